// SPDX-License-Identifier: GPL-2.0
/*
 * transhume: the hook that whoever touches an absent page runs into.
 *
 * handle_mm_fault() is hooked by ftrace, and so are calls that read and write
 * the page cache (gate_cache.c). Where a fault may be tried again, the process
 * sleeps until the page is there, and tries again. All else goes its usual
 * way, and stops the virtual CPU instead.
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

/** gate_sample - a touch begins; returns what gate_sampled() takes */
u64 notrace gate_sample(void)
{
	if (this_cpu_inc_return(gate_faults.count) % GATE_SAMPLE)
		return 0;
	return ktime_get_mono_fast_ns();
}

/**
 * gate_sampled - what the gate does for a touch is done, but for the sleep
 * @began: what gate_sample() returned
 */
void notrace gate_sampled(u64 began)
{
	u64 took;

	if (!began)
		return;
	took = ktime_get_mono_fast_ns() - began;
	this_cpu_add(gate_faults.sampled_ns, min_t(u64, took, GATE_LONGEST));
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
static void want(const struct gate_spans *spans)
{
	unsigned int i;

	spin_lock(&gate.lock);
	gate.waits++;
	for (i = 0; i < spans->count && gate.nr_wanted < GATE_WANTED; i++) {
		gate.wanted[(gate.first_wanted + gate.nr_wanted) % GATE_WANTED] =
			spans->at[i];
		gate.nr_wanted++;
	}
	spin_unlock(&gate.lock);
	wake_up_interruptible(&gate.news);
}

/**
 * gate_wait_for - sleep until frames are there
 * @spans: these
 * @state: by which signals the sleep ends
 *
 * Whoever calls is counted in gate.inside. Returns whether a signal ended it.
 */
bool gate_wait_for(const struct gate_spans *spans, unsigned int state)
{
	u64 began = ktime_get_ns(), slept = 0, took;
	bool signalled = false;
	unsigned int i = 0;

	want(spans);
	while (i < spans->count && !signalled && gate_is_active()) {
		struct gate_span span = spans->at[i];
		unsigned long pfn = first_absent(span);
		wait_queue_head_t *queue;
		DEFINE_WAIT(wait);

		if (pfn >= span.pfn + span.pages) {
			i++;
			continue;
		}
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
	return signalled;
}

/** gate_leave - one is not in gate.inside any more */
void gate_leave(void)
{
	if (atomic_dec_and_test(&gate.inside))
		wake_up(&gate.emptied);
}

/* What a fault is about to touch that is absent. The memory or area is locked. */
static void absent_at(struct vm_area_struct *vma, unsigned long addr,
		      unsigned int flags, struct gate_spans *spans)
{
	spans->count = 0;
	if (gate_span_at(vma->vm_mm, addr, &spans->at[0]))
		gate_cached_fault(vma, addr, flags, spans);
	else if (is_absent(spans->at[0]))
		spans->count = 1;
}

/* Stands in for handle_mm_fault(): waits, and has the fault tried again. */
static noinline vm_fault_t gate_fault(struct vm_area_struct *vma,
				      unsigned long addr, unsigned int flags,
				      struct pt_regs *regs)
{
	struct mm_struct *mm = vma->vm_mm;
	struct gate_spans spans;
	/* Only a fault of user space can end for any signal. */
	unsigned int state = (flags & FAULT_FLAG_USER) &&
			     (flags & FAULT_FLAG_INTERRUPTIBLE) ?
				     TASK_INTERRUPTIBLE : TASK_KILLABLE;

	absent_at(vma, addr, flags, &spans);
	/* Whoever has a fault tried again has let go of the lock. */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 4, 0)
	if (flags & FAULT_FLAG_VMA_LOCK)
		vma_end_read(vma);
	else
#endif
		mmap_read_unlock(mm);

	gate_wait_for(&spans, state);
	gate_leave();
	return VM_FAULT_RETRY;
}

static void notrace put_off_fault(struct pt_regs *regs)
{
	struct vm_area_struct *vma = (struct vm_area_struct *)regs->di;
	unsigned int flags = regs->dx;
	struct gate_spans spans;

	absent_at(vma, regs->si, flags, &spans);
	if (!spans.count)
		return;
	if (!(flags & FAULT_FLAG_ALLOW_RETRY) ||
	    (flags & FAULT_FLAG_RETRY_NOWAIT)) {
		atomic64_inc(&gate.passed);
		return;
	}
	atomic_inc(&gate.inside);
	regs->ip = (unsigned long)gate_fault;
}

static void notrace gate_hooked(unsigned long ip, unsigned long parent_ip,
				struct ftrace_ops *ops,
				struct ftrace_regs *fregs)
{
	struct pt_regs *regs = ftrace_get_regs(fregs);
	u64 began;

	if (!regs || !gate_is_active() || !READ_ONCE(gate.nr_absent))
		return;
	/* The one who says what has arrived must not wait for it. */
	if (current->mm == gate.mm || (current->flags & PF_KTHREAD))
		return;
	if (!gate_is_call_of(ip, (unsigned long)handle_mm_fault)) {
		/* Not one of gate_cache.c's own. */
		if (!within_module(parent_ip, THIS_MODULE))
			gate_cached_call(ip, regs);
		return;
	}
	if (((struct vm_area_struct *)regs->di)->vm_mm == gate.mm)
		return;
	began = gate_sample();
	put_off_fault(regs);
	gate_sampled(began);
}

static struct ftrace_ops gate_ops = {
	.func	= gate_hooked,
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
	/* By their names they would be looked for among all names of the kernel. */
	unsigned long ips[1 + GATE_CALLS] = { (unsigned long)handle_mm_fault };
	unsigned int count = 1 + gate_calls(ips + 1);
	int ret;

	ret = ftrace_set_filter_ips(&gate_ops, ips, count, 0, 1);
	if (!ret)
		ret = register_ftrace_function(&gate_ops);
	if (ret == -EBUSY)
		pr_warn("transhume: page faults cannot be put off: a livepatch, or another tracer, has replaced "
			"handle_mm_fault, or a call that reads or writes cached files\n");
	else if (ret)
		pr_warn("transhume: page faults cannot be put off: handle_mm_fault, or a call that reads or writes cached files, cannot be traced (%d)\n",
			ret);
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
