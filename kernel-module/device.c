// SPDX-License-Identifier: GPL-2.0
/*
 * transhume: /dev/transhume
 */
#include <linux/capability.h>
#include <linux/fs.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "classes.h"
#include "gate.h"
#include "report.h"
#include "transhume.h"

/* One open: nothing is shared between two. */
struct transhume_file {
	struct mutex lock;
	struct report report;
};

static int transhume_open(struct inode *inode, struct file *file)
{
	struct transhume_file *tf;

	/* Page frame numbers are worth hiding, as in /proc/pid/pagemap. */
	if (!capable(CAP_SYS_ADMIN))
		return -EPERM;

	tf = kvzalloc(sizeof(*tf), GFP_KERNEL_ACCOUNT);
	if (!tf)
		return -ENOMEM;

	mutex_init(&tf->lock);
	file->private_data = tf;
	return nonseekable_open(inode, file);
}

static int transhume_release(struct inode *inode, struct file *file)
{
	struct transhume_file *tf = file->private_data;

	gate_close(file);
	report_drop(&tf->report);
	mutex_destroy(&tf->lock);
	kvfree(tf);
	return 0;
}

static ssize_t transhume_read(struct file *file, char __user *buf, size_t len,
			      loff_t *pos)
{
	struct transhume_file *tf = file->private_data;
	ssize_t ret;

	if (mutex_lock_interruptible(&tf->lock))
		return -ERESTARTSYS;
	ret = report_read(&tf->report, buf, len);
	mutex_unlock(&tf->lock);
	return ret;
}

static long transhume_start(struct transhume_file *tf, void __user *arg)
{
	struct transhume_start start;

	if (copy_from_user(&start, arg, sizeof(start)))
		return -EFAULT;
	if (start.flags)
		return -EINVAL;
	return report_start(&tf->report, start.fd);
}

static long transhume_counts(struct transhume_file *tf, void __user *arg)
{
	if (copy_to_user(arg, &tf->report.counts, sizeof(tf->report.counts)))
		return -EFAULT;
	return 0;
}

static long transhume_ioctl(struct file *file, unsigned int cmd,
			    unsigned long arg)
{
	struct transhume_file *tf = file->private_data;
	void __user *uarg = (void __user *)arg;
	long ret;

	if (cmd == TRANSHUME_VERSION)
		return TRANSHUME_ABI_VERSION;
	/* These two keep nothing between two calls. */
	if (cmd == TRANSHUME_CLASSES)
		return classes_ioctl(uarg);
	if (cmd == TRANSHUME_TOUCHED)
		return touched_ioctl(uarg);
	if (_IOC_TYPE(cmd) == TRANSHUME_IOC_MAGIC &&
	    _IOC_NR(cmd) >= _IOC_NR(TRANSHUME_GATE_OPEN))
		return gate_ioctl(file, cmd, uarg);

	if (mutex_lock_interruptible(&tf->lock))
		return -ERESTARTSYS;
	switch (cmd) {
	case TRANSHUME_START:
		ret = transhume_start(tf, uarg);
		break;
	case TRANSHUME_COUNTS:
		ret = transhume_counts(tf, uarg);
		break;
	default:
		ret = -ENOTTY;
	}
	mutex_unlock(&tf->lock);
	return ret;
}

static const struct file_operations transhume_fops = {
	.owner		= THIS_MODULE,
	.open		= transhume_open,
	.release	= transhume_release,
	.read		= transhume_read,
	.poll		= gate_poll,
	.unlocked_ioctl	= transhume_ioctl,
	.compat_ioctl	= compat_ptr_ioctl,
};

static struct miscdevice transhume_device = {
	.minor	= MISC_DYNAMIC_MINOR,
	.name	= "transhume",
	.fops	= &transhume_fops,
	.mode	= 0600,
};

static int __init transhume_init(void)
{
	gate_init();
	return misc_register(&transhume_device);
}
module_init(transhume_init);

static void __exit transhume_exit(void)
{
	misc_deregister(&transhume_device);
	gate_exit();
}
module_exit(transhume_exit);

MODULE_DESCRIPTION("Page-cache report and deferred page faults for live migration");
MODULE_LICENSE("GPL");
MODULE_VERSION("0.1.0");
