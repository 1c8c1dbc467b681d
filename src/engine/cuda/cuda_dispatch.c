/* SPDX-License-Identifier: MIT */
/* The host's half of cuda_dispatch.cu. */
#include "engine/cuda/cuda_engine.h"

#include <inttypes.h>

static const char *const array_names[EPX__NUM_ARRAYS] = {
    "recv_x",         "recv_scales", "recv_topk_idx", "recv_topk_weights",
    "recv_src_token",
};

/* A dispatch between its checks and its launch. */
typedef struct draft {
    cuda_plan_t *plan;
    epx_dispatch_args_t args;
    epx__dispatch_shape_t shape;
    int64_t num_tokens;
    int64_t num_rows; /* that the receive buffer needs */
    bool is_new;      /* the dispatch counts new routing */
    bool to_slots;    /* which receive the rows first */
    cuda_dispatch_args_t kernel;
    cuda_stage_args_t stage;
    bool stages;
} draft_t;

static epx_status_t
check_pointers(const draft_t *draft)
{
    const epx_dispatch_args_t *args = &draft->args;
    bool has_scales = draft->shape.num_scales > 0;
    const epx__pointer_t sent[] = {
        { "x", args->x, true },
        { "scales", args->scales,
          has_scales && args->quantize == EPX_QUANTIZE_NONE },
        { "topk_weights", args->topk_weights, draft->shape.has_weights },
    };
    const epx__pointer_t received[] = {
        { "recv_x", args->recv_x, true },
        { "recv_scales", args->recv_scales, has_scales },
        { "recv_topk_weights", args->recv_topk_weights,
          draft->shape.has_weights },
    };
    epx_status_t status =
        epx__check_pointers(sent, 3, "num_tokens", draft->num_tokens);

    if (status == EPX_OK && args->recv_rows < draft->num_rows) {
        status = epx__fail(EPX_ERR_TOO_SMALL,
                           "recv_rows is %" PRId64 ", but this rank's receive "
                           "buffers need %" PRId64 " rows",
                           args->recv_rows, draft->num_rows);
    }
    return status == EPX_OK
               ? epx__check_pointers(received, 3, "the number of received rows",
                                     draft->num_rows)
               : status;
}

/* How received scales lie: as the caller wants it, or dense in a stand-in. */
static void
set_scale_strides(const draft_t *draft, bool is_dense, epx__post_t *post)
{
    const epx_dispatch_args_t *args = &draft->args;
    uint64_t num_scales = (uint64_t)draft->shape.num_scales;

    post->scale_row_stride =
        is_dense ? num_scales : (uint64_t)args->recv_scale_row_stride;
    post->scale_stride = is_dense ? 1 : (uint64_t)args->recv_scale_stride;
    post->scale_expert_stride =
        is_dense ? epx__rows_per_expert(&draft->plan->base) * num_scales
                 : (uint64_t)args->recv_scale_expert_stride;
}

static epx_status_t
open_scales(draft_t *draft, const cuda_op_t *op, void *user)
{
    cuda_plan_t *plan = draft->plan;
    epx__post_t *post = &draft->kernel.post;
    int32_t num_local = plan->base.num_local_experts;
    uint64_t left, rows = (uint64_t)draft->num_rows;
    bool is_outside =
        user != NULL && !epx__heap_find(&plan->base.group->heap, user, &left);
    epx_status_t status;
    char *heap;

    set_scale_strides(draft, is_outside, post);
    status = cuda_reachable(
        op, "recv_scales", user,
        user == NULL ? 0
                     : epx__scale_extent(&plan->base, num_local, rows, post),
        sizeof(uint32_t), &heap);
    post->offset[EPX__ARRAY_SCALES] = cuda_heap_offset(plan, heap);
    if (status == EPX_OK && heap != NULL && heap != user) {
        draft->stages = true;
        draft->stage.user_scales = user;
        draft->stage.heap_scales = (const uint32_t *)(const void *)heap;
        draft->stage.num_scales = draft->shape.num_scales;
        draft->stage.row_stride = draft->args.recv_scale_row_stride;
        draft->stage.scale_stride = draft->args.recv_scale_stride;
        draft->stage.expert_stride = draft->args.recv_scale_expert_stride;
    }
    return status;
}

/* See where peers write the receive arrays, and tell them in the post. */
static epx_status_t
open_arrays(draft_t *draft, const cuda_op_t *op)
{
    cuda_plan_t *plan = draft->plan;
    const epx_dispatch_args_t *args = &draft->args;
    void *const users[EPX__NUM_ARRAYS] = {
        args->recv_x,
        draft->shape.num_scales > 0 ? args->recv_scales : NULL,
        args->recv_topk_idx,
        args->recv_topk_weights,
        args->recv_src_token,
    };
    epx_status_t status = open_scales(draft, op, users[EPX__ARRAY_SCALES]);

    for (int i = 0; i < EPX__NUM_ARRAYS && status == EPX_OK; i++) {
        epx__array_t array = (epx__array_t)i;
        uint64_t row_bytes = epx__array_row_bytes(
            &plan->base, array, (uint64_t)draft->shape.row_bytes);
        uint64_t bytes;
        char *heap;

        if (array == EPX__ARRAY_SCALES) {
            continue;
        }
        if (__builtin_mul_overflow((uint64_t)draft->num_rows, row_bytes,
                                   &bytes)) {
            bytes = UINT64_MAX;
        }
        status =
            cuda_reachable(op, array_names[i], users[i], bytes,
                           array == EPX__ARRAY_X ? EPX_ROW_ALIGN : 4, &heap);
        draft->kernel.post.offset[i] = cuda_heap_offset(plan, heap);
        if (status == EPX_OK && heap != users[i] && heap != NULL) {
            draft->stages = true;
            cuda_stage_add(&draft->stage, users[i], heap, row_bytes);
        }
    }
    return status;
}

static void
fill_kernel(draft_t *draft)
{
    const cuda_plan_t *plan = draft->plan;
    const epx_dispatch_args_t *args = &draft->args;
    bool takes_part = draft->num_tokens > 0 || draft->num_rows > 0;
    cuda_dispatch_args_t *kernel = &draft->kernel;

    kernel->view = cuda_engine(plan->base.group)->view;
    kernel->plan = plan->view;
    kernel->num_tokens = draft->num_tokens;
    kernel->x = args->x;
    kernel->in_bytes = (uint64_t)args->hidden * epx_dtype_size(args->dtype);
    kernel->row_bytes = (uint64_t)draft->shape.row_bytes;
    kernel->x_is_aligned = (uintptr_t)args->x % EPX_ROW_ALIGN == 0;
    kernel->quantize = args->quantize;
    kernel->scales = args->scales;
    kernel->num_scales = draft->shape.num_scales;
    kernel->scale_token_stride = args->scale_token_stride;
    kernel->scale_stride = args->scale_stride;
    kernel->topk_weights = args->topk_weights;
    kernel->recv_expert_counts = args->recv_expert_counts;
    kernel->recv_expert_totals = args->recv_expert_totals;
    kernel->wait_ns = args->wait_ns;
    kernel->is_send_only = (args->flags & EPX_SEND_ONLY) != 0;
    kernel->post.num_rows = (uint64_t)args->recv_rows;
    kernel->post.signature = draft->shape.signature;
    kernel->post.signature.arrays =
        epx__weights_bits(draft->shape.has_weights, takes_part);
    draft->stage.view = kernel->view;
    draft->stage.plan = kernel->plan;
    draft->stage.to_user = 1;
    draft->stage.max_rows = (uint64_t)draft->num_rows;
}

static epx_status_t
stage_out(const cuda_stage_args_t *stage, int num_blocks, cudaStream_t stream)
{
    return epx__cuda_check(cuda_stage_launch(stage, num_blocks, stream),
                           "cannot launch the copy of a dispatch's rows");
}

static epx_status_t
launch_kernel(draft_t *draft, const cuda_op_t *op, int num_blocks)
{
    const cuda_engine_t *engine = cuda_engine(draft->plan->base.group);
    cuda_mover_t mover =
        draft->kernel.x_is_aligned ? engine->mover : CUDA_MOVER_PLAIN;

    if (draft->is_new || draft->to_slots) {
        uint64_t generation =
            draft->is_new ? cuda_plan_renew(draft->plan, op, draft->num_tokens)
                          : 0;

        return cuda_fused_start(op, &draft->kernel, draft->is_new,
                                draft->args.topk_idx, num_blocks, generation);
    }
    if (cuda_dispatch_shape(&draft->kernel, mover, engine->max_shared) >
        engine->max_shared) {
        mover = CUDA_MOVER_PLAIN; /* which stages nothing */
        (void)cuda_dispatch_shape(&draft->kernel, mover, engine->max_shared);
    }
    if (cuda_spans_nodes(draft->plan->base.group)) {
        return cuda_rail_dispatch(op, &draft->kernel, mover, num_blocks);
    }
    return epx__cuda_check(
        cuda_dispatch_launch(&draft->kernel, mover, num_blocks, op->stream),
        "cannot launch a dispatch");
}

static epx_status_t
launch(draft_t *draft, const cuda_op_t *op)
{
    cuda_plan_t *plan = draft->plan;
    int num_blocks = cuda_blocks(plan->base.group, draft->args.num_workers);
    epx_status_t status;

    plan->pending_is_in_slots = false;
    status = launch_kernel(draft, op, num_blocks);
    if (plan->pending != EPX__PENDING_NONE) {
        plan->pending_stage = draft->stage;
        plan->pending_stages = draft->stages;
        plan->pending_blocks = num_blocks;
        plan->pending_rows = draft->args.recv_rows;
        plan->pending_wait_ns = draft->args.wait_ns;
        plan->pending_dispatch = draft->kernel;
    } else if (status == EPX_OK && draft->stages) {
        status = stage_out(&draft->stage, num_blocks, op->stream);
    }
    return status;
}

/* The widest row that the plan's slots can hold. */
static epx_status_t
check_slot(const draft_t *draft)
{
    uint64_t bytes = (uint64_t)draft->shape.row_bytes +
                     (uint64_t)draft->shape.num_scales * sizeof(uint32_t);
    uint64_t most = draft->plan->base.key.send_only_row_bytes;

    return bytes <= most
               ? EPX_OK
               : epx__fail(EPX_ERR_TOO_SMALL,
                           "a row has %" PRIu64 " bytes with its scales; the "
                           "plan's send_only_row_bytes is %" PRIu64,
                           bytes, most);
}

/* What the plan's state allows, and what it says of the receive buffer. */
static epx_status_t
check_plan(draft_t *draft, const cuda_op_t *op)
{
    const cuda_plan_t *plan = draft->plan;
    epx_status_t status;

    draft->num_rows = cuda_plan_is_fixed(plan)
                          ? (int64_t)epx__plan_fixed_rows(&plan->base)
                          : draft->args.recv_rows;
    if (draft->is_new) {
        return cuda_op_check_free(op);
    }
    if (!draft->to_slots) {
        return cuda_op_check(op, &draft->num_rows);
    }
    status = cuda_op_check_free(op);
    return status == EPX_OK ? cuda_refused(draft->plan) : status;
}

/* With several nodes. */
static epx_status_t
open_rail(draft_t *draft, const cuda_op_t *op)
{
    cuda_dispatch_args_t *kernel = &draft->kernel;

    if (draft->to_slots) {
        return cuda_rail_open_slots(draft->plan, &kernel->rail);
    }
    kernel->num_forwarders =
        (uint32_t)cuda_blocks(draft->plan->base.group, draft->args.num_workers);
    return cuda_rail_open(op, EPX__STEP_DISPATCH, kernel->row_bytes,
                          (uint64_t)kernel->num_scales, &kernel->rail);
}

static epx_status_t
start(draft_t *draft, const cuda_op_t *op, bool *launched_p)
{
    epx_status_t status = check_plan(draft, op);

    if (status == EPX_OK && draft->to_slots) {
        status = check_slot(draft);
    }
    if (status == EPX_OK) {
        status = check_pointers(draft);
    }
    if (status == EPX_OK) {
        fill_kernel(draft);
        status = open_arrays(draft, op);
    }
    if (status == EPX_OK && cuda_spans_nodes(draft->plan->base.group)) {
        status = open_rail(draft, op);
    }
    if (status == EPX_OK) {
        status = cuda_step_take(op, draft->kernel.is_send_only
                                        ? EPX__PENDING_DISPATCH
                                        : EPX__PENDING_NONE);
    }
    if (status == EPX_OK) {
        *launched_p = true;
        status = launch(draft, op);
    }
    return status;
}

/* New routing that the dispatch cannot count goes ahead of it. */
static epx_status_t
route_first(draft_t *draft, epx_stream_t stream)
{
    const epx_dispatch_args_t *args = &draft->args;
    epx_status_t status = epx__check_pending(draft->plan->pending);

    draft->num_tokens = args->num_tokens;
    draft->num_rows = (int64_t)epx__plan_fixed_rows(&draft->plan->base);
    if (status == EPX_OK) {
        status = check_pointers(draft);
    }
    draft->is_new = false;
    return status == EPX_OK
               ? cuda_plan_route_timed(&draft->plan->base, args->num_tokens,
                                       args->topk_idx, args->wait_ns, stream)
               : status;
}

epx_status_t
cuda_dispatch(epx_plan_t *base, const epx_dispatch_args_t *args,
              epx_stream_t stream)
{
    draft_t draft = { .plan = cuda_plan(base), .args = *args };
    bool launched = false;
    cuda_op_t op;
    epx_status_t status;

    epx__dispatch_describe(base, &draft.args, &draft.shape);
    draft.is_new = (args->flags & EPX_NEW_ROUTING) != 0;
    draft.to_slots =
        (args->flags & EPX_SEND_ONLY) != 0 && draft.plan->slot_block != NULL;
    draft.kernel.view.num_ranks = base->group->num_ranks;
    draft.kernel.is_send_only = (args->flags & EPX_SEND_ONLY) != 0;
    draft.kernel.plan = draft.plan->view;
    draft.kernel.row_bytes = (uint64_t)draft.shape.row_bytes;
    draft.kernel.num_scales = draft.shape.num_scales;
    if (draft.is_new && !cuda_can_count(draft.plan, &draft.kernel)) {
        status = route_first(&draft, stream);
        if (status != EPX_OK) {
            return status;
        }
    }
    status = cuda_op_begin(draft.plan, stream, &op);
    if (status != EPX_OK) {
        return status;
    }
    draft.num_tokens = draft.is_new ? args->num_tokens : draft.plan->num_tokens;
    status = start(&draft, &op, &launched);
    return cuda_op_end(&op, status, launched);
}

/* Of a dispatch whose counts were not known when it began. */
static epx_status_t
check_pending_rows(cuda_plan_t *plan)
{
    epx_status_t status =
        cuda_plan_is_fixed(plan) ? EPX_OK : cuda_counts_wait(plan);
    int64_t rows = plan->num_rows;

    return status == EPX_OK && !cuda_plan_is_fixed(plan) &&
                   rows > plan->pending_rows
               ? epx__fail(EPX_ERR_TOO_SMALL,
                           "recv_rows is %" PRId64 ", but this rank's receive "
                           "buffers need %" PRId64 " rows",
                           plan->pending_rows, rows)
               : status;
}

epx_status_t
cuda_dispatch_complete(const cuda_op_t *op)
{
    cuda_plan_t *plan = op->plan;
    cuda_wait_args_t args = {
        .view = cuda_engine(plan->base.group)->view,
        .plan = plan->view,
        .wait_ns = plan->pending_wait_ns,
    };
    epx_status_t status;

    if (plan->pending_is_in_slots) {
        status = check_pending_rows(plan);
        if (status == EPX_OK) {
            status = cuda_unpack_start(op);
        }
    } else if (cuda_spans_nodes(plan->base.group)) {
        status = cuda_rail_dispatch_end(op, &plan->pending_dispatch,
                                        plan->pending_blocks);
    } else {
        status = epx__cuda_check(cuda_wait_launch(&args, op->stream),
                                 "cannot launch the end of a dispatch");
    }
    if (status == EPX_OK && plan->pending_stages) {
        status =
            stage_out(&plan->pending_stage, plan->pending_blocks, op->stream);
    }
    return status;
}
