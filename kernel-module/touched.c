// SPDX-License-Identifier: GPL-2.0
/*
 * transhume: tells which frames a process has touched.
 *
 * Processors set a bit in the page-table entry by which they touch a page. It
 * is taken away here, so what is set the next time was touched in between.
 */
#include <linux/mm.h>
#include <linux/mmap_lock.h>
#include <linux/sched/mm.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "classes.h"
#include "tables.h"
#include "transhume.h"

#if TABLES_POSSIBLE

/* A walk that lists what was touched. */
struct touched_walk {
	struct table_walk walk;
	/* NULL to list nothing. */
	struct transhume_frames *frames;
	u32 count;
	u32 room;
	bool any;
};

/* Whether there was room for some frames. */
static bool add(struct touched_walk *walk, unsigned long pfn,
		unsigned long pages)
{
	return !walk->frames ||
	       list_frames(walk->frames, &walk->count, walk->room, pfn, pages);
}

static bool touched_huge(struct table_walk *table, struct vm_area_struct *vma,
			 pmd_t *pmd, unsigned long addr)
{
	struct touched_walk *walk = container_of(table, struct touched_walk, walk);

	if (!pmd_young(*pmd))
		return true;
	if (!add(walk, pmd_pfn(*pmd), HPAGE_PMD_NR))
		return false;
	/* As pmdp_test_and_clear_young(), which is not exported. */
	clear_bit(_PAGE_BIT_ACCESSED, (unsigned long *)pmd);
	walk->any = true;
	return true;
}

static bool touched_page(struct table_walk *table, struct vm_area_struct *vma,
			 pte_t *pte, unsigned long addr)
{
	struct touched_walk *walk = container_of(table, struct touched_walk, walk);
	pte_t entry = READ_ONCE(*pte);

	if (!pte_young(entry))
		return true;
	if (!add(walk, pte_pfn(entry), 1))
		return false;
	/* As ptep_test_and_clear_young(), which is not exported. */
	clear_bit(_PAGE_BIT_ACCESSED, (unsigned long *)&pte->pte);
	walk->any = true;
	return true;
}

/* Walks part of a process's memory. */
static long look(struct touched_walk *walk, struct transhume_touched *touched)
{
	struct mm_struct *mm = mm_of(touched->pid);
	long ret = 0;

	if (!mm)
		return -ESRCH;
	if (mmap_read_lock_killable(mm)) {
		ret = -EINTR;
	} else {
		touched->addr = walk_tables(mm, &walk->walk, touched->addr);
		mmap_read_unlock(mm);
	}
	/* If it was the last one's, that would be a lot of work. */
	mmput_async(mm);
	/* Or what processors remember, which is touched most, would not be seen. */
	if (walk->any)
		flush_tlbs();
	return ret;
}

/**
 * touched_ioctl - TRANSHUME_TOUCHED
 * @arg: its argument
 */
long touched_ioctl(void __user *arg)
{
	struct touched_walk walk = {
		.walk = { .huge = touched_huge, .page = touched_page },
	};
	struct transhume_touched touched;
	long ret;

	if (copy_from_user(&touched, arg, sizeof(touched)))
		return -EFAULT;
	if (touched.flags || touched.reserved ||
	    touched.count > TRANSHUME_MAX_RANGES || touched.addr >= TASK_SIZE_MAX)
		return -EINVAL;
	walk.room = touched.count;
	if (walk.room) {
		walk.frames = kvmalloc_array(walk.room, sizeof(*walk.frames),
					     GFP_KERNEL_ACCOUNT);
		if (!walk.frames)
			return -ENOMEM;
	}
	ret = look(&walk, &touched);
	touched.count = walk.count;
	if (!ret && (copy_to_user(u64_to_user_ptr(touched.frames), walk.frames,
				  walk.count * sizeof(*walk.frames)) ||
		     copy_to_user(arg, &touched, sizeof(touched))))
		ret = -EFAULT;
	kvfree(walk.frames);
	return ret;
}

#else /* !TABLES_POSSIBLE */

long touched_ioctl(void __user *arg)
{
	return -EOPNOTSUPP;
}

#endif /* TABLES_POSSIBLE */
