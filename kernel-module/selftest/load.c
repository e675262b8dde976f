// SPDX-License-Identifier: GPL-2.0
/* See load.h. Each kind of work is one step that is done over and over. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdbool.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "load.h"

#define PAGE		4096
#define MIB		(1UL << 20)
/* How long a process may take for its last step, in 10 ms. */
#define PATIENCE	6000

struct worker {
	volatile uint64_t steps;
	volatile uint64_t errors;
	pid_t pid;
};

struct load {
	volatile int stop;
	char folder[256];
	struct worker workers[16];
	int count;
};

static struct load *load;
static struct worker *me;

static void *memory(size_t length, int flags)
{
	void *at = mmap(NULL, length, PROT_READ | PROT_WRITE,
			MAP_ANONYMOUS | flags, -1, 0);

	if (at == MAP_FAILED)
		_exit(1);
	return at;
}

static uint64_t word(uint64_t seed, size_t i)
{
	return (seed + i) * 0x9e3779b97f4a7c15;
}

static void fill(uint64_t *at, size_t length, uint64_t seed)
{
	size_t i;

	for (i = 0; i < length / 8; i += 64)
		at[i] = word(seed, i);
}

static void compare(const uint64_t *at, size_t length, uint64_t seed)
{
	size_t i;

	for (i = 0; i < length / 8; i += 64)
		me->errors += at[i] != word(seed, i);
}

/* Memory that stays, read and written in turns. */
static void keep(uint64_t step)
{
	static uint64_t *at;

	if (!at) {
		at = memory(4 * MIB, MAP_PRIVATE);
		fill(at, 4 * MIB, step);
	}
	compare(at, 4 * MIB, step);
	fill(at, 4 * MIB, step + 1);
	usleep(1000);
}

static void map_and_unmap(uint64_t step)
{
	static char *old;
	static uint64_t seed;
	char *at = memory(MIB, MAP_PRIVATE);

	fill((uint64_t *)at, MIB, step);
	usleep(2000);
	if (old) {
		compare((uint64_t *)old, MIB, seed);
		/* Half of it moves, half of it goes. */
		munmap(old + MIB / 2, MIB / 2);
		old = mremap(old, MIB / 2, MIB / 2 + PAGE, MREMAP_MAYMOVE);
		if (old == MAP_FAILED)
			_exit(1);
		compare((uint64_t *)old, MIB / 2, seed);
		munmap(old, MIB / 2 + PAGE);
	}
	old = at;
	seed = step;
}

static void fork_and_write(uint64_t step)
{
	static uint64_t *at;
	int status = 0;
	pid_t pid;

	if (!at) {
		at = memory(MIB, MAP_PRIVATE);
		fill(at, MIB, step);
	}
	pid = fork();
	if (!pid) {
		compare(at, MIB, step);
		fill(at, MIB / 2, ~step);
		compare(at, MIB / 2, ~step);
		_exit(0);
	}
	compare(at, MIB, step);
	fill(at, MIB, step + 1);
	waitpid(pid, &status, 0);
	me->errors += status != 0;
}

static void lock_and_protect(uint64_t step)
{
	static uint64_t *at;

	if (!at) {
		at = memory(MIB, MAP_PRIVATE);
		fill(at, MIB, step);
	}
	mlock(at, MIB / 2);
	mprotect(at, MIB, PROT_READ);
	compare(at, MIB, step);
	mprotect(at, MIB, PROT_NONE);
	mprotect(at, MIB, PROT_READ | PROT_WRITE);
	munlock(at, MIB / 2);
	madvise((char *)at + MIB / 2, MIB / 4, MADV_DONTNEED);
	fill(at, MIB, step + 1);
	usleep(1000);
}

static void huge(uint64_t step)
{
	static char *at;
	const size_t length = 4 * MIB;

	if (!at) {
		at = memory(length + 2 * MIB, MAP_PRIVATE);
		at = (char *)(((uintptr_t)at + 2 * MIB - 1) & ~(2 * MIB - 1));
		madvise(at, length, MADV_HUGEPAGE);
		fill((uint64_t *)at, length, step);
	}
	compare((uint64_t *)at, length, step);
	/* Splits the second one. */
	if (step % 8 == 0)
		madvise(at + 2 * MIB + 16 * PAGE, PAGE, MADV_DONTNEED);
	fill((uint64_t *)at, length, step + 1);
	usleep(2000);
}

static void direct(uint64_t step)
{
	static uint64_t *out, *in;
	static int fd = -1;
	char path[300];

	if (fd < 0) {
		snprintf(path, sizeof(path), "%s/gate-load", load->folder);
		fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_DIRECT, 0600);
		unlink(path);
		out = memory(MIB / 4, MAP_PRIVATE);
		in = memory(MIB / 4, MAP_PRIVATE);
	}
	fill(out, MIB / 4, step);
	usleep(1000);
	me->errors += pwrite(fd, out, MIB / 4, 0) != MIB / 4;
	me->errors += pread(fd, in, MIB / 4, 0) != MIB / 4;
	compare(in, MIB / 4, step);
}

/* Two threads that wake each other, with their words on pages of their own. */
static uint32_t *turn;

static void futex(int call, uint32_t value)
{
	struct timespec limit = { .tv_nsec = 20000000 };

	syscall(SYS_futex, turn, call, value, &limit, NULL, 0);
}

static void *answer(void *unused)
{
	(void)unused;
	for (;;) {
		uint32_t value = __atomic_load_n(turn, __ATOMIC_ACQUIRE);

		if (value % 2) {
			__atomic_store_n(turn, value + 1, __ATOMIC_RELEASE);
			futex(FUTEX_WAKE, 1);
		} else {
			futex(FUTEX_WAIT, value);
		}
	}
	return NULL;
}

static void futexes(uint64_t step)
{
	uint32_t value;
	int i;

	(void)step;
	if (!turn) {
		pthread_t thread;

		turn = memory(PAGE, MAP_SHARED);
		pthread_create(&thread, NULL, answer, NULL);
	}
	for (i = 0; i < 20; i++) {
		value = *turn + 1;
		__atomic_store_n(turn, value, __ATOMIC_RELEASE);
		futex(FUTEX_WAKE, 1);
		while (__atomic_load_n(turn, __ATOMIC_ACQUIRE) == value)
			futex(FUTEX_WAIT, value);
		me->errors += *turn != value + 1;
	}
	usleep(1000);
}

static volatile uint64_t handled;
static uint64_t *in_handler;

static void handle(int signal)
{
	(void)signal;
	handled++;
	in_handler[handled % 512]++;
}

static void signals(uint64_t step)
{
	static const struct itimerval often = {
		.it_interval.tv_usec = 3000, .it_value.tv_usec = 3000,
	};

	if (!in_handler) {
		struct sigaction action = {
			.sa_handler = handle, .sa_flags = SA_RESTART,
		};

		in_handler = memory(PAGE, MAP_PRIVATE);
		sigaction(SIGALRM, &action, NULL);
		setitimer(ITIMER_REAL, &often, NULL);
	}
	keep(step);
}

/* Another process's memory, by the kernel's hand. */
static void peek(uint64_t step)
{
	static uint64_t *theirs, *mine;
	static pid_t pid;
	struct iovec here, there;

	if (!pid) {
		theirs = memory(MIB, MAP_PRIVATE);
		mine = memory(MIB, MAP_PRIVATE);
		fill(theirs, MIB, 99);
		pid = fork();
		if (!pid) {
			while (!load->stop) {
				compare(theirs, MIB, 99);
				fill(theirs, MIB, 99);
				usleep(3000);
			}
			_exit(0);
		}
	}
	(void)step;
	here = (struct iovec){ mine, MIB };
	there = (struct iovec){ theirs, MIB };
	if (!load->stop &&
	    process_vm_readv(pid, &here, 1, &there, 1, 0) == (ssize_t)MIB)
		compare(mine, MIB, 99);
	usleep(3000);
	if (load->stop)
		waitpid(pid, NULL, 0);
}

struct load *load_start(const char *folder)
{
	static void (*const kinds[])(uint64_t step) = {
		keep, map_and_unmap, fork_and_write, lock_and_protect, huge,
		direct, futexes, signals, peek,
	};
	pid_t pid;
	size_t i;

	load = mmap(NULL, sizeof(*load), PROT_READ | PROT_WRITE,
		    MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	snprintf(load->folder, sizeof(load->folder), "%s", folder);
	for (i = 0; i < sizeof(kinds) / sizeof(*kinds); i++) {
		me = &load->workers[load->count++];
		pid = fork();
		if (!pid) {
			while (!load->stop) {
				kinds[i](me->steps + 1);
				me->steps++;
			}
			_exit(0);
		}
		me->pid = pid;
	}
	return load;
}

uint64_t load_end(struct load *load)
{
	uint64_t steps = 0;
	bool all = true;
	int i, n;

	load->stop = 1;
	for (n = 0; n < load->count; n++) {
		struct worker *worker = &load->workers[n];
		pid_t pid = 0;
		int status = 1;

		for (i = 0; i < PATIENCE && !pid; i++) {
			pid = waitpid(worker->pid, &status, WNOHANG);
			if (!pid)
				usleep(10000);
		}
		if (pid != worker->pid || status || !worker->steps) {
			printf("# process %d: %llu steps, status %#x\n", n,
			       (unsigned long long)worker->steps, status);
			all = false;
			kill(worker->pid, SIGKILL);
		}
		steps += worker->steps;
	}
	return all ? steps : 0;
}

uint64_t load_errors(const struct load *load)
{
	uint64_t errors = 0;
	int n;

	for (n = 0; n < load->count; n++)
		errors += load->workers[n].errors;
	return errors;
}
