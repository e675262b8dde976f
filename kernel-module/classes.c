// SPDX-License-Identifier: GPL-2.0
/*
 * transhume: tells classes of page frames, and which ones are the kernel's.
 *
 * Frames change their class while they are looked at, and nothing is locked: a
 * frame may be told wrong, and whoever uses the answer must not rely on it.
 */
#include <linux/hugetlb.h>
#include <linux/memory_hotplug.h>
#include <linux/mm.h>
#include <linux/page-flags.h>
#include <linux/sched.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "classes.h"
#include "transhume.h"

/* Frames looked at in one call: some milliseconds. */
#define FRAMES_PER_CALL	131072
/* Others may run each time so many were looked at. */
#define FRAMES_PER_REST	8192

/* How many frames hold nothing, from one on that does not. */
static unsigned long free_run(struct page *page, unsigned long pfn)
{
	unsigned long order = READ_ONCE(page->private);

	/* Such a block begins at a multiple of its length, or it is none. */
	if (!PageBuddy(page) || order >= 16 || pfn & ((1UL << order) - 1))
		return 1;
	return 1UL << order;
}

static unsigned int class_of(struct page *page)
{
	struct folio *folio = page_folio(page);
	unsigned long mapping;

	if (PageReserved(page))
		return TRANSHUME_CLASS_KERNEL;
	if (PageOffline(page))
		return TRANSHUME_CLASS_OTHER;
	if (folio_test_slab(folio))
		return TRANSHUME_CLASS_SLAB;
	if (PageTable(page))
		return TRANSHUME_CLASS_PAGE_TABLES;
	if (PageBuddy(page) || !folio_ref_count(folio))
		return TRANSHUME_CLASS_FREE;

	mapping = (unsigned long)READ_ONCE(folio->mapping);
	if (mapping & PAGE_MAPPING_ANON)
		return TRANSHUME_CLASS_ANONYMOUS;
	/* Files of hugetlbfs, which has no disk. */
	if (PageHuge(page))
		return TRANSHUME_CLASS_DIRTY_FILE;
	/* Others have something else in the place of a file's mapping. */
	if (mapping && !(mapping & PAGE_MAPPING_FLAGS) && folio_test_lru(folio))
		return folio_test_dirty(folio) || folio_test_writeback(folio) ?
			       TRANSHUME_CLASS_DIRTY_FILE :
			       TRANSHUME_CLASS_CLEAN_FILE;
	return TRANSHUME_CLASS_KERNEL;
}

static bool is_kernels(unsigned int class)
{
	return class == TRANSHUME_CLASS_KERNEL ||
	       class == TRANSHUME_CLASS_SLAB ||
	       class == TRANSHUME_CLASS_PAGE_TABLES;
}

/**
 * list_frames - add frames to a list, joined with the last ones if they follow
 * @frames: the list
 * @count: how many runs are in it
 * @room: how many fit
 * @pfn: the first frame
 * @pages: how many
 *
 * Returns whether there was room.
 */
bool list_frames(struct transhume_frames *frames, u32 *count, u32 room,
		 unsigned long pfn, unsigned long pages)
{
	struct transhume_frames *last = *count ? &frames[*count - 1] : NULL;

	if (last && last->pfn + last->pages == pfn) {
		last->pages += pages;
		return true;
	}
	if (*count == room)
		return false;
	frames[*count] = (struct transhume_frames){ .pfn = pfn, .pages = pages };
	(*count)++;
	return true;
}

/* Fills in what lies from classes->pfn on, and where to go on. */
static void look(struct transhume_classes *classes,
		 struct transhume_frames *frames)
{
	unsigned long end = min_t(u64, classes->end, TRANSHUME_MAX_FRAMES);
	unsigned long stop = min(classes->pfn + FRAMES_PER_CALL, end);
	unsigned long pfn = classes->pfn;
	u32 room = classes->count;

	classes->count = 0;
	while (pfn < stop) {
		struct page *page = pfn_to_online_page(pfn);
		unsigned long pages = 1;
		unsigned int class;

		if (pfn % FRAMES_PER_REST == 0)
			cond_resched();
		/* No memory, or not ours to look at. */
		if (!page) {
			pfn++;
			continue;
		}
		class = class_of(page);
		if (is_kernels(class) &&
		    !list_frames(frames, &classes->count, room, pfn, 1))
			break;
		if (class == TRANSHUME_CLASS_FREE)
			pages = min(free_run(page, pfn), stop - pfn);
		classes->pages[class] += pages;
		pfn += pages;
	}
	classes->pfn = pfn < end ? pfn : 0;
}

/**
 * classes_ioctl - TRANSHUME_CLASSES
 * @arg: its argument
 */
long classes_ioctl(void __user *arg)
{
	struct transhume_classes classes;
	struct transhume_frames *frames;
	long ret = 0;

	if (copy_from_user(&classes, arg, sizeof(classes)))
		return -EFAULT;
	if (classes.flags || !classes.count ||
	    classes.count > TRANSHUME_MAX_RANGES ||
	    classes.pfn >= TRANSHUME_MAX_FRAMES)
		return -EINVAL;
	frames = kvmalloc_array(classes.count, sizeof(*frames),
				GFP_KERNEL_ACCOUNT);
	if (!frames)
		return -ENOMEM;
	memset(classes.pages, 0, sizeof(classes.pages));
	look(&classes, frames);
	if (copy_to_user(u64_to_user_ptr(classes.frames), frames,
			 classes.count * sizeof(*frames)) ||
	    copy_to_user(arg, &classes, sizeof(classes)))
		ret = -EFAULT;
	kvfree(frames);
	return ret;
}
