/* SPDX-License-Identifier: MIT */
/* One rank: its group, its buffers and what is in them. */
#ifndef EPX_BENCH_RANK_H
#define EPX_BENCH_RANK_H

#include "bench_run.h"

struct bench_rank {
    const struct bench_run *run;
    int32_t rank;
    int64_t tokens; /* T */
    epx_group_t *group;
    epx_plan_t *plan;
    struct bench_progress progress; /* of rank 0 */

    /* Inputs of the current round. */
    uint64_t round;
    int64_t *idx;   /* [T, K] */
    float *weights; /* [T, K] */
    void *x;        /* [T, H] */
    void *scales;   /* [T, S] words of 4 bytes, or NULL */

    /* [recv_rows, ...] */
    void *recv_x;
    void *recv_scales;  /* or NULL */
    void *recv_idx;     /* RANK_MAJOR or NULL */
    void *recv_weights; /* float */
    void *outputs;      /* of the experts: what combine sends */

    void *out; /* [T, H] */
};

/* Every failure ends the process. */
void bench_rank_open(struct bench_rank *self, const struct bench_run *run,
                     int32_t rank, const epx_bootstrap_t *bootstrap);
void bench_rank_close(struct bench_rank *self);

/* Ends the process when a call has failed. */
void bench_rank_check(const struct bench_rank *self, epx_status_t status);

/* An array where --buffers says, from the system as it is touched.  NULL may be
 * given back. */
void *bench_rank_take(const struct bench_rank *self, int64_t rows,
                      size_t row_bytes);
void bench_rank_give_back(const struct bench_rank *self, void *ptr,
                          int64_t rows, size_t row_bytes);

/* The routing and the tokens of a round. */
void bench_rank_set_round(struct bench_rank *self, uint64_t round);
/* The experts' outputs for it, in the rows that `counts` tells of. */
void bench_rank_set_outputs(struct bench_rank *self,
                            const epx_plan_counts_t *counts);

epx_plan_args_t bench_rank_plan_args(const struct bench_rank *self);
epx_dispatch_args_t bench_rank_dispatch_args(const struct bench_rank *self);
epx_combine_args_t bench_rank_combine_args(const struct bench_rank *self);

/* Inputs are functions of the seed, so that any rank can tell those of all:
 * one token's row and scales (may be NULL), and one row of expert outputs. */
void bench_data_token(const struct bench_run *run, int32_t rank, uint64_t round,
                      int64_t token, void *row, uint32_t *scales);
void bench_data_output(const struct bench_run *run, int32_t rank,
                       uint64_t round, int64_t row, void *x);

#endif
