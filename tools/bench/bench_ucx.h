/* SPDX-License-Identifier: MIT */
/*
 * What the network allows: the ranks send one another the rows that must cross
 * it, by UCX with the settings that EPX uses, from one buffer to another and
 * with nothing around them.  The transfers are made in blocks between those of
 * the timed iterations, and in each way that UCX has.
 */
#ifndef EPX_BENCH_UCX_H
#define EPX_BENCH_UCX_H

#include "bench_rank.h"

struct bench_ucx;

/* One rank's links and buffers, NULL without --vs ucx; whatever fails ends the
 * process.  Collective, as all of these. */
struct bench_ucx *bench_ucx_open(const struct bench_rank *rank);
void bench_ucx_close(struct bench_ucx *ucx);

/* Block 0..run->blocks-1; the results go to run->shared->transfers. */
void bench_ucx_block(struct bench_ucx *ucx, int32_t block);

#endif
