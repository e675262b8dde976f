/* SPDX-License-Identifier: GPL-2.0 */
/*
 * transhume: the page tables of processes.
 */
#ifndef _TRANSHUME_TABLES_H
#define _TRANSHUME_TABLES_H

#include <linux/kconfig.h>
#include <linux/mm_types.h>
#include <linux/pgtable.h>
#include <linux/types.h>

/* Bits of entries are changed as this processor has them. */
#if IS_ENABLED(CONFIG_X86_64)
#define TABLES_POSSIBLE	1
#else
#define TABLES_POSSIBLE	0
#endif

struct vm_area_struct;

/**
 * struct table_walk - what to do with each entry that maps memory of a process
 * @huge: called for a huge one
 * @page: called for another one
 *
 * Both are called with the table locked, and return whether to go on; if not,
 * the walk goes on with the same entry later.
 */
struct table_walk {
	bool (*huge)(struct table_walk *walk, struct vm_area_struct *vma,
		     pmd_t *pmd, unsigned long addr);
	bool (*page)(struct table_walk *walk, struct vm_area_struct *vma,
		     pte_t *pte, unsigned long addr);
};

pmd_t *find_pmd(struct mm_struct *mm, unsigned long addr);
unsigned long walk_tables(struct mm_struct *mm, struct table_walk *walk,
			  unsigned long addr);
struct mm_struct *mm_of(pid_t number);
void flush_tlbs(void);

#endif /* _TRANSHUME_TABLES_H */
