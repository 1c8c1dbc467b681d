/* SPDX-License-Identifier: MIT */
/*
 * The losses and, from the head back to the embedding, their gradients.
 *
 * What belongs to a replicated parameter is summed for each shard by itself;
 * gradient_sum_run adds the shards up.  model->dx holds the gradient of the
 * stage at hand, [T, D].
 */
#include "model.h"
#include "ops.h"

#include <math.h>
#include <string.h>

/* The tokens of the rank's i-th shard. */
typedef struct range {
    int64_t begin, end;
} range_t;

static range_t
shard_tokens(const model_t *model, int32_t i)
{
    const int64_t n = config_shard_tokens(&model->config);

    return (range_t){ i * n, (i + 1) * n };
}

/* Cross entropy, and the gradient of the scores in place of the probabilities:
 * (p - 1 at the byte that came) / tokens of the whole batch. */
static float
cross_entropy(model_t *model, range_t tokens, const uint8_t *bytes)
{
    const config_t *c = &model->config;
    const float scale = 1 / (float)(c->num_shards * config_shard_tokens(c));
    double loss = 0;

    for (int64_t t = tokens.begin; t < tokens.end; t++) {
        float *probs = model->probs + t * VOCABULARY;
        uint8_t next = bytes[config_byte(c, t) + 1];
        loss -= log(fmax(probs[next], 1e-30));
        probs[next] -= 1;
        for (int32_t i = 0; i < VOCABULARY; i++) {
            probs[i] *= scale;
        }
    }
    return (float)(loss * scale);
}

static void
predict_backward(model_t *model, range_t tokens, const params_t *grads)
{
    const int64_t D = model->config.dim;
    const int64_t n = tokens.end - tokens.begin;
    const float *dscores = model->probs + tokens.begin * VOCABULARY;
    float *dnorm = model->dnorm + tokens.begin * D;

    ops_matmul_grad(D, VOCABULARY, n, model->head_in + tokens.begin * D,
                    dscores, grads->head);
    ops_transpose(D, VOCABULARY, model->params.head, model->transposed);
    ops_matmul(n, D, VOCABULARY, dscores, model->transposed, dnorm);
    for (int64_t t = tokens.begin; t < tokens.end; t++) {
        ops_rmsnorm_backward(D, model->x + t * D, model->params.head_gain,
                             model->head_inv_rms[t], model->dnorm + t * D,
                             model->dx + t * D, grads->head_gain);
    }
}

/* The part of the expert layer before its dispatch: router and norm.  dnorm
 * already holds what came back from the experts. */
static void
route_backward(model_t *model, int32_t l, range_t tokens, const params_t *grads)
{
    const config_t *c = &model->config;
    const int64_t D = c->dim;
    const int64_t E = c->num_experts;
    const int64_t n = tokens.end - tokens.begin;
    layer_state_t *layer = &model->layer[l];
    float *dscores = layer->routing.probs + tokens.begin * E;

    router_backward(c, &layer->routing, tokens.begin, model->dweight,
                    grads->load + l * E);
    ops_matmul_grad(D, E, n, layer->moe_in + tokens.begin * D, dscores,
                    grads->layer[l].router);
    ops_transpose(D, E, model->params.layer[l].router, model->transposed);
    ops_gemm(&(ops_gemm_t){ .m = n,
                            .n = D,
                            .k = E,
                            .a = dscores,
                            .a_row = E,
                            .a_col = 1,
                            .b = model->transposed,
                            .b_row = D,
                            .c = model->dnorm + tokens.begin * D,
                            .c_row = D,
                            .add = 1 });
    for (int64_t t = tokens.begin; t < tokens.end; t++) {
        ops_rmsnorm_backward(D, layer->mid + t * D,
                             model->params.layer[l].moe_gain,
                             layer->moe_inv_rms[t], model->dnorm + t * D,
                             model->dx + t * D, grads->layer[l].moe_gain);
    }
}

/* One sequence of mix_positions.  transposed holds the W matrices of the taps,
 * each transposed. */
static void
mix_backward(model_t *model, int32_t l, int64_t s, const params_t *grads)
{
    const config_t *c = &model->config;
    const int64_t D = c->dim;
    const int64_t padded_len = c->taps - 1 + c->seq_len;
    const int64_t first = s * c->seq_len;
    layer_state_t *layer = &model->layer[l];

    ops_gemm(&(ops_gemm_t){ .m = c->taps * D,
                            .n = D,
                            .k = c->seq_len,
                            .a = layer->mix_in + s * padded_len * D,
                            .a_row = 1,
                            .a_col = D,
                            .b = model->dx + first * D,
                            .b_row = D,
                            .c = grads->layer[l].mix,
                            .c_row = D,
                            .add = 1 });

    memset(model->dmix_in, 0, (size_t)(padded_len * D) * sizeof(float));
    for (int64_t w = 0; w < c->taps; w++) {
        ops_gemm(&(ops_gemm_t){ .m = c->seq_len,
                                .n = D,
                                .k = D,
                                .a = model->dx + first * D,
                                .a_row = D,
                                .a_col = 1,
                                .b = model->transposed + w * D * D,
                                .b_row = D,
                                .c = model->dmix_in + w * D,
                                .c_row = D,
                                .add = 1 });
    }
    for (int64_t i = 0; i < c->seq_len; i++) {
        int64_t t = first + i;
        ops_rmsnorm_backward(
            D, layer->x + t * D, model->params.layer[l].mix_gain,
            layer->mix_inv_rms[t], model->dmix_in + (c->taps - 1 + i) * D,
            model->dx + t * D, grads->layer[l].mix_gain);
    }
}

static void
layer_backward(model_t *model, int32_t l)
{
    const config_t *c = &model->config;
    const int64_t D = c->dim;
    const int64_t shard_seqs = c->num_seqs / c->num_shards;
    layer_state_t *layer = &model->layer[l];

    /* All shards at once go through the experts and back. */
    for (int32_t i = 0; i < model->num_shards; i++) {
        params_t grads = model_grads(model, i);
        *grads.balance_loss += router_balance_loss(
            c, &layer->routing, shard_tokens(model, i).begin,
            grads.load + l * c->num_experts);
    }
    moe_layer_backward(&layer->moe, &layer->routing, model->dx, model->dnorm,
                       model->dweight);

    for (int32_t i = 0; i < model->num_shards; i++) {
        params_t grads = model_grads(model, i);
        route_backward(model, l, shard_tokens(model, i), &grads);
    }
    for (int64_t w = 0; w < c->taps; w++) {
        ops_transpose(D, D, model->params.layer[l].mix + w * D * D,
                      model->transposed + w * D * D);
    }
    for (int64_t s = 0; s < model->num_shards * shard_seqs; s++) {
        params_t grads = model_grads(model, (int32_t)(s / shard_seqs));
        mix_backward(model, l, s, &grads);
    }
}

static void
embed_backward(model_t *model, range_t tokens, const uint8_t *bytes,
               const params_t *grads)
{
    const config_t *c = &model->config;
    const int64_t D = c->dim;

    for (int64_t t = tokens.begin; t < tokens.end; t++) {
        uint8_t byte = bytes[config_byte(c, t)];
        for (int64_t i = 0; i < D; i++) {
            grads->embedding[byte * D + i] += model->dx[t * D + i];
        }
    }
}

void
model_backward(model_t *model, const uint8_t *bytes)
{
    const config_t *c = &model->config;

    gradient_sum_clear(&model->grads);
    memset(model->dx, 0, (size_t)(model->num_tokens * c->dim) * sizeof(float));
    for (int32_t i = 0; i < model->num_shards; i++) {
        range_t tokens = shard_tokens(model, i);
        params_t grads = model_grads(model, i);
        *grads.loss = cross_entropy(model, tokens, bytes);
        predict_backward(model, tokens, &grads);
    }
    for (int32_t l = c->num_layers - 1; l >= 0; l--) {
        layer_backward(model, l);
    }
    for (int32_t i = 0; i < model->num_shards; i++) {
        params_t grads = model_grads(model, i);
        embed_backward(model, shard_tokens(model, i), bytes, &grads);
    }
}
