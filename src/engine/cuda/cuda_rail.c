/* SPDX-License-Identifier: MIT */
/* The host's half of what goes between nodes: the memory of parcels, and the
 * order of kernels.
 *
 *     dispatch    pack, dispatch | turn: wait OUT, forward
 *     combine     pack, announce | turn: wait OUT, a sum for each forward,
 *                 turn: wait BACK, the last sum
 *
 * A send-only operation ends at the line, and its hook begins there.  Through
 * receive slots:
 *
 *     dispatch    begin, fused, turn | turn: wait, unpack, turn
 */
#include "core/atomic.h"
#include "engine/cuda/cuda_engine.h"
#include "engine/cuda/cuda_kept.h"
#include "net/net_group.h"

#include <inttypes.h>
#include <stdlib.h>

/* Blocks are multiples of it, so that plans can use each other's. */
#define REGION_UNIT ((uint64_t)1 << 21)

/* ---- memory ---- */

/* Regions for parcels of so many tokens; lay_out tells where. */
static cuda_regions_t
regions_for(const cuda_parcel_kind_t *kind, int64_t num_tokens)
{
    cuda_parcel_t parcel = cuda_parcel(kind, 1, (uint64_t)num_tokens);

    return (cuda_regions_t){
        .bytes = epx__round_up(parcel.bytes, EPX__PAGE),
        .row_bytes = epx__round_up(parcel.row_bytes, EPX__PAGE),
        .max_tokens = (uint64_t)num_tokens,
    };
}

/* The most tokens that a rank of another node can send here. */
static epx_status_t
far_capacity(const cuda_op_t *op, int64_t *capacity_p)
{
    cuda_plan_t *plan = op->plan;
    epx_status_t status = EPX_OK;

    *capacity_p = (int64_t)plan->base.key.max_tokens_per_rank;
    if (*capacity_p > 0) {
        return EPX_OK;
    }
    if (op->is_captured) {
        return epx__fail(EPX_ERR_STATE,
                         "across nodes only a plan with max_tokens_per_rank "
                         "can be captured in a graph: the others need their "
                         "counts on the host");
    }
    status = cuda_counts_wait(plan);
    *capacity_p = plan->most_tokens;
    return status;
}

static epx_status_t
make_room(const epx_group_t *group, uint64_t bytes, uint64_t row_bytes,
          cuda_room_t *room)
{
    bool is_on_card = epx__net_reaches_card(epx__group_net(group));
    epx_status_t status;

    *room = (cuda_room_t){
        .heads.bytes = epx__round_up(bytes, REGION_UNIT),
        .rows.bytes = epx__round_up(row_bytes, REGION_UNIT),
    };
    status = epx__cuda_check(cuda_kept_take(CUDA_KEPT_PINNED, room->heads.bytes,
                                            CUDA_MARK_BYTES, &room->heads.base),
                             "no pinned memory for what goes between nodes");
    if (status == EPX_OK && row_bytes > 0) {
        status = epx__cuda_check(
            cuda_kept_take(is_on_card ? group->device_ordinal
                                      : CUDA_KEPT_PINNED,
                           room->rows.bytes, 0, &room->rows.base),
            is_on_card ? "no memory of the card for rows between nodes"
                       : "no pinned memory for rows between nodes");
    }
    if (status != EPX_OK) {
        cuda_kept_give(room->heads.base);
    }
    return status;
}

static uint64_t
larger(uint64_t a, uint64_t b)
{
    return a > b ? a : b;
}

/* Room for so many bytes at least: what there was before stays until the plan
 * goes, as kernels may be working with it. */
static epx_status_t
grow(cuda_plan_t *plan, uint64_t bytes, uint64_t row_bytes)
{
    int count = plan->num_rooms;
    cuda_room_t last = { 0 };
    cuda_room_t *rooms;
    epx_status_t status;

    if (count > 0) {
        last = plan->rooms[count - 1];
    }
    if (last.heads.bytes >= bytes && last.rows.bytes >= row_bytes) {
        return EPX_OK;
    }
    rooms = realloc(plan->rooms, ((size_t)count + 1) * sizeof(*rooms));
    if (rooms == NULL) {
        return epx__fail(EPX_ERR_NO_MEMORY, "no memory for a plan");
    }
    plan->rooms = rooms;
    /* By half at least, so that there are few. */
    status =
        make_room(plan->base.group, larger(bytes, last.heads.bytes * 3 / 2),
                  larger(row_bytes, last.rows.bytes * 3 / 2), &rooms[count]);
    plan->num_rooms += status == EPX_OK;
    return status;
}

static void
place(cuda_regions_t *regions, int32_t count, char **at_p, char **rows_at_p)
{
    regions->heads = *at_p;
    regions->rows = *rows_at_p;
    *at_p += (uint64_t)count * regions->bytes;
    *rows_at_p += (uint64_t)count * regions->row_bytes;
}

/* Lays the regions out in the plan's room; the counts are of those by node, and
 * by forward. */
static epx_status_t
lay_out(cuda_plan_t *plan, int32_t num_nodes, int32_t num_forwards,
        cuda_rail_t *rail)
{
    uint64_t bytes = EPX__PAGE, row_bytes = 0; /* marks have the first page */
    epx_status_t status;
    char *at, *rows_at;

    for (int lane = 0; lane < EPX__NUM_LANES; lane++) {
        bytes += (uint64_t)num_nodes * rail->by_node[lane].bytes +
                 (uint64_t)num_forwards * rail->by_forward[lane].bytes;
        row_bytes += (uint64_t)num_nodes * rail->by_node[lane].row_bytes +
                     (uint64_t)num_forwards * rail->by_forward[lane].row_bytes;
    }
    status = grow(plan, bytes, row_bytes);
    if (status != EPX_OK) {
        return status;
    }
    at = plan->rooms[plan->num_rooms - 1].heads.base;
    rows_at = plan->rooms[plan->num_rooms - 1].rows.base;
    rail->marks = (uint64_t *)(void *)at;
    at += EPX__PAGE;
    for (int lane = 0; lane < EPX__NUM_LANES; lane++) {
        place(&rail->by_node[lane], num_nodes, &at, &rows_at);
        place(&rail->by_forward[lane], num_forwards, &at, &rows_at);
    }
    return EPX_OK;
}

epx_status_t
cuda_rail_open(const cuda_op_t *op, epx__step_kind_t kind, uint64_t row_bytes,
               uint64_t num_scales, cuda_rail_t *rail)
{
    cuda_plan_t *plan = op->plan;
    const cuda_nodes_t *nodes = &cuda_engine(plan->base.group)->view.nodes;
    bool is_dispatch = kind == EPX__STEP_DISPATCH;
    int64_t far_tokens;
    epx_status_t status = far_capacity(op, &far_tokens);

    if (status != EPX_OK) {
        return status;
    }
    *rail = (cuda_rail_t){ 0 };
    for (int lane = 0; lane < EPX__NUM_LANES; lane++) {
        bool is_out = lane == EPX__LANE_OUT;
        bool has_rows = is_out == is_dispatch;

        rail->kinds[lane] = (cuda_parcel_kind_t){
            .topk = plan->base.key.topk,
            .is_out = is_out,
            .num_scales = has_rows ? num_scales : 0,
            .row_bytes = has_rows ? row_bytes : 0,
        };
        if (is_out || !is_dispatch) {
            rail->by_node[lane] =
                regions_for(&rail->kinds[lane], plan->token_capacity);
            rail->by_forward[lane] =
                regions_for(&rail->kinds[lane], far_tokens);
        }
    }
    return lay_out(plan, nodes->num_nodes - 1, nodes->num_forwards, rail);
}

epx_status_t
cuda_rail_open_slots(cuda_plan_t *plan, cuda_rail_t *rail)
{
    const epx__nodes_t *nodes = &plan->base.group->nodes;
    int32_t num_far =
        plan->base.group->num_ranks - epx__node_size(nodes, nodes->own);
    cuda_parcel_kind_t kind = { .row_bytes = plan->slots.slot_bytes };
    cuda_regions_t regions =
        regions_for(&kind, (int64_t)plan->base.key.max_tokens_per_rank);

    *rail = (cuda_rail_t){
        .kinds[EPX__LANE_OUT] = kind,
        .by_node[EPX__LANE_OUT] = regions,
        .by_forward[EPX__LANE_OUT] = regions,
        .is_slots = 1,
    };
    return lay_out(plan, num_far, num_far, rail);
}

bool
cuda_rail_is_busy(const cuda_plan_t *plan)
{
    /* Nothing ends the trips of a broken group but the end of its net. */
    bool is_busy =
        plan->num_rooms > 0 && epx__group_is_broken(plan->base.group);
    /* In another epoch nobody works with them. */
    int count = cuda_plan_is_stale(plan) ? 0 : plan->num_rooms;

    for (int i = 0; i < count && !is_busy; i++) {
        const uint64_t *marks = plan->rooms[i].heads.base;

        /* Released by the proxy. */
        is_busy = epx__load_acquire_u64(&marks[CUDA_MARK_FREE]) !=
                  epx__load_acquire_u64(&marks[0]);
    }
    return is_busy;
}

void
cuda_rail_forget(cuda_plan_t *plan)
{
    for (int i = 0; i < plan->num_rooms; i++) {
        uint64_t *marks = plan->rooms[i].heads.base;

        marks[CUDA_MARK_FREE] = marks[0];
    }
}

void
cuda_rail_close(cuda_plan_t *plan)
{
    for (int i = 0; i < plan->num_rooms; i++) {
        cuda_kept_give(plan->rooms[i].heads.base);
        cuda_kept_give(plan->rooms[i].rows.base);
    }
    free(plan->rooms);
}

/* ---- kernels ---- */

static epx_status_t
launch_route(const cuda_op_t *op, const cuda_rail_args_t *args)
{
    return epx__cuda_check(
        cuda_rail_route_launch(args, op->plan->base.group->num_workers,
                               op->stream),
        "cannot launch a plan's kernels");
}

epx_status_t
cuda_rail_route(const cuda_op_t *op, const cuda_plan_args_t *args)
{
    const cuda_rail_args_t rail = {
        .view = args->view,
        .plan = args->plan,
        .num_tokens = args->num_tokens,
    };

    return launch_route(op, &rail);
}

static epx_status_t
launch_turn(const cuda_op_t *op, const cuda_turn_args_t *args)
{
    return epx__cuda_check(cuda_rail_turn_launch(args, op->stream),
                           "cannot launch a turn to the network");
}

static epx_status_t
turn(const cuda_op_t *op, const cuda_rail_t *rail, cuda_tell_t tell, int wait,
     int64_t *wait_ns)
{
    return launch_turn(op, &(cuda_turn_args_t){
                               .view = cuda_engine(op->plan->base.group)->view,
                               .plan = op->plan->view,
                               .marks = rail->marks,
                               .tell = tell,
                               .wait = wait,
                               .wait_ns = wait_ns,
                           });
}

static epx_status_t
forward(const cuda_op_t *op, const cuda_dispatch_args_t *sent, int num_blocks)
{
    const cuda_engine_t *engine = cuda_engine(op->plan->base.group);
    cuda_dispatch_args_t args = *sent;
    cuda_mover_t mover = engine->mover;
    const void *rows = sent->rail.marks;

    /* Rows are as they were sent, their scales dense.  That there may be
     * weights is all that a pointer says here. */
    args.in_bytes = args.row_bytes;
    args.quantize = EPX_QUANTIZE_NONE;
    args.x_is_aligned = 1;
    args.scales = args.num_scales > 0 ? rows : NULL;
    args.scale_stride = 1;
    args.scale_token_stride = args.num_scales;
    args.topk_weights = rows;
    if (cuda_rail_forward_shape(&args, mover, engine->max_shared) >
        engine->max_shared) {
        mover = CUDA_MOVER_PLAIN; /* which stages nothing */
        (void)cuda_rail_forward_shape(&args, mover, engine->max_shared);
    }
    return epx__cuda_check(
        cuda_rail_forward_launch(&args, mover, num_blocks, op->stream),
        "cannot launch the forwarding of a dispatch");
}

epx_status_t
cuda_rail_dispatch(const cuda_op_t *op, const cuda_dispatch_args_t *args,
                   cuda_mover_t mover, int num_blocks)
{
    const cuda_rail_args_t pack = {
        .view = args->view,
        .plan = args->plan,
        .num_tokens = args->num_tokens,
        .kind = EPX__STEP_DISPATCH,
        .topk_weights = args->topk_weights,
        .rail = args->rail,
    };
    epx_status_t status =
        epx__cuda_check(cuda_rail_pack_launch(&pack, num_blocks, op->stream),
                        "cannot launch the packing of a dispatch");

    if (status == EPX_OK) {
        status = epx__cuda_check(
            cuda_dispatch_launch(args, mover, num_blocks, op->stream),
            "cannot launch a dispatch");
    }
    if (status == EPX_OK) {
        status = turn(op, &args->rail, CUDA_TELL_PACKED,
                      args->is_send_only ? -1 : EPX__LANE_OUT, args->wait_ns);
    }
    return status == EPX_OK && !args->is_send_only
               ? forward(op, args, num_blocks)
               : status;
}

epx_status_t
cuda_rail_dispatch_end(const cuda_op_t *op, const cuda_dispatch_args_t *args,
                       int num_blocks)
{
    epx_status_t status =
        turn(op, &args->rail, CUDA_TELL_NOTHING, EPX__LANE_OUT, args->wait_ns);

    return status == EPX_OK ? forward(op, args, num_blocks) : status;
}

static epx_status_t
sum_all(const cuda_op_t *op, const cuda_combine_args_t *args, epx_dtype_t dtype,
        cuda_mover_t mover, int num_blocks)
{
    cuda_combine_args_t sum = *args;
    uint32_t num_forwards = (uint32_t)args->view.nodes.num_forwards;
    epx_status_t status = EPX_OK;

    sum.is_partial = 1;
    for (uint32_t f = 0; f < num_forwards && status == EPX_OK; f++) {
        sum.forward = f;
        status =
            epx__cuda_check(cuda_rail_combine_launch(&sum, dtype, mover,
                                                     num_blocks, op->stream),
                            "cannot launch a sum for another node");
    }
    if (status == EPX_OK) {
        status = turn(op, &args->rail, CUDA_TELL_SUMMED, EPX__LANE_BACK,
                      args->wait_ns);
    }
    return status == EPX_OK
               ? epx__cuda_check(cuda_rail_combine_launch(args, dtype, mover,
                                                          num_blocks,
                                                          op->stream),
                                 "cannot launch a combine")
               : status;
}

epx_status_t
cuda_rail_combine(const cuda_op_t *op, const cuda_combine_args_t *args,
                  bool wants_weights, epx_dtype_t dtype, cuda_mover_t mover,
                  int num_blocks)
{
    const cuda_rail_args_t pack = {
        .view = args->view,
        .plan = args->plan,
        .num_tokens = args->num_tokens,
        .kind = EPX__STEP_COMBINE,
        .wants_weights = wants_weights,
        .topk_weights = args->topk_weights,
        .rail = args->rail,
    };
    cuda_combine_args_t announce = *args;
    epx_status_t status =
        epx__cuda_check(cuda_rail_pack_launch(&pack, num_blocks, op->stream),
                        "cannot launch the packing of a combine");

    announce.posts = 1;
    announce.pulls = 0;
    if (status == EPX_OK) {
        status = epx__cuda_check(
            cuda_combine_launch(&announce, dtype, mover, 1, op->stream),
            "cannot launch a combine");
    }
    if (status == EPX_OK) {
        status = turn(op, &args->rail, CUDA_TELL_PACKED,
                      args->pulls ? EPX__LANE_OUT : -1, args->wait_ns);
    }
    return status == EPX_OK && args->pulls
               ? sum_all(op, args, dtype, mover, num_blocks)
               : status;
}

epx_status_t
cuda_rail_combine_end(const cuda_op_t *op, const cuda_combine_args_t *args,
                      epx_dtype_t dtype, cuda_mover_t mover, int num_blocks)
{
    epx_status_t status =
        turn(op, &args->rail, CUDA_TELL_NOTHING, EPX__LANE_OUT, args->wait_ns);

    return status == EPX_OK ? sum_all(op, args, dtype, mover, num_blocks)
                            : status;
}

/* ---- receive slots ---- */

static epx_status_t
slots_turn(const cuda_op_t *op, const cuda_dispatch_args_t *args, bool is_new,
           cuda_tell_t tell, int wait)
{
    return launch_turn(op, &(cuda_turn_args_t){
                               .view = args->view,
                               .plan = args->plan,
                               .marks = args->rail.marks,
                               .is_new = is_new,
                               .tell = tell,
                               .wait = wait,
                               .wait_ns = args->wait_ns,
                           });
}

epx_status_t
cuda_rail_slots_begin(const cuda_op_t *op, const cuda_fused_args_t *args)
{
    const cuda_rail_args_t begin = {
        .view = args->move.view,
        .plan = args->move.plan,
        .kind = EPX__STEP_DISPATCH,
        .is_new = args->is_new,
        .rail = args->move.rail,
    };

    return epx__cuda_check(cuda_rail_pack_launch(&begin, 1, op->stream),
                           "cannot launch the beginning of a dispatch");
}

epx_status_t
cuda_rail_slots_sent(const cuda_op_t *op, const cuda_fused_args_t *args)
{
    return slots_turn(op, &args->move, args->is_new, CUDA_TELL_PACKED, -1);
}

epx_status_t
cuda_rail_slots_wait(const cuda_op_t *op, const cuda_unpack_args_t *args)
{
    return slots_turn(op, &args->move, args->is_new, CUDA_TELL_NOTHING,
                      EPX__LANE_OUT);
}

epx_status_t
cuda_rail_slots_end(const cuda_op_t *op, const cuda_unpack_args_t *args)
{
    const cuda_rail_args_t route = {
        .view = args->move.view,
        .plan = args->move.plan,
        .num_tokens = args->move.num_tokens,
    };
    epx_status_t status =
        slots_turn(op, &args->move, args->is_new, CUDA_TELL_ENDED, -1);

    return status == EPX_OK && args->is_new ? launch_route(op, &route) : status;
}
