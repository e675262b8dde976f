// SPDX-License-Identifier: GPL-2.0
/*
 * See sleepers.h. Processes sleep in user space and in the kernel, for pages of
 * their own and of files, and are woken by all that can wake them.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "calls.h"
#include "sleepers.h"
#include "tap.h"

/* A sleeper must be dead, or go on, so soon: in microseconds. */
#define KILL_LIMIT	100000
#define WATCHDOG_LIMIT	1000000
/* Each is tried so often, and its median counts: this machine has other work. */
#define TRIES		5

/* How a sleeper touches its page. */
enum touch {
	OWN,	/* in user space: its own */
	FILED,	/* in user space: a file's */
	FILLED,	/* in the kernel: read(2) writes to it */
	GIVEN,	/* in the kernel: write(2) reads it */
	/* What follows is nobody's memory when the gate opens. */
	READ,	/* a file's, by read(2) */
	WRITTEN,	/* the same, by write(2) */
	SENT,	/* the same, by sendfile(2) */
	MAPPED,	/* a file's, which is mapped only then */
	BESIDE,	/* the one before the file's that is touched, mapped along */
	TOUCHES,
};

static const char *const touches[TOUCHES] = {
	"a page of its own", "a file's page", "a page in read(2)",
	"a page in write(2)", "a file's page in read(2)",
	"a file's page in write(2)", "a file's page in sendfile(2)",
	"a page to be mapped", "a page to be mapped with another",
};

/* What a sleeper and the test share; never absent. */
struct talk {
	volatile int ready;
	volatile int go;
	volatile int value;
	volatile int signals;
	/* When it went on, in microseconds. */
	volatile int64_t at;
};

static struct talk *talk;
static volatile int *page;
static const char *where;
/* The file that the page is of. */
static int page_file;
static uint64_t pfn_of_page;

static int64_t now_us(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000LL + now.tv_nsec / 1000;
}

static void count_signal(int signal)
{
	(void)signal;
	talk->signals++;
}

static bool until(bool (*is)(int dev), int dev)
{
	int i;

	for (i = 0; i < PATIENCE; i++) {
		if (is(dev))
			return true;
		gate_renew(dev);
		usleep(10000);
	}
	return false;
}

static bool is_ready(int dev)
{
	(void)dev;
	return talk->ready;
}

static bool is_asleep(int dev)
{
	return gate_state(dev).waiting == 1;
}

static bool has_read(int dev)
{
	(void)dev;
	return talk->value == 4711;
}

static bool has_handled(int dev)
{
	(void)dev;
	return talk->signals == 1;
}

/* The page, by way of user space or of the kernel. */
static int touched(enum touch touch, const int ends[2])
{
	int value = 4711;
	off_t begin = 0;
	int *pages;

	switch (touch) {
	case FILLED:
		if (write(ends[1], &value, 4) != 4 ||
		    read(ends[0], (void *)page, 4) != 4)
			return -1;
		return *page;
	case GIVEN:
		if (write(ends[1], (void *)page, 4) != 4)
			return -1;
		return read(ends[0], &value, 4) == 4 ? value : -1;
	case READ:
		return pread(page_file, &value, 4, 0) == 4 ? value : -1;
	case WRITTEN:
		return pwrite(page_file, &value, 4, 0) == 4 ? value : -1;
	case SENT:
		if (sendfile(ends[1], page_file, &begin, 4) != 4)
			return -1;
		return read(ends[0], &value, 4) == 4 ? value : -1;
	case MAPPED:
	case BESIDE:
		pages = mmap(NULL, 8192, PROT_READ, MAP_SHARED, page_file,
			     0);
		if (pages == MAP_FAILED || (touch == BESIDE && pages[1024] != 1))
			return -1;
		return pages[0];
	default:
		return *page;
	}
}

static bool is_filed(enum touch touch)
{
	return touch == FILED || touch >= READ;
}

static void *new_page(enum touch touch)
{
	int flags = MAP_PRIVATE | MAP_ANONYMOUS, value = 1;
	char path[300];

	if (is_filed(touch)) {
		snprintf(path, sizeof(path), "%s/gate-page", where);
		page_file = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
		unlink(path);
		if (ftruncate(page_file, 8192) ||
		    pwrite(page_file, &value, 4, 4096) != 4)
			return MAP_FAILED;
		flags = MAP_SHARED;
	}
	return mmap(NULL, 4096, PROT_READ | PROT_WRITE, flags,
		    is_filed(touch) ? page_file : -1, 0);
}

/* Starts a process that touches the page when told to go. */
static pid_t sleeper(int dev, enum touch touch)
{
	struct sigaction action = { .sa_handler = count_signal };
	int ends[2];
	pid_t pid;

	memset((void *)talk, 0, sizeof(*talk));
	page = new_page(touch);
	if (page == MAP_FAILED || pipe(ends))
		return -1;
	pid = fork();
	if (!pid) {
		sigaction(SIGUSR1, &action, NULL);
		*page = 4711;
		if (touch >= READ)
			munmap((void *)page, 4096);
		talk->ready = 1;
		while (!talk->go)
			usleep(1000);
		talk->value = touched(touch, ends);
		talk->at = now_us();
		_exit(0);
	}
	close(ends[0]);
	close(ends[1]);
	until(is_ready, dev);
	/* A file's page is the same one here. */
	pfn_of_page = touch < READ || *page != 4711 ? frame(pid, page) :
						      frame(getpid(), page);
	munmap((void *)page, 4096);
	if (is_filed(touch))
		close(page_file);
	return pid;
}

/* A sleeper behind an open gate, asleep. Returns the frame that it waits for; 0 if not. */
static uint64_t put_to_sleep(int dev, pid_t *pid, enum touch touch)
{
	uint64_t pfn;

	*pid = sleeper(dev, touch);
	pfn = pfn_of_page;
	if (!pfn || gate_open(dev, FRAMES) ||
	    gate_one(dev, TRANSHUME_GATE_ABSENT, pfn, 1) ||
	    gate_walk(dev, *pid) != (touch < READ))
		return 0;
	talk->go = 1;
	return until(is_asleep, dev) && !talk->value ? pfn : 0;
}

static bool ended(pid_t pid, int dev)
{
	int i, status;

	for (i = 0; i < PATIENCE; i++) {
		if (waitpid(pid, &status, WNOHANG) == pid)
			return true;
		if (dev >= 0)
			gate_renew(dev);
		usleep(10000);
	}
	kill(pid, SIGKILL);
	return false;
}

static void test_sleep(void)
{
	struct transhume_frames wanted[4];
	struct pollfd news;
	int dev = device();
	uint64_t pfn;
	pid_t pid;

	pfn = put_to_sleep(dev, &pid, OWN);
	check(pfn, "who touches an absent page sleeps");
	news = (struct pollfd){ .fd = dev, .events = POLLIN };
	check(poll(&news, 1, 1000) == 1 && news.revents == POLLIN,
	      "poll tells of it");
	check(gate_list(dev, TRANSHUME_GATE_WANTED, wanted, 4) == 1 &&
	      wanted[0].pfn == pfn && wanted[0].pages == 1,
	      "and the page is wanted");
	check(gate_list(dev, TRANSHUME_GATE_WANTED, wanted, 4) == 0, "once");
	kill(pid, SIGUSR1);
	check(until(has_handled, dev) && until(is_asleep, dev) && !talk->value,
	      "a signal is handled meanwhile");
	gate_one(dev, TRANSHUME_GATE_ARRIVED, pfn, 1);
	check(until(has_read, dev), "the page arrives, and holds what it held");
	ended(pid, dev);
	check(gate_state(dev).waits >= 2 && gate_state(dev).interrupted == 1 &&
	      gate_state(dev).gated == 1 && gate_state(dev).longest_us > 0 &&
	      gate_state(dev).waiting == 0, "the counts make sense");
	close(dev);
}

static int by_size(const void *one, const void *other)
{
	int64_t a = *(const int64_t *)one, b = *(const int64_t *)other;

	return (a > b) - (a < b);
}

/* Prints what was measured, sorts it, and returns its median. */
static int64_t median(int64_t *took, const char *what)
{
	qsort(took, TRIES, sizeof(*took), by_size);
	printf("# %s: %lld us, %lld at most\n", what,
	       (long long)took[TRIES / 2], (long long)took[TRIES - 1]);
	return took[TRIES / 2];
}

/* A sleeper is killed while its page is absent. */
static void test_kill(enum touch touch)
{
	int64_t took[TRIES];
	bool well = true;
	char what[100];
	int i;

	for (i = 0; i < TRIES; i++) {
		int dev = device(), status = 0;
		struct transhume_gate_state now;
		int64_t began;
		pid_t pid;

		well &= put_to_sleep(dev, &pid, touch) != 0;
		began = now_us();
		kill(pid, SIGKILL);
		/* Should it hang, the watchdog would end that, and show. */
		waitpid(pid, &status, 0);
		took[i] = now_us() - began;
		now = gate_state(dev);
		well &= WIFSIGNALED(status) && !talk->value &&
			now.absent == 1 && now.waiting == 0 &&
			now.state == TRANSHUME_GATE_ACTIVE;
		close(dev);
	}
	snprintf(what, sizeof(what), "who sleeps for %s can be killed",
		 touches[touch]);
	check(well, what);
	check(median(took, what) < KILL_LIMIT, "soon");
}

/* Nobody says anything any more. */
static void test_watchdog(enum touch touch)
{
	int64_t took[TRIES];
	struct pollfd news;
	bool well = true;
	char what[100];
	int i, dev = -1;

	for (i = 0; i < TRIES; i++) {
		int64_t began;
		pid_t pid;

		if (dev >= 0)
			close(dev);
		dev = device();
		well &= put_to_sleep(dev, &pid, touch) != 0;
		gate_renew(dev);
		began = now_us();
		well &= ended(pid, -1) && talk->value == 4711;
		took[i] = talk->at - began;
		well &= gate_state(dev).state == TRANSHUME_GATE_EXPIRED &&
			gate_state(dev).waits == 1;
	}
	snprintf(what, sizeof(what),
		 "nobody cares: who sleeps for %s goes on", touches[touch]);
	check(well, what);
	check(median(took, what) < WATCHDOG_LIMIT, "within a second");
	news = (struct pollfd){ .fd = dev, .events = POLLIN };
	check(poll(&news, 1, 1000) == 1 && news.revents & POLLHUP,
	      "poll tells of that, too");
	fails(gate_one(dev, TRANSHUME_GATE_ARRIVED, 1, 1), ESTALE,
	      "nothing arrives any more");
	close(dev);
}

/* The page arrives, or the file is closed. */
static void test_wake(enum touch touch)
{
	int dev = device();
	bool well = true;
	char what[100];
	uint64_t pfn;
	pid_t pid;

	pfn = put_to_sleep(dev, &pid, touch);
	well &= pfn && !gate_one(dev, TRANSHUME_GATE_ARRIVED, pfn, 1) &&
		ended(pid, dev) && talk->value == 4711;
	close(dev);
	dev = device();
	well &= put_to_sleep(dev, &pid, touch) != 0;
	close(dev);
	well &= ended(pid, -1) && talk->value == 4711;
	snprintf(what, sizeof(what),
		 "who sleeps for %s goes on when it is there, and when the file is closed",
		 touches[touch]);
	check(well, what);
}

/* The one who keeps the gate is killed, and the module is taken out. */
static void test_unload(const char *module, enum touch touch)
{
	char what[100];
	pid_t agent, pid;
	int dev, i, file;
	long out = -1;
	volatile int *child = shared(4096);

	agent = fork();
	if (!agent) {
		dev = device();
		child[0] = put_to_sleep(dev, &pid, touch) ? pid : -1;
		for (;;) {
			gate_renew(dev);
			usleep(10000);
		}
	}
	for (i = 0; i < PATIENCE && !child[0]; i++)
		usleep(10000);
	kill(agent, SIGKILL);
	/* Until its file is closed. */
	for (i = 0; i < PATIENCE && out; i++) {
		out = syscall(SYS_delete_module, "transhume", O_NONBLOCK);
		if (out)
			usleep(1000);
	}
	check(child[0] > 0 && !out, "the agent dies, and the module goes");
	for (i = 0; i < PATIENCE && talk->value != 4711; i++)
		usleep(10000);
	snprintf(what, sizeof(what), "who slept for %s goes on", touches[touch]);
	check(talk->value == 4711, what);
	waitpid(agent, NULL, 0);
	file = open(module, O_RDONLY);
	check(!syscall(SYS_finit_module, file, "", 0), "the module comes back");
	close(file);
	/* devtmpfs makes the node. */
	for (i = 0; i < PATIENCE && access("/dev/transhume", F_OK); i++)
		usleep(10000);
}

void test_sleepers(const char *folder, const char *module)
{
	enum touch touch;

	talk = shared(sizeof(*talk));
	where = folder;
	test_sleep();
	for (touch = 0; touch < TOUCHES; touch++) {
		test_wake(touch);
		test_kill(touch);
		test_watchdog(touch);
		if (module)
			test_unload(module, touch);
	}
}
