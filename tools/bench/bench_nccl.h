/* SPDX-License-Identifier: MIT */
/*
 * What NCCL makes of the same bytes: each rank, on a card of its own, sends
 * every rank, itself too, as many as the rows have that EPX brings there, all
 * in one group of ncclSend and ncclRecv, from one buffer to another.  Nothing
 * is packed or summed.
 */
#ifndef EPX_BENCH_NCCL_H
#define EPX_BENCH_NCCL_H

#include "bench_rank.h"

/* One rank's communicator and buffers, NULL without --vs nccl; whatever fails
 * ends the process.  Collective, as all of these. */
struct bench_nccl *bench_nccl_open(const struct bench_rank *rank);
void bench_nccl_close(struct bench_nccl *nccl);

/* BENCH_NCCL_DISPATCH or BENCH_NCCL_COMBINE, in the rank's stream. */
void bench_nccl_start(struct bench_nccl *nccl, enum bench_op op);

#endif
