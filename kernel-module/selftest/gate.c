// SPDX-License-Identifier: GPL-2.0
/*
 * Tests the gate of transhume.ko from user space, in a guest whose module is
 * loaded:
 *
 *	gate SECONDS FOLDER [MODULE]
 *	gate load FOLDER
 *
 * FOLDER is on a file system that can do O_DIRECT; MODULE is the module's file,
 * to take it out and put it back. The last test puts all of user space behind
 * the gate, over and over, for so many seconds, while processes do what is hard
 * on memory management. Prints TAP. The second form is that load alone, until
 * SIGTERM. Build: make selftest/gate
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/klog.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/sysinfo.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "calls.h"
#include "classes.h"
#include "load.h"
#include "sleepers.h"
#include "tap.h"

static void test_arguments(void)
{
	struct transhume_gate_open bad = { .frames = FRAMES, .flags = 1 };
	struct transhume_gate_walk crooked = { .pid = 1, .flags = 1 };
	struct transhume_frames odd[] = {
		{ UINT64_MAX, UINT64_MAX }, { FRAMES - 1, UINT64_MAX },
		{ FRAMES, 1 }, { 0, 0 }, { 5, 1 }, { 5, 1 }, { 4, 3 },
	};
	void *nowhere = mmap(NULL, 8192, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS,
			     -1, 0);
	int dev = device(), other = device();

	check(gate_state(dev).state == TRANSHUME_GATE_NONE, "there is no gate");
	fails(gate_one(dev, TRANSHUME_GATE_ABSENT, 1, 1), ESTALE,
	      "nothing is absent without a gate");
	fails(ioctl(dev, TRANSHUME_GATE_OPEN, &bad), EINVAL,
	      "unknown flags are refused");
	fails(gate_open(dev, 0), EINVAL, "no frames are refused");
	fails(gate_open(dev, TRANSHUME_MAX_FRAMES + 1), EINVAL,
	      "too many frames are refused");
	fails(ioctl(dev, TRANSHUME_GATE_OPEN, nowhere), EFAULT,
	      "an argument that is not there is refused");
	check(!ioctl(dev, TRANSHUME_GATE_RELEASE), "no gate can be released");

	check(!gate_open(dev, FRAMES), "a gate opens");
	fails(gate_open(dev, FRAMES), EBUSY, "but not twice");
	fails(gate_open(other, FRAMES), EBUSY, "nor in another file");
	fails(gate_one(other, TRANSHUME_GATE_ARRIVED, 1, 1), ESTALE,
	      "which has no say");
	fails(gate_list(dev, TRANSHUME_GATE_ABSENT, odd, TRANSHUME_MAX_RANGES + 1),
	      EINVAL, "too many ranges are refused");
	fails(gate_list(dev, TRANSHUME_GATE_ABSENT, nowhere, 1), EFAULT,
	      "ranges that are not there are refused");
	check(!gate_list(dev, TRANSHUME_GATE_ARRIVED, odd, 7),
	      "what was never absent can arrive");
	check(!gate_list(dev, TRANSHUME_GATE_ABSENT, odd, 7) &&
	      gate_state(dev).absent == 3, "odd ranges are cut");
	fails(ioctl(dev, TRANSHUME_GATE_WALK, &crooked), EINVAL,
	      "a walk with unknown flags is refused");
	fails(gate_walk(dev, 2), ESRCH, "a kernel thread has nothing to gate");
	fails(gate_walk(dev, 4194304), ESRCH, "nor has nobody");
	check(gate_walk(dev, getpid()) == 0, "the caller is never gated");
	fails(gate_one(dev, TRANSHUME_GATE_ABSENT, 7, 1), EBUSY,
	      "nothing is absent after the walk that was not before");
	check(!gate_one(dev, TRANSHUME_GATE_ARRIVED, 0, UINT64_MAX) &&
	      gate_state(dev).absent == 0, "all can arrive at once");
	check(!ioctl(dev, TRANSHUME_GATE_RELEASE) &&
	      gate_state(dev).state == TRANSHUME_GATE_RELEASED, "it is released");
	close(dev);
	check(!gate_open(other, FRAMES), "then another one can be opened");
	close(other);
	munmap(nowhere, 8192);
}

static void test_garbage(void)
{
	struct transhume_frames frames[64];
	int dev = device(), round;
	uint64_t argument[8];
	size_t i;

	for (round = 0; round < 600; round++) {
		for (i = 0; i < 64; i++) {
			frames[i].pfn = random() >> (random() % 31);
			frames[i].pages = (uint64_t)random() << (random() % 34);
		}
		switch (round % 6) {
		case 0:
			gate_open(dev, random() % (2 * FRAMES));
			break;
		case 1:
			gate_list(dev, TRANSHUME_GATE_ABSENT, frames, random() % 64);
			break;
		case 2:
			gate_list(dev, TRANSHUME_GATE_ARRIVED, frames, random() % 64);
			break;
		case 3:
			gate_list(dev, TRANSHUME_GATE_WANTED, frames, random() % 64);
			break;
		case 4:
			/* Only processes that nobody needs. */
			gate_walk(dev, 1000000 + random() % 1000);
			break;
		default:
			for (i = 0; i < 8; i++)
				argument[i] = (uint64_t)random() << (random() % 34);
			ioctl(dev, _IO(TRANSHUME_IOC_MAGIC, random() % 32),
			      argument);
			ioctl(dev, TRANSHUME_GATE_ABSENT, argument);
		}
	}
	check(gate_state(dev).waiting == 0, "garbage does no harm");
	close(dev);
}

/* Runs a call for the frames that processes wait for. */
static unsigned int serve(int dev)
{
	struct transhume_frames wanted[64];
	long count = gate_list(dev, TRANSHUME_GATE_WANTED, wanted, 64);

	if (count > 0)
		gate_list(dev, TRANSHUME_GATE_ARRIVED, wanted, count);
	else
		gate_renew(dev);
	return count > 0 ? count : 0;
}

/* Puts all of user space behind the gate, and lets its pages arrive. */
static bool round_trip(int dev, uint64_t frames, struct transhume_gate_state *sum,
		       int *whole)
{
	/* Runs of frames that arrive in an order that looks like none. */
	const uint64_t piece = 1024, pieces = frames / piece, step = 7919;
	struct transhume_gate_state now;
	struct dirent *entry;
	uint64_t i;
	DIR *proc;

	if (gate_open(dev, frames) ||
	    gate_one(dev, TRANSHUME_GATE_ABSENT, 0, frames))
		return false;
	proc = opendir("/proc");
	while ((entry = readdir(proc))) {
		struct transhume_gate_walk walk = { .pid = atoi(entry->d_name) };

		if (!isdigit(entry->d_name[0]))
			continue;
		do {
			if (ioctl(dev, TRANSHUME_GATE_WALK, &walk))
				break;
			serve(dev);
		} while (walk.addr);
	}
	closedir(proc);
	for (i = 0; i < pieces; i++) {
		gate_one(dev, TRANSHUME_GATE_ARRIVED, i * step % pieces * piece, piece);
		while (serve(dev))
			;
		if (i % 4 == 0)
			usleep(500);
	}
	/* Sometimes all goes its way, and sometimes it breaks off. */
	if (random() % 2)
		gate_one(dev, TRANSHUME_GATE_ARRIVED, 0, frames);
	ioctl(dev, TRANSHUME_GATE_RELEASE);
	now = gate_state(dev);
	if (now.state == TRANSHUME_GATE_RELEASED)
		(*whole)++;
	sum->gated += now.gated;
	sum->waits += now.waits;
	sum->interrupted += now.interrupted;
	sum->passed += now.passed;
	if (now.longest_us > sum->longest_us)
		sum->longest_us = now.longest_us;
	/* Where this machine is too slow, the watchdog may have come first. */
	return now.state != TRANSHUME_GATE_ACTIVE && !now.waiting;
}

static void test_stress(int seconds, const char *folder)
{
	struct transhume_gate_state sum = {};
	struct sysinfo memory;
	struct load *load;
	int dev = device(), rounds = 0, whole = 0;
	time_t end = time(NULL) + seconds;
	uint64_t frames, done;
	bool well = true;

	sysinfo(&memory);
	/* The hole below 4 GiB is above all memory of a small guest. */
	frames = memory.totalram * memory.mem_unit / 4096 + 65536;
	load = load_start(folder);
	/* Others must not keep the one from its work that they wait for. */
	setpriority(PRIO_PROCESS, 0, -20);
	while (time(NULL) < end) {
		well &= round_trip(dev, frames, &sum, &whole);
		look_around(dev, frames);
		rounds++;
		usleep(20000);
	}
	close(dev);
	done = load_end(load);
	check(well && whole, "gates open and are released, over and over");
	check(done, "the processes come to an end");
	check(!load_errors(load), "and all their data was right");
	check(sum.gated > 1000 && sum.waits > 10, "they were gated, and waited");
	printf("# %d rounds, %d of them to their end, %llu steps: %llu gated, %llu waits, %llu interrupted, %llu passed, longest %llu us\n",
	       rounds, whole, (unsigned long long)done, (unsigned long long)sum.gated,
	       (unsigned long long)sum.waits,
	       (unsigned long long)sum.interrupted,
	       (unsigned long long)sum.passed,
	       (unsigned long long)sum.longest_us);
}

/* The kernel's log has nothing that should worry anybody. */
static void test_log(void)
{
	static const char *const bad[] = {
		"WARNING:", "BUG:", "Oops", "cut here", "Bad rss",
		"Bad page", "general protection", "blocked for more",
	};
	static char log[1 << 20];
	int length = klogctl(3, log, sizeof(log) - 1);
	bool clean = length > 0;
	size_t i;

	log[length > 0 ? length : 0] = 0;
	for (i = 0; i < sizeof(bad) / sizeof(*bad); i++) {
		const char *at = strstr(log, bad[i]);

		if (at) {
			printf("# %.400s\n", at);
			clean = false;
		}
	}
	check(clean, "the kernel has nothing to complain of");
}

/* The load alone, until somebody ends it: for a guest that moves meanwhile. */
static int only_load(const char *folder)
{
	struct load *load;
	uint64_t steps;
	sigset_t set;
	int signal;

	sigemptyset(&set);
	sigaddset(&set, SIGTERM);
	sigprocmask(SIG_BLOCK, &set, NULL);
	load = load_start(folder);
	sigwait(&set, &signal);
	steps = load_end(load);
	printf("load: %llu steps, %llu errors\n", (unsigned long long)steps,
	       (unsigned long long)load_errors(load));
	return !steps || load_errors(load);
}

int main(int argc, char **argv)
{
	if (argc < 3) {
		fprintf(stderr, "usage: gate SECONDS FOLDER [MODULE]\n"
			"       gate load FOLDER\n");
		return 2;
	}
	if (!strcmp(argv[1], "load"))
		return only_load(argv[2]);
	mlockall(MCL_CURRENT | MCL_FUTURE);
	tap_start();
	test_arguments();
	test_sleepers(argv[2], argc > 3 ? argv[3] : NULL);
	test_garbage();
	test_classes(argv[2]);
	test_touched();
	test_stress(atoi(argv[1]), argv[2]);
	test_log();
	return tap_end();
}
