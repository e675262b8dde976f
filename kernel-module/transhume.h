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
 *
 * After a migration by post-copy, part of the memory is still at the other
 * host, and touching it stops a whole virtual CPU. A gate puts only the process
 * to sleep: name the page frames that are absent (TRANSHUME_GATE_OPEN and
 * _ABSENT), walk the processes (_WALK), then say what has arrived (_ARRIVED).
 * poll(2) says POLLIN when a process has begun to wait (_WANTED), and POLLHUP
 * when the gate was opened but is over.
 *
 * All three of _ABSENT, _WALK and _ARRIVED show that somebody still cares: a
 * second without one, and everybody is let go. An _ARRIVED without ranges will
 * do. So does closing the file. Before anything is absent it may be 30 seconds,
 * so that a gate can be opened at the host that the guest leaves.
 *
 * Before such a migration, TRANSHUME_CLASSES tells which frames are the
 * kernel's, and TRANSHUME_TOUCHED which ones a process works with: those are
 * wanted first where the guest goes.
 */
#ifndef _TRANSHUME_H
#define _TRANSHUME_H

#include <linux/ioctl.h>
#include <linux/types.h>

/* Changes whenever something below changes in a way that old callers notice. */
#define TRANSHUME_ABI_VERSION	2

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

/**
 * struct transhume_gate_open - get ready to put processes to sleep
 * @frames: no page frame number reaches this, TRANSHUME_MAX_FRAMES at most;
 *	more than this machine has are not kept
 * @flags: must be 0
 * @reserved: must be 0
 *
 * The caller's own process never sleeps. Errors: EBUSY when a gate is open, or
 * something else (a livepatch) has replaced what is hooked: handle_mm_fault,
 * filemap_read, filemap_splice_read (since 6.5), generic_perform_write,
 * iomap_file_buffered_write; EOPNOTSUPP when this kernel cannot do it; the
 * kernel's log says which.
 */
struct transhume_gate_open {
	__u64 frames;
	__u32 flags;
	__u32 reserved;
};

/* 4 TiB. The gate keeps one bit a frame. */
#define TRANSHUME_MAX_FRAMES	(1ULL << 30)

/**
 * struct transhume_frames - page frames that follow one another
 * @pfn: the first one
 * @pages: how many
 */
struct transhume_frames {
	__u64 pfn;
	__u64 pages;
};

/**
 * struct transhume_frame_list - what is absent, has arrived, or is wanted
 * @frames: address of so many struct transhume_frames
 * @count: how many, TRANSHUME_MAX_RANGES at most
 * @flags: must be 0
 *
 * What lies beyond the gate's frames is passed over, and so is what was said
 * before. EBUSY: absent frames are named before the first walk. ESTALE: the
 * gate is over, or was never opened.
 */
struct transhume_frame_list {
	__u64 frames;
	__u32 count;
	__u32 flags;
};

#define TRANSHUME_MAX_RANGES	512

/**
 * struct transhume_gate_walk - gate a process's absent pages
 * @addr: where to go on, 0 to begin; afterwards where to go on, 0 at the end
 * @gated: set to how many pages are gated now that were not
 * @pid: the process
 * @flags: must be 0
 *
 * Each call does some milliseconds of work. ESRCH: no such process, or it has
 * no memory of its own.
 */
struct transhume_gate_walk {
	__u64 addr;
	__u64 gated;
	__s32 pid;
	__u32 flags;
};

/* What became of a gate. */
#define TRANSHUME_GATE_NONE	0	/* never opened */
#define TRANSHUME_GATE_ACTIVE	1
#define TRANSHUME_GATE_RELEASED	2	/* by TRANSHUME_GATE_RELEASE */
#define TRANSHUME_GATE_EXPIRED	3	/* nobody cared for a second */

/**
 * struct transhume_gate_state - how a gate does, or did
 * @state: TRANSHUME_GATE_*
 * @waiting: processes that wait now
 * @absent: page frames that have not arrived
 * @named: page frames that were named absent
 * @gated: pages that were gated
 * @waits: times that a process went to sleep
 * @interrupted: times that it woke up by a signal
 * @passed: faults on absent pages, and reads and writes of them, that could not
 *	be put off
 * @waited_us: how long processes slept, in microseconds
 * @longest_us: how long one slept at most
 * @faults: page faults of processes, reads and writes of files, while something
 *	was absent
 * @faults_us: CPU time that the gate added to them, in microseconds, from the
 *	time of every sixteenth
 */
struct transhume_gate_state {
	__u32 state;
	__u32 waiting;
	__u64 absent;
	__u64 named;
	__u64 gated;
	__u64 waits;
	__u64 interrupted;
	__u64 passed;
	__u64 waited_us;
	__u64 longest_us;
	__u64 faults;
	__u64 faults_us;
};

#define TRANSHUME_IOC_MAGIC	0xd7

/* Returns TRANSHUME_ABI_VERSION of the module. */
#define TRANSHUME_VERSION	_IO(TRANSHUME_IOC_MAGIC, 0)
#define TRANSHUME_START		_IOW(TRANSHUME_IOC_MAGIC, 1, struct transhume_start)
#define TRANSHUME_COUNTS	_IOR(TRANSHUME_IOC_MAGIC, 2, struct transhume_counts)
#define TRANSHUME_GATE_OPEN						\
	_IOW(TRANSHUME_IOC_MAGIC, 3, struct transhume_gate_open)
#define TRANSHUME_GATE_ABSENT						\
	_IOW(TRANSHUME_IOC_MAGIC, 4, struct transhume_frame_list)
#define TRANSHUME_GATE_WALK						\
	_IOWR(TRANSHUME_IOC_MAGIC, 5, struct transhume_gate_walk)
#define TRANSHUME_GATE_ARRIVED						\
	_IOW(TRANSHUME_IOC_MAGIC, 6, struct transhume_frame_list)
/* Fills in the list and returns how many there were. */
#define TRANSHUME_GATE_WANTED						\
	_IOW(TRANSHUME_IOC_MAGIC, 7, struct transhume_frame_list)
#define TRANSHUME_GATE_STATE						\
	_IOR(TRANSHUME_IOC_MAGIC, 8, struct transhume_gate_state)
/* Lets everybody go. Does no harm to a gate that is over. */
#define TRANSHUME_GATE_RELEASE	_IO(TRANSHUME_IOC_MAGIC, 9)

/* Classes of page frames. */
#define TRANSHUME_CLASS_KERNEL		0	/* the kernel's, but for the next two */
#define TRANSHUME_CLASS_SLAB		1
#define TRANSHUME_CLASS_PAGE_TABLES	2
#define TRANSHUME_CLASS_ANONYMOUS	3	/* processes' own */
#define TRANSHUME_CLASS_CLEAN_FILE	4	/* page cache */
#define TRANSHUME_CLASS_DIRTY_FILE	5	/* the same, to be written; tmpfs */
#define TRANSHUME_CLASS_FREE		6
#define TRANSHUME_CLASS_OTHER		7	/* given back to the hypervisor */
#define TRANSHUME_CLASS_COUNT		8

/**
 * struct transhume_classes - tell classes of page frames
 * @pfn: where to go on, 0 to begin; afterwards where to go on, 0 at the end
 * @end: no frame from here on is looked at
 * @frames: address of so many struct transhume_frames, for the kernel's frames:
 *	those of its first three classes
 * @count: how many fit there, 1 to TRANSHUME_MAX_RANGES; set to how many there
 *	are
 * @flags: must be 0
 * @pages: set to how many frames of each class were passed by this call
 *
 * Each call does some milliseconds of work. Frames change while they are looked
 * at: the answer is a hint.
 */
struct transhume_classes {
	__u64 pfn;
	__u64 end;
	__u64 frames;
	__u32 count;
	__u32 flags;
	__u64 pages[TRANSHUME_CLASS_COUNT];
};

/**
 * struct transhume_touched - tell which frames a process has touched since the
 *	call before
 * @addr: where to go on, 0 to begin; afterwards where to go on, 0 at the end
 * @frames: address of so many struct transhume_frames
 * @count: how many fit there, TRANSHUME_MAX_RANGES at most; set to how many
 *	there are. With 0 nothing is listed: what is touched counts from now on.
 * @pid: the process
 * @flags: must be 0
 * @reserved: must be 0
 *
 * Each call does some milliseconds of work. Whoever else goes by the same bits
 * (reclaim, DAMON) sees less touched than there was. A frame can be listed more
 * than once. ESRCH: no such process, or it has no memory of its own.
 * EOPNOTSUPP: not on this processor.
 */
struct transhume_touched {
	__u64 addr;
	__u64 frames;
	__u32 count;
	__s32 pid;
	__u32 flags;
	__u32 reserved;
};

#define TRANSHUME_CLASSES						\
	_IOWR(TRANSHUME_IOC_MAGIC, 10, struct transhume_classes)
#define TRANSHUME_TOUCHED						\
	_IOWR(TRANSHUME_IOC_MAGIC, 11, struct transhume_touched)

#endif /* _TRANSHUME_H */
