/* SPDX-License-Identifier: MIT */
/* The comparison of a rank's results with what a direct computation from the
 * inputs of all ranks gives, bit by bit. */
#ifndef EPX_BENCH_CHECK_H
#define EPX_BENCH_CHECK_H

#include "bench_rank.h"

struct bench_check;

/* Everything here ends the process, with a sentence, when it fails; `what`
 * names the iteration in it. */
struct bench_check *bench_check_open(const struct bench_rank *rank,
                                     uint64_t round);
void bench_check_close(struct bench_check *check);

/* What the plan must count on this rank; valid until closed. */
epx_plan_counts_t bench_check_counts(const struct bench_check *check);

void bench_check_plan(const struct bench_check *check,
                      const epx_plan_counts_t *counts, const char *what);

/* What dispatch and combine have left in the rank's buffers. */
void bench_check_results(const struct bench_check *check, const char *what);

#endif
