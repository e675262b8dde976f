// SPDX-License-Identifier: GPL-2.0
/*
 * transhume: makes page-table entries of absent pages inaccessible.
 *
 * They become what NUMA balancing makes of entries whose use it wants to see:
 * PROT_NONE in memory that is accessible. So all of the kernel knows how to
 * treat them, and do_numa_page() opens them again at the next touch.
 */
#include <linux/mm.h>
#include <linux/mm_inline.h>
#include <linux/mmap_lock.h>
#include <linux/pgtable.h>
#include <linux/sched.h>
#include <linux/smp.h>

#include <asm/tlbflush.h>

#include "gate.h"

#if GATE_POSSIBLE

/* Entries looked at in one call, about: some milliseconds. */
#define ENTRIES_PER_CALL	65536

#ifdef CONFIG_ARCH_HAS_CC_PLATFORM
#include <asm/coco.h>
/*
 * pte_modify() wants the kernel's, which is not exported. It is 0 where memory
 * is not encrypted, and elsewhere gate.c refuses.
 */
u64 cc_mask;
#endif

static bool any_absent(const unsigned long *absent, unsigned long frames,
		       unsigned long pfn, unsigned long pages)
{
	unsigned long end = min(pfn + pages, frames);

	return pfn < end && find_next_bit(absent, end, pfn) < end;
}

/* The middle of the page table for an address, or NULL where there is none. */
static pmd_t *find_pmd(struct mm_struct *mm, unsigned long addr)
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

/**
 * gate_span_at - which frames an inaccessible entry maps
 * @mm: the process's memory; it or the area is locked
 * @addr: an address in it
 *
 * Like get_user_pages_fast() this looks with interrupts off and without the
 * page table's lock: that keeps tables from being freed, and an entry that
 * changes meanwhile only makes somebody wait or not wait who need or need not.
 */
struct gate_span gate_span_at(struct mm_struct *mm, unsigned long addr)
{
	struct gate_span span = {};
	unsigned long flags;
	pmd_t *pmd, middle;
	pte_t pte;

	local_irq_save(flags);
	pmd = find_pmd(mm, addr);
	if (!pmd)
		goto out;
	middle = READ_ONCE(*pmd);
	if (pmd_none(middle) || !pmd_present(middle))
		goto out;
	if (pmd_trans_huge(middle)) {
		if (pmd_protnone(middle)) {
			span.pfn = pmd_pfn(middle);
			span.pages = HPAGE_PMD_NR;
		}
		goto out;
	}
	if (pmd_bad(middle))
		goto out;
	pte = READ_ONCE(*pte_offset_kernel(&middle, addr));
	if (pte_protnone(pte)) {
		span.pfn = pte_pfn(pte);
		span.pages = 1;
	}
out:
	local_irq_restore(flags);
	return span;
}

/* Returns how many pages were gated. */
static unsigned long gate_huge(struct vm_area_struct *vma, pmd_t *pmd,
			       unsigned long addr, const unsigned long *absent,
			       unsigned long frames)
{
	unsigned long pages = 0;
	spinlock_t *lock = pmd_lock(vma->vm_mm, pmd);
	pmd_t old = *pmd;

	if (pmd_present(old) && pmd_trans_huge(old) && !pmd_protnone(old) &&
	    any_absent(absent, frames, pmd_pfn(old), HPAGE_PMD_NR)) {
		/* Takes the processor's accessed and dirty bits along. */
		old = pmdp_establish(vma, addr & PMD_MASK, pmd,
				     pmd_mkinvalid(old));
		set_pmd_at(vma->vm_mm, addr & PMD_MASK, pmd,
			   pmd_modify(old, PAGE_NONE));
		pages = HPAGE_PMD_NR;
	}
	spin_unlock(lock);
	return pages;
}

/* Gates what one page table maps from addr on and below end. */
static unsigned long gate_table(struct vm_area_struct *vma, pmd_t *pmd,
				unsigned long addr, unsigned long end,
				const unsigned long *absent,
				unsigned long frames)
{
	unsigned long pages = 0;
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
		pte_t old = READ_ONCE(*pte);

		if (!pte_present(old) || pte_protnone(old) ||
		    pte_special(old) || pte_devmap(old) ||
		    !any_absent(absent, frames, pte_pfn(old), 1))
			continue;
		old = ptep_modify_prot_start(vma, addr, pte);
		ptep_modify_prot_commit(vma, addr, pte, old,
					pte_modify(old, PAGE_NONE));
		pages++;
	}
unlock:
	spin_unlock(lock);
out:
	rcu_read_unlock();
	return pages;
}

static bool is_suitable(const struct vm_area_struct *vma)
{
	return !(vma->vm_flags & (VM_PFNMAP | VM_IO | VM_MIXEDMAP | VM_HUGETLB)) &&
	       (vma->vm_flags & (VM_READ | VM_WRITE | VM_EXEC));
}

static void flush_here(void *unused)
{
	__flush_tlb_all();
}

/**
 * gate_pages - gate a process's absent pages
 * @mm: its memory
 * @absent: a bit for each frame that is absent
 * @frames: how many bits there are
 * @addr: where to go on; afterwards where to go on, 0 at the end
 * @gated: how many pages were gated
 */
int gate_pages(struct mm_struct *mm, const unsigned long *absent,
	       unsigned long frames, unsigned long *addr, u64 *gated)
{
	unsigned long at = *addr, entries = 0;
	struct vm_area_struct *vma;

	*gated = 0;
	*addr = 0;
	if (mmap_read_lock_killable(mm))
		return -EINTR;
	/*
	 * Until the flush a processor may still write by an entry that it
	 * remembers. Whoever takes the page away meanwhile must flush too.
	 */
	inc_tlb_flush_pending(mm);
	while ((vma = find_vma(mm, at)) != NULL) {
		unsigned long end = vma->vm_end;

		at = max(at, vma->vm_start);
		if (!is_suitable(vma)) {
			at = end;
			continue;
		}
		while (at < end && entries < ENTRIES_PER_CALL) {
			pmd_t *pmd = find_pmd(mm, at);
			unsigned long mask = pmd ? PMD_MASK : PUD_MASK;
			unsigned long next = min((at | ~mask) + 1, end);

			entries += 8;
			if (pmd && pmd_trans_huge(READ_ONCE(*pmd))) {
				*gated += gate_huge(vma, pmd, at, absent, frames);
			} else if (pmd) {
				entries += (next - at) >> PAGE_SHIFT;
				*gated += gate_table(vma, pmd, at, next, absent,
						     frames);
			}
			at = next;
			cond_resched();
		}
		if (entries >= ENTRIES_PER_CALL) {
			*addr = at;
			break;
		}
		entries += 8;
	}
	/* flush_tlb_mm_range() is not exported; this is wider, and seldom. */
	if (*gated)
		on_each_cpu(flush_here, NULL, 1);
	dec_tlb_flush_pending(mm);
	mmap_read_unlock(mm);
	return 0;
}

#endif /* GATE_POSSIBLE */
