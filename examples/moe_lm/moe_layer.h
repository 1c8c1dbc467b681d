/* SPDX-License-Identifier: MIT */
/* A layer of experts that are spread over the ranks of an EPX group. */
#ifndef MOE_LM_MOE_LAYER_H
#define MOE_LM_MOE_LAYER_H

#include "router.h"

#include <epx/epx.h>

/* Seconds spent in each stage, waiting for the other ranks included. */
typedef struct moe_seconds {
    double plan, dispatch, experts, combine;
} moe_seconds_t;

/*
 * An expert is out = relu(in * up)^2 * down.
 *
 * Rows are in EXPERT_MAJOR: one row for each (token, expert), by local expert,
 * then source rank, then token.
 */
typedef struct moe_layer {
    config_t config;
    epx_group_t *group;
    epx_plan_t *plan;
    epx_plan_counts_t counts; /* which rows belong to which local expert */
    moe_seconds_t *seconds;

    /* Parameters of the local experts and their gradients, each [L, 2, D * F]:
     * an expert is up [D, F], then down [F, D]. */
    int32_t first_expert, num_local;
    int64_t num_params;
    float *params, *grads;

    /* Rows that ranks exchange, in EPX memory.  No rank can receive more than
     * max_rows. */
    int64_t max_rows;
    float *in, *out;    /* [max_rows, D] of the experts */
    float *din, *dout;  /* their gradients */
    float *row_weight;  /* [max_rows] what the token's owner gave the row */
    float *drow_weight; /* and its gradient */

    /* Local: [max_rows, F], and one transposed matrix. */
    float *relu, *hidden, *dhidden, *transposed;
} moe_layer_t;

/* max_tokens: of any rank.  Collective.  Adds its times to *seconds. */
void moe_layer_create(epx_group_t *group, const config_t *config,
                      int32_t layer_idx, int64_t max_tokens,
                      moe_seconds_t *seconds, moe_layer_t *moe);
void moe_layer_destroy(moe_layer_t *moe);

/* y[t] = sum over k of weight[t][k] * expert[t][k](x[t]); x and y are [T, D].
 * Collective. */
void moe_layer_forward(moe_layer_t *moe, const routing_t *routing,
                       const float *x, float *y);

/* From dy: dx [T, D], dweight [T, K], and the experts' gradients (not added:
 * set).  After moe_layer_forward with the same routing.  Collective. */
void moe_layer_backward(moe_layer_t *moe, const routing_t *routing,
                        const float *dy, float *dx, float *dweight);

#endif
