/* SPDX-License-Identifier: GPL-2.0 */
/* Tests of processes that sleep for an absent page. */
#ifndef _SELFTEST_SLEEPERS_H
#define _SELFTEST_SLEEPERS_H

/* FOLDER is on a file system with a disk; MODULE may be NULL. */
void test_sleepers(const char *folder, const char *module);

#endif /* _SELFTEST_SLEEPERS_H */
