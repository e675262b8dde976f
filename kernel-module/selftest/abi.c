// SPDX-License-Identifier: GPL-2.0
/*
 * Tests transhume.ko's interface from user space, in a guest whose module is
 * loaded:
 *
 *	abi GOOD-MOUNT [UNSUITABLE-MOUNT...]
 *
 * GOOD-MOUNT is ext4 or XFS on a disk or partition, writable, with some cached
 * files, not in use by anybody else; it is unmounted and mounted again.
 * Prints TAP. Build: cc -static -pthread -o abi abi.c
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <unistd.h>

#include "../transhume.h"

static int tests;
static int failures;

static void check(bool ok, const char *what)
{
	tests++;
	failures += !ok;
	printf("%sok %d - %s\n", ok ? "" : "not ", tests, what);
	fflush(stdout);
}

/* Whether a call failed with this error. */
static void fails(long ret, int error, const char *what)
{
	int got = ret < 0 ? errno : 0;

	check(got == error, what);
	if (got != error)
		printf("# got %s, wanted %s\n", strerror(got), strerror(error));
}

static int device(void)
{
	int fd = open("/dev/transhume", O_RDONLY | O_CLOEXEC);

	if (fd < 0) {
		printf("Bail out! /dev/transhume: %s\n", strerror(errno));
		exit(1);
	}
	return fd;
}

static long start(int dev, int fd, uint32_t flags)
{
	struct transhume_start start = { .fd = fd, .flags = flags };

	return ioctl(dev, TRANSHUME_START, &start);
}

static uint64_t sum(const struct transhume_record *records, ssize_t bytes)
{
	uint64_t pages = 0;
	size_t i;

	for (i = 0; i < bytes / sizeof(*records); i++)
		pages += records[i].pages;
	return pages;
}

/* Reads a report to its end and returns its pages, or -1. */
static int64_t read_all(int dev, size_t len)
{
	struct transhume_record *buf = malloc(len);
	int64_t pages = 0;
	ssize_t got;

	while ((got = read(dev, buf, len)) > 0)
		pages += sum(buf, got);
	free(buf);
	return got < 0 ? -1 : pages;
}

static int64_t report(int root, size_t len)
{
	int dev = device();
	int64_t pages = start(dev, root, 0) ? -1 : read_all(dev, len);

	close(dev);
	return pages;
}

struct scribble {
	volatile uint64_t *at;
	size_t words;
	volatile bool stop;
};

/* Overwrites the scratch space while the module uses it. */
static void *scribble(void *arg)
{
	struct scribble *s = arg;
	uint64_t value = 0x9e3779b97f4a7c15;
	size_t i;

	while (!s->stop)
		for (i = 0; i < s->words; i++) {
			value = value * 6364136223846793005 + 1442695040888963407;
			/* Small, huge and odd numbers in turn. */
			s->at[i] = value >> (value >> 58);
		}
	return NULL;
}

static void test_hostile_buffer(int root)
{
	const size_t len = 16384;
	char *buf = aligned_alloc(4096, len);
	struct scribble s = { .at = (uint64_t *)(buf + len / 2), .words = len / 16 };
	pthread_t thread;
	int dev = device();
	ssize_t got = 1;
	int round, reads;

	pthread_create(&thread, NULL, scribble, &s);
	for (round = 0; round < 20; round++) {
		if (start(dev, root, 0))
			break;
		for (reads = 0; reads < 100000; reads++) {
			got = read(dev, buf, len);
			if (got <= 0)
				break;
		}
	}
	s.stop = true;
	pthread_join(thread, NULL);
	check(round == 20 && got == 0,
	      "a report ends although its scratch space is overwritten");
	close(dev);
	free(buf);
}

static void test_arguments(int root, const char *mount)
{
	struct transhume_counts counts;
	char buf[8192];
	void *nowhere = mmap(NULL, sizeof(buf), PROT_NONE,
			     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	int dev = device();
	int path;

	check(ioctl(dev, TRANSHUME_VERSION) == TRANSHUME_ABI_VERSION,
	      "the version is ours");
	fails(ioctl(dev, _IO(TRANSHUME_IOC_MAGIC, 99)), ENOTTY,
	      "an unknown call is refused");
	fails(read(dev, buf, sizeof(buf)), ENODATA,
	      "no report, nothing to read");
	fails(start(dev, -1, 0), EBADF, "a bad descriptor is refused");
	fails(start(dev, root, 1), EINVAL, "unknown flags are refused");
	fails(ioctl(dev, TRANSHUME_START, nowhere), EFAULT,
	      "an argument that is not there is refused");
	path = open(mount, O_PATH);
	fails(start(dev, path, 0), EBADF, "an O_PATH descriptor is refused");
	close(path);
	fails(start(dev, dev, 0), EOPNOTSUPP, "the device itself is refused");

	check(!start(dev, root, 0), "a report starts");
	fails(read(dev, buf, TRANSHUME_MIN_READ - 1), EINVAL,
	      "a short read is refused");
	fails(read(dev, nowhere, sizeof(buf)), EFAULT,
	      "a buffer that is not there is refused");
	check(read_all(dev, sizeof(buf)) >= 0, "and the report goes on");
	check(read(dev, buf, sizeof(buf)) == 0, "the end stays the end");
	check(!ioctl(dev, TRANSHUME_COUNTS, &counts) && counts.files &&
	      counts.files <= counts.inodes && counts.reported,
	      "the counts make sense");
	close(dev);
	munmap(nowhere, sizeof(buf));
}

static void test_opens(int root)
{
	struct transhume_record small[TRANSHUME_MIN_READ /
				      sizeof(struct transhume_record) + 1];
	int64_t whole = report(root, 1 << 20);
	int one = device(), two = device();
	int64_t pages = 0;
	ssize_t got;

	check(whole > 0, "there is something to report");
	check(report(root, TRANSHUME_MIN_READ) == whole,
	      "small reads find the same");
	check(report(root, 5003) == whole, "a crooked length finds the same");

	start(one, root, 0);
	start(two, root, 0);
	got = read(one, small, sizeof(small));
	pages = got > 0 ? sum(small, got) : 0;
	check(read_all(two, 65536) == whole && pages + read_all(one, 65536) == whole,
	      "two opens are independent");
	start(one, root, 0);
	got = read(one, small, sizeof(small));
	check(got > 0 && !start(one, root, 0) && read_all(one, 65536) == whole,
	      "a report that is started again begins anew");
	close(one);
	close(two);
}

/* An open but unlinked file counts, and its inode is let go. */
static void test_unlinked(int root)
{
	const size_t len = 4 << 20;
	char *data = malloc(len);
	int64_t before = report(root, 65536), with;
	int fd = openat(root, "selftest", O_RDWR | O_CREAT | O_TRUNC, 0600);

	memset(data, 0x5a, len);
	check(fd >= 0 && write(fd, data, len) == (ssize_t)len,
	      "a file is written");
	check(report(root, 65536) == before, "dirty pages are not reported");
	fsync(fd);
	unlinkat(root, "selftest", 0);
	with = report(root, 65536);
	check(with == before + (int64_t)(len / sysconf(_SC_PAGESIZE)),
	      "an unlinked file's pages are reported");
	close(fd);
	check(report(root, 65536) == before, "and no longer when it is closed");
	free(data);
}

static char source[256], type[64];

static bool find_mount(const char *mount)
{
	FILE *mounts = fopen("/proc/self/mounts", "r");
	char at[256];
	bool found = false;

	while (!found && fscanf(mounts, "%255s %255s %63s %*s %*d %*d", source,
				at, type) == 3)
		found = !strcmp(at, mount);
	fclose(mounts);
	return found;
}

static int mount_again(const char *point)
{
	return mount(source, point, type, 0, NULL);
}

static void test_unmount(const char *point)
{
	char buf[TRANSHUME_MIN_READ];
	int dev = device();
	int root = open(point, O_RDONLY | O_DIRECTORY);

	if (!find_mount(point)) {
		check(false, "the mount is found");
		return;
	}
	start(dev, root, 0);
	check(read(dev, buf, sizeof(buf)) > 0, "a report is under way");
	close(root);
	fails(umount(point), EBUSY, "its file system cannot be unmounted");
	close(dev);
	check(!umount(point), "but can when the report is closed");
	check(!mount_again(point), "and mounted again");
}

int main(int argc, char **argv)
{
	int root, fd, i;

	if (argc < 2) {
		fprintf(stderr, "usage: abi GOOD-MOUNT [UNSUITABLE-MOUNT...]\n");
		return 2;
	}
	root = open(argv[1], O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (root < 0) {
		perror(argv[1]);
		return 2;
	}
	test_arguments(root, argv[1]);
	test_opens(root);
	test_unlinked(root);
	test_hostile_buffer(root);
	close(root);
	test_unmount(argv[1]);

	for (i = 2; i < argc; i++) {
		int dev = device();

		fd = open(argv[i], O_RDONLY);
		fails(start(dev, fd, 0), EOPNOTSUPP, argv[i]);
		close(fd);
		close(dev);
	}
	printf("1..%d\n", tests);
	return failures != 0;
}
