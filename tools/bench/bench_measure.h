/* SPDX-License-Identifier: MIT */
#ifndef EPX_BENCH_MEASURE_H
#define EPX_BENCH_MEASURE_H

#include "bench_launch.h"
#include "bench_rank.h"

/* Everything that one rank does: make its group, check if asked to, time the
 * operations, then the copies that they are held against.  The results go to
 * run->shared. */
bench_rank_fn bench_measure_rank;

/* One iteration on the inputs of a round, compared with the reference. */
void bench_measure_check(struct bench_rank *self, uint64_t round,
                         const char *what);

#endif
