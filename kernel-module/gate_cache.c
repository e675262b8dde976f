// SPDX-License-Identifier: GPL-2.0
/*
 * transhume: whoever is about to touch absent pages of the page cache.
 *
 * There is no entry of a page table to take away where the kernel itself copies
 * to or from the page cache for read(2), write(2) and sendfile(2), nor where a
 * page is not mapped yet. So calls that do the former are hooked, and a fault
 * that would map such pages is put off, too.
 */
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/iomap.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/pagemap.h>
#include <linux/ptrace.h>
#include <linux/sched/signal.h>
#include <linux/uio.h>
#include <linux/version.h>
#include <linux/xarray.h>

#include "gate.h"

#if GATE_POSSIBLE

/* Pages of a file that are looked at without a rest. */
#define PAGES_PER_LOOK	1024

/* Adds a frame; returns whether there is room for one more. */
static bool notrace add(struct gate_spans *spans, unsigned long pfn)
{
	struct gate_span *last = spans->count ? &spans->at[spans->count - 1] :
						NULL;

	if (last && last->pfn + last->pages == pfn)
		last->pages++;
	else
		spans->at[spans->count++] =
			(struct gate_span){ .pfn = pfn, .pages = 1 };
	return spans->count < GATE_AROUND;
}

/*
 * Finds absent pages of a file from first on up to last, and with mapped of all
 * of a huge page that they are of, as one entry maps it. Returns where to go on:
 * behind last, unless there was no more room.
 *
 * Nothing is held: a page that is taken away meanwhile only makes somebody wait
 * or not wait who need or need not.
 */
static pgoff_t notrace absent_cached(struct address_space *mapping,
				     pgoff_t first, pgoff_t last, bool mapped,
				     struct gate_spans *spans)
{
	XA_STATE(xas, &mapping->i_pages, first);
	struct folio *folio;
	pgoff_t next = first;

	spans->count = 0;
	rcu_read_lock();
	xas_for_each(&xas, folio, last) {
		pgoff_t begin, from, to;

		if (xas_retry(&xas, folio) || xa_is_value(folio))
			continue;
		begin = READ_ONCE(folio->index);
		to = begin + folio_nr_pages(folio) - 1;
		if (mapped && folio_test_pmd_mappable(folio)) {
			from = begin;
			to = min(to, begin + HPAGE_PMD_NR - 1);
		} else {
			from = max(begin, first);
			to = min(to, last);
		}
		for (next = from; next <= to; next++) {
			unsigned long pfn = folio_pfn(folio) + (next - begin);

			if (gate_has(pfn) && !add(spans, pfn)) {
				rcu_read_unlock();
				return next + 1;
			}
		}
	}
	rcu_read_unlock();
	return last + 1;
}

/**
 * gate_cached_fault - what a fault is about to map that is absent
 * @vma: the area
 * @addr: where in it; there is no entry
 * @flags: the fault's
 * @spans: set to these frames
 */
void notrace gate_cached_fault(struct vm_area_struct *vma, unsigned long addr,
			       unsigned int flags, struct gate_spans *spans)
{
	const unsigned long around = GATE_AROUND * PAGE_SIZE;
	unsigned long from = addr & PAGE_MASK, to = from;

	if (!vma->vm_file || !vma->vm_ops ||
	    vma->vm_flags & (VM_PFNMAP | VM_IO | VM_MIXEDMAP | VM_HUGETLB))
		return;
	/* As do_fault_around() has it: what it maps is not asked for again. */
	if (!(flags & FAULT_FLAG_WRITE) && vma->vm_ops->map_pages) {
		from = max(round_down(addr, around), vma->vm_start);
		to = min3(from + around, vma->vm_end,
			  (from & PMD_MASK) + PMD_SIZE) - PAGE_SIZE;
	}
	absent_cached(vma->vm_file->f_mapping, linear_page_index(vma, from),
		      linear_page_index(vma, to), true, spans);
}

/*
 * Waits until all cached pages of a part of a file are there. Whoever wants
 * that part wants all of it, and nothing of it is copied before.
 */
static int wait_for_cached(struct file *file, loff_t pos, size_t length,
			   bool may_sleep)
{
	pgoff_t next = (u64)pos >> PAGE_SHIFT;
	pgoff_t end = ((u64)pos + min_t(u64, length, MAX_RW_COUNT) +
		       PAGE_SIZE - 1) >> PAGE_SHIFT;
	struct gate_spans spans;
	int ret = 0;

	while (!ret && next < end && gate_is_active()) {
		pgoff_t last = min(next + PAGES_PER_LOOK, end) - 1;
		u64 began = gate_sample();

		next = absent_cached(file->f_mapping, next, last, false,
				     &spans);
		gate_sampled(began);
		cond_resched();
		if (!spans.count)
			continue;
		if (!may_sleep)
			ret = -EAGAIN;
		else if (gate_wait_for(&spans, TASK_KILLABLE))
			ret = -EINTR;
	}
	gate_leave();
	return ret;
}

static int wait_for_call(struct kiocb *iocb, struct iov_iter *iter)
{
	/* io_uring's second try (IOCB_WAITQ) comes without this flag. */
	return wait_for_cached(iocb->ki_filp, iocb->ki_pos, iov_iter_count(iter),
			       !(iocb->ki_flags & IOCB_NOWAIT));
}

static ssize_t gate_read(struct kiocb *iocb, struct iov_iter *iter,
			 ssize_t already)
{
	ssize_t ret = wait_for_call(iocb, iter);

	if (!ret)
		ret = filemap_read(iocb, iter, already);
	else if (already)
		ret = already;
	module_put(THIS_MODULE);
	return ret;
}

static ssize_t gate_write(struct kiocb *iocb, struct iov_iter *iter)
{
	ssize_t ret = wait_for_call(iocb, iter);

	if (!ret)
		ret = generic_perform_write(iocb, iter);
	module_put(THIS_MODULE);
	return ret;
}

#if IS_ENABLED(CONFIG_FS_IOMAP)
/* XFS's. */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 12, 0)
static ssize_t gate_iomap_write(struct kiocb *iocb, struct iov_iter *iter,
				const struct iomap_ops *ops, void *private)
{
	ssize_t ret = wait_for_call(iocb, iter);

	if (!ret)
		ret = iomap_file_buffered_write(iocb, iter, ops, private);
	module_put(THIS_MODULE);
	return ret;
}
#else
static ssize_t gate_iomap_write(struct kiocb *iocb, struct iov_iter *iter,
				const struct iomap_ops *ops)
{
	ssize_t ret = wait_for_call(iocb, iter);

	if (!ret)
		ret = iomap_file_buffered_write(iocb, iter, ops);
	module_put(THIS_MODULE);
	return ret;
}
#endif
#endif

#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 5, 0)
/* Before, sendfile(2) came by filemap_read(). */
static ssize_t gate_splice(struct file *file, loff_t *pos,
			   struct pipe_inode_info *pipe, size_t length,
			   unsigned int flags)
{
	ssize_t ret = wait_for_cached(file, *pos, length, true);

	if (!ret)
		ret = filemap_splice_read(file, pos, pipe, length, flags);
	module_put(THIS_MODULE);
	return ret;
}
#endif

/* What is hooked, and what stands in for it. */
static const struct {
	unsigned long call;
	unsigned long stand_in;
} calls[] = {
	{ (unsigned long)filemap_read, (unsigned long)gate_read },
	{ (unsigned long)generic_perform_write, (unsigned long)gate_write },
#if IS_ENABLED(CONFIG_FS_IOMAP)
	{ (unsigned long)iomap_file_buffered_write,
	  (unsigned long)gate_iomap_write },
#endif
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 5, 0)
	{ (unsigned long)filemap_splice_read, (unsigned long)gate_splice },
#endif
};

/**
 * gate_calls - which calls are to be hooked
 * @ips: set to their addresses; GATE_CALLS of them fit
 *
 * Returns how many there are.
 */
unsigned int gate_calls(unsigned long *ips)
{
	unsigned int i;

	BUILD_BUG_ON(ARRAY_SIZE(calls) > GATE_CALLS);
	for (i = 0; i < ARRAY_SIZE(calls); i++)
		ips[i] = calls[i].call;
	return i;
}

/**
 * gate_cached_call - have a call wait for what is absent
 * @ip: where it was hooked
 * @regs: where it goes on
 */
void notrace gate_cached_call(unsigned long ip, struct pt_regs *regs)
{
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(calls); i++) {
		if (!gate_is_call_of(ip, calls[i].call))
			continue;
		atomic_inc(&gate.inside);
		/* Until the call has ended: it may take longer than the gate. */
		__module_get(THIS_MODULE);
		regs->ip = calls[i].stand_in;
		return;
	}
}

#endif /* GATE_POSSIBLE */
