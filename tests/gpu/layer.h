/* SPDX-License-Identifier: MIT */
/*
 * A small layer of fixed capacity on one card: its ranks are threads, its
 * experts copy what they receive.  What each of its batches must give is known
 * beforehand from the oracle.
 */
#ifndef TESTS_GPU_LAYER_H
#define TESTS_GPU_LAYER_H

#include "conformance/memory.h"
#include "oracle/oracle.h"

#include <cuda_runtime_api.h>

enum {
    LAYER_MAX_RANKS = 4,
    LAYER_MAX_BATCHES = 16,
    LAYER_TOKENS = 48,
    LAYER_HIDDEN = 256, /* of BF16 */
    LAYER_TOPK = 4,
    LAYER_EXPERTS = 18,
    LAYER_EXIT_SKIP = 77,
};

/* One rank's part of a batch. */
typedef struct layer_part {
    int64_t idx[LAYER_TOKENS * LAYER_TOPK];
    float weights[LAYER_TOKENS * LAYER_TOPK];
    uint16_t x[LAYER_TOKENS * LAYER_HIDDEN];
    uint16_t out[LAYER_TOKENS * LAYER_HIDDEN]; /* expected */
    uint16_t *recv_x;                          /* expected, [recv_rows, H] */
} layer_part_t;

typedef struct layer_batch {
    oracle_t *oracle;
    layer_part_t parts[LAYER_MAX_RANKS];
} layer_batch_t;

typedef struct layer {
    epx_layout_t layout;
    int32_t num_ranks;
    int32_t num_batches;
    int64_t recv_capacity; /* of the plan; 0 in EXPERT_SLOTS */
    int64_t recv_rows;     /* of the largest receive buffer */
    size_t recv_bytes;
    layer_batch_t *batches;
} layer_t;

/* Aborts when there is no memory. */
layer_t *layer_make(epx_layout_t layout, int32_t num_ranks,
                    int32_t num_batches);
void layer_free(layer_t *layer);

/* Exits with 77, loudly, where there is no card; call it first in main. */
void layer_need_card(void);

/* Runs fn(self, layer) on every rank; 0, or 1 after telling what failed. */
int layer_run(const layer_t *layer, world_kind_t kind, const char *what,
              world_fn *fn);
/* The same with a layer of each layout; how many failed. */
int layer_run_each(world_kind_t kind, int32_t num_ranks, int32_t num_batches,
                   const char *what, world_fn *fn);

/* One rank, its arrays on the card. */
typedef struct layer_rank {
    world_rank_t *self;
    const layer_t *layer;
    memory_t *memory;
    cudaStream_t stream; /* the first of memory's */
    epx_group_t *group;
    epx_plan_t *plan;
    void *idx;
    void *weights;
    void *x;
    void *recv_x;
    void *expert_x; /* what the experts make of recv_x */
    void *out;
    /* Of the calls; a test may set them. */
    uint32_t flags;
    int64_t *wait_ns; /* [R] */
} layer_rank_t;

/* Everything but the plan.  False, noted, when it failed. */
bool layer_rank_open(layer_rank_t *rank, world_rank_t *self,
                     const layer_t *layer, uint64_t timeout_s);
void layer_rank_close(layer_rank_t *rank);

/* The group alone, for a second one. */
bool layer_open_group(layer_rank_t *rank, uint64_t timeout_s);
void layer_close_group(layer_rank_t *rank);

/* The inputs of a batch, at once. */
bool layer_set(layer_rank_t *rank, int32_t batch);

/* Spoils what dispatch writes, or tells whether it is still spoilt. */
bool layer_spoil(layer_rank_t *rank);
bool layer_is_spoilt(layer_rank_t *rank);

/* The calls; the plan's arguments can be changed before they are used. */
epx_plan_args_t layer_plan_args(const layer_rank_t *rank);
epx_status_t layer_plan(layer_rank_t *rank, const epx_plan_args_t *args);
epx_status_t layer_update(layer_rank_t *rank, cudaStream_t stream);
epx_status_t layer_dispatch(layer_rank_t *rank, cudaStream_t stream);
epx_status_t layer_combine(layer_rank_t *rank, cudaStream_t stream);

/* The experts' copy, in stream order. */
bool layer_experts(layer_rank_t *rank, cudaStream_t stream);

/* From the update to combine.  Failures are noted. */
bool layer_pass(layer_rank_t *rank, cudaStream_t stream);

/* Until the stream has run and the group is well. */
bool layer_synchronize(layer_rank_t *rank, cudaStream_t stream);

/* Compares what lies at recv_x and out with what the batch must give. */
bool layer_check(layer_rank_t *rank, int32_t batch, const void *recv_x,
                 const void *out, const char *what);

/* A new plan, and the first batch through it, compared.  Failures are noted. */
void layer_try(layer_rank_t *rank, const char *what);

/* Notes a failure of CUDA's; true if there was one. */
bool layer_cuda_failed(layer_rank_t *rank, cudaError_t error, const char *call);

#endif
