/* SPDX-License-Identifier: MIT */
/*
 * A byte-level language model.  A layer mixes each position with the few before
 * it by a causal convolution, then lets experts work on it:
 *
 *     x = embedding[byte]
 *     x += convolution(norm(x))      for each
 *     x += experts(norm(x))          layer
 *     scores of the next byte = norm(x) * head
 *
 * Every rank holds the whole model but for the experts, and some shards of the
 * batch.
 */
#ifndef MOE_LM_MODEL_H
#define MOE_LM_MODEL_H

#include "gradient_sum.h"
#include "moe_layer.h"

/* The replicated parameters, or one shard's gradient of them: pointers into one
 * array.  A gradient is followed by what else is summed over the shards. */
typedef struct params {
    float *embedding; /* [VOCABULARY, D] */
    struct {
        float *mix_gain; /* [D] */
        float *mix;      /* [W * D, D]: the oldest position first */
        float *moe_gain; /* [D] */
        float *router;   /* [D, E] */
    } layer[MAX_LAYERS];
    float *head_gain; /* [D] */
    float *head;      /* [D, VOCABULARY] */

    float *loss;         /* mean cross entropy, in nats */
    float *balance_loss; /* mean over layers */
    float *load;         /* [num_layers, E] choices of each expert */
} params_t;

/* What the forward pass keeps for the backward pass; T tokens of this rank. */
typedef struct layer_state {
    float *x;           /* [T, D] input */
    float *mix_in;      /* [sequences, W - 1 + seq_len, D] normalised input; the
                           first W - 1 rows of a sequence stay zero */
    float *mix_inv_rms; /* [T] */
    float *mid;         /* [T, D] after mixing */
    float *moe_in;      /* [T, D] normalised */
    float *moe_inv_rms; /* [T] */
    routing_t routing;
    moe_layer_t moe;
} layer_state_t;

typedef struct model {
    config_t config;
    int32_t first_shard, num_shards; /* of this rank */
    int64_t num_tokens;              /* T */

    int64_t num_params; /* replicated ones */
    float *param_array;
    params_t params;
    gradient_sum_t grads; /* a vector for each of the rank's shards */

    layer_state_t layer[MAX_LAYERS];
    float *x;            /* [T, D] output of the last layer */
    float *head_in;      /* [T, D] normalised */
    float *head_inv_rms; /* [T] */
    float *probs;        /* [T, VOCABULARY] of the next byte */

    /* Scratch of the backward pass. */
    float *dx, *dnorm; /* [T, D] */
    float *dmix_in;    /* [W - 1 + seq_len, D] */
    float *dweight;    /* [T, K] */
    float *transposed; /* of one matrix */

    moe_seconds_t moe_seconds;
    double sum_seconds; /* in gradient_sum_run */
} model_t;

/* Collective.  The group has at most num_shards ranks. */
void model_create(epx_group_t *group, const config_t *config, model_t *model);
void model_destroy(model_t *model);

/* The gradient that the rank's i-th shard has by itself, or after
 * model_gradients the sum over all shards, the same for each i. */
params_t model_grads(const model_t *model, int32_t i);

/* Sequence i of this rank's part of the batch is bytes[i * (seq_len + 1)] on.
 * Computes the losses and all gradients, of the replicated parameters and of
 * the experts, over the batch of all ranks.  Collective. */
void model_gradients(model_t *model, const uint8_t *bytes);

/* The two halves of that, for the rank's own shards. */
void model_forward(model_t *model, const uint8_t *bytes);
void model_backward(model_t *model, const uint8_t *bytes);

#endif
