/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * transhume: what the module and user space agree on.
 *
 * Open /dev/transhume (needs CAP_SYS_ADMIN), start a report with
 * TRANSHUME_START, then read(2) records until it returns 0. Every open is a
 * report of its own.
 *
 * A report is a hint: pages change while it is made, so whoever uses a record
 * must check the page's content.
 */
#ifndef _TRANSHUME_H
#define _TRANSHUME_H

#include <linux/ioctl.h>
#include <linux/types.h>

/* Changes whenever something below changes in a way that old callers notice. */
#define TRANSHUME_ABI_VERSION	1

/**
 * struct transhume_start - begin a report of one file system
 * @fd: an open file or directory on it. The report keeps it open, so that the
 *	file system cannot be unmounted meanwhile, until it is released or
 *	another one is started.
 * @flags: must be 0
 *
 * Errors: EBADF for a bad or an O_PATH descriptor; EOPNOTSUPP when the file
 * system's extents are no sectors of one disk, or its block device is no disk
 * nor a partition of one (dm, md, loop).
 */
struct transhume_start {
	__s32 fd;
	__u32 flags;
};

/**
 * struct transhume_record - page frames that hold what the disk holds
 * @pfn: first page frame number
 * @sector: first sector of 512 bytes, counted from the start of the whole disk
 * @pages: how many pages. 0 makes the record void: the read has done its share
 *	of work and found nothing, and there is more to come.
 * @dev: the whole disk's device number, as new_encode_dev() packs it: minor
 *	bits 0-7, major bits 8-19, the minor's higher bits from 20
 */
struct transhume_record {
	__u64 pfn;
	__u64 sector;
	__u32 pages;
	__u32 dev;
};

/*
 * A read needs room for at least this many bytes. The module also uses the
 * second half of the caller's buffer as scratch space, so what stands behind
 * the bytes that read(2) returned is undefined.
 */
#define TRANSHUME_MIN_READ	4096

/**
 * struct transhume_counts - what the report has come across so far
 * @inodes: inodes looked at
 * @files: regular files among them with pages in the cache
 * @reported: pages reported
 * @busy: pages that are dirty, under writeback, locked or not up to date
 * @unmapped: pages in holes, or only in part within one extent
 * @unfit: pages in extents whose place holds something else than the page's
 *	bytes: delayed, unwritten, inline, encrypted, encoded
 * @refused: pages of files whose file system would not map them
 */
struct transhume_counts {
	__u64 inodes;
	__u64 files;
	__u64 reported;
	__u64 busy;
	__u64 unmapped;
	__u64 unfit;
	__u64 refused;
};

#define TRANSHUME_IOC_MAGIC	0xd7

/* Returns TRANSHUME_ABI_VERSION of the module. */
#define TRANSHUME_VERSION	_IO(TRANSHUME_IOC_MAGIC, 0)
#define TRANSHUME_START		_IOW(TRANSHUME_IOC_MAGIC, 1, struct transhume_start)
#define TRANSHUME_COUNTS	_IOR(TRANSHUME_IOC_MAGIC, 2, struct transhume_counts)

#endif /* _TRANSHUME_H */
