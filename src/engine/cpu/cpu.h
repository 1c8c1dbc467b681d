/* SPDX-License-Identifier: MIT */
/* The CPU engine's own plan and the steps between its files. */
#ifndef EPX_ENGINE_CPU_CPU_H
#define EPX_ENGINE_CPU_CPU_H

#include "core/plan.h"
#include "engine/common/describe.h"
#include "engine/cpu/cpu_kernels.h"
#include "engine/cpu/cpu_lane.h"
#include "engine/cpu/cpu_pool.h"
#include "engine/cpu/cpu_share.h"
#include "engine/cpu/cpu_store_choice.h"

typedef struct cpu_engine {
    epx__pool_t *pool;
    const epx__kernels_t *kernels;
    cpu_store_choice_t dispatch_stores;
    cpu_store_choice_t combine_stores;
    /* For the operation that runs: the posts of its step and, made from
     * them, where rows go on each rank; both [R]. */
    epx__post_t *posts;
    struct cpu_target *targets;
    struct cpu_rails *rails; /* NULL with a single node */
    /* A piece for each worker; grown by cpu_scratch_reserve. */
    char *scratch;
    size_t scratch_bytes; /* of one worker */
} cpu_engine_t;

static inline cpu_engine_t *
cpu_engine(const epx_group_t *group)
{
    return group->engine_state;
}

/* A token's row on one destination rank. */
typedef struct cpu_route {
    int32_t rank;    /* -1 ends a token's routes */
    int32_t ordinal; /* among this rank's tokens that go there */
} cpu_route_t;

/* In cpu_plan_t's experts: no expert, and one whose rank is masked. */
#define CPU_EXPERT_NONE    (-1)
#define CPU_EXPERT_DROPPED (-2)

typedef enum cpu_plan_state {
    CPU_PLAN_EMPTY = 0, /* no routing yet */
    CPU_PLAN_POSTED,    /* peers have our counts */
    CPU_PLAN_RESOLVED,  /* and we have theirs */
    CPU_PLAN_FAILED,    /* the ranks' routings do not fit together */
} cpu_plan_state_t;

/* One array of an operation: the caller's, and where peers reach it. */
typedef struct cpu_array {
    void *user; /* NULL: not given */
    char *heap; /* == user unless staged */
    bool staged;
} cpu_array_t;

/* What a dispatch needs from its start to its completion. */
typedef struct cpu_dispatch {
    epx_dispatch_args_t args;
    uint64_t step;
    epx__dispatch_shape_t shape;
    bool uses_slots;
    cpu_array_t arrays[EPX__NUM_ARRAYS];
    cpu_lane_t *lanes[EPX__NUM_LANES]; /* with several nodes */
} cpu_dispatch_t;

typedef struct cpu_combine {
    epx_combine_args_t args;
    uint64_t step;
    bool has_weights;
    bool goes_ahead; /* with several nodes: what rails need does, of posts */
    epx__signature_t signature;
    cpu_array_t arrays[EPX__NUM_ARRAYS]; /* x and recv_topk_weights */
    cpu_lane_t *lanes[EPX__NUM_LANES];   /* with several nodes */
} cpu_combine_t;

typedef struct cpu_forward cpu_forward_t;

typedef struct cpu_plan {
    struct epx_plan base;
    epx_queue_t *queue; /* where it was last queued, or NULL; retained */
    uint64_t ticket;

    /* This rank's routing: set by cpu_plan_route. */
    int64_t num_tokens;
    int64_t token_capacity;
    int64_t num_sent_rows; /* in the plan's layout */
    int64_t num_dropped;
    int32_t *experts;       /* [T, K] global indices, or CPU_EXPERT_* */
    int32_t *ordinals;      /* [T, K] among this rank's rows for that expert;
                               EXPERT_MAJOR and EXPERT_SLOTS */
    cpu_route_t *routes;    /* [T, K] distinct ranks of a token, ascending;
                               RANK_MAJOR and receive slots */
    uint32_t *sent_tokens;  /* [R], followed by the next two: our count row */
    uint32_t *sent_rows;    /* [E] */
    uint32_t *sent_nodes;   /* [N]; with several nodes, as are the next two */
    int32_t *node_tokens;   /* [N, T] the tokens that go to each node */
    int32_t *node_ordinals; /* [N, T] a token's place among them; -1 */
    bool rails_know;  /* the peers have what their lanes need of the routing */
    uint32_t *stamps; /* [E] scratch of the check for duplicates */
    int32_t *expert_rank; /* [E], -1 where that is masked */
    uint32_t epoch;       /* of the group, in which the plan is of use */

    /* Everybody's: set by cpu_plan_resolve. */
    cpu_plan_state_t state;
    epx__error_t error; /* why it failed */
    uint64_t counts_step;
    uint32_t *count_row;     /* scratch: one peer's tokens[R], rows[E],
                                nodes[N] */
    int64_t *rank_base;      /* [R] first row of our tokens on each rank */
    int64_t *rank_rows;      /* [R] rows that each rank's buffer needs */
    int64_t *expert_base;    /* [E] first row of our tokens for each expert */
    int64_t *expert_total;   /* [E] rows of each expert from all ranks */
    int64_t *recv_tokens;    /* [R] from each rank */
    int64_t *recv_base;      /* [R + 1] exclusive prefix of recv_tokens */
    int64_t *expert_rows;    /* [L] */
    int64_t *expert_offsets; /* [L + 1] */
    int64_t *source_rows;    /* [R, L] first row of each source's tokens for
                                each local expert */
    cpu_forward_t *forwards; /* whose tokens for this node come here */
    int32_t num_forwards;
    int64_t num_rows;      /* that the receive buffer needs */
    int64_t num_recv_rows; /* without padding */

    /* Receive slots of send-only dispatches, [2, R, T_max]. */
    char *slots;
    uint32_t slots_epoch; /* from which on peers know them */
    uint64_t slot_bytes;
    uint64_t *peer_slots; /* [R] where each peer keeps its own; set by the
                             first exchange of counts that succeeds */
    bool knows_peer_slots;
    uint64_t num_slot_turns;
    uint32_t slots_channel;  /* with several nodes: what others send here */
    uint64_t slots_turn;     /* the first */
    uint32_t *peer_channels; /* [R] theirs, as peer_slots */
    uint64_t *peer_turns;    /* [R] */

    epx__pending_t pending;
    cpu_dispatch_t dispatch;
    cpu_combine_t combine;
} cpu_plan_t;

static inline cpu_plan_t *
cpu_plan(epx_plan_t *plan)
{
    return (cpu_plan_t *)plan;
}

/* Where this rank keeps its receive slots, from the start of its segment; 0
 * without them. */
static inline uint64_t
cpu_slots_offset(const cpu_plan_t *plan)
{
    return plan->slots == NULL
               ? 0
               : (uint64_t)(plan->slots - epx__group_segment(plan->base.group));
}

/* The numbers that follow the head of a count row. */
static inline size_t
cpu_num_counts(const cpu_plan_t *plan)
{
    const epx_group_t *group = plan->base.group;
    int32_t nodes = group->nodes.num_nodes > 1 ? group->nodes.num_nodes : 0;

    return (size_t)group->num_ranks + plan->base.key.num_experts +
           (size_t)nodes;
}

static inline bool
cpu_is_rank_major(const cpu_plan_t *plan)
{
    return plan->base.key.layout == EPX_LAYOUT_RANK_MAJOR;
}

static inline int32_t
cpu_workers(const epx_group_t *group, int32_t wanted)
{
    return wanted > 0 ? wanted : group->num_workers;
}

/* What one worker moves in the time in which another hears of its share, and is
 * heard of; more if that has to be woken. */
#define CPU_WORKER_BYTES (UINT64_C(1) << 17)

/* How many of them pay for moving so many bytes. */
static inline int32_t
cpu_workers_for(uint64_t bytes, int32_t most)
{
    uint64_t enough = bytes / CPU_WORKER_BYTES;

    return enough >= (uint64_t)most ? most : enough > 1 ? (int32_t)enough : 1;
}

/* The most bytes that are moved for so many tokens. */
static inline uint64_t
cpu_bytes_of(const cpu_plan_t *plan, int64_t num_tokens, int64_t row_bytes)
{
    return (uint64_t)num_tokens * plan->base.key.topk * (uint64_t)row_bytes;
}

/* cpu_step.c: take the next step, open until cpu_step_end. */
epx_status_t cpu_step_begin(epx_group_t *group, epx_plan_t *plan,
                            epx__step_kind_t kind, uint64_t *step_p);
void cpu_step_end(epx_group_t *group, uint64_t step);
void cpu_step_forget_plan(epx_group_t *group, const epx_plan_t *plan);

/* Write a post to every peer and signal READY. */
void cpu_post_all(epx_group_t *group, uint64_t step, const epx__post_t *post);
/* Wait for every post of the step, copy them to posts[R] and compare their
 * signatures with ours. */
epx_status_t cpu_posts_wait(epx_group_t *group, uint64_t step, const char *what,
                            const epx__signature_t *ours, epx__post_t *posts);
/* Whether rows of whole elements at a peer's offset lie in its heap. */
epx_status_t cpu_check_extent(const epx_group_t *group, int32_t rank,
                              const char *what, uint64_t offset, uint64_t rows,
                              uint64_t row_bytes, uint64_t element_bytes);

/* cpu_plan.c */
epx_status_t cpu_plan_open(epx_group_t *group, const epx_plan_args_t *args,
                           epx_plan_t **plan_p);
void cpu_plan_free(cpu_plan_t *plan);
/* Whether ranks have been masked since the plan was routed: then it is of no
 * use, which the check says, before it is renewed. */
bool cpu_plan_is_stale(const cpu_plan_t *plan);
epx_status_t cpu_plan_check(const cpu_plan_t *plan);
/* Forget everything that the plan knew. */
epx_status_t cpu_plan_renew(cpu_plan_t *plan);
/* cpu_route.c */
epx_status_t cpu_plan_route(cpu_plan_t *plan, int64_t num_tokens,
                            const void *topk_idx);
/* cpu_resolve.c: wait for the peers' counts and place everybody's rows. */
epx_status_t cpu_plan_resolve(cpu_plan_t *plan);

/* cpu_arrays.c: an array of `bytes` that peers must reach; staged when it lies
 * outside the heap. */
epx_status_t cpu_array_open(epx_group_t *group, const char *name, void *user,
                            uint64_t bytes, cpu_array_t *array);
/* Whether an array would be staged. */
bool cpu_array_is_outside(epx_group_t *group, const void *user);
void cpu_arrays_close(epx_group_t *group, cpu_array_t *arrays);
/* Those of an operation of an earlier epoch. */
void cpu_arrays_give_up(epx_group_t *group, cpu_array_t *arrays);
/* From the start of the segment; 0 when the array is not given. */
uint64_t cpu_array_offset(const epx_group_t *group, const cpu_array_t *array);

/* The runs of rows that hold received data, padding included: one, or in
 * EXPERT_SLOTS one for each local expert. */
typedef struct cpu_run {
    int64_t begin;
    int64_t count;
} cpu_run_t;
int32_t cpu_num_runs(const cpu_plan_t *plan);
cpu_run_t cpu_run(const cpu_plan_t *plan, int32_t i);
/* Copy the received rows of a row-major array. */
void cpu_copy_runs(const cpu_plan_t *plan, void *to, const void *from,
                   uint64_t row_bytes);

epx_status_t cpu_scratch_reserve(const epx_group_t *group, size_t bytes);
static inline void *
cpu_scratch(const cpu_engine_t *engine, int32_t worker)
{
    return engine->scratch + (size_t)worker * engine->scratch_bytes;
}

/* cpu_op.c: whether the plan can start an operation. */
epx_status_t cpu_op_check(cpu_plan_t *plan);

/* cpu_dispatch.c */
epx_status_t cpu_dispatch_start(cpu_plan_t *plan,
                                const epx_dispatch_args_t *args);
epx_status_t cpu_dispatch_finish(cpu_plan_t *plan);

/* A token's row as it is sent: quantised, or with its scales gathered. */
typedef struct cpu_source_row {
    const void *payload;
    const uint32_t *scales;
} cpu_source_row_t;
cpu_source_row_t cpu_source_row(const cpu_plan_t *plan, void *scratch,
                                int64_t t);

/* cpu_receive.c: open this rank's receive arrays and describe them to the
 * peers; close copies what was staged. */
epx_status_t cpu_receive_open(cpu_plan_t *plan, epx__post_t *post);
void cpu_receive_close(cpu_plan_t *plan);
/* Where rows go on a peer, by its post, whose numbers are checked; and here. */
epx_status_t cpu_target_open(const cpu_plan_t *plan, int32_t rank,
                             const epx__post_t *post,
                             struct cpu_target *target);

/* cpu_slots.c */
epx_status_t cpu_slots_open(cpu_plan_t *plan);
/* In another epoch. */
epx_status_t cpu_slots_renew(cpu_plan_t *plan);
void cpu_slots_close(cpu_plan_t *plan);
/* An operation that uses them takes a turn, on all ranks, and ends it with its
 * own status, whether all has come that was sent or not.  Returns that. */
void cpu_slots_begin_turn(cpu_plan_t *plan);
epx_status_t cpu_slots_end_turn(cpu_plan_t *plan, epx_status_t status);
/* Whether there are any for so much from each rank of another node, in one
 * parcel: how that goes there, how it comes here, and where it lies then. */
bool cpu_slots_take_parcels(const cpu_plan_t *plan, uint64_t bytes);
cpu_turn_t cpu_slots_turn_there(const cpu_plan_t *plan, int32_t rank);
cpu_turn_t cpu_slots_turn_here(const cpu_plan_t *plan);
const char *cpu_slots_parcel(const cpu_plan_t *plan, int32_t source);
epx_status_t cpu_slots_send(cpu_plan_t *plan, epx__post_t *post);
epx_status_t cpu_slots_receive(cpu_plan_t *plan);
uint64_t cpu_slot_bytes(int32_t topk, uint64_t row_bytes);

/* cpu_combine.c */
epx_status_t cpu_combine_start(cpu_plan_t *plan,
                               const epx_combine_args_t *args);
epx_status_t cpu_combine_finish(cpu_plan_t *plan);

#endif
