/* SPDX-License-Identifier: MIT */
/* What every engine's plan starts with: the part that the api layer reads. */
#ifndef EPX_CORE_PLAN_H
#define EPX_CORE_PLAN_H

#include "core/group.h"

#include <epx/epx.h>

/* A send-only operation that epx_complete has still to finish. */
typedef enum epx__pending {
    EPX__PENDING_NONE = 0,
    EPX__PENDING_DISPATCH,
    EPX__PENDING_COMBINE,
} epx__pending_t;

struct epx_plan {
    epx_group_t *group;
    epx__plan_key_t key; /* what all ranks share */
    int32_t first_expert;
    int32_t num_local_experts;
};

/* Rows of the receive buffer that the key fixes; 0 when counts decide. */
static inline uint64_t
epx__plan_fixed_rows(const epx_plan_t *plan)
{
    if (plan->key.layout == EPX_LAYOUT_EXPERT_SLOTS) {
        return (uint64_t)plan->num_local_experts *
               (uint64_t)plan->group->num_ranks * plan->key.max_tokens_per_rank;
    }
    return plan->key.recv_capacity;
}

#endif
