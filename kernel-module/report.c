// SPDX-License-Identifier: GPL-2.0
/*
 * transhume: which page frames hold clean page cache, and where on disk the
 * same bytes stand.
 *
 * The walk goes over a superblock's inodes, so that files count that are open
 * but unlinked, then over each file's page cache, and asks the file system for
 * the extents below. bmap() would be simpler, but ext4's writes the file back
 * and XFS's does not answer for reflinked files.
 *
 * The block device's own page cache (ext4's metadata) is left out: pages that
 * look clean there are often newer than the disk, because the journal owns
 * them.
 *
 * The walk is pulled by read(2) and keeps no more than a cursor in between.
 */
#include <linux/blkdev.h>
#include <linux/err.h>
#include <linux/fiemap.h>
#include <linux/file.h>
#include <linux/kdev_t.h>
#include <linux/magic.h>
#include <linux/math.h>
#include <linux/minmax.h>
#include <linux/mm.h>
#include <linux/pagemap.h>
#include <linux/rcupdate.h>
#include <linux/rcupdate_wait.h>
#include <linux/sched.h>
#include <linux/sched/signal.h>
#include <linux/uaccess.h>
#include <linux/xarray.h>

#include "report.h"

#ifndef XFS_SUPER_MAGIC
#define XFS_SUPER_MAGIC		0x58465342
#endif

/* Folios between two offers to let others run. */
#define FOLIOS_PER_BREATH	512
/* Inodes passed over with the superblock's inode list locked. */
#define INODES_PER_BREATH	1024
/*
 * Work after which a read returns even without a record: inodes and folios,
 * each counted once. Some milliseconds.
 */
#define WORK_PER_READ		32768

/* An extent with one of these holds no plain bytes of the file. */
#define EXTENT_UNFIT							\
	(FIEMAP_EXTENT_UNKNOWN | FIEMAP_EXTENT_DELALLOC |		\
	 FIEMAP_EXTENT_ENCODED | FIEMAP_EXTENT_DATA_ENCRYPTED |		\
	 FIEMAP_EXTENT_NOT_ALIGNED | FIEMAP_EXTENT_DATA_INLINE |	\
	 FIEMAP_EXTENT_DATA_TAIL | FIEMAP_EXTENT_UNWRITTEN)

/* Where a read puts its records, and its scratch space. */
struct sink {
	struct transhume_record __user *records;
	size_t filled;
	size_t room;
	struct fiemap_extent __user *extents;
	u32 max_extents;
	u32 work;
};

/*
 * Only where fiemap's physical offsets are known to be offsets into sb->s_bdev:
 * those of btrfs are logical, others have several devices. (XFS has a realtime
 * device at most; the caller leaves such mounts out.)
 */
static bool extents_are_on_device(const struct super_block *sb)
{
	return sb->s_bdev &&
	       (sb->s_magic == EXT4_SUPER_MAGIC ||
		sb->s_magic == XFS_SUPER_MAGIC);
}

/*
 * Disks that are made of other block devices (dm, md, loop) have no device as
 * their parent, and their sectors mean nothing to the hypervisor.
 */
static bool is_real_disk(struct block_device *bdev)
{
	return disk_to_dev(bdev->bd_disk)->parent != NULL;
}

/**
 * report_start - begin a report, forgetting an earlier one
 * @report: the report
 * @fd: a file on the file system
 */
int report_start(struct report *report, int fd)
{
	struct super_block *sb;
	struct file *file;

	file = fget(fd);
	if (!file)
		return -EBADF;

	/* A block device's file would lead to the pseudo file system of those. */
	sb = file_inode(file)->i_sb;
	if (!extents_are_on_device(sb) || !is_real_disk(sb->s_bdev)) {
		fput(file);
		return -EOPNOTSUPP;
	}

	report_drop(report);
	memset(&report->counts, 0, sizeof(report->counts));
	report->file = file;
	report->first_sector = get_start_sect(sb->s_bdev);
	report->sectors = bdev_nr_sectors(sb->s_bdev);
	report->dev = new_encode_dev(disk_devt(sb->s_bdev->bd_disk));
	report->done = false;
	return 0;
}

/**
 * report_drop - forget the report and give back what it holds
 * @report: the report
 */
void report_drop(struct report *report)
{
	/* The inode first: its file system lives as long as the file is open. */
	iput(report->inode);
	report->inode = NULL;
	report->in_inode = false;
	if (report->file)
		fput(report->file);
	report->file = NULL;
}

static bool has_pages(const struct inode *inode)
{
	return S_ISREG(inode->i_mode) && READ_ONCE(inode->i_data.nrpages) &&
	       inode->i_mapping == &inode->i_data;
}

/*
 * Moves the cursor to the next inode with pages, or to any inode after some
 * that had none, so that the list is not locked for long. New inodes enter the
 * list at its head, behind the cursor, so the walk ends.
 */
static bool next_inode(struct report *report, struct sink *sink)
{
	struct super_block *sb = file_inode(report->file)->i_sb;
	struct inode *last = report->inode;
	struct inode *found = NULL;
	struct inode *inode;
	u32 seen = 0;

	spin_lock(&sb->s_inode_list_lock);
	/* A referenced inode stays in the list. */
	inode = last ? list_next_entry(last, i_sb_list) :
		       list_first_entry(&sb->s_inodes, struct inode, i_sb_list);
	list_for_each_entry_from(inode, &sb->s_inodes, i_sb_list) {
		seen++;
		if (!has_pages(inode) && seen < INODES_PER_BREATH)
			continue;
		/* A new inode is still being filled in. */
		if (READ_ONCE(inode->i_state) & I_NEW)
			continue;
		/* Fails for one that is about to go. */
		found = igrab(inode);
		if (found)
			break;
	}
	spin_unlock(&sb->s_inode_list_lock);

	report->counts.inodes += seen;
	sink->work += seen;
	report->inode = found;
	report->index = 0;
	report->in_inode = found && has_pages(found);
	if (report->in_inode)
		report->counts.files++;
	/* May sleep, and may evict the inode. */
	iput(last);
	return found;
}

/**
 * collect_runs - find runs of clean pages in the current file
 * @report: the report; its index is where to begin
 * @sink: accounts the work
 * @max: runs to find at most
 * @next: where to go on afterwards; ULONG_MAX at the file's end
 * @busy: pages passed over behind the last run
 *
 * Returns how many runs were found.
 */
static unsigned int collect_runs(struct report *report, struct sink *sink,
				 unsigned int max, pgoff_t *next, u64 *busy)
{
	XA_STATE(xas, &report->inode->i_data.i_pages, report->index);
	struct report_run *run = NULL;
	unsigned int breath = 0;
	unsigned int nr = 0;
	struct folio *folio;

	*next = ULONG_MAX;
	*busy = 0;

	rcu_read_lock();
	xas_for_each(&xas, folio, ULONG_MAX) {
		unsigned long skip, pages, pfn;
		pgoff_t index;
		bool clean;

		if (xas_retry(&xas, folio) || xa_is_value(folio))
			continue;
		/*
		 * Without a reference the folio could be freed, and be split or
		 * become part of another, between two looks at it.
		 */
		if (!folio_try_get(folio)) {
			xas_reset(&xas);
			continue;
		}
		if (folio != xas_reload(&xas)) {
			folio_put(folio);
			xas_reset(&xas);
			continue;
		}
		/* The cursor may stand in the middle of a large folio. */
		index = max(folio->index, report->index);
		skip = index - folio->index;
		pages = folio_nr_pages(folio) - skip;
		pfn = folio_pfn(folio) + skip;
		clean = folio_test_uptodate(folio) && !folio_test_dirty(folio) &&
			!folio_test_writeback(folio) &&
			!folio_test_locked(folio);
		folio_put(folio);

		if (!clean) {
			*busy += pages;
		} else if (run && !*busy && run->index + run->pages == index &&
			   run->pfn + run->pages == pfn &&
			   run->pages + pages <= U32_MAX) {
			run->pages += pages;
		} else if (nr == max) {
			*next = index;
			break;
		} else {
			run = &report->runs[nr++];
			run->index = index;
			run->pfn = pfn;
			run->pages = pages;
			run->busy = min_t(u64, *busy, U32_MAX);
			*busy = 0;
		}

		sink->work++;
		if (++breath % FOLIOS_PER_BREATH == 0) {
			if (sink->work >= WORK_PER_READ) {
				*next = index + pages;
				break;
			}
			xas_pause(&xas);
			cond_resched_rcu();
		}
	}
	rcu_read_unlock();
	return nr;
}

/* The runs that are still to be mapped. */
struct pending {
	struct report *report;
	struct report_run *run;
	struct report_run *end;
};

static bool is_over(const struct pending *p)
{
	return p->run == p->end;
}

/* Takes pages off the front of the first run. */
static void take(struct pending *p, u32 pages)
{
	struct report_run *run = p->run;

	p->report->counts.busy += run->busy;
	run->busy = 0;
	run->index += pages;
	run->pfn += pages;
	run->pages -= pages;
	if (!run->pages)
		p->run++;
}

static void take_rest(struct pending *p, u64 *count)
{
	while (!is_over(p)) {
		*count += p->run->pages;
		take(p, p->run->pages);
	}
}

/*
 * Reports the first pages of the first run, which stand at this offset of the
 * partition. Returns 1 when the sink is full.
 */
static int emit(struct pending *p, struct sink *sink, u64 offset, u32 pages)
{
	struct report *report = p->report;
	u64 sector = offset >> SECTOR_SHIFT;
	u64 sectors = (u64)pages << (PAGE_SHIFT - SECTOR_SHIFT);
	struct transhume_record record = {
		.pfn = p->run->pfn,
		.sector = report->first_sector + sector,
		.pages = pages,
		.dev = report->dev,
	};

	/* User space could have changed the extent under our hands. */
	if (offset & (SECTOR_SIZE - 1) || sector > report->sectors ||
	    sectors > report->sectors - sector) {
		report->counts.unfit += pages;
		take(p, pages);
		return 0;
	}
	if (sink->filled == sink->room)
		return 1;
	if (copy_to_user(sink->records + sink->filled, &record, sizeof(record)))
		return -EFAULT;
	sink->filled++;
	report->counts.reported += pages;
	take(p, pages);
	return 0;
}

/*
 * Matches runs with one extent: passes over pages before it, takes those that
 * are whole within it, and leaves those behind it. Returns 1 when the sink is
 * full.
 */
static int match_extent(struct pending *p, struct sink *sink,
			const struct fiemap_extent *extent)
{
	struct transhume_counts *counts = &p->report->counts;
	u64 start = extent->fe_logical;
	u64 stop, first, end;
	int ret;

	if (check_add_overflow(start, extent->fe_length, &stop))
		return 0;
	first = (start >> PAGE_SHIFT) + !!(start & ~PAGE_MASK);
	end = stop >> PAGE_SHIFT;

	while (!is_over(p) && p->run->index < end) {
		struct report_run *run = p->run;
		u32 pages;

		if (run->index < first) {
			pages = min_t(u64, run->pages, first - run->index);
			counts->unmapped += pages;
			take(p, pages);
			continue;
		}
		pages = min_t(u64, run->pages, end - run->index);
		if (extent->fe_flags & EXTENT_UNFIT) {
			counts->unfit += pages;
			take(p, pages);
			continue;
		}
		ret = emit(p, sink, extent->fe_physical +
			   (((u64)run->index << PAGE_SHIFT) - start), pages);
		if (ret)
			return ret;
	}
	return 0;
}

/*
 * Maps the runs that were collected to sectors. Returns 1 when the sink is
 * full.
 */
static int map_runs(struct pending *p, struct sink *sink)
{
	struct inode *inode = p->report->inode;
	struct transhume_counts *counts = &p->report->counts;
	const struct report_run *last = p->end - 1;
	u64 end = (u64)(last->index + last->pages) << PAGE_SHIFT;
	u32 i;
	int ret;

	while (!is_over(p)) {
		struct fiemap_extent_info info = {
			.fi_extents_max = sink->max_extents,
			.fi_extents_start = sink->extents,
		};
		u64 start = (u64)p->run->index << PAGE_SHIFT;
		pgoff_t before = p->run->index;

		ret = inode->i_op->fiemap(inode, &info, start, end - start);
		if (ret == -EFAULT)
			return ret;
		if (ret < 0) {
			/* One file that cannot be read is no end of the report. */
			take_rest(p, &counts->refused);
			return 0;
		}
		for (i = 0; i < info.fi_extents_mapped; i++) {
			struct fiemap_extent extent;

			if (copy_from_user(&extent, sink->extents + i,
					   sizeof(extent)))
				return -EFAULT;
			ret = match_extent(p, sink, &extent);
			if (ret)
				return ret;
		}
		/* Room was left, so there are no more extents: holes. */
		if (info.fi_extents_mapped < sink->max_extents) {
			take_rest(p, &counts->unmapped);
			return 0;
		}
		/* Extents smaller than a page could fill the scratch space. */
		if (!is_over(p) && p->run->index == before) {
			counts->unmapped++;
			take(p, 1);
		}
	}
	return 0;
}

/* Goes on with the current file. Returns 1 when the sink is full. */
static int read_file(struct report *report, struct sink *sink)
{
	unsigned int max = min_t(size_t, sink->room - sink->filled, REPORT_RUNS);
	struct pending p = { .report = report, .run = report->runs };
	pgoff_t next;
	u64 busy;
	int ret;

	if (!max)
		return 1;
	p.end = p.run + collect_runs(report, sink, max, &next, &busy);

	if (!is_over(&p)) {
		if (report->inode->i_op->fiemap && !IS_ENCRYPTED(report->inode))
			ret = map_runs(&p, sink);
		else
			take_rest(&p, &report->counts.unfit);
	}
	if (!is_over(&p)) {
		/* What is left is collected again by the next read. */
		report->index = p.run->index;
		return ret;
	}
	report->counts.busy += busy;
	report->index = next;
	report->in_inode = next != ULONG_MAX;
	return 0;
}

/**
 * report_read - go on with a report
 * @report: the report
 * @buf: where records go, and scratch space
 * @len: its length, at least TRANSHUME_MIN_READ
 *
 * Returns the bytes of records; 0 at the end of the report.
 */
ssize_t report_read(struct report *report, char __user *buf, size_t len)
{
	size_t half = round_down(len / 2, __alignof__(struct fiemap_extent));
	struct sink sink = {
		.records = (struct transhume_record __user *)buf,
		.room = half / sizeof(struct transhume_record),
		.extents = (struct fiemap_extent __user *)(buf + half),
		.max_extents = min_t(size_t, REPORT_RUNS,
				     half / sizeof(struct fiemap_extent)),
	};
	int ret = 0;

	if (len < TRANSHUME_MIN_READ)
		return -EINVAL;
	if (!report->file)
		return -ENODATA;

	while (!report->done && sink.work < WORK_PER_READ) {
		if (signal_pending(current)) {
			ret = -EINTR;
			break;
		}
		if (report->in_inode) {
			ret = read_file(report, &sink);
			if (ret)
				break;
		} else if (!next_inode(report, &sink)) {
			report->done = true;
		}
		cond_resched();
	}

	/* What was found counts, whatever came then. */
	if (sink.filled)
		return sink.filled * sizeof(struct transhume_record);
	if (ret < 0)
		return ret;
	if (report->done)
		return 0;
	if (clear_user(sink.records, sizeof(struct transhume_record)))
		return -EFAULT;
	return sizeof(struct transhume_record);
}
