/* SPDX-License-Identifier: MIT */
/* Starts the ranks, as threads or as processes, and lets them meet. */
#ifndef EPX_BENCH_LAUNCH_H
#define EPX_BENCH_LAUNCH_H

#include "bench_run.h"

#include <sched.h>

/* What one rank does; it ends the process with bench_rank_fail if it must. */
typedef void bench_rank_fn(const struct bench_run *run, int32_t rank,
                           const epx_bootstrap_t *bootstrap);

/* Runs `fn` on every rank and waits for all.  With processes, call it before
 * any thread is made.  False when a rank has failed: it, or *error when that
 * is not empty, has told why. */
bool bench_launch(const struct bench_run *run, bench_rank_fn *fn,
                  struct bench_error *error);

/* Cores that this process may use. */
int32_t bench_usable_cores(void);

#endif
