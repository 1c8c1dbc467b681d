/* SPDX-License-Identifier: MIT */
/* What one run does: everything that the ranks agree on, drawn from a seed. */
#ifndef TESTS_CONFORMANCE_SHAPE_H
#define TESTS_CONFORMANCE_SHAPE_H

#include "conformance/world.h"
#include <epx/epx.h>
#include <stdbool.h>
#include <stdio.h>

enum { MAX_PLANS = 2, MAX_BATCHES = 4, MAX_OPS = 3 };

typedef enum routing {
    ROUTING_RANDOM = 0, /* let the seed decide */
    ROUTING_UNIFORM,
    ROUTING_SKEWED,
    ROUTING_ONE_RANK,   /* all tokens to the experts of one rank */
    ROUTING_ONE_EXPERT, /* all tokens to one expert */
    ROUTING_NONE,       /* every entry is -1 */
    ROUTING_BLOCKS,     /* consecutive experts, evenly */
    ROUTING_FILE,       /* real routing */
    NUM_ROUTINGS,
} routing_t;

typedef enum capacity {
    CAPACITY_RANDOM = 0,
    CAPACITY_EXACT,
    CAPACITY_TIGHT,
    CAPACITY_LOOSE,
} capacity_t;

typedef enum send_only {
    SEND_ONLY_RANDOM = 0,
    SEND_ONLY_NEVER,
    SEND_ONLY_PLACED,  /* send_only_row_bytes is 0 */
    SEND_ONLY_SLOTTED, /* send_only_row_bytes is given */
} send_only_t;

/* Routing read from a file. */
typedef struct routing_file {
    int32_t num_experts;
    int32_t topk;
    int64_t num_tokens;
    int32_t *topk_idx; /* [num_tokens, topk] */
} routing_file_t;

/* What a named case insists on; 0 leaves it to the seed, and -1 means 0. */
typedef struct wish {
    const char *name;
    int32_t ranks;
    int32_t experts;
    int32_t topk;
    int32_t tokens;
    int32_t row_bytes;
    int32_t alignment;
    int32_t plans;
    int32_t batches;
    routing_t routing;
    capacity_t capacity;
    send_only_t send_only;
    bool special;        /* NaN, infinities, subnormals everywhere */
    bool last_rank_only; /* only the last rank has tokens */
    const routing_file_t *file;
} wish_t;

typedef struct op_shape {
    uint64_t seed;
    bool is_combine;
    bool send_only;
    bool special;
    epx_dtype_t dtype;
    int64_t hidden;
    epx_quantize_t quantize; /* dispatch */
    int32_t num_scales;      /* dispatch: given scales */
    bool weights;            /* dispatch */
    bool recv_idx;           /* dispatch, RANK_MAJOR */
    bool recv_src;           /* dispatch */
    bool reduce_weights;     /* combine */
} op_shape_t;

typedef struct plan_shape {
    uint64_t seed;
    epx_layout_t layout;
    int32_t num_experts;
    int32_t topk;
    epx_dtype_t idx_dtype;
    int64_t tokens[MAX_BATCHES][WORLD_MAX_RANKS];
    int64_t max_tokens_per_rank; /* 0 unless it is told to the plan */
    capacity_t capacity;
    int64_t extra_capacity; /* CAPACITY_LOOSE: rows beyond the tight one */
    int32_t expert_alignment;
    int64_t send_only_row_bytes;
    routing_t routing;
    int32_t none_percent; /* entries turned into -1 */
    const routing_file_t *file;
    int32_t num_batches;
    int32_t num_ops[MAX_BATCHES];
    op_shape_t ops[MAX_BATCHES][MAX_OPS];
} plan_shape_t;

typedef struct shape {
    uint64_t seed;
    const char *name; /* of the wish, NULL without */
    epx_device_t device;
    uint64_t timeout_s;  /* of the group */
    int32_t max_workers; /* of a rank */
    int32_t num_ranks;
    int32_t num_nodes; /* 1, unless the ranks are to be spread over several */
    bool has_masks;    /* some ranks are masked before some batch */
    bool own_bootstrap;
    bool jitter; /* ranks dawdle before some calls */
    bool async;  /* results are checked at the end only */
    int32_t num_plans;
    plan_shape_t plans[MAX_PLANS];
} shape_t;

void shape_draw(shape_t *shape, uint64_t seed, epx_layout_t layout,
                const wish_t *wish, epx_device_t device);
void shape_print(const shape_t *shape, FILE *stream);

/* Which of the nodes a rank is on: in blocks, in turn, or at random. */
int32_t shape_node(const shape_t *shape, int32_t rank);

/* Whether a rank is masked, and before which batch; not all ranks are. */
bool shape_masks(const shape_t *shape, int32_t rank);
int32_t shape_mask_batch(const shape_t *shape);

const char *layout_name(epx_layout_t layout);

/* The routing of one rank in one batch: a malloc'ed [T, K] of idx_dtype. */
void *shape_topk_idx(const plan_shape_t *plan, int32_t num_ranks, int32_t batch,
                     int32_t rank);

#endif
