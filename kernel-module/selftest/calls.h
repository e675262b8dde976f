/* SPDX-License-Identifier: GPL-2.0 */
/* The calls of a gate. */
#ifndef _SELFTEST_CALLS_H
#define _SELFTEST_CALLS_H

#include <stdint.h>
#include <sys/types.h>

#include "../transhume.h"

/* More frames than the guest has. */
#define FRAMES		(1ULL << 20)
/* Nothing here takes so long, unless it hangs. In 10 ms. */
#define PATIENCE	3000

long gate_open(int dev, uint64_t frames);
/* A call about frames; about one range of them. */
long gate_list(int dev, unsigned long call, struct transhume_frames *frames,
	       uint32_t count);
long gate_one(int dev, unsigned long call, uint64_t pfn, uint64_t pages);
/* Returns how many pages were gated, or -1. */
int64_t gate_walk(int dev, pid_t pid);
struct transhume_gate_state gate_state(int dev);
/* Says that somebody still cares. */
void gate_renew(int dev);

#endif /* _SELFTEST_CALLS_H */
