/* SPDX-License-Identifier: MIT */
/*
 * A dispatch and a combine between nodes.  A token goes once to each other node
 * that has experts for it, to this rank's rail there, which writes its rows to
 * their final places; on the way back the rail sums what the ranks of its node
 * made of it, and sends one row.
 *
 *     parcel    the tokens of a chunk, as arrays one behind the other
 *         heads     i32 [n][1 + 2K]  the token's index at its source; its
 *                                    experts on the node, -1 elsewhere; and of
 *                                    each, its row among the source's rows for
 *                                    that expert (RANK_MAJOR: for its rank)
 *         weights   f32 [n][K]
 *         scales    u32 [n][S]
 *         rows      [n][row]
 *
 * Heads come with the first operation after new routing, and are kept.
 */
#ifndef EPX_ENGINE_CPU_CPU_RAIL_H
#define EPX_ENGINE_CPU_CPU_RAIL_H

#include "engine/cpu/cpu_token.h"

/* What each token of a parcel has. */
typedef struct cpu_parcel_kind {
    int32_t topk;
    bool has_heads;
    bool has_weights;
    int64_t num_scales;
    int64_t row_bytes;
} cpu_parcel_kind_t;

typedef struct cpu_parcel {
    int64_t begin; /* of its tokens in the region */
    int64_t count;
    uint64_t weights; /* where each array begins; heads at 0 */
    uint64_t scales;
    uint64_t rows;
    uint64_t bytes; /* in all */
} cpu_parcel_t;

/* How many chunks n tokens are sent in; 0: nothing is sent. */
int cpu_parcels(const cpu_parcel_kind_t *kind, int64_t num_tokens);
/* Empty from that number on. */
cpu_parcel_t cpu_parcel(const cpu_parcel_kind_t *kind, int64_t num_tokens,
                        int chunk);
/* Bytes of the largest. */
uint64_t cpu_parcel_room(const cpu_parcel_kind_t *kind, int64_t num_tokens);

/* int32_t in a head. */
static inline int64_t
cpu_head_length(const cpu_plan_t *plan)
{
    return 1 + 2 * (int64_t)plan->base.key.topk;
}

/* The tokens of a rank of another node that this rank takes in. */
struct cpu_forward {
    int32_t rank;
    int64_t num_tokens;
    int64_t source_tokens; /* T of the source */
    int64_t *rank_base;    /* [R] as the plan's, of the source's tokens */
    int64_t *expert_base;  /* [E] */
    uint32_t *counts;      /* tokens[R], rows[E] of the source */
    int32_t *heads;        /* [num_tokens][1 + 2K], once they have come */
    int64_t head_capacity; /* in tokens */
};

/* Room for the ranks that there are now.  All that was known of any before is
 * forgotten. */
epx_status_t cpu_forwards_open(cpu_plan_t *plan);
void cpu_forwards_close(cpu_plan_t *plan);

/* A token that is forwarded; routes is [K], and written. */
cpu_token_t cpu_forward_token(const cpu_plan_t *plan,
                              const cpu_forward_t *forward, int64_t i,
                              const float *weights, cpu_route_t *routes);

/* What the tokens of this operation have on their way out; those of `rank`,
 * whose post is here. */
cpu_parcel_kind_t cpu_rail_kind(const cpu_plan_t *plan, int32_t rank);

/* Whether the peers' posts announce lanes that there can be; an error breaks
 * the group. */
epx_status_t cpu_rail_check(cpu_plan_t *plan);
/* Send this rank's tokens to its rails.  Some are left to those who attend to
 * the network next. */
epx_status_t cpu_rail_send(cpu_plan_t *plan, cpu_lane_t *lane);

/* Called for a chunk of a source that has come, its heads in place. */
typedef void cpu_rail_fn_t(cpu_plan_t *plan, const cpu_forward_t *forward,
                           const cpu_parcel_t *parcel, const char *chunk);
epx_status_t cpu_rail_receive(cpu_plan_t *plan, const cpu_lane_t *lane,
                              const char *what, cpu_rail_fn_t *fn);
/* Where a chunk of plan->forwards[f] has come. */
const char *cpu_rail_chunk(const cpu_plan_t *plan, const cpu_lane_t *lane,
                           int32_t f, int chunk);

/* Wait until all that was sent through the lanes is acknowledged. */
epx_status_t cpu_rail_wait_sent(epx_group_t *group,
                                cpu_lane_t *const lanes[EPX__NUM_LANES]);
/* Give back the lanes of an operation that has ended, however. */
void cpu_rail_give(epx_group_t *group, cpu_lane_t *lanes[EPX__NUM_LANES]);

/* ---- a dispatch: cpu_rail_dispatch.c ---- */

/* Before the post: a lane for what comes. */
epx_status_t cpu_rail_dispatch_open(cpu_plan_t *plan, epx__post_t *post);
/* After the posts, and what this rank sends to its own node. */
epx_status_t cpu_rail_forward(cpu_plan_t *plan);

/* ---- a combine: cpu_rail_combine.c ---- */

epx_status_t cpu_rail_combine_open(cpu_plan_t *plan, epx__post_t *post);
/* Then what goes ahead of the posts, if anything does: it is left to those who
 * attend to the network next. */
epx_status_t cpu_rail_combine_send(cpu_plan_t *plan);
/* After the posts: sum for others. */
epx_status_t cpu_rail_combine(cpu_plan_t *plan);
/* Then, chunk by chunk, wait for this rank's sums: those of its tokens before
 * *end_p are there, if those of the chunks before are. */
epx_status_t cpu_rail_combine_await(const cpu_plan_t *plan, int chunk,
                                    int64_t *end_p);
/* The sum of a token from another node, and its weights, which may be NULL;
 * NULL: it has no expert there. */
const char *cpu_rail_partial(const cpu_plan_t *plan, int32_t node, int64_t t,
                             const float **weights_p);

#endif
