/* SPDX-License-Identifier: MIT */
/* The host's half of cuda_fused.cu and cuda_unpack.cu. */
#include "engine/cuda/cuda_engine.h"

#include <inttypes.h>

/* Every block counts all of the routing: beyond this many entries a plan's
 * kernel and then the dispatch are faster. */
#define MOST_ENTRIES 16384

static int
min_int(int64_t a, int64_t b)
{
    return (int)(a < b ? a : b);
}

static cuda_fused_args_t
draft_fused(const cuda_plan_t *plan, const cuda_dispatch_args_t *move)
{
    cuda_fused_args_t args = {
        .move = *move,
        .slots = plan->slots,
        .told.record = plan->seat == NULL ? NULL : plan->seat->record,
    };

    return args;
}

bool
cuda_can_count(const cuda_plan_t *plan, const cuda_dispatch_args_t *move)
{
    size_t most = cuda_engine(plan->base.group)->max_shared;
    cuda_fused_args_t args = draft_fused(plan, move);

    /* Between nodes rows go straight to the places that the plan has given. */
    return (!cuda_spans_nodes(plan->base.group) ||
            (move->is_send_only && plan->slot_block != NULL)) &&
           plan->base.key.layout == EPX_LAYOUT_EXPERT_SLOTS &&
           plan->base.key.max_tokens_per_rank * plan->base.key.topk <=
               MOST_ENTRIES &&
           cuda_fused_shape(&args, 1, most) <= most;
}

static cuda_slots_t
describe_slots(const cuda_plan_t *plan)
{
    uint64_t topk = plan->base.key.topk;
    cuda_slots_t slots = { 0 };

    slots.rows_at = 16 + topk * sizeof(int32_t);
    slots.weights_at = slots.rows_at + topk * sizeof(uint32_t);
    slots.scales_at =
        epx__round_up(slots.weights_at + topk * sizeof(float), EPX_ROW_ALIGN);
    /* payload_at depends on the scales of a dispatch; it begins on a multiple
     * of EPX_ROW_ALIGN, which may cost as much. */
    slots.slot_bytes = epx__round_up(slots.scales_at + EPX_ROW_ALIGN +
                                         plan->base.key.send_only_row_bytes,
                                     EPX__LINE);
    return slots;
}

/* Whether shared memory can hold the widest row that may be sent. */
static epx_status_t
check_row(const cuda_plan_t *plan)
{
    size_t most = cuda_engine(plan->base.group)->max_shared;
    cuda_dispatch_args_t move = { .num_tokens = 1 };
    cuda_fused_args_t args;

    move.view.num_ranks = plan->base.group->num_ranks;
    move.plan = plan->view;
    move.row_bytes = plan->base.key.send_only_row_bytes + EPX_ROW_ALIGN;
    /* Quantising takes the most. */
    move.in_bytes = 2 * move.row_bytes;
    move.quantize = EPX_QUANTIZE_F8E4M3_F32;
    args = draft_fused(plan, &move);
    if (cuda_fused_shape(&args, 1, most) > most) {
        return epx__fail(
            EPX_ERR_UNSUPPORTED,
            "args->send_only_row_bytes is %" PRIu64
            ", with %u experts on %d ranks; a row does not fit the "
            "%zu bytes of shared memory of a CUDA block",
            plan->base.key.send_only_row_bytes, plan->base.key.num_experts,
            move.view.num_ranks, most);
    }
    return EPX_OK;
}

epx_status_t
cuda_slots_open(cuda_plan_t *plan)
{
    epx_group_t *group = plan->base.group;
    const epx__plan_key_t *key = &plan->base.key;
    uint64_t count = 2 * (uint64_t)group->num_ranks * key->max_tokens_per_rank;
    uint64_t bytes;
    void *block = NULL;
    epx_status_t status;

    if (key->send_only_row_bytes == 0) {
        return EPX_OK;
    }
    if (key->max_tokens_per_rank * key->topk > INT32_MAX) {
        return epx__fail(EPX_ERR_UNSUPPORTED,
                         "args->send_only_row_bytes is given with %" PRIu64
                         " tokens of top-k %u; a CUDA device counts %d entries",
                         key->max_tokens_per_rank, key->topk, INT32_MAX);
    }
    status = check_row(plan);
    if (status != EPX_OK) {
        return status;
    }
    plan->slots = describe_slots(plan);
    if (__builtin_mul_overflow(count, plan->slots.slot_bytes, &bytes)) {
        bytes = UINT64_MAX;
    }
    status = cuda_heap_alloc(group, bytes, "receive slots", &block);
    plan->slot_block = block;
    return status;
}

static cuda_slots_t
slots_of(const cuda_plan_t *plan, const cuda_dispatch_args_t *move)
{
    cuda_slots_t slots = plan->slots;

    slots.payload_at = epx__round_up(
        slots.scales_at + (uint64_t)move->num_scales * sizeof(uint32_t),
        EPX_ROW_ALIGN);
    return slots;
}

/* How the slots' rows come to their places: they are as they were sent. */
static void
draft_unpack(cuda_plan_t *plan, const cuda_fused_args_t *sent, int num_blocks)
{
    cuda_unpack_args_t *unpack = &plan->pending_unpack;
    cuda_dispatch_args_t *move = &unpack->move;
    const char *slots = plan->slot_block;

    *unpack = (cuda_unpack_args_t){
        .move = sent->move,
        .is_new = sent->is_new,
        .slots = sent->slots,
        .told = sent->told,
    };
    move->in_bytes = move->row_bytes;
    move->quantize = EPX_QUANTIZE_NONE;
    move->x_is_aligned = 1;
    move->scale_stride = 1;
    move->scale_token_stride = 4;
    /* The kernel finds them; here they say that there are any, aligned. */
    move->scales =
        move->num_scales > 0 ? (const uint32_t *)(const void *)slots : NULL;
    plan->pending_is_in_slots = true;
    plan->pending_blocks = num_blocks;
}

epx_status_t
cuda_fused_start(const cuda_op_t *op, const cuda_dispatch_args_t *move,
                 bool is_new, const void *topk_idx, int num_blocks,
                 uint64_t generation)
{
    cuda_plan_t *plan = op->plan;
    const cuda_engine_t *engine = cuda_engine(plan->base.group);
    cuda_fused_args_t args = draft_fused(plan, move);
    int64_t tokens = move->num_tokens > 0 ? move->num_tokens : 1;
    int64_t per_block = (tokens + num_blocks - 1) / num_blocks;
    int most = move->view.num_ranks; /* blocks that tell the peers */
    bool spans = cuda_spans_nodes(plan->base.group);
    epx_status_t status = EPX_OK;
    int used;

    args.topk_idx = is_new ? topk_idx : plan->view.experts;
    args.idx_is_i64 = is_new && plan->base.key.idx_dtype == EPX_I64;
    args.is_new = is_new;
    args.to_slots = move->is_send_only && plan->slot_block != NULL;
    args.slots = slots_of(plan, move);
    args.told.generation = generation;
    args.num_movers = (uint32_t)((tokens + per_block - 1) / per_block);
    /* The last ones tell: where that costs none of the others' SMs, they do
     * nothing else. */
    used = min_int(num_blocks, (int64_t)args.num_movers + most);
    (void)cuda_fused_shape(&args, (int)args.num_movers, engine->max_shared);
    if (args.to_slots) {
        draft_unpack(plan, &args, num_blocks);
    }
    if (spans) {
        status = cuda_rail_slots_begin(op, &args);
    }
    if (status == EPX_OK) {
        status = epx__cuda_check(
            cuda_fused_launch(&args, engine->mover, used, op->stream),
            "cannot launch a dispatch");
    }
    return status == EPX_OK && spans ? cuda_rail_slots_sent(op, &args) : status;
}

epx_status_t
cuda_unpack_start(const cuda_op_t *op)
{
    cuda_plan_t *plan = op->plan;
    const cuda_engine_t *engine = cuda_engine(plan->base.group);
    cuda_unpack_args_t *args = &plan->pending_unpack;
    cuda_mover_t mover = engine->mover;
    bool spans = cuda_spans_nodes(plan->base.group);
    epx_status_t status = EPX_OK;

    if (cuda_unpack_shape(args, mover, engine->max_shared) >
        engine->max_shared) {
        mover = CUDA_MOVER_PLAIN; /* which stages nothing */
        (void)cuda_unpack_shape(args, mover, engine->max_shared);
    }
    if (spans) {
        status = cuda_rail_slots_wait(op, args);
    }
    if (status == EPX_OK) {
        status = epx__cuda_check(
            cuda_unpack_launch(args, mover, plan->pending_blocks, op->stream),
            "cannot launch the end of a dispatch");
    }
    return status == EPX_OK && spans ? cuda_rail_slots_end(op, args) : status;
}
