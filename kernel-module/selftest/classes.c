// SPDX-License-Identifier: GPL-2.0
/* See classes.h. */
#define _GNU_SOURCE
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "../transhume.h"
#include "classes.h"
#include "tap.h"

#define PAGE		4096UL
/* More frames than the guest has. */
#define FRAMES		(1ULL << 20)
/* The pages of the process that is looked at, and every which one it touches. */
#define PAGES		256
#define EVERY		4
/* Nothing here takes so long, unless it hangs. In ms. */
#define PATIENCE	30000

/* What one look finds. */
struct found {
	uint64_t pages[TRANSHUME_CLASS_COUNT];
	uint64_t listed;
	/* A bit a frame. */
	uint8_t *set;
};

static void note(struct found *found, const struct transhume_frames *frames,
		 uint32_t count)
{
	uint64_t pfn;
	uint32_t i;

	for (i = 0; i < count; i++) {
		found->listed += frames[i].pages;
		for (pfn = frames[i].pfn; pfn < frames[i].pfn + frames[i].pages; pfn++)
			if (pfn < FRAMES)
				found->set[pfn / 8] |= 1 << pfn % 8;
	}
}

static bool has(const struct found *found, uint64_t pfn)
{
	return pfn && pfn < FRAMES && found->set[pfn / 8] >> pfn % 8 & 1;
}

static struct found nothing(void)
{
	struct found found = { .set = calloc(FRAMES / 8, 1) };

	return found;
}

/* Looks at all frames, with room for so many ranges. */
static bool look(int dev, uint64_t end, uint32_t room, struct found *found)
{
	struct transhume_frames frames[TRANSHUME_MAX_RANGES];
	struct transhume_classes classes = { .end = end };
	int i;

	do {
		classes.frames = (uintptr_t)frames;
		classes.count = room;
		if (ioctl(dev, TRANSHUME_CLASSES, &classes) ||
		    classes.count > room)
			return false;
		note(found, frames, classes.count);
		for (i = 0; i < TRANSHUME_CLASS_COUNT; i++)
			found->pages[i] += classes.pages[i];
	} while (classes.pfn);
	return true;
}

/* Looks at all of a process; without room it is only forgotten. */
static bool touched(int dev, pid_t pid, uint32_t room, struct found *found)
{
	struct transhume_frames frames[TRANSHUME_MAX_RANGES];
	struct transhume_touched touched = { .pid = pid };

	do {
		touched.frames = (uintptr_t)frames;
		touched.count = room;
		if (ioctl(dev, TRANSHUME_TOUCHED, &touched) ||
		    touched.count > room)
			return false;
		if (found)
			note(found, frames, touched.count);
	} while (touched.addr);
	return true;
}

static uint64_t microseconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000ULL + now.tv_nsec / 1000;
}

static void test_arguments(int dev)
{
	struct transhume_frames frames[2];
	const struct transhume_classes good = {
		.end = 16, .frames = (uintptr_t)frames, .count = 1,
	};
	const struct transhume_touched fine = {
		.pid = getpid(), .frames = (uintptr_t)frames, .count = 1,
	};
	void *nowhere = mmap(NULL, 2 * PAGE, PROT_NONE,
			     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct transhume_classes classes;
	struct transhume_touched bad;

	classes = good;
	check(!ioctl(dev, TRANSHUME_CLASSES, &classes) && !classes.pfn,
	      "a few frames are looked at in one call");
	classes = good;
	classes.flags = 1;
	fails(ioctl(dev, TRANSHUME_CLASSES, &classes), EINVAL,
	      "unknown flags are refused");
	classes = good;
	classes.count = 0;
	fails(ioctl(dev, TRANSHUME_CLASSES, &classes), EINVAL,
	      "no room is refused");
	classes = good;
	classes.count = TRANSHUME_MAX_RANGES + 1;
	fails(ioctl(dev, TRANSHUME_CLASSES, &classes), EINVAL,
	      "too many ranges are refused");
	classes = good;
	classes.pfn = UINT64_MAX;
	fails(ioctl(dev, TRANSHUME_CLASSES, &classes), EINVAL,
	      "a frame beyond all is refused");
	classes = good;
	classes.pfn = 20;
	check(!ioctl(dev, TRANSHUME_CLASSES, &classes) && !classes.pfn &&
	      !classes.count, "behind the end there is nothing");
	classes = good;
	classes.end = UINT64_MAX;
	classes.pfn = TRANSHUME_MAX_FRAMES - 1;
	check(!ioctl(dev, TRANSHUME_CLASSES, &classes) && !classes.pfn &&
	      !classes.count, "nor where no memory is");
	classes = good;
	classes.frames = (uintptr_t)nowhere;
	fails(ioctl(dev, TRANSHUME_CLASSES, &classes), EFAULT,
	      "room that is not there is refused");
	fails(ioctl(dev, TRANSHUME_CLASSES, nowhere), EFAULT,
	      "an argument that is not there is refused");

	bad = fine;
	check(!ioctl(dev, TRANSHUME_TOUCHED, &bad) && bad.count <= 1,
	      "the caller can look at itself");
	bad = fine;
	bad.flags = 1;
	fails(ioctl(dev, TRANSHUME_TOUCHED, &bad), EINVAL,
	      "unknown flags are refused");
	bad = fine;
	bad.reserved = 1;
	fails(ioctl(dev, TRANSHUME_TOUCHED, &bad), EINVAL,
	      "and so is what is reserved");
	bad = fine;
	bad.count = TRANSHUME_MAX_RANGES + 1;
	fails(ioctl(dev, TRANSHUME_TOUCHED, &bad), EINVAL,
	      "too many ranges are refused");
	bad = fine;
	bad.addr = UINT64_MAX;
	fails(ioctl(dev, TRANSHUME_TOUCHED, &bad), EINVAL,
	      "an address of the kernel's is refused");
	bad = fine;
	bad.pid = 2;
	fails(ioctl(dev, TRANSHUME_TOUCHED, &bad), ESRCH,
	      "a kernel thread touches nothing");
	bad.pid = 4194304;
	fails(ioctl(dev, TRANSHUME_TOUCHED, &bad), ESRCH, "nor does nobody");
	bad = fine;
	bad.frames = (uintptr_t)nowhere;
	fails(ioctl(dev, TRANSHUME_TOUCHED, &bad), EFAULT,
	      "room that is not there is refused");
	fails(ioctl(dev, TRANSHUME_TOUCHED, nowhere), EFAULT,
	      "an argument that is not there is refused");
	munmap(nowhere, 2 * PAGE);
}

/* Whether all of the kernel's text is listed. */
static bool has_text(const struct found *found)
{
	FILE *map = fopen("/proc/iomem", "r");
	unsigned long from, to;
	char line[256];
	bool all = false;

	while (fgets(line, sizeof(line), map))
		if (strstr(line, "Kernel code") &&
		    sscanf(line, " %lx-%lx", &from, &to) == 2)
			for (all = from > 0; from < to; from += PAGE)
				all &= has(found, from / PAGE);
	fclose(map);
	return all;
}

void test_classes(const char *folder)
{
	const size_t length = 16UL << 20;
	struct found before = nothing(), with = nothing(), small = nothing();
	struct found dirty = nothing(), clean = nothing();
	const uint64_t *is = before.pages;
	int dev = device(), own = 0, fd;
	uint64_t sum = 0, began;
	char path[300];
	char *memory;
	size_t i;

	test_arguments(dev);
	began = microseconds();
	check(look(dev, FRAMES, TRANSHUME_MAX_RANGES, &before),
	      "all frames are looked at");
	began = microseconds() - began;
	for (i = 0; i < TRANSHUME_CLASS_COUNT; i++)
		sum += is[i];
	printf("# kernel %llu, slab %llu, page tables %llu, anonymous %llu, clean %llu, dirty %llu, free %llu, other %llu\n",
	       (unsigned long long)is[0], (unsigned long long)is[1],
	       (unsigned long long)is[2], (unsigned long long)is[3],
	       (unsigned long long)is[4], (unsigned long long)is[5],
	       (unsigned long long)is[6], (unsigned long long)is[7]);
	printf("# %llu frames in %llu us\n", (unsigned long long)sum,
	       (unsigned long long)began);
	check(sum > 0 && sum <= FRAMES && is[TRANSHUME_CLASS_KERNEL] > 1000 &&
	      is[TRANSHUME_CLASS_SLAB] > 100 &&
	      is[TRANSHUME_CLASS_PAGE_TABLES] > 10 &&
	      is[TRANSHUME_CLASS_FREE] > 1000, "there are some of each class");
	check(before.listed == is[TRANSHUME_CLASS_KERNEL] +
	      is[TRANSHUME_CLASS_SLAB] + is[TRANSHUME_CLASS_PAGE_TABLES],
	      "the kernel's are listed, and no others");
	check(has_text(&before), "its text is among them");
	check(look(dev, FRAMES, 1, &small) && small.listed > before.listed / 10 * 9 &&
	      small.listed < before.listed / 9 * 10,
	      "with room for one range the same is found");

	memory = mmap(NULL, length, PROT_READ | PROT_WRITE,
		      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	memset(memory, 1, length);
	/* Else what earlier tests wrote may get clean meanwhile. */
	sync();
	look(dev, FRAMES, TRANSHUME_MAX_RANGES, &with);
	for (i = 0; i < length; i += PAGE)
		own += has(&with, frame(getpid(), memory + i));
	check(!own && frame(getpid(), memory),
	      "a process's memory is not the kernel's");
	check(with.pages[TRANSHUME_CLASS_ANONYMOUS] >
	      is[TRANSHUME_CLASS_ANONYMOUS] + length / PAGE * 9 / 10,
	      "it is anonymous");

	snprintf(path, sizeof(path), "%s/classes", folder);
	fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
	check(fd >= 0 && write(fd, memory, length) == (ssize_t)length,
	      "a file is written");
	look(dev, FRAMES, TRANSHUME_MAX_RANGES, &dirty);
	check(dirty.pages[TRANSHUME_CLASS_DIRTY_FILE] >
	      with.pages[TRANSHUME_CLASS_DIRTY_FILE] + length / PAGE / 2,
	      "its pages are dirty");
	fsync(fd);
	look(dev, FRAMES, TRANSHUME_MAX_RANGES, &clean);
	check(clean.pages[TRANSHUME_CLASS_CLEAN_FILE] >
	      dirty.pages[TRANSHUME_CLASS_CLEAN_FILE] + length / PAGE / 2 &&
	      clean.pages[TRANSHUME_CLASS_DIRTY_FILE] <
	      dirty.pages[TRANSHUME_CLASS_DIRTY_FILE], "and clean afterwards");
	close(fd);
	unlink(path);
	munmap(memory, length);
	free(before.set);
	free(with.set);
	free(small.set);
	free(dirty.set);
	free(clean.set);
	close(dev);
}

/* What the process that is looked at and the test share. */
struct orders {
	volatile int round;
	volatile int done;
};

static bool obeyed(struct orders *orders, int round)
{
	int i;

	orders->round = round;
	for (i = 0; i < PATIENCE && orders->done != round; i++)
		usleep(1000);
	return orders->done == round;
}

static void work(struct orders *orders, volatile char *memory)
{
	int i, round;

	for (;;) {
		while ((round = orders->round) == orders->done)
			usleep(1000);
		/* First all pages, then some. */
		for (i = 0; i < PAGES; i += round == 1 ? 1 : EVERY)
			memory[i * PAGE]++;
		orders->done = round;
	}
}

void test_touched(void)
{
	struct orders *orders = shared(sizeof(*orders));
	struct found first = nothing(), second = nothing(), third = nothing();
	struct found fourth = nothing();
	int dev = device(), right = 0, wrong = 0, quiet = 0, i;
	char *memory = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	pid_t pid;

	madvise(memory, PAGES * PAGE, MADV_NOHUGEPAGE);
	pid = fork();
	if (!pid)
		work(orders, memory);
	check(obeyed(orders, 1) && touched(dev, pid, TRANSHUME_MAX_RANGES, &first),
	      "a process touches all of its memory");
	for (i = 0; i < PAGES; i++)
		right += has(&first, frame(pid, memory + i * PAGE));
	check(right == PAGES, "all of it is listed");

	check(obeyed(orders, 2) && touched(dev, pid, TRANSHUME_MAX_RANGES, &second),
	      "it touches some of it");
	for (i = right = 0; i < PAGES; i++) {
		bool is = has(&second, frame(pid, memory + i * PAGE));

		if (i % EVERY)
			wrong += is;
		else
			right += is;
	}
	check(right == PAGES / EVERY, "that is listed");
	check(!wrong, "and nothing else");

	check(obeyed(orders, 3) && touched(dev, pid, 0, NULL) &&
	      touched(dev, pid, TRANSHUME_MAX_RANGES, &third),
	      "what it touched is forgotten");
	for (i = 0; i < PAGES; i++)
		quiet += has(&third, frame(pid, memory + i * PAGE));
	check(!quiet, "then nothing of it is listed");

	/* Each call lists as much as there is room for. */
	check(obeyed(orders, 4) && touched(dev, pid, 1, &fourth),
	      "a little room is enough");
	for (i = right = 0; i < PAGES; i += EVERY)
		right += has(&fourth, frame(pid, memory + i * PAGE));
	check(right == PAGES / EVERY, "and nothing is lost");
	kill(pid, SIGKILL);
	waitpid(pid, NULL, 0);
	munmap(memory, PAGES * PAGE);
	free(first.set);
	free(second.set);
	free(third.set);
	free(fourth.set);
	close(dev);
}

void look_around(int dev, uint64_t frames)
{
	struct found found = nothing();
	static bool told;
	struct dirent *entry;
	DIR *proc = opendir("/proc");
	uint64_t began = microseconds();

	while ((entry = readdir(proc)))
		if (isdigit(entry->d_name[0]))
			touched(dev, atoi(entry->d_name), TRANSHUME_MAX_RANGES,
				&found);
	closedir(proc);
	if (!told) {
		told = true;
		printf("# %llu pages touched by all processes, told in %llu us\n",
		       (unsigned long long)found.listed,
		       (unsigned long long)(microseconds() - began));
	}
	look(dev, frames, TRANSHUME_MAX_RANGES, &found);
	free(found.set);
}
