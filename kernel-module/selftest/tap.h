/* SPDX-License-Identifier: GPL-2.0 */
/* What tests need: a count of what holds, the device, and frames. */
#ifndef _SELFTEST_TAP_H
#define _SELFTEST_TAP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* Before the first check, and after the last one: the exit code. */
void tap_start(void);
int tap_end(void);

void check(bool ok, const char *what);
/* Whether a call failed with this error. */
void fails(long ret, int error, const char *what);
/* Opens the device. */
int device(void);
/* Memory that processes share. */
void *shared(size_t length);
/* The frame behind an address of a process; 0 if there is none. */
uint64_t frame(pid_t pid, const volatile void *at);

#endif /* _SELFTEST_TAP_H */
