/* SPDX-License-Identifier: MIT */
/*
 * A soak: for as long as it is asked for, groups are made, used and destroyed.
 * Each of their turns draws another shape, layout and type, the results of
 * which are checked.  What a turn has taken of the heap must be back at its
 * end, and what a group has taken of the system after it.
 */
#ifndef EPX_BENCH_SOAK_H
#define EPX_BENCH_SOAK_H

#include "bench_launch.h"

#include <stdio.h>

bench_rank_fn bench_soak_rank;

/* One line, or with --json one object. */
void bench_soak_report(FILE *file, const struct bench_run *run);

#endif
