/* SPDX-License-Identifier: MIT */
/* The forward pass: bytes to the probabilities of the next byte. */
#include "model.h"
#include "ops.h"

#include <string.h>

static void
embed(model_t *model, const uint8_t *bytes)
{
    const config_t *c = &model->config;

    for (int64_t t = 0; t < model->num_tokens; t++) {
        uint8_t byte = bytes[config_byte(c, t)];
        memcpy(model->layer[0].x + t * c->dim,
               model->params.embedding + byte * c->dim,
               (size_t)c->dim * sizeof(float));
    }
}

/*
 * mid = x + convolution(norm(x)).  The W rows that position i of a sequence
 * sees lie one after the other, from row i of the padded input: as one long
 * row they are a row of the matrix product.
 */
static void
mix_positions(model_t *model, int32_t l)
{
    const config_t *c = &model->config;
    const int64_t D = c->dim;
    const int64_t padded_len = c->taps - 1 + c->seq_len;
    layer_state_t *layer = &model->layer[l];

    memcpy(layer->mid, layer->x,
           (size_t)(model->num_tokens * D) * sizeof(float));
    for (int64_t s = 0; s < model->num_tokens / c->seq_len; s++) {
        float *padded = layer->mix_in + s * padded_len * D;
        for (int64_t i = 0; i < c->seq_len; i++) {
            int64_t t = s * c->seq_len + i;
            layer->mix_inv_rms[t] = ops_rmsnorm(D, layer->x + t * D,
                                                model->params.layer[l].mix_gain,
                                                padded + (c->taps - 1 + i) * D);
        }
        ops_gemm(&(ops_gemm_t){ .m = c->seq_len,
                                .n = D,
                                .k = c->taps * D,
                                .a = padded,
                                .a_row = D,
                                .a_col = 1,
                                .b = model->params.layer[l].mix,
                                .b_row = D,
                                .c = layer->mid + s * c->seq_len * D,
                                .c_row = D,
                                .add = 1 });
    }
}

/* y = mid + experts(norm(mid)). */
static void
apply_experts(model_t *model, int32_t l, float *y)
{
    const int64_t D = model->config.dim;
    layer_state_t *layer = &model->layer[l];

    for (int64_t t = 0; t < model->num_tokens; t++) {
        layer->moe_inv_rms[t] =
            ops_rmsnorm(D, layer->mid + t * D, model->params.layer[l].moe_gain,
                        layer->moe_in + t * D);
    }
    router_forward(&model->config, model->params.layer[l].router, layer->moe_in,
                   &layer->routing);
    moe_layer_forward(&layer->moe, &layer->routing, layer->moe_in, y);
    for (int64_t i = 0; i < model->num_tokens * D; i++) {
        y[i] += layer->mid[i];
    }
}

static void
predict(model_t *model)
{
    const int64_t D = model->config.dim;

    for (int64_t t = 0; t < model->num_tokens; t++) {
        model->head_inv_rms[t] =
            ops_rmsnorm(D, model->x + t * D, model->params.head_gain,
                        model->head_in + t * D);
    }
    ops_matmul(model->num_tokens, VOCABULARY, D, model->head_in,
               model->params.head, model->probs);
    for (int64_t t = 0; t < model->num_tokens; t++) {
        ops_softmax(VOCABULARY, model->probs + t * VOCABULARY);
    }
}

void
model_forward(model_t *model, const uint8_t *bytes)
{
    const int32_t num_layers = model->config.num_layers;

    embed(model, bytes);
    for (int32_t l = 0; l < num_layers; l++) {
        mix_positions(model, l);
        apply_experts(model, l,
                      l + 1 < num_layers ? model->layer[l + 1].x : model->x);
    }
    predict(model);
}
