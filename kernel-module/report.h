/* SPDX-License-Identifier: GPL-2.0 */
/*
 * transhume: the page-cache report of one open.
 */
#ifndef _TRANSHUME_REPORT_H
#define _TRANSHUME_REPORT_H

#include <linux/fs.h>
#include <linux/types.h>

#include "transhume.h"

/*
 * Runs of pages that are mapped to extents at a time. More would save calls of
 * fiemap on fragmented files; 512 keep the memory of an open at 12 KiB.
 */
#define REPORT_RUNS	512

/**
 * struct report_run - pages of one file that follow one another in the file
 *	and in memory
 * @index: the first one's place in the file, in pages
 * @pfn: its page frame number
 * @pages: how many
 * @busy: pages passed over between the run before and this one
 */
struct report_run {
	pgoff_t index;
	unsigned long pfn;
	u32 pages;
	u32 busy;
};

/**
 * struct report - a report and how far it got
 * @file: keeps the file system mounted; NULL when no report was started
 * @inode: where the walk stands, with a reference; NULL before the first inode
 * @index: next page of @inode
 * @in_inode: @inode is not finished
 * @done: the walk is over
 * @first_sector: where the file system's partition starts on the disk
 * @sectors: the partition's length
 * @dev: the whole disk's device number, encoded
 * @counts: for TRANSHUME_COUNTS
 * @runs: scratch space
 */
struct report {
	struct file *file;
	struct inode *inode;
	pgoff_t index;
	bool in_inode;
	bool done;
	sector_t first_sector;
	sector_t sectors;
	u32 dev;
	struct transhume_counts counts;
	struct report_run runs[REPORT_RUNS];
};

int report_start(struct report *report, int fd);
void report_drop(struct report *report);
ssize_t report_read(struct report *report, char __user *buf, size_t len);

#endif /* _TRANSHUME_REPORT_H */
