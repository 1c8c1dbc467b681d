/* SPDX-License-Identifier: MIT */
/* Summing the rows of a token, of this rank's or for another node. */
#ifndef EPX_ENGINE_CPU_CPU_COMBINE_H
#define EPX_ENGINE_CPU_CPU_COMBINE_H

#include "engine/cpu/cpu_token.h"

/* Rows to be summed, at most: biases, and what K experts and all other nodes
 * give, which are no more than K together. */
#define CPU_MAX_SUMMANDS (EPX_MAX_BIAS + EPX_MAX_TOPK)

typedef struct cpu_summands {
    const void *rows[CPU_MAX_SUMMANDS];
    float weights[CPU_MAX_SUMMANDS];
    uint8_t kinds[CPU_MAX_SUMMANDS]; /* epx__row_kind_t */
    int count;
} cpu_summands_t;

/* Elements of recv_topk_weights in one row. */
static inline int64_t
cpu_weights_per_row(const cpu_plan_t *plan)
{
    return cpu_is_rank_major(plan) ? plan->base.key.topk : 1;
}

/* Add the token's rows on the ranks of this node, in the order of the sum. */
void cpu_add_near_rows(const cpu_plan_t *plan, const cpu_token_t *token,
                       cpu_summands_t *summands);
/* Sum weights that these ranks have for the token into out[K]. */
void cpu_add_near_weights(const cpu_plan_t *plan, const cpu_token_t *token,
                          float *out);

static inline bool
cpu_is_logfmt(const cpu_plan_t *plan)
{
    return plan->combine.args.quantize == EPX_QUANTIZE_LOGFMT10;
}

/* The kernel for the combine's element type. */
typedef void cpu_reduce_fn_t(const epx__reduce_t *reduce);
cpu_reduce_fn_t *cpu_reduce_fn(const cpu_plan_t *plan);

#endif
