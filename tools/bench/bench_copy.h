/* SPDX-License-Identifier: MIT */
/*
 * What the memory of this machine allows: the ranks' workers, all at once, copy
 * as many bytes as an operation must read and write, between buffers of the
 * same kind as those of the operation.  The copies are made in blocks between
 * those of the timed iterations, since what the memory gives can change from
 * one second to the next.
 */
#ifndef EPX_BENCH_COPY_H
#define EPX_BENCH_COPY_H

#include "bench_rank.h"

struct bench_copier;

/* One rank's buffers and workers; whatever fails ends the process. */
struct bench_copier *bench_copy_open(const struct bench_rank *rank);
void bench_copy_close(struct bench_copier *copier);

/* Block 0..run->blocks-1, in that order, on every rank; the results go to
 * run->shared->copies. */
void bench_copy_block(struct bench_copier *copier, int32_t block);

#endif
