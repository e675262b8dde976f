// SPDX-License-Identifier: GPL-2.0
/*
 * A livepatch of the function that transhume.ko hooks, for its tests: it puts
 * the function's own body in its place.
 *
 * Disable it before it is taken out:
 *	echo 0 > /sys/kernel/livepatch/livepatch_test/enabled
 */
#include <linux/livepatch.h>
#include <linux/mm.h>
#include <linux/module.h>

/* The body behind the tracer's call, which stands first of all. */
static vm_fault_t (*body)(struct vm_area_struct *vma, unsigned long addr,
			  unsigned int flags, struct pt_regs *regs);

static vm_fault_t patched(struct vm_area_struct *vma, unsigned long addr,
			  unsigned int flags, struct pt_regs *regs)
{
	return body(vma, addr, flags, regs);
}

static struct klp_func functions[] = {
	{
		.old_name = "handle_mm_fault",
		.new_func = patched,
	},
	{ }
};

static struct klp_object objects[] = {
	{
		/* The kernel itself. */
		.funcs = functions,
	},
	{ }
};

static struct klp_patch patch = {
	.mod = THIS_MODULE,
	.objs = objects,
};

static int __init livepatch_test_init(void)
{
	const u32 endbr64 = 0xfa1e0ff3;
	unsigned long at = (unsigned long)handle_mm_fault;

	if (*(u32 *)at == endbr64)
		at += sizeof(endbr64);
	body = (void *)(at + MCOUNT_INSN_SIZE);
	return klp_enable_patch(&patch);
}
module_init(livepatch_test_init);

static void __exit livepatch_test_exit(void)
{
}
module_exit(livepatch_test_exit);

MODULE_DESCRIPTION("A livepatch of handle_mm_fault, for the tests of transhume.ko");
MODULE_LICENSE("GPL");
MODULE_INFO(livepatch, "Y");
