/* SPDX-License-Identifier: GPL-2.0 */
/* Processes that do what is hard on memory management, and check their data. */
#ifndef _SELFTEST_LOAD_H
#define _SELFTEST_LOAD_H

#include <stdint.h>

struct load;

/* Starts them; FOLDER is where one of them does O_DIRECT. */
struct load *load_start(const char *folder);
/* Ends them. Returns how many steps they did; 0 if one did not end. */
uint64_t load_end(struct load *load);
/* How often data was not what it had been. */
uint64_t load_errors(const struct load *load);

#endif /* _SELFTEST_LOAD_H */
