/* SPDX-License-Identifier: MIT */
#include "conformance/op.h"

/* Rows of expert outputs that rank's part of the plan calls for. */
static int64_t
output_rows(const op_t *op, int32_t rank)
{
    int64_t num_rows;
    const oracle_row_t *rows = oracle_rows(op->batch->oracle, rank, &num_rows);

    if (op->batch->plan->layout == EPX_LAYOUT_EXPERT_SLOTS) {
        return oracle_counts(op->batch->oracle, rank).num_rows;
    }
    return num_rows > 0 ? rows[num_rows - 1].row + 1 : 0;
}

/* The expert outputs of `rank`, as all ranks know them. */
static epx_combine_args_t
gather_outputs(op_t *op, int32_t rank)
{
    const op_shape_t *shape = op->shape;
    uint64_t key = (uint64_t)rank * 8;
    int64_t rows = output_rows(op, rank);
    epx_combine_args_t args = EPX_COMBINE_ARGS_INIT;

    args.hidden = shape->hidden;
    args.dtype = shape->dtype;
    args.quantize = shape->quantize;
    args.num_rows = rows;
    args.flags = shape->send_only ? EPX_SEND_ONLY : 0;
    args.x = op_gather(op, shape->dtype, rows * shape->hidden, key + 1,
                       shape->special);
    if (shape->reduce_weights) {
        args.recv_topk_weights = op_gather(
            op, EPX_F32, rows * op_row_weights(op), key + 2, shape->special);
    }
    return args;
}

/* Random contents in an array of this rank; NULL when that fails. */
static guarded_t *
own_random(op_t *op, const char *name, epx_dtype_t dtype, int64_t count)
{
    guarded_t *g = op_array(op, name, dtype, count, true);

    if (!g) {
        return NULL;
    }
    rng_fill(&op->rng, dtype, guarded_expected(g), count, op->shape->special);
    return guarded_copy_twin(g) == EPX_OK ? g : NULL;
}

/* x and recv_topk_weights: as gathered, with rows to spare now and then. */
static epx_status_t
own_outputs_of_experts(op_t *op, const epx_combine_args_t *mine)
{
    epx_combine_args_t *args = &op->combine;
    epx_plan_counts_t counts = oracle_counts(op->batch->oracle, op->rank);
    size_t size = epx_dtype_size(mine->dtype);
    guarded_t *g;

    args->num_rows = counts.num_rows;
    if (rng_one_in(&op->rng, 3)) {
        args->num_rows += rng_int(&op->rng, 1, 5);
    }
    g = op_array(op, "x", mine->dtype, args->num_rows * mine->hidden, true);
    if (!g || guarded_fill(g, mine->x,
                           (size_t)(mine->num_rows * mine->hidden) * size) !=
                  EPX_OK) {
        return EPX_ERR_NO_MEMORY;
    }
    args->x = guarded_data(g);
    if (mine->recv_topk_weights) {
        int64_t per_row = op_row_weights(op);

        g = op_array(op, "recv_topk_weights", EPX_I32, args->num_rows * per_row,
                     true);
        if (!g || guarded_fill(g, mine->recv_topk_weights,
                               (size_t)(mine->num_rows * per_row) *
                                   sizeof(float)) != EPX_OK) {
            return EPX_ERR_NO_MEMORY;
        }
        args->recv_topk_weights = guarded_data(g);
    }
    return EPX_OK;
}

/* What the owner of the tokens decides alone; the oracle reads the twins. */
static epx_status_t
own_terms(op_t *op, epx_combine_args_t *expected)
{
    epx_combine_args_t *args = &op->combine;
    const plan_shape_t *plan = op->batch->plan;
    int64_t tokens = op_tokens(op, op->rank);
    guarded_t *g;

    if (plan->layout != EPX_LAYOUT_RANK_MAJOR && rng_one_in(&op->rng, 2)) {
        g = own_random(op, "topk_weights", EPX_F32, tokens * plan->topk);
        if (!g) {
            return EPX_ERR_NO_MEMORY;
        }
        args->topk_weights = guarded_data(g);
        expected->topk_weights = guarded_expected(g);
    }
    for (int32_t b = 0; b < EPX_MAX_BIAS; b++) {
        if (rng_one_in(&op->rng, 3)) {
            g = own_random(op, b ? "bias[1]" : "bias[0]", args->dtype,
                           tokens * args->hidden);
            if (!g) {
                return EPX_ERR_NO_MEMORY;
            }
            args->bias[b] = guarded_data(g);
            expected->bias[b] = guarded_expected(g);
        }
    }
    return EPX_OK;
}

static epx_status_t
own_sums(op_t *op, epx_combine_args_t *expected)
{
    epx_combine_args_t *args = &op->combine;
    int64_t tokens = op_tokens(op, op->rank);
    guarded_t *g =
        op_array(op, "out", args->dtype, tokens * args->hidden, false);

    if (!g) {
        return EPX_ERR_NO_MEMORY;
    }
    args->out = guarded_data(g);
    expected->out = guarded_expected(g);
    if (tokens == 0 && rng_one_in(&op->rng, 2)) {
        args->out = NULL;
    }
    if (op->shape->reduce_weights) {
        g = op_array(op, "out_topk_weights", EPX_F32,
                     tokens * op->batch->plan->topk, false);
        if (!g) {
            return EPX_ERR_NO_MEMORY;
        }
        args->out_topk_weights = guarded_data(g);
        expected->out_topk_weights = guarded_expected(g);
    }
    return EPX_OK;
}

epx_status_t
op_prepare_combine(op_t *op)
{
    epx_combine_args_t all[WORLD_MAX_RANKS];
    oracle_outputs_t outputs = { all, op_row_weights(op) };
    epx_combine_args_t expected;
    epx_status_t status;

    for (int32_t r = 0; r < op->num_ranks; r++) {
        all[r] = gather_outputs(op, r);
    }
    op->combine = all[op->rank];
    op->combine.num_workers = (int32_t)rng_int(&op->rng, 0, op->num_workers);
    status = own_outputs_of_experts(op, &all[op->rank]);
    expected = op->combine;
    if (status == EPX_OK) {
        status = own_terms(op, &expected);
    }
    if (status == EPX_OK) {
        status = own_sums(op, &expected);
    }
    if (status == EPX_OK) {
        status = op_make_waits(op, &op->combine.wait_ns);
    }
    if (status == EPX_OK) {
        oracle_combine(op->batch->oracle, op->rank, oracle_output_of_arrays,
                       &outputs, &expected);
    }
    return status;
}
