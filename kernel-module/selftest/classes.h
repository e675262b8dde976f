/* SPDX-License-Identifier: GPL-2.0 */
/* Tests of classes of frames, and of what a process touches. */
#ifndef _SELFTEST_CLASSES_H
#define _SELFTEST_CLASSES_H

#include <stdint.h>

/* FOLDER is on a file system with a disk. */
void test_classes(const char *folder);
void test_touched(void);
/* Asks for everything once, while others are at work. */
void look_around(int dev, uint64_t frames);

#endif /* _SELFTEST_CLASSES_H */
