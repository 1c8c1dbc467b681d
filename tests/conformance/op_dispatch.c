/* SPDX-License-Identifier: MIT */
#include "conformance/op.h"

/* Where scales lie: by token or row, or by scale, with gaps or without. */
typedef enum stride_style {
    STRIDES_DEFAULT = 0,
    STRIDES_BY_ROW,
    STRIDES_BY_SCALE,
} stride_style_t;

/* Strides of `rows` rows of S scales; returns the elements they span. */
static int64_t
draw_strides(rng_t *rng, int64_t rows, int32_t num_scales, int64_t *row_p,
             int64_t *scale_p)
{
    int64_t gap = rng_int(rng, 0, 3);

    switch ((stride_style_t)rng_int(rng, 0, 2)) {
    case STRIDES_DEFAULT:
        *row_p = 0;
        *scale_p = 0;
        return rows * num_scales;
    case STRIDES_BY_ROW:
        *row_p = num_scales + gap;
        *scale_p = 1;
        return rows * *row_p;
    default:
        *row_p = 1;
        *scale_p = rows + gap > 0 ? rows + gap : 1;
        return num_scales * *scale_p;
    }
}

/* The inputs of `rank`, as all ranks know them. */
static epx_dispatch_args_t
gather_inputs(op_t *op, int32_t rank)
{
    const op_shape_t *shape = op->shape;
    uint64_t key = (uint64_t)rank * 8;
    int64_t tokens = op_tokens(op, rank);
    epx_dispatch_args_t args = EPX_DISPATCH_ARGS_INIT;
    rng_t rng = rng_of(shape->seed, key, 4);

    args.hidden = shape->hidden;
    args.dtype = shape->dtype;
    args.quantize = shape->quantize;
    args.flags = shape->send_only ? EPX_SEND_ONLY : 0;
    args.x = op_gather(op, shape->dtype, tokens * shape->hidden, key + 1,
                       shape->special);
    if (shape->num_scales) {
        args.num_scales = shape->num_scales;
        args.scales = op_gather(op, EPX_I32,
                                draw_strides(&rng, tokens, args.num_scales,
                                             &args.scale_token_stride,
                                             &args.scale_stride),
                                key + 2, false);
    }
    if (shape->weights) {
        args.topk_weights =
            op_gather(op, EPX_F32, tokens * op->batch->plan->topk, key + 3,
                      shape->special);
    }
    return args;
}

/* Elements from the first to the last of this rank's scales. */
static int64_t
scales_span(const epx_dispatch_args_t *args, int64_t tokens)
{
    if (args->scale_token_stride == 0 && args->scale_stride == 0) {
        return tokens * args->num_scales;
    }
    return tokens == 0 ? 0
                       : (tokens - 1) * args->scale_token_stride +
                             (args->num_scales - 1) * args->scale_stride + 1;
}

/* A copy of an input of this rank, in an array of its own. */
static const void *
own_input(op_t *op, const char *name, epx_dtype_t dtype, const void *contents,
          int64_t count)
{
    guarded_t *g = op_array(op, name, dtype, count, true);

    if (!g || guarded_fill(g, contents,
                           (size_t)count * epx_dtype_size(dtype)) != EPX_OK) {
        return NULL;
    }
    return guarded_data(g);
}

static epx_status_t
own_inputs(op_t *op, const epx_dispatch_args_t *mine)
{
    epx_dispatch_args_t *args = &op->dispatch;
    int64_t tokens = op_tokens(op, op->rank);

    args->x = own_input(op, "x", mine->dtype, mine->x, tokens * mine->hidden);
    if (!args->x) {
        return EPX_ERR_NO_MEMORY;
    }
    if (tokens == 0 && rng_one_in(&op->rng, 2)) {
        args->x = NULL;
    }
    if (mine->scales) {
        args->scales = own_input(op, "scales", EPX_I32, mine->scales,
                                 scales_span(mine, tokens));
        if (!args->scales) {
            return EPX_ERR_NO_MEMORY;
        }
    }
    if (mine->topk_weights) {
        args->topk_weights =
            own_input(op, "topk_weights", EPX_F32, mine->topk_weights,
                      tokens * op->batch->plan->topk);
        if (!args->topk_weights) {
            return EPX_ERR_NO_MEMORY;
        }
    }
    return EPX_OK;
}

/* An output, NULL in *expected_p and as result when there is no memory. */
static void *
own_output(op_t *op, const char *name, epx_dtype_t dtype, int64_t count,
           void **expected_p)
{
    guarded_t *g = op_array(op, name, dtype, count, false);

    *expected_p = g ? guarded_expected(g) : NULL;
    return g ? guarded_data(g) : NULL;
}

/* Strides of recv_scales; returns the elements they span. */
static int64_t
draw_recv_strides(op_t *op, int32_t num_scales)
{
    epx_dispatch_args_t *args = &op->dispatch;
    const plan_shape_t *plan = op->batch->plan;
    int64_t per_expert = plan->max_tokens_per_rank * op->num_ranks;
    epx_plan_counts_t counts = oracle_counts(op->batch->oracle, op->rank);
    int64_t span;

    if (plan->layout != EPX_LAYOUT_EXPERT_SLOTS) {
        return draw_strides(&op->rng, args->recv_rows, num_scales,
                            &args->recv_scale_row_stride,
                            &args->recv_scale_stride);
    }
    span = draw_strides(&op->rng, per_expert, num_scales,
                        &args->recv_scale_row_stride, &args->recv_scale_stride);
    if (args->recv_scale_row_stride == 0) {
        return args->recv_rows * num_scales;
    }
    args->recv_scale_expert_stride = span + rng_int(&op->rng, 0, 5);
    return counts.num_local_experts * args->recv_scale_expert_stride;
}

/* recv_scales and the arrays of the routing. */
static bool
own_side_outputs(op_t *op, epx_dispatch_args_t *expected)
{
    epx_dispatch_args_t *args = &op->dispatch;
    const plan_shape_t *plan = op->batch->plan;
    int32_t num_scales = oracle_sent_scales(args);
    int64_t rows = args->recv_rows;
    void *twin;

    if (num_scales) {
        args->recv_scales = own_output(op, "recv_scales", EPX_I32,
                                       draw_recv_strides(op, num_scales),
                                       &expected->recv_scales);
        if (!args->recv_scales) {
            return false;
        }
        expected->recv_scale_row_stride = args->recv_scale_row_stride;
        expected->recv_scale_stride = args->recv_scale_stride;
        expected->recv_scale_expert_stride = args->recv_scale_expert_stride;
    }
    if (op->shape->recv_idx) {
        args->recv_topk_idx =
            own_output(op, "recv_topk_idx", plan->idx_dtype, rows * plan->topk,
                       &expected->recv_topk_idx);
        if (!args->recv_topk_idx) {
            return false;
        }
    }
    if (op->shape->weights) {
        /* Compared as bits: weights are moved, not computed with. */
        args->recv_topk_weights = own_output(op, "recv_topk_weights", EPX_I32,
                                             rows * op_row_weights(op), &twin);
        expected->recv_topk_weights = twin;
        if (!args->recv_topk_weights) {
            return false;
        }
    }
    if (op->shape->recv_src) {
        args->recv_src_token =
            own_output(op, "recv_src_token", EPX_I32, rows, &twin);
        expected->recv_src_token = twin;
        if (!args->recv_src_token) {
            return false;
        }
    }
    return true;
}

static epx_status_t
own_outputs(op_t *op, epx_dispatch_args_t *expected)
{
    epx_dispatch_args_t *args = &op->dispatch;
    epx_plan_counts_t counts = oracle_counts(op->batch->oracle, op->rank);
    void *twin;

    args->recv_rows = counts.num_rows;
    if (rng_one_in(&op->rng, 3)) {
        args->recv_rows += rng_int(&op->rng, 1, 5);
    }
    args->recv_x =
        own_output(op, "recv_x", args->quantize ? EPX_F8E4M3 : args->dtype,
                   args->recv_rows * args->hidden, &expected->recv_x);
    if (args->recv_x && !args->quantize) {
        op->types[op->num_arrays - 1] = EPX_BYTES; /* NaNs are moved, too */
    }
    if (!args->recv_x || !own_side_outputs(op, expected)) {
        return EPX_ERR_NO_MEMORY;
    }
    if (rng_one_in(&op->rng, 2)) {
        args->recv_expert_counts = own_output(op, "recv_expert_counts", EPX_I32,
                                              counts.num_local_experts, &twin);
        expected->recv_expert_counts = twin;
        if (!args->recv_expert_counts) {
            return EPX_ERR_NO_MEMORY;
        }
    }
    return EPX_OK;
}

/* Which entries count as -1, where there are masks. */
static epx_status_t
own_dropped(op_t *op)
{
    const oracle_t *oracle = op->batch->oracle;
    int32_t topk = op->batch->plan->topk;
    int64_t tokens = op_tokens(op, op->rank);
    void *twin;
    uint8_t *expected;

    if (op->memory->device != EPX_DEVICE_CPU || !rng_one_in(&op->rng, 2)) {
        return EPX_OK;
    }
    op->dispatch.dropped =
        own_output(op, "dropped", EPX_BYTES, tokens * topk, &twin);
    if (!op->dispatch.dropped) {
        return EPX_ERR_NO_MEMORY;
    }
    expected = twin;
    for (int64_t i = 0; i < tokens * topk; i++) {
        expected[i] =
            oracle_is_dropped(oracle, op->rank, i / topk, (int32_t)(i % topk));
    }
    return EPX_OK;
}

epx_status_t
op_prepare_dispatch(op_t *op)
{
    epx_dispatch_args_t all[WORLD_MAX_RANKS];
    oracle_arrays_t arrays = { all, op->batch->plan->topk };
    epx_dispatch_args_t expected;
    epx_status_t status;

    for (int32_t r = 0; r < op->num_ranks; r++) {
        all[r] = gather_inputs(op, r);
    }
    op->dispatch = all[op->rank];
    op->dispatch.num_workers = (int32_t)rng_int(&op->rng, 0, op->num_workers);
    expected = all[op->rank];
    status = own_inputs(op, &all[op->rank]);
    if (status == EPX_OK) {
        status = own_outputs(op, &expected);
    }
    if (status == EPX_OK) {
        status = own_dropped(op);
    }
    if (status == EPX_OK) {
        status = op_make_waits(op, &op->dispatch.wait_ns);
    }
    if (status == EPX_OK) {
        oracle_dispatch(op->batch->oracle, op->rank, oracle_token_of_arrays,
                        &arrays, &expected);
    }
    return status;
}
