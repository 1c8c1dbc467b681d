/* SPDX-License-Identifier: MIT */
/* The cores that a rank may run on, and how many ranks it shares them with. */
#ifndef EPX_CORE_CORES_H
#define EPX_CORE_CORES_H

#include <stdbool.h>
#include <stdint.h>

typedef struct epx__cores {
    uint64_t words[16]; /* a set of cores: bits */
    int32_t count;
} epx__cores_t;

/* The calling thread's.  On machines with more than 1024 cores, where the set
 * does not fit, it is empty but counted. */
epx__cores_t epx__cores_get(void);

/* Whether some core is in both; sets that did not fit are taken to overlap. */
bool epx__cores_overlap(const epx__cores_t *a, const epx__cores_t *b);

#endif
