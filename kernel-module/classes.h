/* SPDX-License-Identifier: GPL-2.0 */
/*
 * transhume: classes of page frames, and what processes touch.
 */
#ifndef _TRANSHUME_CLASSES_H
#define _TRANSHUME_CLASSES_H

#include <linux/compiler_types.h>
#include <linux/types.h>

struct transhume_frames;

/* In classes.c. */
long classes_ioctl(void __user *arg);
bool list_frames(struct transhume_frames *frames, u32 *count, u32 room,
		 unsigned long pfn, unsigned long pages);

/* In touched.c. */
long touched_ioctl(void __user *arg);

#endif /* _TRANSHUME_CLASSES_H */
