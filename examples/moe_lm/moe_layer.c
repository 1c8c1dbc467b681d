/* SPDX-License-Identifier: MIT */
/*
 * Expert parallelism, step by step.
 *
 *     forward                             backward
 *     x, expert, weight                   dy, weight
 *       | plan      who sends what where    | (the same plan)
 *       | dispatch  tokens to experts       | dispatch  dy and weight
 *       | experts   in -> hidden -> out     | experts   dout -> dhidden -> din
 *       | combine   y = sum weight * out    | combine   dx = sum din, dweight
 *       v                                   v
 *       y                                   dx, dweight
 *
 * The backward of a combine is a dispatch, and that of a dispatch a combine.
 */
#include "moe_layer.h"
#include "check.h"
#include "ops.h"

#include <string.h>

/* Adds the time since *start to *seconds and starts again. */
static void
lap(double *start, double *seconds)
{
    double now = ops_seconds();

    *seconds += now - *start;
    *start = now;
}

static float *
shared_floats(epx_group_t *group, int64_t count)
{
    void *memory;

    CHECK(epx_mem_alloc(group, (uint64_t)count * sizeof(float), &memory));
    return memory;
}

/* Every expert has its own random stream: it starts out the same wherever it
 * lives. */
static void
init_experts(moe_layer_t *moe, int32_t layer_idx)
{
    const config_t *c = &moe->config;
    const int64_t matrix = (int64_t)c->dim * c->expert_dim;

    for (int32_t e = 0; e < moe->num_local; e++) {
        float *up = moe->params + e * 2 * matrix;
        uint64_t stream = 1000 * ((uint64_t)layer_idx + 1) +
                          2 * (uint64_t)(moe->first_expert + e);
        ops_init_matrix(c->dim, c->expert_dim, up, c->seed, stream);
        ops_init_matrix(c->expert_dim, c->dim, up + matrix, c->seed,
                        stream + 1);
    }
}

/* An empty plan, which every step fills with epx_plan_update: so no step
 * allocates anything. */
static epx_plan_t *
create_plan(epx_group_t *group, const config_t *config, int64_t max_tokens)
{
    epx_plan_args_t args = EPX_PLAN_ARGS_INIT;
    epx_plan_t *plan;

    args.layout = EPX_LAYOUT_EXPERT_MAJOR;
    args.num_experts = config->num_experts;
    args.topk = config->topk;
    args.idx_dtype = EPX_I32;
    args.max_tokens_per_rank = max_tokens;
    CHECK(epx_plan_create(group, &args, NULL, &plan));
    return plan;
}

void
moe_layer_create(epx_group_t *group, const config_t *config, int32_t layer_idx,
                 int64_t max_tokens, moe_seconds_t *seconds, moe_layer_t *moe)
{
    epx_group_info_t info = EPX_GROUP_INFO_INIT;
    const int64_t matrix = (int64_t)config->dim * config->expert_dim;
    int64_t tokens = config->num_shards * config_shard_tokens(config);

    *moe = (moe_layer_t){ .config = *config,
                          .group = group,
                          .counts = EPX_PLAN_COUNTS_INIT,
                          .seconds = seconds };
    CHECK(epx_group_query(group, &info));
    CHECK(epx_local_experts(config->num_experts, info.num_ranks, info.rank,
                            &moe->first_expert, &moe->num_local));
    moe->plan = create_plan(group, config, max_tokens);

    moe->num_params = moe->num_local * 2 * matrix;
    moe->params = ops_floats(moe->num_params);
    moe->grads = ops_floats(moe->num_params);
    init_experts(moe, layer_idx);

    /* At worst every token of the batch has all its experts here. */
    moe->max_rows = tokens * (config->topk < moe->num_local ? config->topk
                                                            : moe->num_local);
    moe->in = shared_floats(group, moe->max_rows * config->dim);
    moe->out = shared_floats(group, moe->max_rows * config->dim);
    moe->din = shared_floats(group, moe->max_rows * config->dim);
    moe->dout = shared_floats(group, moe->max_rows * config->dim);
    moe->row_weight = shared_floats(group, moe->max_rows);
    moe->drow_weight = shared_floats(group, moe->max_rows);
    moe->relu = ops_floats(moe->max_rows * config->expert_dim);
    moe->hidden = ops_floats(moe->max_rows * config->expert_dim);
    moe->dhidden = ops_floats(moe->max_rows * config->expert_dim);
    moe->transposed = ops_floats(matrix);
}

void
moe_layer_destroy(moe_layer_t *moe)
{
    float *shared[] = { moe->in,   moe->out,        moe->din,
                        moe->dout, moe->row_weight, moe->drow_weight };
    float *local[] = { moe->params, moe->grads,   moe->relu,
                       moe->hidden, moe->dhidden, moe->transposed };

    CHECK(epx_plan_destroy(moe->plan));
    for (size_t i = 0; i < sizeof(shared) / sizeof(shared[0]); i++) {
        CHECK(epx_mem_free(moe->group, shared[i]));
    }
    for (size_t i = 0; i < sizeof(local) / sizeof(local[0]); i++) {
        free(local[i]);
    }
}

/* Row t of x goes to each of token t's experts; if weight is given, each row
 * takes along the weight that its expert has for the token. */
static void
dispatch(moe_layer_t *moe, const float *x, const float *weight, float *rows,
         float *row_weight)
{
    epx_dispatch_args_t args = EPX_DISPATCH_ARGS_INIT;

    args.x = x;
    args.hidden = moe->config.dim;
    args.dtype = EPX_F32;
    args.topk_weights = weight;
    args.recv_x = rows;
    args.recv_rows = moe->max_rows;
    args.recv_topk_weights = row_weight;
    CHECK(epx_dispatch(moe->plan, &args, NULL));
}

/* Row t of y becomes the sum, in the order of k, of the rows that token t's
 * experts made; with topk_weights, each times its weight. */
static void
combine(moe_layer_t *moe, epx_combine_args_t *args, const float *rows, float *y)
{
    args->x = rows;
    args->num_rows = moe->max_rows;
    args->hidden = moe->config.dim;
    args->dtype = EPX_F32;
    args->out = y;
    CHECK(epx_combine(moe->plan, args, NULL));
}

/* The rows of one local expert, and its parameters. */
typedef struct expert {
    int64_t first, count;
    const float *up, *down;
    float *up_grad, *down_grad;
} expert_t;

static expert_t
local_expert(const moe_layer_t *moe, int32_t e)
{
    const int64_t matrix = (int64_t)moe->config.dim * moe->config.expert_dim;
    const int64_t up = e * 2 * matrix;
    const int64_t down = up + matrix;

    return (expert_t){ .first = moe->counts.expert_offsets[e],
                       .count = moe->counts.expert_rows[e],
                       .up = moe->params + up,
                       .down = moe->params + down,
                       .up_grad = moe->grads + up,
                       .down_grad = moe->grads + down };
}

static void
expert_forward(moe_layer_t *moe, const expert_t *expert)
{
    const int64_t D = moe->config.dim;
    const int64_t F = moe->config.expert_dim;
    const int64_t n = expert->count;
    float *relu = moe->relu + expert->first * F;
    float *hidden = moe->hidden + expert->first * F;

    ops_matmul(n, F, D, moe->in + expert->first * D, expert->up, relu);
    for (int64_t i = 0; i < n * F; i++) {
        relu[i] = relu[i] > 0 ? relu[i] : 0;
        hidden[i] = relu[i] * relu[i];
    }
    ops_matmul(n, D, F, hidden, expert->down, moe->out + expert->first * D);
}

static void
expert_backward(moe_layer_t *moe, const expert_t *expert)
{
    const int64_t D = moe->config.dim;
    const int64_t F = moe->config.expert_dim;
    const int64_t n = expert->count;
    const float *in = moe->in + expert->first * D;
    const float *relu = moe->relu + expert->first * F;
    float *dout = moe->dout + expert->first * D;
    float *dhidden = moe->dhidden + expert->first * F;

    /* y had weight * out: both factors get their share of dy. */
    for (int64_t i = 0; i < n; i++) {
        int64_t row = expert->first + i;
        moe->drow_weight[row] = ops_dot(D, dout + i * D, moe->out + row * D);
        for (int64_t j = 0; j < D; j++) {
            dout[i * D + j] *= moe->row_weight[row];
        }
    }

    ops_matmul_grad(F, D, n, moe->hidden + expert->first * F, dout,
                    expert->down_grad);
    ops_transpose(F, D, expert->down, moe->transposed);
    ops_matmul(n, F, D, dout, moe->transposed, dhidden);
    for (int64_t i = 0; i < n * F; i++) {
        dhidden[i] *= 2 * relu[i];
    }
    ops_matmul_grad(D, F, n, in, dhidden, expert->up_grad);
    ops_transpose(D, F, expert->up, moe->transposed);
    ops_matmul(n, D, F, dhidden, moe->transposed, moe->din + expert->first * D);
}

void
moe_layer_forward(moe_layer_t *moe, const routing_t *routing, const float *x,
                  float *y)
{
    epx_combine_args_t weighted = EPX_COMBINE_ARGS_INIT;
    double start = ops_seconds();

    /* Plan: tell every rank how much comes from here, and learn the same. */
    CHECK(
        epx_plan_update(moe->plan, routing->num_tokens, routing->expert, NULL));
    CHECK(epx_plan_counts(moe->plan, &moe->counts));
    lap(&start, &moe->seconds->plan);

    /* Dispatch: tokens to their experts. */
    dispatch(moe, x, NULL, moe->in, NULL);
    lap(&start, &moe->seconds->dispatch);

    /* Each local expert works on its rows, which lie together. */
    for (int32_t e = 0; e < moe->num_local; e++) {
        expert_t expert = local_expert(moe, e);
        expert_forward(moe, &expert);
    }
    lap(&start, &moe->seconds->experts);

    /* Combine: the experts' answers back to the tokens. */
    weighted.topk_weights = routing->weight;
    combine(moe, &weighted, moe->out, y);
    lap(&start, &moe->seconds->combine);
}

void
moe_layer_backward(moe_layer_t *moe, const routing_t *routing, const float *dy,
                   float *dx, float *dweight)
{
    epx_combine_args_t plain = EPX_COMBINE_ARGS_INIT;
    double start = ops_seconds();

    /* The gradient of a combine is a dispatch on the same plan. */
    dispatch(moe, dy, routing->weight, moe->dout, moe->row_weight);
    lap(&start, &moe->seconds->dispatch);

    memset(moe->grads, 0, (size_t)moe->num_params * sizeof(float));
    for (int32_t e = 0; e < moe->num_local; e++) {
        expert_t expert = local_expert(moe, e);
        expert_backward(moe, &expert);
    }
    lap(&start, &moe->seconds->experts);

    /* The gradient of a dispatch is a combine; the weights' gradients return
     * to the tokens' owners with it. */
    plain.recv_topk_weights = moe->drow_weight;
    plain.out_topk_weights = dweight;
    combine(moe, &plain, moe->din, dx);
    lap(&start, &moe->seconds->combine);
}
