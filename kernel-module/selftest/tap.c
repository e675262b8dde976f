// SPDX-License-Identifier: GPL-2.0
/* See tap.h. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "tap.h"

/* Shared with processes that check something, too. */
static struct score {
	int tests;
	int failures;
} *score;

void *shared(size_t length)
{
	return mmap(NULL, length, PROT_READ | PROT_WRITE,
		    MAP_SHARED | MAP_ANONYMOUS, -1, 0);
}

void check(bool ok, const char *what)
{
	score->tests++;
	score->failures += !ok;
	printf("%sok %d - %s\n", ok ? "" : "not ", score->tests, what);
	fflush(stdout);
}

void fails(long ret, int error, const char *what)
{
	int got = ret < 0 ? errno : 0;

	check(got == error, what);
	if (got != error)
		printf("# got %s, wanted %s\n", strerror(got), strerror(error));
}

int device(void)
{
	int fd = open("/dev/transhume", O_RDONLY | O_CLOEXEC);

	if (fd < 0) {
		printf("Bail out! /dev/transhume: %s\n", strerror(errno));
		exit(1);
	}
	return fd;
}

/* The frame behind an address of a process; 0 if there is none. */
uint64_t frame(pid_t pid, const volatile void *at)
{
	char path[64];
	uint64_t entry = 0;
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/pagemap", pid);
	fd = open(path, O_RDONLY);
	if (fd < 0 || pread(fd, &entry, 8, (uintptr_t)at / 4096 * 8) != 8)
		entry = 0;
	close(fd);
	return entry >> 63 ? entry & ((1ULL << 55) - 1) : 0;
}

void tap_start(void)
{
	score = shared(sizeof(*score));
}

int tap_end(void)
{
	printf("1..%d\n", score->tests);
	return score->failures != 0;
}
