/* SPDX-License-Identifier: MIT */
#include "router.h"
#include "ops.h"

#include <stdlib.h>

void
router_create(const config_t *config, int64_t num_tokens, routing_t *routing)
{
    routing->num_tokens = num_tokens;
    routing->frozen = 0;
    routing->probs = ops_floats(num_tokens * config->num_experts);
    routing->weight = ops_floats(num_tokens * config->topk);
    routing->expert =
        ops_alloc(num_tokens * config->topk, sizeof(*routing->expert));
}

void
router_destroy(routing_t *routing)
{
    free(routing->probs);
    free(routing->weight);
    free(routing->expert);
}

/* Of equal probabilities the lowest expert wins. */
static void
choose_experts(const config_t *config, const float *probs, int32_t *expert)
{
    for (int32_t k = 0; k < config->topk; k++) {
        int32_t best = -1;
        for (int32_t e = 0; e < config->num_experts; e++) {
            int taken = 0;
            for (int32_t j = 0; j < k; j++) {
                taken |= expert[j] == e;
            }
            if (!taken && (best < 0 || probs[e] > probs[best])) {
                best = e;
            }
        }
        expert[k] = best;
    }
}

void
router_forward(const config_t *config, const float *matrix, const float *x,
               routing_t *routing)
{
    const int32_t E = config->num_experts;
    const int32_t K = config->topk;

    ops_matmul(routing->num_tokens, E, config->dim, x, matrix, routing->probs);
    for (int64_t t = 0; t < routing->num_tokens; t++) {
        float *probs = routing->probs + t * E;
        ops_softmax(E, probs);
        if (!routing->frozen) {
            choose_experts(config, probs, routing->expert + t * K);
        }
        for (int64_t i = t * K; i < (t + 1) * K; i++) {
            routing->weight[i] = probs[routing->expert[i]];
        }
    }
}

float
router_balance_loss(const config_t *config, const routing_t *routing,
                    int64_t first, float *load)
{
    const int32_t E = config->num_experts;
    const int32_t K = config->topk;
    const int64_t n = config_shard_tokens(config);
    double sum = 0;

    for (int32_t e = 0; e < E; e++) {
        load[e] = 0;
    }
    for (int64_t i = first * K; i < (first + n) * K; i++) {
        load[routing->expert[i]] += 1;
    }
    for (int32_t e = 0; e < E; e++) {
        double prob = 0;
        for (int64_t t = first; t < first + n; t++) {
            prob += routing->probs[t * E + e];
        }
        sum += (load[e] / (double)(n * K)) * (prob / (double)n);
    }
    return (float)(E * sum / config->num_shards);
}

/*
 * The gradient of a probability is its share of the balancing loss, plus, for a
 * chosen expert, that of the weight.  Softmax turns probabilities' gradients
 * into scores' gradients: ds_e = p_e * (dp_e - sum over j of p_j * dp_j).
 */
void
router_backward(const config_t *config, routing_t *routing, int64_t first,
                const float *dweight, const float *load)
{
    const int32_t E = config->num_experts;
    const int32_t K = config->topk;
    const int64_t n = config_shard_tokens(config);
    const float scale = config->balance * (float)E /
                        ((float)config->num_shards * (float)(n * K) * (float)n);

    for (int64_t t = first; t < first + n; t++) {
        float *p = routing->probs + t * E;
        float inner = 0;
        for (int32_t e = 0; e < E; e++) {
            inner += p[e] * scale * load[e];
        }
        for (int32_t k = 0; k < K; k++) {
            inner += routing->weight[t * K + k] * dweight[t * K + k];
        }
        for (int32_t e = 0; e < E; e++) {
            p[e] *= scale * load[e] - inner;
        }
        for (int32_t k = 0; k < K; k++) {
            p[routing->expert[t * K + k]] +=
                routing->weight[t * K + k] * dweight[t * K + k];
        }
    }
}
