// SPDX-License-Identifier: GPL-2.0
/*
 * transhume: goes through the page tables of a process.
 *
 * The kernel's own way (walk_page_range) is not exported.
 */
#include <linux/mm.h>
#include <linux/mmap_lock.h>
#include <linux/pid.h>
#include <linux/sched.h>
#include <linux/sched/mm.h>
#include <linux/sched/task.h>
#include <linux/smp.h>

#include "tables.h"

#if TABLES_POSSIBLE

#include <asm/tlbflush.h>

/* Entries looked at in one call, about: some milliseconds. */
#define ENTRIES_PER_CALL	65536

/**
 * find_pmd - the middle of the page table for an address
 * @mm: a process's memory
 * @addr: an address in it
 *
 * NULL where there is none.
 */
pmd_t *find_pmd(struct mm_struct *mm, unsigned long addr)
{
	pgd_t *pgd = pgd_offset(mm, addr);
	p4d_t *p4d;
	pud_t *pud;

	if (pgd_none(READ_ONCE(*pgd)))
		return NULL;
	p4d = p4d_offset(pgd, addr);
	if (p4d_none(READ_ONCE(*p4d)) || p4d_bad(*p4d))
		return NULL;
	pud = pud_offset(p4d, addr);
	if (pud_none(READ_ONCE(*pud)) || pud_leaf(*pud) || pud_bad(*pud))
		return NULL;
	return pmd_offset(pud, addr);
}

static bool walk_huge(struct vm_area_struct *vma, pmd_t *pmd,
		      unsigned long addr, struct table_walk *walk)
{
	spinlock_t *lock = pmd_lock(vma->vm_mm, pmd);
	bool more = true;

	if (pmd_present(*pmd) && pmd_trans_huge(*pmd))
		more = walk->huge(walk, vma, pmd, addr & PMD_MASK);
	spin_unlock(lock);
	return more;
}

/* What one page table maps from addr on and below end. Returns where it ended. */
static unsigned long walk_table(struct vm_area_struct *vma, pmd_t *pmd,
				unsigned long addr, unsigned long end,
				struct table_walk *walk)
{
	spinlock_t *lock;
	pmd_t middle;
	pte_t *pte;

	/* Since 6.5 a table of file pages can go although the memory is locked. */
	rcu_read_lock();
	middle = READ_ONCE(*pmd);
	if (pmd_none(middle) || !pmd_present(middle) ||
	    pmd_trans_huge(middle) || pmd_bad(middle))
		goto out;
	lock = pte_lockptr(vma->vm_mm, &middle);
	spin_lock(lock);
	if (!pmd_same(middle, READ_ONCE(*pmd)))
		goto unlock;

	for (pte = pte_offset_kernel(&middle, addr); addr < end;
	     pte++, addr += PAGE_SIZE) {
		pte_t entry = READ_ONCE(*pte);

		if (!pte_present(entry) || pte_protnone(entry) ||
		    pte_special(entry) || pte_devmap(entry))
			continue;
		if (!walk->page(walk, vma, pte, addr))
			break;
	}
	spin_unlock(lock);
	rcu_read_unlock();
	return addr;
unlock:
	spin_unlock(lock);
out:
	rcu_read_unlock();
	return end;
}

static bool is_suitable(const struct vm_area_struct *vma)
{
	return !(vma->vm_flags & (VM_PFNMAP | VM_IO | VM_MIXEDMAP | VM_HUGETLB)) &&
	       (vma->vm_flags & (VM_READ | VM_WRITE | VM_EXEC));
}

/**
 * walk_tables - go through part of a process's page tables
 * @mm: its memory, locked for reading
 * @walk: what to do
 * @addr: where to go on
 *
 * Does some milliseconds of work. Returns where to go on, or 0 at the end.
 */
unsigned long walk_tables(struct mm_struct *mm, struct table_walk *walk,
			  unsigned long addr)
{
	struct vm_area_struct *vma;
	unsigned long entries = 0;

	while ((vma = find_vma(mm, addr)) != NULL) {
		unsigned long end = vma->vm_end;

		addr = max(addr, vma->vm_start);
		if (!is_suitable(vma)) {
			addr = end;
			continue;
		}
		while (addr < end && entries < ENTRIES_PER_CALL) {
			pmd_t *pmd = find_pmd(mm, addr);
			unsigned long mask = pmd ? PMD_MASK : PUD_MASK;
			unsigned long next = min((addr | ~mask) + 1, end);
			unsigned long to = next;

			entries += 8;
			if (pmd && pmd_trans_huge(READ_ONCE(*pmd))) {
				if (!walk_huge(vma, pmd, addr, walk))
					return addr;
			} else if (pmd) {
				entries += (next - addr) >> PAGE_SHIFT;
				to = walk_table(vma, pmd, addr, next, walk);
			}
			addr = to;
			if (to < next)
				return addr;
			cond_resched();
		}
		if (entries >= ENTRIES_PER_CALL)
			return addr;
		entries += 8;
	}
	return 0;
}

/**
 * mm_of - a process's memory, with a reference
 * @number: its number
 *
 * NULL if there is no such process, or it has no memory of its own.
 */
struct mm_struct *mm_of(pid_t number)
{
	struct pid *pid = find_get_pid(number);
	struct task_struct *task = get_pid_task(pid, PIDTYPE_PID);
	struct mm_struct *mm;

	put_pid(pid);
	if (!task)
		return NULL;
	mm = get_task_mm(task);
	put_task_struct(task);
	return mm;
}

static void flush_here(void *unused)
{
	__flush_tlb_all();
}

/**
 * flush_tlbs - make all processors forget all entries
 *
 * flush_tlb_mm_range() is not exported; this is wider, and seldom.
 */
void flush_tlbs(void)
{
	on_each_cpu(flush_here, NULL, 1);
}

#endif /* TABLES_POSSIBLE */
