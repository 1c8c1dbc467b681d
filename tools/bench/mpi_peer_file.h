/* SPDX-License-Identifier: MIT */
/* The file in which epx-bench tells its MPI peer what to do, so that both do
 * the same.  Behind the head: for each rank its [T, K] int64_t expert indices,
 * then for each rank its [T, K] float weights. */
#ifndef EPX_BENCH_MPI_PEER_FILE_H
#define EPX_BENCH_MPI_PEER_FILE_H

#include <epx/epx.h>
#include <stdint.h>

#define MPI_PEER_MAGIC 0x31507845u

struct mpi_peer_file {
    uint32_t magic;
    int32_t ranks;
    int32_t topk;
    int32_t experts;
    int32_t layout;        /* epx_layout_t */
    int32_t elem_bytes;    /* of a dispatched element */
    int32_t combine_bytes; /* of a combined one: 2 for bf16, 4 for f32 */
    int32_t num_scales;    /* per row, 4 bytes each */
    int32_t iters;
    int32_t warmup;
    int64_t hidden;
    int64_t max_tokens;                       /* of any rank */
    int64_t tokens_before[EPX_MAX_RANKS + 1]; /* of the ranks below each */
};

/* What the peer prints for each operation: its name, then min, p50 and p99 in
 * microseconds. */
#define MPI_PEER_LINE "epx-bench-mpi-peer %15s %lf %lf %lf"

#endif
