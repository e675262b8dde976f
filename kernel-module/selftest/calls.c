// SPDX-License-Identifier: GPL-2.0
/* See calls.h. */
#include <stddef.h>
#include <sys/ioctl.h>

#include "calls.h"

long gate_open(int dev, uint64_t frames)
{
	struct transhume_gate_open open = { .frames = frames };

	return ioctl(dev, TRANSHUME_GATE_OPEN, &open);
}

long gate_list(int dev, unsigned long call, struct transhume_frames *frames,
		 uint32_t count)
{
	struct transhume_frame_list list = {
		.frames = (uintptr_t)frames,
		.count = count,
	};

	return ioctl(dev, call, &list);
}

long gate_one(int dev, unsigned long call, uint64_t pfn, uint64_t pages)
{
	struct transhume_frames frames = { .pfn = pfn, .pages = pages };

	return gate_list(dev, call, &frames, 1);
}

int64_t gate_walk(int dev, pid_t pid)
{
	struct transhume_gate_walk walk = { .pid = pid };
	int64_t gated = 0;

	do {
		if (ioctl(dev, TRANSHUME_GATE_WALK, &walk))
			return -1;
		gated += walk.gated;
	} while (walk.addr);
	return gated;
}

struct transhume_gate_state gate_state(int dev)
{
	struct transhume_gate_state state = {};

	ioctl(dev, TRANSHUME_GATE_STATE, &state);
	return state;
}

void gate_renew(int dev)
{
	gate_list(dev, TRANSHUME_GATE_ARRIVED, NULL, 0);
}
