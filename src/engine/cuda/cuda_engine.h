/* SPDX-License-Identifier: MIT */
/* The CUDA engine's own objects, on the host, and the steps between its files.
 */
#ifndef EPX_ENGINE_CUDA_ENGINE_H
#define EPX_ENGINE_CUDA_ENGINE_H

#include "core/atomic.h"
#include "core/plan.h"
#include "engine/common/describe.h"
#include "engine/cuda/cuda_kernels.h"
#include "fabric/cuda/cuda_device.h"
#include "fabric/cuda/cuda_error.h"

#include <stdbool.h>

/* What a plan needs of the driver, and so is kept for the next one: making it
 * may wait for the device. */
typedef struct cuda_seat {
    struct cuda_seat *next;
    cuda_record_t *record; /* host memory that the device writes */
    cudaEvent_t done;      /* see cuda_plan_record */
} cuda_seat_t;

struct cuda_plan;
struct cuda_proxy;
struct cuda_stand_in;

typedef struct cuda_engine {
    cuda_view_t view;
    struct cuda_proxy *proxy; /* NULL with a single node */
    cuda_mover_t mover;
    size_t max_shared; /* that a block may have */
    size_t record_bytes;
    void *private_block; /* in the heap: state, segments, their sizes */
    cuda_seat_t *seats;  /* free ones */
    struct cuda_chunk *chunks;
    struct cuda_plan *retired; /* destroyed, but perhaps still running */
    /* Operations run one after the other, on whatever stream: whose the last
     * one was, or, once that plan is gone, the event after it. */
    struct cuda_plan *last_plan;
    cudaEvent_t last_done;
    int num_plans;                   /* the retired ones too */
    struct cuda_stand_in *stand_ins; /* a list: cuda_stand_in.c */
    uint64_t idle_bytes;             /* atomic: of those that nobody has */
} cuda_engine_t;

static inline cuda_engine_t *
cuda_engine(const epx_group_t *group)
{
    return group->engine_state;
}

typedef struct cuda_block {
    void *base;
    uint64_t bytes;
} cuda_block_t;

/* What parcels lie in: their heads in pinned memory, their rows as well, or on
 * the card where the network reaches it. */
typedef struct cuda_room {
    cuda_block_t heads;
    cuda_block_t rows;
} cuda_room_t;

typedef struct cuda_plan {
    struct epx_plan base;
    struct cuda_plan *next; /* among the retired */
    cuda_seat_t *seat;
    cuda_plan_view_t view;
    char *block;      /* of the heap; holds what view points to */
    char *slot_block; /* receive slots, of the heap; NULL: none */
    cuda_slots_t slots;
    uint32_t *notes;
    uint32_t *block_totals;
    int64_t token_capacity;
    cuda_room_t *rooms; /* the last in use: cuda_rail.c */
    int num_rooms;

    int64_t num_tokens;
    /* The counts of the last routing, once it has been waited for; in one
     * allocation. */
    int64_t *rank_tokens;    /* [R] */
    int64_t *expert_rows;    /* [L] */
    int64_t *expert_offsets; /* [L + 1] */
    int64_t num_rows, num_recv_rows, num_recv_tokens;
    int64_t num_dropped;
    int64_t most_tokens; /* of a rank; with several nodes */

    uint32_t epoch;          /* of the group, in which the plan is of use */
    uint32_t first_epoch;    /* in which its receive slots were shown */
    uint64_t num_routings;   /* generation of the last one, graphs apart */
    bool is_routed_in_graph; /* the last routing lives in a graph */
    bool needs_record;       /* retired while its stream was capturing */
    bool was_queued;         /* some other has been put on a stream: */
    cudaStream_t stream;     /* the last one on this */

    epx__pending_t pending;
    uint64_t pending_call; /* when it was started, in calls of the group */
    cuda_stage_args_t pending_stage; /* how its dispatch ends */
    bool pending_stages;
    cuda_unpack_args_t pending_unpack; /* to_slots: what comes before that */
    bool pending_is_in_slots;
    int64_t pending_rows;     /* that its receive buffers hold */
    int64_t *pending_wait_ns; /* of a dispatch that goes straight */
    cuda_dispatch_args_t pending_dispatch; /* with several nodes: the same */
    cuda_combine_args_t pending_combine;
    epx_dtype_t pending_dtype;
    int pending_blocks;
} cuda_plan_t;

static inline cuda_plan_t *
cuda_plan(epx_plan_t *plan)
{
    return (cuda_plan_t *)plan;
}

/* An operation on its way to a stream, between cuda_op_begin and cuda_op_end,
 * which hold the group's lock and the device. */
typedef struct cuda_op {
    cuda_plan_t *plan;
    cudaStream_t stream;
    bool is_captured;
} cuda_op_t;

/* cuda_engine.c: what a thread of this library's own does first, which never
 * leaves. */
void cuda_enter_thread(int32_t ordinal);

/* cuda_op.c: record the seat's event behind the plan's last operation.  That is
 * done only when somebody has to wait for it, since it costs every operation.
 */
cudaError_t cuda_plan_record(cuda_plan_t *plan);
/* Until the group's last operation has run, graphs apart. */
cudaError_t cuda_wait_for_last(const cuda_engine_t *engine);
/* Check the group, enter the device, and put the stream behind the group's last
 * operation.  On success cuda_op_end must follow. */
epx_status_t cuda_op_begin(cuda_plan_t *plan, epx_stream_t stream,
                           cuda_op_t *op);
/* Note that something has been launched, if so; returns status. */
epx_status_t cuda_op_end(cuda_op_t *op, epx_status_t status, bool launched);
/* Whether the plan can start a dispatch or combine; *rows_p (may be NULL) is
 * what its receive buffer needs, waiting for the counts when they decide. */
epx_status_t cuda_op_check(const cuda_op_t *op, int64_t *rows_p);
/* The same, but that its counts need not be known. */
epx_status_t cuda_op_check_free(const cuda_op_t *op);
/* Take the group's next step; opens a send-only operation when asked to. */
epx_status_t cuda_step_take(const cuda_op_t *op, epx__pending_t pending);

/* cuda_engine.c: make sure that there is a free seat. */
epx_status_t cuda_seats_reserve(epx_group_t *group);

/* Whether the receive rows are known without the counts. */
static inline bool
cuda_plan_is_fixed(const cuda_plan_t *plan)
{
    return plan->base.key.recv_capacity > 0 ||
           plan->base.key.layout == EPX_LAYOUT_EXPERT_SLOTS;
}

/* The error of capturing what needs counts on the host. */
epx_status_t cuda_capture_refused(void);

/* cuda_plan.c */
epx_status_t cuda_plan_open(epx_group_t *group, const epx_plan_args_t *args,
                            epx_plan_t **plan_p);
epx_status_t cuda_plan_close(epx_plan_t *base);
epx_status_t cuda_plan_route(epx_plan_t *base, int64_t num_tokens,
                             const void *topk_idx, epx_stream_t stream);
/* The same, adding to wait_ns[R] how long it waits for each rank. */
epx_status_t cuda_plan_route_timed(epx_plan_t *base, int64_t num_tokens,
                                   const void *topk_idx, int64_t *wait_ns,
                                   epx_stream_t stream);
/* Give back what retired plans held, once they have run; with `wait`, until
 * they have. */
void cuda_plans_reclaim(epx_group_t *group, bool wait);

/* Take note of new routing on its way to a stream; returns its generation, 0 in
 * a graph. */
uint64_t cuda_plan_renew(cuda_plan_t *plan, const cuda_op_t *op,
                         int64_t num_tokens);

/* cuda_counts.c */
epx_status_t cuda_counts_open(cuda_plan_t *plan);
void cuda_counts_close(cuda_plan_t *plan);
/* Forget what was told of the seat's last plan, or of routings in an earlier
 * epoch, whose kernels have all run. */
void cuda_counts_clear(cuda_plan_t *plan);
/* Whether the last routing is known to have no counts, and why. */
bool cuda_counts_refused(const cuda_plan_t *plan, epx_status_t *status_p);
/* Until the counts of the last routing are there, or a reason why not. */
epx_status_t cuda_counts_wait(cuda_plan_t *plan);
epx_status_t cuda_plan_counts(epx_plan_t *base, epx_plan_counts_t *counts);

/* cuda_fused.c: dispatches that count their own routing. */
/* Room for receive slots, if the plan has any; its shape is checked. */
epx_status_t cuda_slots_open(cuda_plan_t *plan);
/* Whether a dispatch can count the plan's new routing; on all ranks alike. */
bool cuda_can_count(const cuda_plan_t *plan, const cuda_dispatch_args_t *move);
/* Launch one that cuda_dispatch.c has drafted; topk_idx is NULL where the
 * plan's routing is meant and `is_new` false. */
epx_status_t cuda_fused_start(const cuda_op_t *op,
                              const cuda_dispatch_args_t *move, bool is_new,
                              const void *topk_idx, int num_blocks,
                              uint64_t generation);
epx_status_t cuda_unpack_start(const cuda_op_t *op);

/* cuda_stand_in.c: where peers reach an array of `bytes`: at `user` itself if
 * that is in the heap and aligned, else in a block that stands in for it.
 * *heap_p is NULL for no array. */
epx_status_t cuda_reachable(const cuda_op_t *op, const char *name,
                            const void *user, uint64_t bytes,
                            uint64_t alignment, char **heap_p);
/* A block of the heap; when it is full, once more after a clean-up. */
epx_status_t cuda_heap_alloc(epx_group_t *group, uint64_t bytes,
                             const char *what, void **block_p);
/* The operation is on its way, or has failed: see who keeps its blocks. */
void cuda_stand_ins_settle(const cuda_op_t *op, bool launched);
/* The plan goes, and with the last one all blocks. */
void cuda_stand_ins_leave(const cuda_plan_t *plan);
/* Give back what nobody uses, having waited for the last operation. */
void cuda_reclaim(epx_group_t *group);
uint64_t cuda_idle_bytes(const epx_group_t *group);
/* An epoch begins: masked ranks may still write to them. */
void cuda_stand_ins_retire(epx_group_t *group);
/* Forget them: the heap goes, too. */
void cuda_stand_ins_close(cuda_engine_t *engine);
/* Add an array to what a kernel stages, if it has a stand-in. */
void cuda_stage_add(cuda_stage_args_t *stage, const void *user, char *heap,
                    uint64_t row_bytes);
uint64_t cuda_heap_offset(const cuda_plan_t *plan, const char *heap);

/* cuda_dispatch.c, cuda_combine.c */
epx_status_t cuda_dispatch(epx_plan_t *base, const epx_dispatch_args_t *args,
                           epx_stream_t stream);
epx_status_t cuda_combine(epx_plan_t *base, const epx_combine_args_t *args,
                          epx_stream_t stream);
epx_status_t cuda_dispatch_complete(const cuda_op_t *op);
epx_status_t cuda_combine_complete(const cuda_op_t *op);

/* cuda_proxy.c: the thread that moves between nodes what kernels have packed.
 * Open sets up what both share; the thread starts with the first plan.  Leave
 * ends it, once all is sent that has to be; the net may be closed then. */
epx_status_t cuda_proxy_open(epx_group_t *group);
/* The mail: see cuda_rail.h; NULL with a single node. */
char *cuda_proxy_mail(const epx_group_t *group);
epx_status_t cuda_proxy_start(epx_group_t *group);
void cuda_proxy_leave(epx_group_t *group);
/* For core/mask.h: once the kernels have ended, until nothing is under way to
 * other nodes; then begin anew, with the first plan that is used.  With a
 * single node, nothing. */
void cuda_proxy_rest(epx_group_t *group, const uint64_t *masked);
epx_status_t cuda_proxy_renew(epx_group_t *group, const uint64_t *masked,
                              uint64_t last_step);
void cuda_proxy_close(epx_group_t *group);

/* cuda_rail.c: operations between nodes. */
static inline bool
cuda_spans_nodes(const epx_group_t *group)
{
    return group->nodes.num_nodes > 1;
}
/* After a routing's kernel. */
epx_status_t cuda_rail_route(const cuda_op_t *op, const cuda_plan_args_t *args);
/* Room for a step's parcels, which row_bytes and num_scales are of; for a
 * combine row_bytes is what comes back. */
epx_status_t cuda_rail_open(const cuda_op_t *op, epx__step_kind_t kind,
                            uint64_t row_bytes, uint64_t num_scales,
                            cuda_rail_t *rail);
/* The same for a dispatch into receive slots. */
epx_status_t cuda_rail_open_slots(cuda_plan_t *plan, cuda_rail_t *rail);
/* Its kernels beside the fused one and, in the hook, unpack. */
epx_status_t cuda_rail_slots_begin(const cuda_op_t *op,
                                   const cuda_fused_args_t *args);
epx_status_t cuda_rail_slots_sent(const cuda_op_t *op,
                                  const cuda_fused_args_t *args);
epx_status_t cuda_rail_slots_wait(const cuda_op_t *op,
                                  const cuda_unpack_args_t *args);
epx_status_t cuda_rail_slots_end(const cuda_op_t *op,
                                 const cuda_unpack_args_t *args);
/* All kernels of a step, in a send-only one those before the hook. */
epx_status_t cuda_rail_dispatch(const cuda_op_t *op,
                                const cuda_dispatch_args_t *args,
                                cuda_mover_t mover, int num_blocks);
epx_status_t cuda_rail_dispatch_end(const cuda_op_t *op,
                                    const cuda_dispatch_args_t *args,
                                    int num_blocks);
epx_status_t cuda_rail_combine(const cuda_op_t *op,
                               const cuda_combine_args_t *args,
                               bool wants_weights, epx_dtype_t dtype,
                               cuda_mover_t mover, int num_blocks);
epx_status_t cuda_rail_combine_end(const cuda_op_t *op,
                                   const cuda_combine_args_t *args,
                                   epx_dtype_t dtype, cuda_mover_t mover,
                                   int num_blocks);
/* Whether the network may still read or write the plan's regions, though its
 * kernels have run. */
bool cuda_rail_is_busy(const cuda_plan_t *plan);
void cuda_rail_close(cuda_plan_t *plan);
/* In another epoch: nobody works with its memory any more. */
void cuda_rail_forget(cuda_plan_t *plan);

/* cuda_mask.c: going on without ranks. */
void cuda_mask_open(epx_group_t *group);
static inline bool
cuda_plan_is_stale(const cuda_plan_t *plan)
{
    return plan->epoch != epx__load_u32(&plan->base.group->epoch);
}
/* Refuse a plan of an earlier epoch. */
epx_status_t cuda_plan_check(const cuda_plan_t *plan);
/* Make one as it was before it had routing, but for its memory. */
epx_status_t cuda_plan_revive(cuda_plan_t *plan);
/* Which entries of the plan's routing are dropped: `dropped` may be NULL.  New
 * routing's generation, else tells is false. */
epx_status_t cuda_drops(const cuda_op_t *op, int64_t num_tokens,
                        uint8_t *dropped, bool tells, uint64_t generation);

/* cuda_report.c: the errors that the device has found, as sentences. */
epx_status_t cuda_check(epx_group_t *group);
/* The same, outside of any call. */
void cuda_look(epx_group_t *group);
epx_status_t cuda_refused(cuda_plan_t *plan);

static inline int
cuda_blocks(const epx_group_t *group, int32_t wanted)
{
    return wanted > 0 ? wanted : group->num_workers;
}

#endif
