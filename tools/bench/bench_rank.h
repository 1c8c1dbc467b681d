/* SPDX-License-Identifier: MIT */
/* One rank: its group, its buffers and what is in them. */
#ifndef EPX_BENCH_RANK_H
#define EPX_BENCH_RANK_H

#include "bench_card.h"

/* Inputs of the current round, [T, ...]. */
enum bench_array_id {
    BENCH_IDX,     /* [T, K] */
    BENCH_WEIGHTS, /* [T, K] */
    BENCH_X,       /* [T, H] */
    BENCH_SCALES,  /* [T, S] words of 4 bytes */
    /* What arrives, [recv_rows, ...]. */
    BENCH_RECV_X,
    BENCH_RECV_SCALES,
    BENCH_RECV_IDX,     /* in RANK_MAJOR */
    BENCH_RECV_WEIGHTS, /* of float */
    BENCH_OUTPUTS,      /* of the experts: what combine sends */
    BENCH_OUT,          /* [T, H] */
    BENCH_NUM_ARRAYS,
};

/* With a CPU group both are the same place; a card's array has a twin on the
 * host, for filling and checking.  NULL where the options need no such array.
 */
struct bench_array {
    void *place; /* for EPX */
    void *host;
    int64_t rows;
    size_t row_bytes;
};

struct bench_rank {
    const struct bench_run *run;
    int32_t rank;
    int64_t tokens;          /* T */
    struct bench_card *card; /* NULL with a CPU group */
    epx_group_t *group;
    epx_plan_t *plan;
    struct bench_nccl *nccl;        /* NULL without --vs nccl */
    struct bench_progress progress; /* of rank 0 */
    uint64_t round;                 /* of the inputs */
    struct bench_array arrays[BENCH_NUM_ARRAYS];
};

/* Every failure ends the process. */
void bench_rank_open(struct bench_rank *self, const struct bench_run *run,
                     int32_t rank, const epx_bootstrap_t *bootstrap);
void bench_rank_close(struct bench_rank *self);

/* The parts of that.  Arrays are those of self->run, and the plan, if there is
 * one, goes with them; both calls are collective. */
void bench_rank_open_group(struct bench_rank *self, const struct bench_run *run,
                           int32_t rank, const epx_bootstrap_t *bootstrap);
void bench_rank_close_group(struct bench_rank *self);
void bench_rank_open_arrays(struct bench_rank *self);
void bench_rank_close_arrays(struct bench_rank *self);

/* Ends the process when a call has failed. */
void bench_rank_check(const struct bench_rank *self, epx_status_t status);

/* The stream of this rank's calls. */
epx_stream_t bench_rank_stream(const struct bench_rank *self);

/* Until all calls are complete. */
void bench_rank_synchronize(const struct bench_rank *self);

/* Memory where --buffers says; the host's is taken from the system as it is
 * touched.  NULL may be given back. */
void *bench_rank_take(const struct bench_rank *self, int64_t rows,
                      size_t row_bytes);
void bench_rank_give_back(const struct bench_rank *self, void *ptr,
                          int64_t rows, size_t row_bytes);

/* The routing and the tokens of a round. */
void bench_rank_set_round(struct bench_rank *self, uint64_t round);
/* The experts' outputs for it, in the rows that `counts` tells of. */
void bench_rank_set_outputs(struct bench_rank *self,
                            const epx_plan_counts_t *counts);
/* Brings what those rows received, and the sums, to the host. */
void bench_rank_fetch(const struct bench_rank *self,
                      const epx_plan_counts_t *counts);

/* The arguments of this rank's calls. */
epx_plan_args_t bench_rank_plan_args(const struct bench_rank *self);
epx_dispatch_args_t bench_rank_dispatch_args(const struct bench_rank *self);
epx_combine_args_t bench_rank_combine_args(const struct bench_rank *self);

/* The same with the arrays' twins. */
epx_dispatch_args_t
bench_rank_dispatch_args_on_host(const struct bench_rank *self);
epx_combine_args_t
bench_rank_combine_args_on_host(const struct bench_rank *self);

/* Inputs are functions of the seed, so that any rank can tell those of all:
 * one token's row and scales (may be NULL), and one row of expert outputs. */
void bench_data_token(const struct bench_run *run, int32_t rank, uint64_t round,
                      int64_t token, void *row, uint32_t *scales);
void bench_data_output(const struct bench_run *run, int32_t rank,
                       uint64_t round, int64_t row, void *x);

#endif
