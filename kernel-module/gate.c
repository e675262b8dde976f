// SPDX-License-Identifier: GPL-2.0
/*
 * transhume: puts processes to sleep that touch pages which have not arrived.
 *
 * gate_pages.c makes the page-table entries of absent pages inaccessible. A
 * touch is then a page fault, and handle_mm_fault() is hooked by ftrace: where
 * the fault may be tried again, the process sleeps until the page is there, and
 * tries again. All else goes its usual way, and stops the virtual CPU instead.
 *
 * There is one gate, because there is one hook. It is there only while somebody
 * keeps it open, and says so every second.
 */
#include <linux/atomic.h>
#include <linux/ftrace.h>
#include <linux/hash.h>
#include <linux/jiffies.h>
#include <linux/ktime.h>
#include <linux/math64.h>
#include <linux/mm.h>
#include <linux/mmap_lock.h>
#include <linux/mutex.h>
#include <linux/pid.h>
#include <linux/rcupdate.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/spinlock.h>
#include <linux/uaccess.h>
#include <linux/version.h>
#include <linux/vmalloc.h>
#include <linux/wait.h>
#include <linux/workqueue.h>

#include "gate.h"

#if GATE_POSSIBLE

#include <linux/cc_platform.h>

#define HOOKED		"handle_mm_fault"
/* Nobody cared for so long: let everybody go. */
#define PATIENCE	HZ
/* How often it is tried again to take the hook away. */
#define RETRY		(HZ / 10)

#define QUEUE_BITS	8
/* Spans that processes wait for and nobody has fetched. */
#define WANTED		256

/* Serialises the calls below, but not the hook, nor letting go. */
static DEFINE_MUTEX(gate_lock);

static struct {
	/* Whose it is, also when it is over; NULL when nobody's. */
	struct file *owner;
	/* The owner's memory, whose faults are never put off. */
	struct mm_struct *mm;
	/* A bit a frame; NULL when the hook is not there. */
	unsigned long *absent;
	unsigned long frames;
	bool walked;
	/* TRANSHUME_GATE_*: nobody sleeps in another state than _ACTIVE. */
	int state;
	/* When the watchdog lets everybody go, in jiffies. */
	unsigned long deadline;
	u64 gated;
	u64 nr_absent;

	/* Processes between the hook and their next try. */
	atomic_t inside;
	wait_queue_head_t emptied;
	wait_queue_head_t queues[1 << QUEUE_BITS];

	/* Guards what follows. */
	spinlock_t lock;
	struct gate_span wanted[WANTED];
	unsigned int first_wanted;
	unsigned int nr_wanted;
	u64 waits;
	u64 interrupted;
	u64 waited_ns;
	u64 longest_ns;
	atomic64_t passed;
	/* For poll. */
	wait_queue_head_t news;
} gate = {
	.lock = __SPIN_LOCK_UNLOCKED(gate.lock),
	.emptied = __WAIT_QUEUE_HEAD_INITIALIZER(gate.emptied),
	.news = __WAIT_QUEUE_HEAD_INITIALIZER(gate.news),
};

static void gate_expire(struct work_struct *work);
static DECLARE_DELAYED_WORK(gate_watchdog, gate_expire);

static bool is_active(void)
{
	return READ_ONCE(gate.state) == TRANSHUME_GATE_ACTIVE;
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

static wait_queue_head_t *queue_of(unsigned long pfn)
{
	return &gate.queues[hash_long(pfn, QUEUE_BITS)];
}

/* Somebody waits for these frames. If too many do, they come by themselves. */
static void want(struct gate_span span)
{
	spin_lock(&gate.lock);
	gate.waits++;
	if (gate.nr_wanted < WANTED) {
		gate.wanted[(gate.first_wanted + gate.nr_wanted) % WANTED] = span;
		gate.nr_wanted++;
	}
	spin_unlock(&gate.lock);
	wake_up_interruptible(&gate.news);
}

static void wait_for(struct gate_span span, unsigned int state)
{
	u64 began = ktime_get_ns(), took;
	unsigned long pfn;
	bool signalled = false;

	want(span);
	while (!signalled && is_active()) {
		wait_queue_head_t *queue;
		DEFINE_WAIT(wait);

		pfn = first_absent(span);
		if (pfn >= span.pfn + span.pages)
			break;
		queue = queue_of(pfn);
		prepare_to_wait(queue, &wait, state);
		signalled = signal_pending_state(state, current);
		if (!signalled && is_active() && test_bit(pfn, gate.absent))
			schedule();
		finish_wait(queue, &wait);
	}
	took = ktime_get_ns() - began;

	spin_lock(&gate.lock);
	gate.interrupted += signalled;
	gate.waited_ns += took;
	gate.longest_ns = max(gate.longest_ns, took);
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

static void notrace gate_hook(unsigned long ip, unsigned long parent_ip,
			      struct ftrace_ops *ops, struct ftrace_regs *fregs)
{
	struct pt_regs *regs = ftrace_get_regs(fregs);
	struct vm_area_struct *vma;
	unsigned int flags;

	if (!regs || !is_active())
		return;
	vma = (struct vm_area_struct *)regs->di;
	flags = regs->dx;
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

static struct ftrace_ops gate_ops = {
	.func	= gate_hook,
	.flags	= FTRACE_OPS_FL_SAVE_REGS | FTRACE_OPS_FL_IPMODIFY |
		  FTRACE_OPS_FL_RECURSION,
};

/* Wakes everybody for good. Needs no lock, so nothing can hold it up. */
static void let_go(int state)
{
	unsigned int i;

	if (cmpxchg(&gate.state, TRANSHUME_GATE_ACTIVE, state) !=
	    TRANSHUME_GATE_ACTIVE)
		return;
	for (i = 0; i < ARRAY_SIZE(gate.queues); i++)
		wake_up_all(&gate.queues[i]);
	wake_up_interruptible(&gate.news);
}

/* Lets everybody go and takes the hook away. */
static void gate_end(int state)
{
	lockdep_assert_held(&gate_lock);
	let_go(state);
	if (!gate.absent)
		return;
	/* Afterwards nobody is in the hook, and those behind it are few. */
	unregister_ftrace_function(&gate_ops);
	wait_event(gate.emptied, !atomic_read(&gate.inside));
	vfree(gate.absent);
	gate.absent = NULL;
	mmdrop(gate.mm);
	gate.mm = NULL;
}

static void gate_expire(struct work_struct *work)
{
	unsigned long deadline = READ_ONCE(gate.deadline);

	if (is_active() && time_before(jiffies, deadline)) {
		schedule_delayed_work(&gate_watchdog, deadline - jiffies);
		return;
	}
	if (is_active())
		pr_warn("transhume: nobody tells what has arrived: processes wait no longer\n");
	let_go(TRANSHUME_GATE_EXPIRED);
	if (mutex_trylock(&gate_lock)) {
		if (!is_active())
			gate_end(TRANSHUME_GATE_EXPIRED);
		mutex_unlock(&gate_lock);
	} else {
		/* A call is under way, perhaps of one who holds us up. */
		schedule_delayed_work(&gate_watchdog, RETRY);
	}
}

static void renew(void)
{
	WRITE_ONCE(gate.deadline, jiffies + PATIENCE);
	mod_delayed_work(system_wq, &gate_watchdog, PATIENCE);
}

static int install_hook(void)
{
	int ret;

	ret = ftrace_set_filter(&gate_ops, HOOKED, strlen(HOOKED), 1);
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

static int gate_open(struct file *file, const void __user *arg)
{
	struct transhume_gate_open open;
	unsigned long *absent;
	int ret;

	if (copy_from_user(&open, arg, sizeof(open)))
		return -EFAULT;
	if (open.flags || open.reserved || !open.frames ||
	    open.frames > TRANSHUME_MAX_FRAMES)
		return -EINVAL;
	if (gate.owner && gate.owner != file)
		return -EBUSY;
	if (gate.absent)
		return is_active() ? -EBUSY : -ESTALE;
	if (cc_platform_has(CC_ATTR_MEM_ENCRYPT)) {
		pr_warn("transhume: page faults cannot be put off in a guest with encrypted memory\n");
		return -EOPNOTSUPP;
	}

	absent = vzalloc(BITS_TO_LONGS(open.frames) * sizeof(*absent));
	if (!absent)
		return -ENOMEM;
	gate.absent = absent;
	gate.frames = open.frames;
	WRITE_ONCE(gate.state, TRANSHUME_GATE_NONE);
	gate.walked = false;
	gate.gated = 0;
	gate.nr_absent = 0;
	gate.first_wanted = 0;
	gate.nr_wanted = 0;
	gate.waits = 0;
	gate.interrupted = 0;
	gate.waited_ns = 0;
	gate.longest_ns = 0;
	atomic64_set(&gate.passed, 0);
	ret = install_hook();
	if (ret) {
		gate.absent = NULL;
		vfree(absent);
		return ret;
	}
	gate.mm = current->mm;
	mmgrab(gate.mm);
	gate.owner = file;
	smp_store_release(&gate.state, TRANSHUME_GATE_ACTIVE);
	renew();
	return 0;
}

static void mark_absent(unsigned long pfn, unsigned long end)
{
	for (; pfn < end; pfn++)
		gate.nr_absent += !test_and_set_bit(pfn, gate.absent);
}

static void mark_arrived(unsigned long pfn, unsigned long end)
{
	for_each_set_bit_from(pfn, gate.absent, end) {
		wait_queue_head_t *queue = queue_of(pfn);

		clear_bit(pfn, gate.absent);
		gate.nr_absent--;
		/* Against prepare_to_wait() in wait_for(). */
		smp_mb__after_atomic();
		if (waitqueue_active(queue))
			wake_up_all(queue);
	}
}

/* Calls mark() for each range of a list, as far as it lies within the frames. */
static int mark_list(const struct transhume_frame_list *list,
		     void (*mark)(unsigned long pfn, unsigned long end))
{
	const struct transhume_frames __user *from = u64_to_user_ptr(list->frames);
	u32 i;

	for (i = 0; i < list->count; i++) {
		struct transhume_frames frames;

		if (copy_from_user(&frames, from + i, sizeof(frames)))
			return -EFAULT;
		if (frames.pfn >= gate.frames)
			continue;
		frames.pages = min_t(u64, frames.pages, gate.frames - frames.pfn);
		mark(frames.pfn, frames.pfn + frames.pages);
		cond_resched();
	}
	return 0;
}

static int gate_walk(void __user *arg)
{
	struct transhume_gate_walk walk;
	struct task_struct *task;
	struct mm_struct *mm;
	unsigned long addr;
	struct pid *pid;
	int ret;

	if (copy_from_user(&walk, arg, sizeof(walk)))
		return -EFAULT;
	if (walk.flags || walk.addr >= TASK_SIZE_MAX)
		return -EINVAL;
	pid = find_get_pid(walk.pid);
	task = get_pid_task(pid, PIDTYPE_PID);
	put_pid(pid);
	if (!task)
		return -ESRCH;
	mm = get_task_mm(task);
	put_task_struct(task);
	if (!mm)
		return -ESRCH;

	gate.walked = true;
	addr = walk.addr;
	walk.gated = 0;
	ret = 0;
	if (mm == gate.mm)
		addr = 0;
	else
		ret = gate_pages(mm, gate.absent, gate.frames, &addr, &walk.gated);
	mmput(mm);
	walk.addr = addr;
	gate.gated += walk.gated;
	if (!ret && copy_to_user(arg, &walk, sizeof(walk)))
		ret = -EFAULT;
	return ret;
}

static long gate_wanted(const struct transhume_frame_list *list)
{
	struct transhume_frames __user *to = u64_to_user_ptr(list->frames);
	u32 i;

	for (i = 0; i < list->count; i++) {
		struct transhume_frames frames = {};

		spin_lock(&gate.lock);
		if (gate.nr_wanted) {
			struct gate_span *span = &gate.wanted[gate.first_wanted];

			frames.pfn = span->pfn;
			frames.pages = span->pages;
			gate.first_wanted = (gate.first_wanted + 1) % WANTED;
			gate.nr_wanted--;
		}
		spin_unlock(&gate.lock);
		if (!frames.pages)
			break;
		if (copy_to_user(to + i, &frames, sizeof(frames)))
			return -EFAULT;
	}
	return i;
}

static long gate_list(unsigned int cmd, const void __user *arg)
{
	struct transhume_frame_list list;

	if (copy_from_user(&list, arg, sizeof(list)))
		return -EFAULT;
	if (list.flags || list.count > TRANSHUME_MAX_RANGES)
		return -EINVAL;
	if (cmd == TRANSHUME_GATE_WANTED)
		return gate_wanted(&list);
	if (cmd == TRANSHUME_GATE_ARRIVED)
		return mark_list(&list, mark_arrived);
	/* What has arrived once must not be absent again: who would say more? */
	return gate.walked ? -EBUSY : mark_list(&list, mark_absent);
}

static int gate_state(struct file *file, void __user *arg)
{
	struct transhume_gate_state state = {};

	if (gate.owner == file) {
		state.state = gate.state;
		state.waiting = atomic_read(&gate.inside);
		state.absent = gate.nr_absent;
		state.gated = gate.gated;
		state.passed = atomic64_read(&gate.passed);
		spin_lock(&gate.lock);
		state.waits = gate.waits;
		state.interrupted = gate.interrupted;
		state.waited_us = div_u64(gate.waited_ns, NSEC_PER_USEC);
		state.longest_us = div_u64(gate.longest_ns, NSEC_PER_USEC);
		spin_unlock(&gate.lock);
	}
	return copy_to_user(arg, &state, sizeof(state)) ? -EFAULT : 0;
}

/* Calls of the one who has an open gate. */
static long gate_call(struct file *file, unsigned int cmd, void __user *arg)
{
	long ret;

	if (gate.owner != file || !gate.absent || !is_active())
		return -ESTALE;
	if (cmd != TRANSHUME_GATE_WANTED)
		renew();
	ret = cmd == TRANSHUME_GATE_WALK ? gate_walk(arg) : gate_list(cmd, arg);
	/* The watchdog counts from the end of a call, too. */
	if (cmd != TRANSHUME_GATE_WANTED && is_active())
		renew();
	return ret;
}

/**
 * gate_ioctl - a call about the gate
 * @file: whose
 * @cmd: TRANSHUME_GATE_*
 * @arg: its argument
 */
long gate_ioctl(struct file *file, unsigned int cmd, void __user *arg)
{
	long ret;

	if (mutex_lock_killable(&gate_lock))
		return -EINTR;
	switch (cmd) {
	case TRANSHUME_GATE_OPEN:
		ret = gate_open(file, arg);
		break;
	case TRANSHUME_GATE_ABSENT:
	case TRANSHUME_GATE_WALK:
	case TRANSHUME_GATE_ARRIVED:
	case TRANSHUME_GATE_WANTED:
		ret = gate_call(file, cmd, arg);
		break;
	case TRANSHUME_GATE_STATE:
		ret = gate_state(file, arg);
		break;
	case TRANSHUME_GATE_RELEASE:
		if (gate.owner == file)
			gate_end(TRANSHUME_GATE_RELEASED);
		ret = 0;
		break;
	default:
		ret = -ENOTTY;
	}
	mutex_unlock(&gate_lock);
	return ret;
}

/**
 * gate_poll - whether there is news
 * @file: whose
 * @wait: where to wait for it
 */
__poll_t gate_poll(struct file *file, struct poll_table_struct *wait)
{
	__poll_t mask = 0;

	poll_wait(file, &gate.news, wait);
	if (READ_ONCE(gate.owner) != file)
		return 0;
	if (!is_active())
		mask |= EPOLLHUP;
	else if (READ_ONCE(gate.nr_wanted))
		mask |= EPOLLIN | EPOLLRDNORM;
	return mask;
}

/**
 * gate_close - a file is closed, and its gate with it
 * @file: the file
 */
void gate_close(struct file *file)
{
	mutex_lock(&gate_lock);
	if (gate.owner == file) {
		gate_end(TRANSHUME_GATE_RELEASED);
		gate.owner = NULL;
		WRITE_ONCE(gate.state, TRANSHUME_GATE_NONE);
	}
	mutex_unlock(&gate_lock);
}

/** gate_init - before the device is there */
void gate_init(void)
{
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(gate.queues); i++)
		init_waitqueue_head(&gate.queues[i]);
}

/** gate_exit - no file is open any more, and none can be opened */
void gate_exit(void)
{
	cancel_delayed_work_sync(&gate_watchdog);
	/* Whoever was woken last may still be on its way out of gate_fault(). */
	synchronize_rcu_tasks();
	ftrace_free_filter(&gate_ops);
}

#else /* !GATE_POSSIBLE */

long gate_ioctl(struct file *file, unsigned int cmd, void __user *arg)
{
	if (cmd == TRANSHUME_GATE_STATE)
		return clear_user(arg, sizeof(struct transhume_gate_state)) ?
			       -EFAULT : 0;
	pr_warn_once("transhume: page faults cannot be put off: this kernel has no CONFIG_NUMA_BALANCING or cannot patch functions\n");
	return cmd == TRANSHUME_GATE_OPEN ? -EOPNOTSUPP : -ESTALE;
}

__poll_t gate_poll(struct file *file, struct poll_table_struct *wait)
{
	return 0;
}

void gate_close(struct file *file)
{
}

void gate_init(void)
{
}

void gate_exit(void)
{
}

#endif /* GATE_POSSIBLE */
