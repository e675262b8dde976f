/* SPDX-License-Identifier: GPL-2.0 */
/*
 * transhume: puts processes to sleep that touch pages which have not arrived.
 */
#ifndef _TRANSHUME_GATE_H
#define _TRANSHUME_GATE_H

#include <linux/fs.h>
#include <linux/kconfig.h>
#include <linux/poll.h>
#include <linux/types.h>

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
