/* SPDX-License-Identifier: MIT */
/* The host's half of cuda_combine.cu. */
#include "engine/cuda/cuda_engine.h"

#include <inttypes.h>

#define CACHE_SECTOR 32 /* bytes */

/* A combine between its checks and its launch. */
typedef struct draft {
    cuda_plan_t *plan;
    epx_combine_args_t args;
    int64_t num_rows; /* that the plan has placed here, or more */
    bool has_weights;
    cuda_combine_args_t kernel;
    cuda_stage_args_t stage;
} draft_t;

static epx_status_t
check_args(const draft_t *draft)
{
    const epx_combine_args_t *args = &draft->args;
    /* With a fixed capacity, what has come is known to the device alone. */
    bool is_exact = draft->plan->base.key.recv_capacity == 0;
    const epx__pointer_t outputs[] = {
        { "out", args->out, true },
        { "out_topk_weights", args->out_topk_weights, draft->has_weights },
    };
    const epx__pointer_t inputs[] = {
        { "x", args->x, true },
        { "recv_topk_weights", args->recv_topk_weights, draft->has_weights },
    };
    epx_status_t status =
        epx__check_pointers(outputs, 2, "num_tokens", draft->plan->num_tokens);

    if (status == EPX_OK && is_exact && args->num_rows < draft->num_rows) {
        status = epx__fail(EPX_ERR_TOO_SMALL,
                           "num_rows is %" PRId64 ", but the plan placed "
                           "%" PRId64 " rows on this rank",
                           args->num_rows, draft->num_rows);
    }
    return status == EPX_OK ? epx__check_pointers(
                                  inputs, 2, "the number of received rows",
                                  is_exact ? draft->num_rows : args->num_rows)
                            : status;
}

/* See where peers read an input, and tell them in the post. */
static epx_status_t
open_input(draft_t *draft, const cuda_op_t *op, epx__array_t array,
           const char *name, const void *user, uint64_t row_bytes,
           uint64_t alignment)
{
    uint64_t rows =
        (uint64_t)(draft->args.num_rows < draft->num_rows ? draft->args.num_rows
                                                          : draft->num_rows);
    uint64_t bytes;
    char *heap;
    epx_status_t status;

    if (__builtin_mul_overflow(rows, row_bytes, &bytes)) {
        bytes = UINT64_MAX;
    }
    status = cuda_reachable(op, name, user, bytes, alignment, &heap);
    if (status == EPX_OK) {
        draft->kernel.post.offset[array] = cuda_heap_offset(draft->plan, heap);
        cuda_stage_add(&draft->stage, user, heap, row_bytes);
    }
    return status;
}

static epx_status_t
open_inputs(draft_t *draft, const cuda_op_t *op)
{
    const epx_combine_args_t *args = &draft->args;
    epx_status_t status = open_input(draft, op, EPX__ARRAY_X, "x", args->x,
                                     draft->kernel.row_bytes, EPX_ROW_ALIGN);

    if (status == EPX_OK && draft->has_weights) {
        status = open_input(draft, op, EPX__ARRAY_TOPK_WEIGHTS,
                            "recv_topk_weights", args->recv_topk_weights,
                            epx__array_row_bytes(&draft->plan->base,
                                                 EPX__ARRAY_TOPK_WEIGHTS, 0),
                            sizeof(float));
    }
    return status;
}

static void
fill_kernel(draft_t *draft)
{
    const cuda_plan_t *plan = draft->plan;
    const epx_combine_args_t *args = &draft->args;
    bool takes_part = plan->num_tokens > 0 || draft->num_rows > 0;
    uint32_t most = plan->base.key.topk; /* rows of a token */
    cuda_combine_args_t *kernel = &draft->kernel;
    uintptr_t own = (uintptr_t)args->out | (uintptr_t)args->bias[0] |
                    (uintptr_t)args->bias[1];

    if (plan->base.key.layout == EPX_LAYOUT_RANK_MAJOR &&
        most > (uint32_t)plan->base.group->num_ranks) {
        most = (uint32_t)plan->base.group->num_ranks;
    }
    kernel->view = cuda_engine(plan->base.group)->view;
    kernel->plan = plan->view;
    kernel->num_tokens = plan->num_tokens;
    kernel->row_bytes = (uint64_t)args->hidden * epx_dtype_size(args->dtype);
    kernel->topk_weights = args->topk_weights;
    kernel->bias[0] = args->bias[0];
    kernel->bias[1] = args->bias[1];
    kernel->has_bias = args->bias[0] != NULL || args->bias[1] != NULL;
    kernel->out = args->out;
    kernel->own_is_aligned = own % EPX_ROW_ALIGN == 0;
    cuda_combine_shape(kernel, most,
                       cuda_blocks(plan->base.group, args->num_workers),
                       args->quantize == EPX_QUANTIZE_LOGFMT10
                           ? EPX_LOGFMT_BLOCK * sizeof(uint16_t)
                           : CACHE_SECTOR);
    kernel->out_topk_weights = args->out_topk_weights;
    kernel->wait_ns = args->wait_ns;
    kernel->post.num_rows = (uint64_t)args->num_rows;
    kernel->post.signature = epx__combine_signature(&plan->base, args);
    kernel->post.signature.arrays =
        epx__weights_bits(draft->has_weights, takes_part);
    draft->stage.view = kernel->view;
    draft->stage.plan = kernel->plan;
    draft->stage.max_rows =
        (uint64_t)(args->num_rows < draft->num_rows ? args->num_rows
                                                    : draft->num_rows);
}

static epx_status_t
launch_kernel(const cuda_op_t *op, const cuda_combine_args_t *args,
              epx_dtype_t dtype, int num_blocks)
{
    const epx_group_t *group = op->plan->base.group;
    const cuda_engine_t *engine = cuda_engine(group);
    cuda_mover_t mover = engine->mover;

    if (cuda_combine_shared_bytes(&engine->view, mover) > engine->max_shared) {
        mover = CUDA_MOVER_PLAIN; /* which stages nothing */
    }
    if (cuda_spans_nodes(group)) {
        return args->posts
                   ? cuda_rail_combine(op, args, args->out_topk_weights != NULL,
                                       dtype, mover, num_blocks)
                   : cuda_rail_combine_end(op, args, dtype, mover, num_blocks);
    }
    return epx__cuda_check(
        cuda_combine_launch(args, dtype, mover, num_blocks, op->stream),
        "cannot launch a combine");
}

static epx_status_t
launch(draft_t *draft, const cuda_op_t *op)
{
    cuda_plan_t *plan = op->plan;
    int num_blocks = cuda_blocks(plan->base.group, draft->args.num_workers);
    bool is_send_only = (draft->args.flags & EPX_SEND_ONLY) != 0;

    if (draft->stage.num_arrays > 0) {
        epx_status_t status = epx__cuda_check(
            cuda_stage_launch(&draft->stage, num_blocks, op->stream),
            "cannot launch the copy of a combine's rows");

        if (status != EPX_OK) {
            return status;
        }
    }
    draft->kernel.posts = 1;
    draft->kernel.pulls = !is_send_only;
    draft->kernel.num_pullers = (uint32_t)num_blocks;
    if (is_send_only) {
        plan->pending_combine = draft->kernel;
        plan->pending_combine.posts = 0;
        plan->pending_combine.pulls = 1;
        plan->pending_dtype = draft->args.dtype;
        plan->pending_blocks = num_blocks;
    }
    return launch_kernel(op, &draft->kernel, draft->args.dtype,
                         is_send_only ? 1 : num_blocks);
}

epx_status_t
cuda_combine(epx_plan_t *base, const epx_combine_args_t *args,
             epx_stream_t stream)
{
    draft_t draft = {
        .plan = cuda_plan(base),
        .args = *args,
        .has_weights =
            args->recv_topk_weights != NULL || args->out_topk_weights != NULL,
    };
    cuda_op_t op;
    epx_status_t status = cuda_op_begin(draft.plan, stream, &op);
    bool launched = false;

    if (status != EPX_OK) {
        return status;
    }
    status = cuda_op_check(&op, &draft.num_rows);
    if (status == EPX_OK) {
        status = check_args(&draft);
    }
    if (status == EPX_OK) {
        fill_kernel(&draft);
        status = open_inputs(&draft, &op);
    }
    if (status == EPX_OK && cuda_spans_nodes(base->group)) {
        status = cuda_rail_open(&op, EPX__STEP_COMBINE, draft.kernel.row_bytes,
                                0, &draft.kernel.rail);
    }
    if (status == EPX_OK) {
        status = cuda_step_take(&op, (args->flags & EPX_SEND_ONLY) != 0
                                         ? EPX__PENDING_COMBINE
                                         : EPX__PENDING_NONE);
    }
    if (status == EPX_OK) {
        launched = true;
        status = launch(&draft, &op);
    }
    return cuda_op_end(&op, status, launched);
}

epx_status_t
cuda_combine_complete(const cuda_op_t *op)
{
    const cuda_plan_t *plan = op->plan;

    return launch_kernel(op, &plan->pending_combine, plan->pending_dtype,
                         plan->pending_blocks);
}
