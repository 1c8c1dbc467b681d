/* SPDX-License-Identifier: MIT */
#include "engine/common/describe.h"
#include "engine/common/placement.h"
#include "engine/cpu/cpu.h"

#include <inttypes.h>
#include <stdlib.h>

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

/* The arrays of a plan and their sizes: O(T K + R + E). */
static void
carve_arrays(cpu_plan_t *plan, carve_t *c)
{
    const epx__plan_key_t *key = &plan->base.key;
    uint64_t ranks = (uint64_t)plan->base.group->num_ranks;
    uint64_t local = (uint64_t)plan->base.num_local_experts;
    uint64_t experts = key->num_experts;
    uint64_t entries = (uint64_t)plan->token_capacity * key->topk;
    bool has_slots = key->send_only_row_bytes > 0;

    (void)carve(c, 1, sizeof(cpu_plan_t));
    plan->experts = carve(c, entries, sizeof(*plan->experts));
    plan->ordinals =
        carve(c, cpu_is_rank_major(plan) ? 0 : entries, sizeof(int32_t));
    plan->routes = carve(c, cpu_is_rank_major(plan) || has_slots ? entries : 0,
                         sizeof(*plan->routes));
    plan->sent_tokens = carve(c, ranks + experts, sizeof(uint32_t));
    plan->stamps = carve(c, experts, sizeof(*plan->stamps));
    plan->expert_rank = carve(c, experts, sizeof(*plan->expert_rank));
    plan->count_row = carve(c, ranks + experts, sizeof(uint32_t));
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
            plan->expert_rank[e] = rank;
        }
    }
}

static epx_status_t
open_slots(cpu_plan_t *plan)
{
    epx_group_t *group = plan->base.group;
    const epx__plan_key_t *key = &plan->base.key;
    uint64_t count = 2 * (uint64_t)group->num_ranks * key->max_tokens_per_rank;
    uint64_t bytes;
    void *slots;
    epx_status_t status;

    if (key->send_only_row_bytes == 0) {
        return EPX_OK;
    }
    plan->slot_bytes =
        cpu_slot_bytes((int32_t)key->topk, key->send_only_row_bytes);
    if (__builtin_mul_overflow(count, plan->slot_bytes, &bytes)) {
        return epx__fail(EPX_ERR_SHAPE,
                         "%" PRIu64 " receive slots of %" PRIu64
                         " bytes exceed 2^64 bytes",
                         count, plan->slot_bytes);
    }
    status =
        epx__heap_alloc(&group->heap, bytes,
                        "the receive slots of send_only_row_bytes", &slots);
    if (status == EPX_OK) {
        plan->slots = slots;
    }
    return status;
}

epx_status_t
cpu_plan_open(epx_group_t *group, const epx_plan_args_t *args,
              epx_plan_t **plan_p)
{
    cpu_plan_t draft = { 0 };
    carve_t measure = { 0 }, place = { 0 };
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
    fill_expert_rank(plan);
    status = open_slots(plan);
    if (status != EPX_OK) {
        free(plan);
        return status;
    }
    *plan_p = &plan->base;
    return EPX_OK;
}

void
cpu_plan_free(cpu_plan_t *plan)
{
    epx_group_t *group = plan->base.group;

    cpu_arrays_close(group, plan->dispatch.arrays);
    cpu_arrays_close(group, plan->combine.arrays);
    if (plan->slots != NULL) {
        epx__group_heap_free(group, plan->slots);
    }
    free(plan);
}
