/* SPDX-License-Identifier: MIT */
/* One token and where it goes: one of this rank's, or one that it forwards for
 * a rank of another node. */
#ifndef EPX_ENGINE_CPU_CPU_TOKEN_H
#define EPX_ENGINE_CPU_CPU_TOKEN_H

#include "engine/cpu/cpu_rows.h"

typedef struct cpu_token {
    int32_t index;             /* at its source */
    const int32_t *experts;    /* [K] */
    const int32_t *ordinals;   /* [K] EXPERT_MAJOR and EXPERT_SLOTS */
    const cpu_route_t *routes; /* [K] RANK_MAJOR */
    const float *weights;      /* [K] or NULL */
    /* The first rows of its source's tokens. */
    const int64_t *rank_base;   /* [R] */
    const int64_t *expert_base; /* [E] */
} cpu_token_t;

/* A token of this rank. */
cpu_token_t cpu_own_token(const cpu_plan_t *plan, const float *topk_weights,
                          int64_t t);

/* Write a token's row to its places on the ranks of this node; targets is
 * [R]. */
void cpu_put_token(const cpu_plan_t *plan, const cpu_row_format_t *format,
                   const cpu_target_t *targets, const cpu_token_t *token,
                   cpu_source_row_t source);

#endif
