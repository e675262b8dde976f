/* SPDX-License-Identifier: GPL-2.0 */
/*
 * transhume: puts processes to sleep that touch pages which have not arrived.
 */
#ifndef _TRANSHUME_GATE_H
#define _TRANSHUME_GATE_H

#include <linux/atomic.h>
#include <linux/bits.h>
#include <linux/fs.h>
#include <linux/hash.h>
#include <linux/kconfig.h>
#include <linux/poll.h>
#include <linux/spinlock.h>
#include <linux/types.h>
#include <linux/wait.h>

#include "transhume.h"

struct mm_struct;

/*
 * do_numa_page() repairs the entries that are left over, and the hook needs to
 * change where the traced function goes on.
 */
#if IS_ENABLED(CONFIG_X86_64) && IS_ENABLED(CONFIG_NUMA_BALANCING) && \
	IS_ENABLED(CONFIG_DYNAMIC_FTRACE_WITH_REGS)
#define GATE_POSSIBLE	1
#else
#define GATE_POSSIBLE	0
#endif

/**
 * struct gate_span - the frames that one entry of a page table maps
 * @pfn: the first one
 * @pages: how many; 0 for none
 */
struct gate_span {
	unsigned long pfn;
	unsigned long pages;
};

#define GATE_QUEUE_BITS	8
/* Spans that processes wait for and nobody has fetched, at most. */
#define GATE_WANTED	256

/* The one gate. */
struct gate {
	/* Whose it is, also when it is over; NULL when nobody's. */
	struct file *owner;
	/* The owner's memory, whose faults are never put off. */
	struct mm_struct *mm;
	/* A bit a frame; NULL when the hook is not there. */
	unsigned long *absent;
	unsigned long frames;
	bool walked;
	/* TRANSHUME_GATE_*: nobody sleeps in another state than _ACTIVE. */
	int state;
	/* When the watchdog lets everybody go, in jiffies. */
	unsigned long deadline;
	u64 gated;
	u64 nr_absent;
	u64 named;

	/* Processes between the hook and their next try. */
	atomic_t inside;
	wait_queue_head_t emptied;
	wait_queue_head_t queues[1 << GATE_QUEUE_BITS];

	/* Guards what follows. */
	spinlock_t lock;
	struct gate_span wanted[GATE_WANTED];
	unsigned int first_wanted;
	unsigned int nr_wanted;
	u64 waits;
	u64 interrupted;
	u64 waited_ns;
	u64 longest_ns;
	/* What waits cost, but for the sleep itself. */
	u64 awake_ns;
	atomic64_t passed;
	/* For poll. */
	wait_queue_head_t news;
};

extern struct gate gate;

static inline bool gate_is_active(void)
{
	return READ_ONCE(gate.state) == TRANSHUME_GATE_ACTIVE;
}

/* Where those sleep who wait for a frame: all of a bitmap's word at one place. */
static inline wait_queue_head_t *gate_queue(unsigned long pfn)
{
	return &gate.queues[hash_long(BIT_WORD(pfn), GATE_QUEUE_BITS)];
}

/**
 * struct gate_faults - faults on one processor that ran into the hook
 * @count: how many
 * @sampled_ns: how long each GATE_SAMPLE-th of them took there
 */
struct gate_faults {
	u64 count;
	u64 sampled_ns;
};

/* A clock that is read costs as much as the look-up, so it seldom is. */
#define GATE_SAMPLE	16
/* What took longer had lost its processor meanwhile; in nanoseconds. */
#define GATE_LONGEST	20000

/* In gate_wait.c: the hook. */
void gate_forget_faults(void);
struct gate_faults gate_all_faults(void);
int gate_hook(void);
void gate_unhook(void);
void gate_hook_exit(void);

/* In gate_pages.c: page tables. */
struct gate_span gate_span_at(struct mm_struct *mm, unsigned long addr);
int gate_pages(struct mm_struct *mm, const unsigned long *absent,
	       unsigned long frames, unsigned long *addr, u64 *gated);

/* In gate.c, for the device. */
long gate_ioctl(struct file *file, unsigned int cmd, void __user *arg);
__poll_t gate_poll(struct file *file, struct poll_table_struct *wait);
void gate_close(struct file *file);
void gate_init(void);
void gate_exit(void);

#endif /* _TRANSHUME_GATE_H */
