// SPDX-License-Identifier: GPL-2.0
/*
 * transhume: puts processes to sleep that touch pages which have not arrived.
 *
 * gate_pages.c makes the page-table entries of absent pages inaccessible,
 * gate_cache.c looks for absent pages in the page cache, and gate_wait.c has
 * whoever touches one wait. Here is who opens a gate, what they say of pages,
 * and what happens when they say nothing any more.
 *
 * There is one gate, because there is one hook. It is there only while somebody
 * keeps it open, and says so every second.
 */
#include <linux/atomic.h>
#include <linux/bitmap.h>
#include <linux/bitops.h>
#include <linux/jiffies.h>
#include <linux/math64.h>
#include <linux/mm.h>
#include <linux/mmzone.h>
#include <linux/mutex.h>
#include <linux/nodemask.h>
#include <linux/rcupdate.h>
#include <linux/sched/mm.h>
#include <linux/spinlock.h>
#include <linux/uaccess.h>
#include <linux/vmalloc.h>
#include <linux/wait.h>
#include <linux/workqueue.h>

#include "gate.h"
#include "tables.h"

#if GATE_POSSIBLE

#include <linux/cc_platform.h>

/* Nobody cared for so long: let everybody go, before a second has passed. */
#define PATIENCE	(HZ * 9 / 10)
/* The same while nothing is absent, and so nobody waits. */
#define IDLE_PATIENCE	(30 * HZ)
/* How often it is tried again to take the hook away. */
#define RETRY		(HZ / 10)

/* Serialises the calls below, but not the hook, nor letting go. */
static DEFINE_MUTEX(gate_lock);

struct gate gate = {
	.lock = __SPIN_LOCK_UNLOCKED(gate.lock),
	.emptied = __WAIT_QUEUE_HEAD_INITIALIZER(gate.emptied),
	.news = __WAIT_QUEUE_HEAD_INITIALIZER(gate.news),
};

static void gate_expire(struct work_struct *work);
static DECLARE_DELAYED_WORK(gate_watchdog, gate_expire);

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
	gate_unhook();
	vfree(gate.absent);
	gate.absent = NULL;
	mmdrop(gate.mm);
	gate.mm = NULL;
}

static void gate_expire(struct work_struct *work)
{
	unsigned long deadline = READ_ONCE(gate.deadline);
	unsigned long now = jiffies;

	if (gate_is_active() && time_before(now, deadline)) {
		schedule_delayed_work(&gate_watchdog, deadline - now);
		return;
	}
	if (gate_is_active())
		pr_warn("transhume: nobody tells what has arrived: processes wait no longer\n");
	let_go(TRANSHUME_GATE_EXPIRED);
	if (mutex_trylock(&gate_lock)) {
		if (!gate_is_active())
			gate_end(TRANSHUME_GATE_EXPIRED);
		mutex_unlock(&gate_lock);
	} else {
		/* A call is under way, perhaps of one who holds us up. */
		schedule_delayed_work(&gate_watchdog, RETRY);
	}
}

static void renew(void)
{
	unsigned long patience = gate.nr_absent || gate.walked ? PATIENCE :
								 IDLE_PATIENCE;

	WRITE_ONCE(gate.deadline, jiffies + patience);
	mod_delayed_work(system_wq, &gate_watchdog, patience);
}

/* No frame of this machine has this number, nor a higher one. */
static unsigned long frames_end(void)
{
	unsigned long end = 0;
	int node;

	for_each_online_node(node)
		end = max(end, node_end_pfn(node));
	return end;
}

static int gate_open(struct file *file, const void __user *arg)
{
	struct transhume_gate_open open;
	unsigned long *absent;
	int ret;

	/* First: another one's argument may be absent, and the lock is held. */
	if (gate.owner && gate.owner != file)
		return -EBUSY;
	if (copy_from_user(&open, arg, sizeof(open)))
		return -EFAULT;
	if (open.flags || open.reserved || !open.frames ||
	    open.frames > TRANSHUME_MAX_FRAMES)
		return -EINVAL;
	if (gate.absent)
		return gate_is_active() ? -EBUSY : -ESTALE;
	if (cc_platform_has(CC_ATTR_MEM_ENCRYPT)) {
		pr_warn("transhume: page faults cannot be put off in a guest with encrypted memory\n");
		return -EOPNOTSUPP;
	}

	open.frames = min_t(u64, open.frames, frames_end());
	absent = vzalloc(BITS_TO_LONGS(open.frames) * sizeof(*absent));
	if (!absent)
		return -ENOMEM;
	gate.absent = absent;
	gate.frames = open.frames;
	WRITE_ONCE(gate.state, TRANSHUME_GATE_NONE);
	gate.walked = false;
	gate.gated = 0;
	gate.nr_absent = 0;
	gate.named = 0;
	gate.first_wanted = 0;
	gate.nr_wanted = 0;
	gate.waits = 0;
	gate.interrupted = 0;
	gate.waited_ns = 0;
	gate.longest_ns = 0;
	gate.awake_ns = 0;
	gate_forget_faults();
	atomic64_set(&gate.passed, 0);
	ret = gate_hook();
	if (ret) {
		gate.absent = NULL;
		vfree(absent);
		return ret;
	}
	gate.mm = current->mm;
	mmgrab(gate.mm);
	gate.owner = file;
	/* The one before may have left its watchdog, with another deadline. */
	cancel_delayed_work_sync(&gate_watchdog);
	renew();
	smp_store_release(&gate.state, TRANSHUME_GATE_ACTIVE);
	return 0;
}

/* The frames from pfn on and below end that one word of the bitmap stands for. */
static unsigned long bits_of(unsigned long word, unsigned long pfn,
			     unsigned long end)
{
	unsigned long bits = ~0UL;

	if (word == BIT_WORD(pfn))
		bits &= BITMAP_FIRST_WORD_MASK(pfn);
	if (word == BIT_WORD(end - 1))
		bits &= BITMAP_LAST_WORD_MASK(end);
	return bits;
}

/* Nobody else writes to the bitmap, so whole words of it are written at once. */
static void mark_absent(unsigned long pfn, unsigned long end)
{
	unsigned long word;

	for (word = BIT_WORD(pfn); word <= BIT_WORD(end - 1); word++) {
		unsigned long old = gate.absent[word];
		unsigned long bits = bits_of(word, pfn, end) & ~old;

		WRITE_ONCE(gate.absent[word], old | bits);
		gate.nr_absent += hweight_long(bits);
		gate.named += hweight_long(bits);
	}
}

/* Wakes those who wait for frames of a word, which are not absent any more. */
static void wake_waiters(unsigned long word)
{
	wait_queue_head_t *queue = gate_queue(word * BITS_PER_LONG);

	/* Against set_current_state() in wait_for(), behind the hook's count. */
	smp_mb();
	if (atomic_read(&gate.inside) && waitqueue_active(queue))
		wake_up_all(queue);
}

static void mark_arrived(unsigned long pfn, unsigned long end)
{
	unsigned long word;

	for (word = BIT_WORD(pfn); word <= BIT_WORD(end - 1); word++) {
		unsigned long old = gate.absent[word];
		unsigned long bits = bits_of(word, pfn, end) & old;

		if (!bits)
			continue;
		WRITE_ONCE(gate.absent[word], old & ~bits);
		gate.nr_absent -= hweight_long(bits);
		wake_waiters(word);
	}
}

/* Calls mark() for each range of a list, as far as it lies within the frames. */
static int mark_list(const struct transhume_frame_list *list,
		     void (*mark)(unsigned long pfn, unsigned long end))
{
	const struct transhume_frames __user *from = u64_to_user_ptr(list->frames);
	struct transhume_frames some[16];
	u32 i, n, left;

	for (left = list->count; left; left -= n, from += n) {
		n = min_t(u32, left, ARRAY_SIZE(some));
		if (copy_from_user(some, from, n * sizeof(*some)))
			return -EFAULT;
		for (i = 0; i < n; i++) {
			u64 pfn = some[i].pfn, pages = some[i].pages;

			if (pfn >= gate.frames || !pages)
				continue;
			pages = min_t(u64, pages, gate.frames - pfn);
			mark(pfn, pfn + pages);
			cond_resched();
		}
	}
	return 0;
}

static int gate_walk(void __user *arg)
{
	struct transhume_gate_walk walk;
	struct mm_struct *mm;
	unsigned long addr;
	int ret;

	if (copy_from_user(&walk, arg, sizeof(walk)))
		return -EFAULT;
	if (walk.flags || walk.addr >= TASK_SIZE_MAX)
		return -EINVAL;
	mm = mm_of(walk.pid);
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
	/* If it was the last one's, that would be a lot of work. */
	mmput_async(mm);
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
			gate.first_wanted = (gate.first_wanted + 1) % GATE_WANTED;
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

static void gate_state(struct file *file, struct transhume_gate_state *state)
{
	struct gate_faults faults;
	u64 faults_ns;

	if (gate.owner != file)
		return;
	faults = gate_all_faults();
	faults_ns = faults.sampled_ns * GATE_SAMPLE;
	state->state = gate.state;
	state->waiting = atomic_read(&gate.inside);
	state->absent = gate.nr_absent;
	state->named = gate.named;
	state->gated = gate.gated;
	state->faults = faults.count;
	state->passed = atomic64_read(&gate.passed);
	spin_lock(&gate.lock);
	state->waits = gate.waits;
	state->interrupted = gate.interrupted;
	state->waited_us = div_u64(gate.waited_ns, NSEC_PER_USEC);
	state->longest_us = div_u64(gate.longest_ns, NSEC_PER_USEC);
	faults_ns += gate.awake_ns;
	spin_unlock(&gate.lock);
	state->faults_us = div_u64(faults_ns, NSEC_PER_USEC);
}

/* Calls of the one who has an open gate. */
static long gate_call(struct file *file, unsigned int cmd, void __user *arg)
{
	long ret;

	if (gate.owner != file || !gate.absent || !gate_is_active())
		return -ESTALE;
	if (cmd != TRANSHUME_GATE_WANTED)
		renew();
	ret = cmd == TRANSHUME_GATE_WALK ? gate_walk(arg) : gate_list(cmd, arg);
	/* The watchdog counts from the end of a call, too. */
	if (cmd != TRANSHUME_GATE_WANTED && gate_is_active())
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
	struct transhume_gate_state state = {};
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
		gate_state(file, &state);
		ret = 0;
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
	/* Not before: whoever asks may be one who has to wait. */
	if (cmd == TRANSHUME_GATE_STATE && !ret &&
	    copy_to_user(arg, &state, sizeof(state)))
		return -EFAULT;
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
	if (!gate_is_active())
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
	gate_hook_exit();
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
