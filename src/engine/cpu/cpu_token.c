/* SPDX-License-Identifier: MIT */
#include "engine/cpu/cpu_token.h"

cpu_token_t
cpu_own_token(const cpu_plan_t *plan, const float *topk_weights, int64_t t)
{
    int64_t at = t * plan->base.key.topk;

    return (cpu_token_t){
        .index = (int32_t)t,
        .experts = plan->experts + at,
        .ordinals = cpu_is_rank_major(plan) ? NULL : plan->ordinals + at,
        .routes = cpu_is_rank_major(plan) ? plan->routes + at : NULL,
        .weights = topk_weights == NULL ? NULL : topk_weights + at,
        .rank_base = plan->rank_base,
        .expert_base = plan->expert_base,
    };
}

static void
put_rank_row(const cpu_plan_t *plan, const cpu_row_format_t *format,
             const cpu_target_t *target, const cpu_token_t *token,
             cpu_route_t route, cpu_source_row_t source)
{
    int64_t row = token->rank_base[route.rank] + route.ordinal;
    int32_t topk = format->topk;

    cpu_put_row(format, target, row, source.payload, source.scales);
    for (int32_t k = 0; k < topk; k++) {
        int32_t expert = token->experts[k];
        bool here = expert >= 0 && plan->expert_rank[expert] == route.rank;

        if (target->topk_idx != NULL) {
            cpu_put_idx(format, target, row, k,
                        here ? expert - target->first_expert : -1);
        }
        if (target->topk_weights != NULL) {
            target->topk_weights[row * topk + k] =
                here ? token->weights[k] : 0.0f;
        }
    }
    if (target->src_token != NULL) {
        target->src_token[row] = token->index;
    }
}

static void
put_expert_row(const cpu_row_format_t *format, const cpu_target_t *target,
               const cpu_token_t *token, int32_t k, cpu_source_row_t source)
{
    int64_t row = token->expert_base[token->experts[k]] + token->ordinals[k];

    cpu_put_row(format, target, row, source.payload, source.scales);
    if (target->topk_weights != NULL) {
        target->topk_weights[row] = token->weights[k];
    }
    if (target->src_token != NULL) {
        target->src_token[row] = token->index;
    }
}

void
cpu_put_token(const cpu_plan_t *plan, const cpu_row_format_t *format,
              const cpu_target_t *targets, const cpu_token_t *token,
              cpu_source_row_t source)
{
    const epx__nodes_t *nodes = &plan->base.group->nodes;

    for (int32_t k = 0; k < format->topk; k++) {
        if (!cpu_is_rank_major(plan)) {
            int32_t expert = token->experts[k];
            int32_t rank = expert < 0 ? -1 : plan->expert_rank[expert];

            if (rank >= 0 && epx__is_near(nodes, rank)) {
                put_expert_row(format, &targets[rank], token, k, source);
            }
            continue;
        }
        if (token->routes[k].rank < 0) {
            break;
        }
        if (epx__is_near(nodes, token->routes[k].rank)) {
            put_rank_row(plan, format, &targets[token->routes[k].rank], token,
                         token->routes[k], source);
        }
    }
}
