/* SPDX-License-Identifier: MIT */
/* Small facts of the system, read where the kernel tells them. */
#ifndef EPX_INFO_SYSTEM_H
#define EPX_INFO_SYSTEM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The first line of a file, without its end; false if it cannot be read. */
bool epx__read_line(const char *path, char *line, size_t size);

/* The value of a "name : value" line of a file such as /proc/cpuinfo. */
bool epx__read_field(const char *path, const char *name, char *value,
                     size_t size);

/* A number that may be followed by a unit: "32K", "16384 kB", "max".  Zero when
 * it is neither; "max" is UINT64_MAX. */
uint64_t epx__parse_size(const char *text);

/* The word that a choice such as "always [madvise] never" has in brackets. */
bool epx__read_choice(const char *path, char *word, size_t size);

/* Bytes of the data cache of a level (1, 2, 3) of the first core; 0: none. */
uint64_t epx__cache_bytes(int level);

/* The sizes of huge pages that the kernel knows, ascending; returns how many.
 */
size_t epx__huge_page_sizes(uint64_t *sizes, size_t max);

/* What the control group (version 2) of this process allows; UINT64_MAX: any.
 */
uint64_t epx__cgroup_memory_bytes(void);

#endif
