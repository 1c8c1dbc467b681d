/* SPDX-License-Identifier: MIT */
#include "core/atomic.h"
#include "engine/common/describe.h"
#include "engine/common/placement.h"
#include "engine/cpu/cpu_rail.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

/* Carves arrays out of one allocation: run once to measure, once to place. */
typedef struct carve {
    char *base; /* NULL while measuring */
    uint64_t used;
    bool overflow;
} carve_t;

static void *
carve(carve_t *c, uint64_t count, uint64_t element_bytes)
{
    uint64_t at = c->used;
    uint64_t bytes;

    if (__builtin_mul_overflow(count, element_bytes, &bytes) ||
        __builtin_add_overflow(bytes, EPX__LINE - 1, &bytes) ||
        __builtin_add_overflow(at, bytes / EPX__LINE * EPX__LINE, &c->used) ||
        c->used > INT64_MAX) {
        c->overflow = true;
        c->used = at;
    }
    return c->base == NULL ? NULL : c->base + at;
}

/* The ranks of other nodes whose tokens for this node come here: O(R + E) for
 * each. */
static void
carve_forwards(cpu_plan_t *plan, carve_t *c)
{
    uint64_t ranks = (uint64_t)plan->base.group->num_ranks;
    uint64_t experts = plan->base.key.num_experts;
    int32_t count = plan->num_forwards;

    plan->forwards = carve(c, (uint64_t)count, sizeof(*plan->forwards));
    for (int32_t f = 0; f < count; f++) {
        int64_t *bases = carve(c, ranks + experts, sizeof(int64_t));
        uint32_t *counts = carve(c, ranks + experts, sizeof(uint32_t));

        if (c->base != NULL) {
            plan->forwards[f] = (cpu_forward_t){
                .rank = cpu_engine(plan->base.group)
                            ->rails->sources[EPX__LANE_OUT][f],
                .rank_base = bases,
                .expert_base = bases + ranks,
                .counts = counts,
            };
        }
    }
}

void
cpu_forwards_close(cpu_plan_t *plan)
{
    for (int32_t f = 0; f < plan->num_forwards; f++) {
        free(plan->forwards[f].heads);
    }
    free(plan->forwards);
    plan->forwards = NULL;
    plan->num_forwards = 0;
}

epx_status_t
cpu_forwards_open(cpu_plan_t *plan)
{
    const cpu_rails_t *rails = cpu_engine(plan->base.group)->rails;
    carve_t measure = { 0 }, place = { 0 };

    cpu_forwards_close(plan);
    if (rails == NULL || rails->num_sources[EPX__LANE_OUT] == 0) {
        return EPX_OK;
    }
    plan->num_forwards = rails->num_sources[EPX__LANE_OUT];
    carve_forwards(plan, &measure);
    place.base = measure.overflow ? NULL : calloc(1, measure.used);
    if (place.base == NULL) {
        plan->num_forwards = 0;
        return epx__fail(EPX_ERR_NO_MEMORY,
                         "no memory for the counts of ranks of other nodes");
    }
    carve_forwards(plan, &place);
    return EPX_OK;
}

/* The arrays of a plan and their sizes: O(T (K + N) + R + E). */
static void
carve_arrays(cpu_plan_t *plan, carve_t *c)
{
    const epx__plan_key_t *key = &plan->base.key;
    uint64_t ranks = (uint64_t)plan->base.group->num_ranks;
    uint64_t local = (uint64_t)plan->base.num_local_experts;
    uint64_t experts = key->num_experts;
    uint64_t entries = (uint64_t)plan->token_capacity * key->topk;
    bool has_slots = key->send_only_row_bytes > 0;
    uint64_t nodes = (uint64_t)plan->base.group->nodes.num_nodes;
    uint64_t tokens = (uint64_t)plan->token_capacity;

    nodes = nodes > 1 ? nodes : 0;
    (void)carve(c, 1, sizeof(cpu_plan_t));
    plan->experts = carve(c, entries, sizeof(*plan->experts));
    plan->ordinals =
        carve(c, cpu_is_rank_major(plan) ? 0 : entries, sizeof(int32_t));
    plan->routes = carve(c, cpu_is_rank_major(plan) || has_slots ? entries : 0,
                         sizeof(*plan->routes));
    plan->sent_tokens = carve(c, ranks + experts + nodes, sizeof(uint32_t));
    plan->node_tokens = carve(c, nodes, tokens * sizeof(int32_t));
    plan->node_ordinals = carve(c, nodes, tokens * sizeof(int32_t));
    plan->stamps = carve(c, experts, sizeof(*plan->stamps));
    plan->expert_rank = carve(c, experts, sizeof(*plan->expert_rank));
    plan->count_row = carve(c, ranks + experts + nodes, sizeof(uint32_t));
    plan->rank_base = carve(c, ranks, sizeof(int64_t));
    plan->rank_rows = carve(c, ranks, sizeof(int64_t));
    plan->expert_base = carve(c, experts, sizeof(int64_t));
    plan->expert_total = carve(c, experts, sizeof(int64_t));
    plan->recv_tokens = carve(c, ranks, sizeof(int64_t));
    plan->recv_base = carve(c, ranks + 1, sizeof(int64_t));
    plan->expert_rows = carve(c, local, sizeof(int64_t));
    plan->expert_offsets = carve(c, local + 1, sizeof(int64_t));
    plan->source_rows = carve(c, ranks * local, sizeof(int64_t));
    plan->peer_slots = carve(c, ranks, sizeof(uint64_t));
    plan->peer_channels = carve(c, nodes > 0 ? ranks : 0, sizeof(uint32_t));
    plan->peer_turns = carve(c, nodes > 0 ? ranks : 0, sizeof(uint64_t));
}

static void
fill_expert_rank(cpu_plan_t *plan)
{
    int32_t num_ranks = plan->base.group->num_ranks;
    int32_t num_experts = (int32_t)plan->base.key.num_experts;

    for (int32_t rank = 0; rank < num_ranks; rank++) {
        int32_t end = epx__first_expert(num_experts, num_ranks, rank + 1);

        for (int32_t e = epx__first_expert(num_experts, num_ranks, rank);
             e < end; e++) {
            plan->expert_rank[e] =
                epx__is_masked(plan->base.group, rank) ? -1 : rank;
        }
    }
}

epx_status_t
cpu_plan_open(epx_group_t *group, const epx_plan_args_t *args,
              epx_plan_t **plan_p)
{
    cpu_plan_t draft = { 0 };
    carve_t measure = { 0 }, place = { 0 };
    epx__error_t error;
    epx_status_t status;
    cpu_plan_t *plan;

    epx__plan_describe(&draft.base, group, args);
    draft.token_capacity = args->max_tokens_per_rank > 0
                               ? args->max_tokens_per_rank
                               : args->num_tokens;
    carve_arrays(&draft, &measure);
    plan = measure.overflow ? NULL : calloc(1, measure.used);
    if (plan == NULL) {
        return epx__fail(EPX_ERR_NO_MEMORY,
                         "no memory for a plan of %" PRId64
                         " tokens with topk %d",
                         draft.token_capacity, args->topk);
    }
    place.base = (char *)plan;
    carve_arrays(&draft, &place);
    *plan = draft;
    plan->sent_rows = plan->sent_tokens + group->num_ranks;
    plan->sent_nodes = plan->sent_rows + plan->base.key.num_experts;
    /* The masks may change before the routing comes: then it is renewed. */
    plan->epoch = epx__load_u32(&group->epoch);
    fill_expert_rank(plan);
    status = cpu_forwards_open(plan);
    if (status == EPX_OK) {
        status = cpu_slots_open(plan);
    }
    if (status != EPX_OK) {
        epx__error_save(&error, status);
        cpu_slots_close(plan);
        cpu_forwards_close(plan);
        free(plan);
        return epx__error_restore(&error);
    }
    *plan_p = &plan->base;
    return EPX_OK;
}

bool
cpu_plan_is_stale(const cpu_plan_t *plan)
{
    return plan->epoch != epx__load_u32(&plan->base.group->epoch);
}

epx_status_t
cpu_plan_check(const cpu_plan_t *plan)
{
    return cpu_plan_is_stale(plan) ? epx__plan_stale(&plan->base, plan->epoch)
                                   : EPX_OK;
}

/* Let go of what operations of an earlier epoch had. */
static void
give_up(cpu_plan_t *plan)
{
    epx_group_t *group = plan->base.group;

    cpu_arrays_give_up(group, plan->dispatch.arrays);
    cpu_arrays_give_up(group, plan->combine.arrays);
    /* Nobody has the lanes any more. */
    memset(plan->dispatch.lanes, 0, sizeof(plan->dispatch.lanes));
    memset(plan->combine.lanes, 0, sizeof(plan->combine.lanes));
}

epx_status_t
cpu_plan_renew(cpu_plan_t *plan)
{
    epx_status_t status;

    give_up(plan);
    plan->pending = EPX__PENDING_NONE;
    plan->state = CPU_PLAN_EMPTY;
    plan->knows_peer_slots = false;
    status = cpu_slots_renew(plan);
    if (status == EPX_OK) {
        status = cpu_forwards_open(plan);
    }
    if (status == EPX_OK) {
        plan->epoch = epx__load_u32(&plan->base.group->epoch);
        fill_expert_rank(plan);
    }
    return status;
}

void
cpu_plan_free(cpu_plan_t *plan)
{
    epx_group_t *group = plan->base.group;

    if (cpu_plan_is_stale(plan)) {
        give_up(plan);
    }
    cpu_arrays_close(group, plan->dispatch.arrays);
    cpu_arrays_close(group, plan->combine.arrays);
    cpu_rail_give(group, plan->dispatch.lanes);
    cpu_rail_give(group, plan->combine.lanes);
    cpu_forwards_close(plan);
    cpu_slots_close(plan);
    free(plan);
}
