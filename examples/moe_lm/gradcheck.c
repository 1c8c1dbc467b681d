/* SPDX-License-Identifier: MIT */
/*
 * For every array of parameters, and a few random directions d of +1 and -1:
 *
 *     gradient . d  =  (loss(params + step d) - loss(params - step d)) / 2 step
 *
 * up to the rounding of float32 and to the curvature of the loss.  A direction
 * touches every parameter of the array, so one wrong element shows.
 */
#include "gradcheck.h"
#include "model.h"
#include "ops.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define DIRECTIONS 3
#define STEP       2e-3f
#define TOLERANCE  0.02 /* relative */
#define NOISE      4e-4 /* absolute: rounding of the loss / step */

/* One array of parameters; values is NULL where another rank owns it. */
typedef struct tensor {
    char name[64];
    int64_t count;
    float *values;
    const float *grads; /* a copy, from before anything was moved */
} tensor_t;

#define MAX_TENSORS 128

typedef struct check {
    model_t model;
    int32_t rank;
    uint8_t *bytes;
    float *grads; /* copies: the replicated parameters', then the experts' */
    tensor_t tensors[MAX_TENSORS];
    int num_tensors;
} check_t;

static void
add(check_t *check, const char *name, int32_t layer, int64_t count,
    float *values, const float *grads)
{
    tensor_t *tensor = &check->tensors[check->num_tensors++];

    snprintf(tensor->name, sizeof(tensor->name), "layer %d %s", layer, name);
    tensor->count = count;
    tensor->values = values;
    tensor->grads = grads;
}

/* A parameter's gradient has the parameter's place in the copied array. */
static void
add_replicated(check_t *check, const char *name, int32_t layer, int64_t count,
               float *values)
{
    int64_t place = values - check->model.param_array;

    add(check, name, layer, count, values, check->grads + place);
}

static void
add_experts(check_t *check, int32_t layer, const float *grads)
{
    const config_t *c = &check->model.config;
    const moe_layer_t *moe = &check->model.layer[layer].moe;
    const int64_t matrix = (int64_t)c->dim * c->expert_dim;

    for (int32_t e = 0; e < c->num_experts; e++) {
        int32_t local = e - moe->first_expert;
        int mine = local >= 0 && local < moe->num_local;
        for (int half = 0; half < 2; half++) {
            int64_t place = (local * 2 + half) * matrix;
            char name[32];
            snprintf(name, sizeof(name), "expert %d %s", e,
                     half == 0 ? "up" : "down");
            add(check, name, layer, matrix, mine ? moe->params + place : NULL,
                mine ? grads + place : NULL);
        }
    }
}

static void
list_tensors(check_t *check)
{
    const config_t *c = &check->model.config;
    const params_t *p = &check->model.params;
    const int64_t D = c->dim;
    const float *expert_grads = check->grads + check->model.num_params;

    add_replicated(check, "embedding", 0, VOCABULARY * D, p->embedding);
    for (int32_t l = 0; l < c->num_layers; l++) {
        add_replicated(check, "mix_gain", l, D, p->layer[l].mix_gain);
        add_replicated(check, "mix", l, c->taps * D * D, p->layer[l].mix);
        add_replicated(check, "moe_gain", l, D, p->layer[l].moe_gain);
        add_replicated(check, "router", l, D * c->num_experts,
                       p->layer[l].router);
        add_experts(check, l, expert_grads);
        expert_grads += check->model.layer[l].moe.num_params;
    }
    add_replicated(check, "head_gain", c->num_layers, D, p->head_gain);
    add_replicated(check, "head", c->num_layers, D * VOCABULARY, p->head);
}

/* What the gradients are the gradients of. */
static double
loss(check_t *check)
{
    params_t sum;

    model_gradients(&check->model, check->bytes);
    sum = model_grads(&check->model, 0);
    return (double)*sum.loss +
           (double)check->model.config.balance * (double)*sum.balance_loss;
}

static void
copy_grads(check_t *check)
{
    model_t *model = &check->model;
    int64_t total = model->num_params;
    float *place;

    for (int32_t l = 0; l < model->config.num_layers; l++) {
        total += model->layer[l].moe.num_params;
    }
    check->grads = ops_floats(total);
    memcpy(check->grads, gradient_sum_vector(&model->grads, 0),
           (size_t)model->num_params * sizeof(float));
    place = check->grads + model->num_params;
    for (int32_t l = 0; l < model->config.num_layers; l++) {
        const moe_layer_t *moe = &model->layer[l].moe;
        memcpy(place, moe->grads, (size_t)moe->num_params * sizeof(float));
        place += moe->num_params;
    }
}

/* The i-th element of a direction, the same on every rank. */
static float
direction(int tensor, int number, int64_t i)
{
    uint64_t bits = ops_random((uint64_t)tensor, (uint64_t)number, (uint64_t)i);

    return (bits & 1) != 0 ? 1 : -1;
}

static void
move(const tensor_t *tensor, int index, int number, float step)
{
    for (int64_t i = 0; tensor->values != NULL && i < tensor->count; i++) {
        tensor->values[i] += step * direction(index, number, i);
    }
}

/* Returns whether the check failed, on the rank that has the gradient. */
static int
check_direction(check_t *check, int index, int number)
{
    const tensor_t *tensor = &check->tensors[index];
    const float step = STEP;
    double difference, expected = 0;

    move(tensor, index, number, step);
    difference = loss(check);
    move(tensor, index, number, -2 * step);
    difference = (difference - loss(check)) / (2 * (double)step);
    move(tensor, index, number, step);
    if (tensor->values == NULL) {
        return 0;
    }
    for (int64_t i = 0; i < tensor->count; i++) {
        expected += (double)(direction(index, number, i) * tensor->grads[i]);
    }
    if (fabs(difference - expected) <= NOISE + TOLERANCE * fabs(expected)) {
        return 0;
    }
    printf("%s, direction %d: the loss changes by %g, its gradient says %g\n",
           tensor->name, number, difference, expected);
    return 1;
}

int
gradcheck(epx_group_t *group, uint64_t seed)
{
    const config_t config = { .dim = 16,
                              .expert_dim = 16,
                              .num_experts = 8,
                              .topk = 2,
                              .num_layers = 2,
                              .taps = 3,
                              .seq_len = 12,
                              .num_seqs = 4,
                              .num_shards = 4,
                              .balance = 0.1f,
                              .seed = seed };
    const int64_t bytes_per_seq = config.seq_len + 1;
    check_t *check = ops_alloc(1, sizeof(*check));
    int failed = 0;

    model_create(group, &config, &check->model);
    int64_t n = check->model.num_shards * bytes_per_seq;
    check->bytes = ops_alloc(n, 1);
    for (int64_t i = 0; i < n; i++) {
        int64_t place = check->model.first_shard * bytes_per_seq + i;
        check->bytes[i] = (uint8_t)ops_random(seed, 1, (uint64_t)place);
    }
    loss(check);
    copy_grads(check);
    for (int32_t l = 0; l < config.num_layers; l++) {
        check->model.layer[l].routing.frozen = 1;
    }
    list_tensors(check);
    for (int t = 0; t < check->num_tensors; t++) {
        for (int d = 0; d < DIRECTIONS; d++) {
            failed += check_direction(check, t, d);
        }
    }
    printf("gradient check: %d arrays, %d directions each, %d failed here\n",
           check->num_tensors, DIRECTIONS, failed);
    model_destroy(&check->model);
    free(check->bytes);
    free(check->grads);
    free(check);
    return failed;
}
