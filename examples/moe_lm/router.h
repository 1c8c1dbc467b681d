/* SPDX-License-Identifier: MIT */
/* The router: which experts a token goes to, and how much each counts. */
#ifndef MOE_LM_ROUTER_H
#define MOE_LM_ROUTER_H

#include "config.h"

typedef struct routing {
    int64_t num_tokens; /* T */
    float *probs;       /* [T, E] softmax of the router's scores */
    int32_t *expert;    /* [T, K] the K most probable, the best first */
    float *weight;      /* [T, K] their probabilities */
    int frozen;         /* keep the experts chosen before: the choice jumps,
                           which finite differences cannot follow */
} routing_t;

void router_create(const config_t *config, int64_t num_tokens,
                   routing_t *routing);
void router_destroy(routing_t *routing);

/* Routes x [T, D] with the router's matrix [D, E]. */
void router_forward(const config_t *config, const float *matrix, const float *x,
                    routing_t *routing);

/*
 * The load balancing loss of one shard, whose first token is `first`:
 *     E * sum over e of (share of the choices that fell on e) * (mean
 *     probability of e)
 * divided by the number of shards, so that the sum over shards is 1 when all
 * experts are used alike, and larger otherwise.  Sets load [E] to the number of
 * choices that fell on each expert.
 */
float router_balance_loss(const config_t *config, const routing_t *routing,
                          int64_t first, float *load);

/*
 * Replaces probs of one shard by the gradient of the router's scores.  dweight
 * [T, K] is the gradient of the weights, load that of router_balance_loss.
 */
void router_backward(const config_t *config, routing_t *routing, int64_t first,
                     const float *dweight, const float *load);

#endif
