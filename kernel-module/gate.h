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
struct pt_regs;
struct vm_area_struct;

/*
 * do_numa_page() repairs the entries that are left over, and the hook needs to
 * change where the traced function goes on. A module that cannot be unloaded
 * gives nothing back after a call: gate_cache.c's would be jumps, and be hooked.
 */
#if IS_ENABLED(CONFIG_X86_64) && IS_ENABLED(CONFIG_NUMA_BALANCING) && \
	IS_ENABLED(CONFIG_DYNAMIC_FTRACE_WITH_REGS) && \
	IS_ENABLED(CONFIG_MODULE_UNLOAD)
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

/* What the kernel maps around a read fault on a file's page at most, in pages. */
#define GATE_AROUND	16

/**
 * struct gate_spans - the frames that somebody is about to touch
 * @at: these
 * @count: how many of @at
 */
struct gate_spans {
	struct gate_span at[GATE_AROUND];
	unsigned int count;
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

static inline bool gate_has(unsigned long pfn)
{
	return pfn < gate.frames && test_bit(pfn, gate.absent);
}

/**
 * struct gate_faults - faults, reads and writes on one processor that ran into
 *	the hook
 * @count: how many
 * @sampled_ns: how long each GATE_SAMPLE-th of them took there
 */
struct gate_faults {
	u64 count;
	u64 sampled_ns;
};

/* Whether the tracer was called there, behind a function's ENDBR at most. */
static inline bool gate_is_call_of(unsigned long ip, unsigned long function)
{
	return ip - function < 16;
}

/* A clock that is read costs as much as the look-up, so it seldom is. */
#define GATE_SAMPLE	16
/* What took longer had lost its processor meanwhile; in nanoseconds. */
#define GATE_LONGEST	20000

/* In gate_wait.c: the hook. */
void gate_forget_faults(void);
struct gate_faults gate_all_faults(void);
u64 gate_sample(void);
void gate_sampled(u64 began);
int gate_hook(void);
void gate_unhook(void);
void gate_hook_exit(void);
bool gate_wait_for(const struct gate_spans *spans, unsigned int state);
void gate_leave(void);

/* In gate_cache.c: the page cache. */
#define GATE_CALLS	4
unsigned int gate_calls(unsigned long *ips);
void gate_cached_call(unsigned long ip, struct pt_regs *regs);
void gate_cached_fault(struct vm_area_struct *vma, unsigned long addr,
		       unsigned int flags, struct gate_spans *spans);

/* In gate_pages.c: page tables. */
bool gate_span_at(struct mm_struct *mm, unsigned long addr,
		  struct gate_span *span);
int gate_pages(struct mm_struct *mm, const unsigned long *absent,
	       unsigned long frames, unsigned long *addr, u64 *gated);

/* In gate.c, for the device. */
long gate_ioctl(struct file *file, unsigned int cmd, void __user *arg);
__poll_t gate_poll(struct file *file, struct poll_table_struct *wait);
void gate_close(struct file *file);
void gate_init(void);
void gate_exit(void);

#endif /* _TRANSHUME_GATE_H */
