/* SPDX-License-Identifier: MIT */
#include "model.h"
#include "check.h"
#include "ops.h"

#include <string.h>

/* Hands out the next `count` floats of an array; without an array it only
 * counts them. */
typedef struct cursor {
    float *array;
    int64_t used;
} cursor_t;

static float *
take(cursor_t *cursor, int64_t count)
{
    float *here = cursor->array != NULL ? cursor->array + cursor->used : NULL;

    cursor->used += count;
    return here;
}

/* Returns the number of parameters; *total_p is that of all floats. */
static int64_t
map_params(const config_t *c, float *array, params_t *params, int64_t *total_p)
{
    const int64_t D = c->dim;
    cursor_t cursor = { array, 0 };
    int64_t num_params;

    params->embedding = take(&cursor, VOCABULARY * D);
    for (int32_t l = 0; l < c->num_layers; l++) {
        params->layer[l].mix_gain = take(&cursor, D);
        params->layer[l].mix = take(&cursor, c->taps * D * D);
        params->layer[l].moe_gain = take(&cursor, D);
        params->layer[l].router = take(&cursor, D * c->num_experts);
    }
    params->head_gain = take(&cursor, D);
    params->head = take(&cursor, D * VOCABULARY);
    num_params = cursor.used;

    params->loss = take(&cursor, 1);
    params->balance_loss = take(&cursor, 1);
    params->load = take(&cursor, (int64_t)c->num_layers * c->num_experts);
    *total_p = cursor.used;
    return num_params;
}

static void
fill(int64_t n, float *x, float value)
{
    for (int64_t i = 0; i < n; i++) {
        x[i] = value;
    }
}

/* The experts' random streams start at 1000, the text has number 1. */
static void
init_params(const config_t *c, const params_t *params)
{
    const int64_t D = c->dim;

    ops_init_matrix(1, VOCABULARY * D, params->embedding, c->seed, 2);
    ops_init_matrix(D, VOCABULARY, params->head, c->seed, 3);
    fill(D, params->head_gain, 1);
    for (int32_t l = 0; l < c->num_layers; l++) {
        uint64_t stream = 10 + 2 * (uint64_t)l;
        fill(D, params->layer[l].mix_gain, 1);
        fill(D, params->layer[l].moe_gain, 1);
        ops_init_matrix(c->taps * D, D, params->layer[l].mix, c->seed, stream);
        ops_init_matrix(D, c->num_experts, params->layer[l].router, c->seed,
                        stream + 1);
    }
}

static void
create_layer(epx_group_t *group, model_t *model, int32_t l)
{
    const config_t *c = &model->config;
    const int64_t T = model->num_tokens;
    layer_state_t *layer = &model->layer[l];
    int32_t first, most_shards;

    layer->x = ops_floats(T * c->dim);
    layer->mix_in =
        ops_floats(T / c->seq_len * (c->taps - 1 + c->seq_len) * c->dim);
    layer->mix_inv_rms = ops_floats(T);
    layer->mid = ops_floats(T * c->dim);
    layer->moe_in = ops_floats(T * c->dim);
    layer->moe_inv_rms = ops_floats(T);
    router_create(c, T, &layer->routing);

    /* No rank has more shards than the first. */
    epx_group_info_t info = EPX_GROUP_INFO_INIT;
    CHECK(epx_group_query(group, &info));
    CHECK(epx_local_experts(c->num_shards, info.num_ranks, 0, &first,
                            &most_shards));
    moe_layer_create(group, c, l, most_shards * config_shard_tokens(c),
                     &model->moe_seconds, &layer->moe);
}

void
model_create(epx_group_t *group, const config_t *config, model_t *model)
{
    const config_t *c = config;
    epx_group_info_t info = EPX_GROUP_INFO_INIT;
    params_t unused;
    int64_t total;

    *model = (model_t){ .config = *config };
    CHECK(epx_group_query(group, &info));
    CHECK(epx_local_experts(c->num_shards, info.num_ranks, info.rank,
                            &model->first_shard, &model->num_shards));
    model->num_tokens = model->num_shards * config_shard_tokens(c);

    model->num_params = map_params(c, NULL, &unused, &total);
    model->param_array = ops_floats(total);
    map_params(c, model->param_array, &model->params, &total);
    init_params(c, &model->params);
    gradient_sum_create(group, c->num_shards, total, &model->grads);

    for (int32_t l = 0; l < c->num_layers; l++) {
        create_layer(group, model, l);
    }
    const int64_t T = model->num_tokens;
    model->x = ops_floats(T * c->dim);
    model->head_in = ops_floats(T * c->dim);
    model->head_inv_rms = ops_floats(T);
    model->probs = ops_floats(T * VOCABULARY);
    model->dx = ops_floats(T * c->dim);
    model->dnorm = ops_floats(T * c->dim);
    model->dmix_in = ops_floats((int64_t)(c->taps - 1 + c->seq_len) * c->dim);
    model->dweight = ops_floats(T * c->topk);
    model->transposed = ops_floats(
        c->dim * ((int64_t)c->taps * c->dim + VOCABULARY + c->num_experts));
}

void
model_destroy(model_t *model)
{
    float *arrays[] = { model->param_array,  model->x,       model->head_in,
                        model->head_inv_rms, model->probs,   model->dx,
                        model->dnorm,        model->dmix_in, model->dweight,
                        model->transposed };

    for (int32_t l = 0; l < model->config.num_layers; l++) {
        layer_state_t *layer = &model->layer[l];
        float *kept[] = { layer->x,   layer->mix_in, layer->mix_inv_rms,
                          layer->mid, layer->moe_in, layer->moe_inv_rms };
        for (size_t i = 0; i < sizeof(kept) / sizeof(kept[0]); i++) {
            free(kept[i]);
        }
        router_destroy(&layer->routing);
        moe_layer_destroy(&layer->moe);
    }
    for (size_t i = 0; i < sizeof(arrays) / sizeof(arrays[0]); i++) {
        free(arrays[i]);
    }
    gradient_sum_destroy(&model->grads);
}

params_t
model_grads(const model_t *model, int32_t i)
{
    params_t grads;
    int64_t total;

    map_params(&model->config, gradient_sum_vector(&model->grads, i), &grads,
               &total);
    return grads;
}

void
model_gradients(model_t *model, const uint8_t *bytes)
{
    double start;

    model_forward(model, bytes);
    model_backward(model, bytes);
    start = ops_seconds();
    gradient_sum_run(&model->grads);
    model->sum_seconds += ops_seconds() - start;
}
