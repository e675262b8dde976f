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

#include "gate.h"
#include "tables.h"

#if GATE_POSSIBLE

#ifdef CONFIG_ARCH_HAS_CC_PLATFORM
#include <asm/coco.h>
/*
 * pte_modify() wants the kernel's, which is not exported. It is 0 where memory
 * is not encrypted, and elsewhere gate.c refuses.
 */
u64 cc_mask;
#endif

/* A walk that gates what is absent. */
struct gate_walk {
	struct table_walk walk;
	const unsigned long *absent;
	unsigned long frames;
	u64 gated;
};

static bool any_absent(const struct gate_walk *walk, unsigned long pfn,
		       unsigned long pages)
{
	unsigned long end = min(pfn + pages, walk->frames);

	return pfn < end && find_next_bit(walk->absent, end, pfn) < end;
}

/**
 * gate_span_at - which frames an inaccessible entry maps
 * @mm: the process's memory; it or the area is locked
 * @addr: an address in it
 * @span: set to these frames; to none, unless there is such an entry
 *
 * Returns whether there is no entry at all.
 *
 * Like get_user_pages_fast() this looks with interrupts off and without the
 * page table's lock: that keeps tables from being freed, and an entry that
 * changes meanwhile only makes somebody wait or not wait who need or need not.
 */
bool gate_span_at(struct mm_struct *mm, unsigned long addr,
		  struct gate_span *span)
{
	bool none = false;
	unsigned long flags;
	pmd_t *pmd, middle;
	pte_t pte;

	*span = (struct gate_span){};
	local_irq_save(flags);
	pmd = find_pmd(mm, addr);
	middle = pmd ? READ_ONCE(*pmd) : __pmd(0);
	if (pmd_none(middle)) {
		none = true;
		goto out;
	}
	if (!pmd_present(middle))
		goto out;
	if (pmd_trans_huge(middle)) {
		if (pmd_protnone(middle)) {
			span->pfn = pmd_pfn(middle);
			span->pages = HPAGE_PMD_NR;
		}
		goto out;
	}
	if (pmd_bad(middle))
		goto out;
	pte = READ_ONCE(*pte_offset_kernel(&middle, addr));
	if (pte_protnone(pte)) {
		span->pfn = pte_pfn(pte);
		span->pages = 1;
	}
	none = pte_none(pte);
out:
	local_irq_restore(flags);
	return none;
}

static bool gate_huge(struct table_walk *table, struct vm_area_struct *vma,
		      pmd_t *pmd, unsigned long addr)
{
	struct gate_walk *walk = container_of(table, struct gate_walk, walk);
	pmd_t old = *pmd;

	if (!pmd_protnone(old) && any_absent(walk, pmd_pfn(old), HPAGE_PMD_NR)) {
		/* Takes the processor's accessed and dirty bits along. */
		old = pmdp_establish(vma, addr, pmd, pmd_mkinvalid(old));
		set_pmd_at(vma->vm_mm, addr, pmd, pmd_modify(old, PAGE_NONE));
		walk->gated += HPAGE_PMD_NR;
	}
	return true;
}

static bool gate_page(struct table_walk *table, struct vm_area_struct *vma,
		      pte_t *pte, unsigned long addr)
{
	struct gate_walk *walk = container_of(table, struct gate_walk, walk);
	pte_t old = READ_ONCE(*pte);

	if (pte_pfn(old) < walk->frames && test_bit(pte_pfn(old), walk->absent)) {
		old = ptep_modify_prot_start(vma, addr, pte);
		ptep_modify_prot_commit(vma, addr, pte, old,
					pte_modify(old, PAGE_NONE));
		walk->gated++;
	}
	return true;
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
	struct gate_walk walk = {
		.walk = { .huge = gate_huge, .page = gate_page },
		.absent = absent,
		.frames = frames,
	};

	*gated = 0;
	if (mmap_read_lock_killable(mm)) {
		*addr = 0;
		return -EINTR;
	}
	/*
	 * Until the flush a processor may still write by an entry that it
	 * remembers. Whoever takes the page away meanwhile must flush too.
	 */
	inc_tlb_flush_pending(mm);
	*addr = walk_tables(mm, &walk.walk, *addr);
	if (walk.gated)
		flush_tlbs();
	dec_tlb_flush_pending(mm);
	mmap_read_unlock(mm);
	*gated = walk.gated;
	return 0;
}

#endif /* GATE_POSSIBLE */
