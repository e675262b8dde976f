// SPDX-License-Identifier: GPL-2.0
/*
 * transhume: the hook that a page fault on an absent page runs into.
 *
 * handle_mm_fault() is hooked by ftrace. Where the fault may be tried again,
 * the process sleeps until the page is there, and tries again. All else goes
 * its usual way, and stops the virtual CPU instead.
 */
#include <linux/ftrace.h>
#include <linux/ktime.h>
#include <linux/mm.h>
#include <linux/mmap_lock.h>
#include <linux/percpu.h>
#include <linux/sched/signal.h>
#include <linux/version.h>

#include "gate.h"

#if GATE_POSSIBLE

#define HOOKED		"handle_mm_fault"

static DEFINE_PER_CPU(struct gate_faults, gate_faults);

/** gate_forget_faults - begin to count; the hook is not there */
void gate_forget_faults(void)
{
	int cpu;

	for_each_possible_cpu(cpu)
		*per_cpu_ptr(&gate_faults, cpu) = (struct gate_faults){};
}

/** gate_all_faults - those of all processors, about: they go on meanwhile */
struct gate_faults gate_all_faults(void)
{
	struct gate_faults all = {};
	int cpu;

	for_each_possible_cpu(cpu) {
		const struct gate_faults *one = per_cpu_ptr(&gate_faults, cpu);

		all.count += READ_ONCE(one->count);
		all.sampled_ns += READ_ONCE(one->sampled_ns);
	}
	return all;
}

/* The first frame of a span that is absent, or the span's end. */
static unsigned long first_absent(struct gate_span span)
{
	unsigned long end = min(span.pfn + span.pages, gate.frames);

	if (span.pfn >= end)
		return span.pfn + span.pages;
	end = find_next_bit(gate.absent, end, span.pfn);
	return end < gate.frames ? end : span.pfn + span.pages;
}

static bool is_absent(struct gate_span span)
{
	return first_absent(span) < span.pfn + span.pages;
}

/* Somebody waits for these frames. If too many do, they come by themselves. */
static void want(struct gate_span span)
{
	spin_lock(&gate.lock);
	gate.waits++;
	if (gate.nr_wanted < GATE_WANTED) {
		gate.wanted[(gate.first_wanted + gate.nr_wanted) % GATE_WANTED] = span;
		gate.nr_wanted++;
	}
	spin_unlock(&gate.lock);
	wake_up_interruptible(&gate.news);
}

static void wait_for(struct gate_span span, unsigned int state)
{
	u64 began = ktime_get_ns(), slept = 0, took;
	unsigned long pfn;
	bool signalled = false;

	want(span);
	while (!signalled && gate_is_active()) {
		wait_queue_head_t *queue;
		DEFINE_WAIT(wait);

		pfn = first_absent(span);
		if (pfn >= span.pfn + span.pages)
			break;
		queue = gate_queue(pfn);
		prepare_to_wait(queue, &wait, state);
		signalled = signal_pending_state(state, current);
		if (!signalled && gate_is_active() && test_bit(pfn, gate.absent)) {
			u64 asleep = ktime_get_ns();

			schedule();
			slept += ktime_get_ns() - asleep;
		}
		finish_wait(queue, &wait);
	}
	took = ktime_get_ns() - began;

	spin_lock(&gate.lock);
	gate.interrupted += signalled;
	gate.waited_ns += took;
	gate.longest_ns = max(gate.longest_ns, took);
	gate.awake_ns += took - slept;
	spin_unlock(&gate.lock);
}

/* Stands in for handle_mm_fault(): waits, and has the fault tried again. */
static noinline vm_fault_t gate_fault(struct vm_area_struct *vma,
				      unsigned long addr, unsigned int flags,
				      struct pt_regs *regs)
{
	struct mm_struct *mm = vma->vm_mm;
	struct gate_span span = gate_span_at(mm, addr);
	/* Only a fault of user space can end for any signal. */
	unsigned int state = (flags & FAULT_FLAG_USER) &&
			     (flags & FAULT_FLAG_INTERRUPTIBLE) ?
				     TASK_INTERRUPTIBLE : TASK_KILLABLE;

	/* Whoever has a fault tried again has let go of the lock. */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 4, 0)
	if (flags & FAULT_FLAG_VMA_LOCK)
		vma_end_read(vma);
	else
#endif
		mmap_read_unlock(mm);

	wait_for(span, state);
	if (atomic_dec_and_test(&gate.inside))
		wake_up(&gate.emptied);
	return VM_FAULT_RETRY;
}

static void notrace put_off(struct pt_regs *regs)
{
	struct vm_area_struct *vma = (struct vm_area_struct *)regs->di;
	unsigned int flags = regs->dx;

	/* The one who says what has arrived must not wait for it. */
	if (vma->vm_mm == gate.mm || (current->flags & PF_KTHREAD) ||
	    !is_absent(gate_span_at(vma->vm_mm, regs->si)))
		return;
	if (!(flags & FAULT_FLAG_ALLOW_RETRY) ||
	    (flags & FAULT_FLAG_RETRY_NOWAIT)) {
		atomic64_inc(&gate.passed);
		return;
	}
	atomic_inc(&gate.inside);
	regs->ip = (unsigned long)gate_fault;
}

static void notrace fault_hook(unsigned long ip, unsigned long parent_ip,
			       struct ftrace_ops *ops, struct ftrace_regs *fregs)
{
	struct pt_regs *regs = ftrace_get_regs(fregs);
	u64 began, took;

	if (!regs || !gate_is_active())
		return;
	if (this_cpu_inc_return(gate_faults.count) % GATE_SAMPLE) {
		put_off(regs);
		return;
	}
	began = ktime_get_mono_fast_ns();
	put_off(regs);
	took = ktime_get_mono_fast_ns() - began;
	this_cpu_add(gate_faults.sampled_ns, min_t(u64, took, GATE_LONGEST));
}

static struct ftrace_ops gate_ops = {
	.func	= fault_hook,
	.flags	= FTRACE_OPS_FL_SAVE_REGS | FTRACE_OPS_FL_IPMODIFY |
		  FTRACE_OPS_FL_RECURSION,
};

/**
 * gate_hook - put the hook in place
 *
 * The kernel's log says why, if it cannot be.
 */
int gate_hook(void)
{
	int ret;

	/* By its name it would be looked for among all names of the kernel. */
	ret = ftrace_set_filter_ip(&gate_ops, (unsigned long)handle_mm_fault, 0,
				   1);
	if (!ret)
		ret = register_ftrace_function(&gate_ops);
	if (ret == -EBUSY)
		pr_warn("transhume: page faults cannot be put off: a livepatch, or another tracer, has replaced "
			HOOKED "\n");
	else if (ret)
		pr_warn("transhume: page faults cannot be put off: " HOOKED
			" cannot be traced (%d)\n", ret);
	return ret && ret != -EBUSY ? -EOPNOTSUPP : ret;
}

/**
 * gate_unhook - take the hook away, after everybody was woken
 *
 * Afterwards nobody is in the hook, nor between it and a next try.
 */
void gate_unhook(void)
{
	unregister_ftrace_function(&gate_ops);
	wait_event(gate.emptied, !atomic_read(&gate.inside));
}

/** gate_hook_exit - give back what the hook held */
void gate_hook_exit(void)
{
	ftrace_free_filter(&gate_ops);
}

#endif /* GATE_POSSIBLE */
