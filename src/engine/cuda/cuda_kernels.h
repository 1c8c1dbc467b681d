/* SPDX-License-Identifier: MIT */
/*
 * What the engine's host code and its kernels share.  A kernel takes one of the
 * argument structs below, by value, so that a captured graph holds all it
 * needs; what changes from one run to the next lives in device memory:
 *
 *     cuda_state_t      of a group on this rank: its step, whether it works
 *     cuda_routing_t    of a plan on this rank: who gets which row
 *     control region    of the segment (core/control.h): what peers write
 *
 *     cuda_trip_t       between nodes, in host memory (cuda_rail.h)
 *
 * and what the host wants to know, in host memory that the device can write:
 *
 *     cuda_report_t     the error that broke the group
 *     cuda_record_t     a plan's counts, or why it has none
 */
#ifndef EPX_ENGINE_CUDA_KERNELS_H
#define EPX_ENGINE_CUDA_KERNELS_H

#include "core/control.h"
#include "engine/common/placement.h"
#include "engine/cuda/cuda_rail.h"

#include <cuda_runtime_api.h>
#include <epx/epx.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Kernels of one group run one after the other: the host sees to it. */
typedef struct cuda_state {
    uint64_t step;    /* the last one that this rank has started */
    uint32_t broken;  /* kernels return at once */
    uint32_t arrived; /* blocks that wait at a barrier of the grid */
    uint32_t barrier; /* barriers passed */
    uint32_t taken;   /* pieces of work that warps have asked for */
    /* What this rank's arrivals at each peer have come to. */
    uint64_t arrivals[EPX__NUM_SLOTS];
} cuda_state_t;

/* What a kernel was doing when it failed. */
typedef enum cuda_what {
    CUDA_IN_COUNTS = 0,
    CUDA_IN_DISPATCH,
    CUDA_IN_COMBINE,
    CUDA_IN_GRID, /* waiting for blocks of its own */
    CUDA_IN_RAIL, /* waiting for what goes between nodes */
} cuda_what_t;

typedef struct cuda_report {
    uint32_t status; /* an epx_status_t, negated; written last */
    uint32_t what;   /* cuda_what_t */
    uint64_t step;
    /* EPX_ERR_TIMEOUT: the ranks that are missing, a bit each. */
    uint64_t missing[EPX_MAX_RANKS / 64];
    /* EPX_ERR_MISMATCH and EPX_ERR_PEER_DATA: whose posts, and what they
     * say. */
    int32_t rank[2];
    epx__post_t posts[2];
    /* The host's: the group has failed there, and kernels end. */
    uint64_t halt;
} cuda_report_t;

/* A group as its kernels see it. */
typedef struct cuda_view {
    int32_t rank;
    int32_t num_ranks;
    uint64_t timeout_ns;
    /* All ranks are threads of this process on this card, so that what one
     * releases to its device the others can acquire: that takes a quarter of
     * the time that a release to the system does. */
    uint32_t is_one_card;
    uint32_t starts_early; /* kernels: see cuda_launch.cuh */
    epx__map_t map;
    char *const *segments;         /* [R], of the ranks; those of other nodes
                                      stand at the mail: see cuda_rail.h */
    const uint64_t *segment_bytes; /* [R] */
    cuda_state_t *state;
    cuda_report_t *report;
    cuda_nodes_t nodes;
} cuda_view_t;

/* Where rows can go: to ranks and, with several nodes, behind them to nodes. */
EPX__INLINE int32_t
cuda_num_places(const cuda_view_t *view)
{
    return view->num_ranks +
           (view->nodes.num_nodes > 1 ? view->nodes.num_nodes : 0);
}

/* Why a plan has no counts, beyond the status. */
typedef struct cuda_refusal {
    uint32_t status; /* an epx_status_t, negated; 0: none */
    int32_t rank;
    uint64_t bad_entry; /* EPX_ERR_EXPERT: see epx__count_row_t */
    int64_t bad_expert;
    uint64_t rows;        /* EPX_ERR_CAPACITY: that the rank would receive */
    uint64_t own_plan_id; /* EPX_ERR_MISMATCH */
    epx__plan_key_t key;  /* EPX_ERR_MISMATCH: the rank's; zero when its count
                             row is of another step */
} cuda_refusal_t;

/* A plan's counts for the host, in words that tell by themselves whether they
 * are there, as those between ranks: content below the low half of the
 * routing's generation.  So the device needs no fence, which takes as long as
 * the way to the host.
 *
 *     words[0]        0, or why there are no counts: refusal's status, which is
 *                     there before this word is
 *     words[1 .. R]   tokens that arrive from each rank
 *     then [L]        (token, expert) pairs for each local expert
 *     then            with several nodes, if there is no max_tokens_per_rank,
 *                     the most tokens that any rank has
 *     then            with masked ranks the entries that are dropped
 */
typedef struct cuda_record {
    cuda_refusal_t refusal;
    uint64_t words[];
} cuda_record_t;

/* A plan on its device; what it points to follows it. */
typedef struct cuda_routing {
    uint64_t plan_id;    /* the step of its first exchange; 0 before */
    uint64_t open_step;  /* of a send-only operation */
    uint64_t generation; /* of the last routing */
    uint64_t num_sends;  /* into receive slots */
    uint32_t failed;     /* the last one was refused */
} cuda_routing_t;

#define CUDA_EXPERT_DROPPED (-3)

/* Pointers into a plan's device memory. */
typedef struct cuda_plan_view {
    epx__plan_key_t key; /* plan_id comes from the routing */
    int32_t num_local;
    cuda_routing_t *routing;
    cuda_route_t *routes;    /* [T, K]: RANK_MAJOR, a token's distinct ranks,
                                ascending, then -1; else by k */
    int32_t *experts;        /* [T, K] -1 for none, CUDA_EXPERT_DROPPED for
                                one whose rank is masked */
    uint64_t *rank_rows;     /* [R] rows that each rank's buffer needs */
    uint64_t *slots;         /* [R] where each rank's receive slots begin; 0:
                                it has none */
    int64_t *expert_rows;    /* [L] */
    int64_t *expert_offsets; /* [L + 1] */
    /* What dispatch follows: the routes but, with several nodes, place R + n
     * for the rows on another node n. */
    cuda_route_t *sends; /* [T, K] */
    /* With several nodes, else NULL.  What combine follows: as above, but in
     * the order of the sum, and for each the k whose weight is its, or -1. */
    cuda_route_t *pulls;    /* [T, K] */
    int32_t *pull_ks;       /* [T, K]; NULL too where routes are followed */
    int32_t *node_tokens;   /* [N, T] the tokens that go to each node */
    int32_t *node_ordinals; /* [N, T] a token's place among them, or -1 */
    uint32_t *node_counts;  /* [N] */
    int64_t token_capacity; /* T of these arrays */
} cuda_plan_view_t;

/* Where the host learns of a routing. */
typedef struct cuda_told {
    cuda_record_t *record;
    uint64_t generation; /* of it; 0: in a graph, whose runs are not counted */
} cuda_told_t;

/* Taking in a routing. */
typedef struct cuda_plan_args {
    cuda_view_t view;
    cuda_plan_view_t plan;
    const void *topk_idx; /* [T, K] */
    int64_t num_tokens;
    uint64_t slots_offset; /* of this rank's receive slots, or 0 */
    uint64_t slot_bytes;   /* of one of them, or 0 */
    uint32_t is_new;       /* the plan's first routing */
    uint64_t generation; /* of it; 0: in a graph, whose runs are not counted */
    uint32_t *notes;     /* [T, K, 2] scratch */
    uint32_t *block_totals; /* [blocks, R + E] scratch */
    cuda_told_t told;
    int32_t num_warps; /* of a block */
    int64_t *wait_ns;  /* [R] */
} cuda_plan_args_t;

/* Dispatch. */
typedef struct cuda_dispatch_args {
    cuda_view_t view;
    cuda_plan_view_t plan;
    epx__post_t post; /* but for its step and plan_id */
    int64_t num_tokens;
    const char *x;
    uint64_t in_bytes;     /* of a row of x */
    uint64_t row_bytes;    /* of a row as it is sent */
    uint64_t chunk_bytes;  /* of x that a warp moves at a time */
    uint32_t num_chunks;   /* of a row */
    uint32_t num_warps;    /* of a block */
    uint32_t num_stages;   /* of a warp */
    uint32_t passes_cache; /* more rows than L2 caches hold */
    uint32_t x_is_aligned; /* to 16 bytes */
    epx_quantize_t quantize;
    const uint32_t *scales;
    int64_t num_scales;
    int64_t scale_token_stride;
    int64_t scale_stride;
    uint32_t scales_ride; /* through shared memory, with the row */
    const float *topk_weights;
    int32_t *recv_expert_counts;
    int32_t *recv_expert_totals;
    int64_t *wait_ns;
    uint32_t is_send_only;
    uint32_t num_forwarders; /* blocks that come later, with several nodes */
    cuda_rail_t rail;
} cuda_dispatch_args_t;

/* Receive slots, where rows of a send-only dispatch wait to be placed:
 *
 *     of a rank   [2][R sources][T_max]
 *     one slot    u32 token, 3 unused; i32 experts[K]; u32 rows[K];
 *                 f32 weights[K]; from the next 16 bytes on u32 scales[S];
 *                 from the next 16 bytes on the payload
 *
 * A source fills the slots of the tokens that it has for a rank in their order.
 * The first dimension alternates: a source fills a half again only after it has
 * completed the dispatch between, which the receiver sent after it had emptied
 * that half. */
typedef struct cuda_slots {
    uint64_t slot_bytes;
    uint64_t rows_at; /* in a slot */
    uint64_t weights_at;
    uint64_t scales_at;
    uint64_t payload_at;
} cuda_slots_t;

/* Dispatch that counts its own routing: with EPX_NEW_ROUTING, or into slots. */
typedef struct cuda_fused_args {
    cuda_dispatch_args_t move; /* its plan's routes are made here */
    const void *topk_idx;      /* [T, K] */
    uint32_t idx_is_i64;
    uint32_t is_new;       /* topk_idx is new routing, not the plan's */
    uint32_t to_slots;     /* of every rank, instead of to their places */
    uint32_t round_tokens; /* of a block, in shared memory together */
    uint32_t num_movers;   /* blocks that have tokens: the first ones */
    cuda_slots_t slots;
    cuda_told_t told;
} cuda_fused_args_t;

/* Its end, where it went to slots. */
typedef struct cuda_unpack_args {
    cuda_dispatch_args_t move; /* of rows as they were sent */
    uint32_t is_new;
    cuda_slots_t slots;
    cuda_told_t told;
} cuda_unpack_args_t;

/* Combine. */
typedef struct cuda_combine_args {
    cuda_view_t view;
    cuda_plan_view_t plan;
    epx__post_t post; /* but for its step and plan_id */
    int64_t num_tokens;
    uint64_t row_bytes;
    const float *topk_weights;
    const char *bias[EPX_MAX_BIAS];
    uint32_t has_bias;
    char *out;
    uint32_t own_is_aligned; /* bias and out, to 16 bytes */
    uint32_t chunk_bytes;    /* of a row that a warp sums at a time */
    uint32_t num_chunks;     /* of a row */
    uint32_t last_bytes;     /* of its last chunk */
    uint32_t batch_rows;     /* of a token that are added up at a time */
    uint32_t num_batches;    /* of a token's rows */
    uint32_t num_stages;     /* batches in shared memory */
    uint32_t posts;          /* announces x */
    uint32_t pulls;          /* waits for the peers and sums */
    uint32_t num_pullers;    /* blocks that do */
    float *out_topk_weights;
    int64_t *wait_ns;
    uint32_t is_partial; /* routes are a peer's: its sum for another node */
    uint32_t forward;    /* whose */
    cuda_rail_t rail;
} cuda_combine_args_t;

/* What goes between nodes: cuda_rail.cu. */
typedef struct cuda_rail_args {
    cuda_view_t view;
    cuda_plan_view_t plan;
    int64_t num_tokens;
    uint32_t kind; /* of the step: epx__step_kind_t */
    uint32_t wants_weights;
    uint32_t is_new; /* the step itself counts new routing */
    const float *topk_weights;
    cuda_rail_t rail;
} cuda_rail_args_t;

/* A word to the proxy, and a wait for it. */
typedef enum cuda_tell {
    CUDA_TELL_NOTHING = 0,
    CUDA_TELL_PACKED,
    CUDA_TELL_SUMMED,
    CUDA_TELL_ENDED,
} cuda_tell_t;

typedef struct cuda_turn_args {
    cuda_view_t view;
    cuda_plan_view_t plan;
    uint64_t *marks;
    uint32_t is_new; /* as in cuda_rail_args_t */
    cuda_tell_t tell;
    int32_t wait; /* for an epx__lane_t; -1: for nothing */
    int64_t *wait_ns;
} cuda_turn_args_t;

/* Waiting for the end of a send-only dispatch. */
typedef struct cuda_wait_args {
    cuda_view_t view;
    cuda_plan_view_t plan;
    int64_t *wait_ns;
} cuda_wait_args_t;

/* An array that is staged: rows that lie dense in one place, and dense or, for
 * scales, strided in the other. */
typedef struct cuda_staged {
    char *user;
    char *heap;
    uint64_t row_bytes;
    uint64_t unit; /* bytes that both places allow at a time */
} cuda_staged_t;

typedef struct cuda_stage_args {
    cuda_view_t view;
    cuda_plan_view_t plan;
    cuda_staged_t arrays[EPX__NUM_ARRAYS];
    uint32_t num_arrays;
    uint32_t to_user;  /* else to the heap */
    uint64_t max_rows; /* that the arrays hold */
    /* recv_scales, apart because of their strides; NULL: not staged. */
    uint32_t *user_scales;
    const uint32_t *heap_scales;
    int64_t num_scales;
    int64_t row_stride, scale_stride, expert_stride;
} cuda_stage_args_t;

/* The entries of a routing that are dropped. */
typedef struct cuda_drops_args {
    cuda_view_t view;
    cuda_plan_view_t plan;
    int64_t num_entries;
    uint8_t *dropped; /* [T, K]; NULL: nobody wants to know */
    uint32_t tells;   /* the host is told how many, of a new routing */
    cuda_told_t told;
} cuda_drops_args_t;

/* How kernels move rows. */
typedef enum cuda_mover {
    CUDA_MOVER_PLAIN = 0, /* loads and stores of 16 bytes */
    CUDA_MOVER_BULK,      /* asynchronous bulk copies: SM90 and later */
} cuda_mover_t;

/* Load the kernels of a file and allow them the device's shared memory: once
 * per group, since loading may wait for the device. */
cudaError_t cuda_plan_load(size_t max_shared);
cudaError_t cuda_dispatch_load(size_t max_shared);
/* Whether kernels can be on the device before what they follow has ended, as
 * they have been compiled for it. */
cudaError_t cuda_dispatch_starts_early(uint32_t *does);
cudaError_t cuda_combine_load(size_t max_shared);
cudaError_t cuda_stage_load(size_t max_shared);

#define CUDA_PLAN_WARPS 16 /* of a block, at most */
size_t cuda_plan_shared_bytes(const cuda_plan_args_t *args);
cudaError_t cuda_plan_launch(const cuda_plan_args_t *args, int num_blocks,
                             cudaStream_t stream);
/* Completes args: chunk_bytes, num_chunks, num_warps, num_stages,
 * scales_ride, passes_cache.
 * Returns the shared memory that a block then needs. */
size_t cuda_dispatch_shape(cuda_dispatch_args_t *args, cuda_mover_t mover,
                           size_t max_shared);
cudaError_t cuda_dispatch_launch(const cuda_dispatch_args_t *args,
                                 cuda_mover_t mover, int num_blocks,
                                 cudaStream_t stream);
size_t cuda_combine_shared_bytes(const cuda_view_t *view, cuda_mover_t mover);
/* Completes args: chunk_bytes, num_chunks, last_bytes, batch_rows, num_batches,
 * num_stages.  Chunks are whole units, each a divisor of 512 bytes. */
void cuda_combine_shape(cuda_combine_args_t *args, uint32_t rows_per_token,
                        int num_blocks, uint32_t unit_bytes);
cudaError_t cuda_combine_launch(const cuda_combine_args_t *args,
                                epx_dtype_t dtype, cuda_mover_t mover,
                                int num_blocks, cudaStream_t stream);
/* Completes args: round_tokens.  Returns the shared memory that a block needs,
 * which is more than max_shared when there is too little. */
size_t cuda_fused_shape(cuda_fused_args_t *args, int num_blocks,
                        size_t max_shared);
cudaError_t cuda_fused_load(size_t max_shared);
cudaError_t cuda_fused_launch(const cuda_fused_args_t *args, cuda_mover_t mover,
                              int num_blocks, cudaStream_t stream);
/* Completes args->move like cuda_dispatch_shape. */
size_t cuda_unpack_shape(cuda_unpack_args_t *args, cuda_mover_t mover,
                         size_t max_shared);
cudaError_t cuda_unpack_load(size_t max_shared);
cudaError_t cuda_unpack_launch(const cuda_unpack_args_t *args,
                               cuda_mover_t mover, int num_blocks,
                               cudaStream_t stream);
cudaError_t cuda_wait_launch(const cuda_wait_args_t *args, cudaStream_t stream);

cudaError_t cuda_rail_load(size_t max_shared);
/* After a routing: which tokens go to which node, and where rows go then. */
cudaError_t cuda_rail_route_launch(const cuda_rail_args_t *args, int num_blocks,
                                   cudaStream_t stream);
/* Begins the trip of the step that comes, and packs all but the rows. */
cudaError_t cuda_rail_pack_launch(const cuda_rail_args_t *args, int num_blocks,
                                  cudaStream_t stream);
cudaError_t cuda_rail_turn_launch(const cuda_turn_args_t *args,
                                  cudaStream_t stream);
/* Completes args like cuda_dispatch_shape. */
size_t cuda_rail_forward_shape(cuda_dispatch_args_t *args, cuda_mover_t mover,
                               size_t max_shared);
cudaError_t cuda_rail_forward_launch(const cuda_dispatch_args_t *args,
                                     cuda_mover_t mover, int num_blocks,
                                     cudaStream_t stream);
cudaError_t cuda_rail_combine_load(size_t max_shared);
/* A sum for another node, or the last one, with what other nodes have sent. */
cudaError_t cuda_rail_combine_launch(const cuda_combine_args_t *args,
                                     epx_dtype_t dtype, cuda_mover_t mover,
                                     int num_blocks, cudaStream_t stream);
/* Which entries are dropped, and how many. */
cudaError_t cuda_drops_launch(const cuda_drops_args_t *args,
                              cudaStream_t stream);
cudaError_t cuda_mask_load(size_t max_shared);
cudaError_t cuda_stage_launch(const cuda_stage_args_t *args, int num_blocks,
                              cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
