/* SPDX-License-Identifier: MIT */
/* The first half of a plan: this rank's own routing. */
#include "engine/cpu/cpu.h"

#include <inttypes.h>
#include <string.h>

static inline int64_t
read_index(const void *topk_idx, bool is_64, int64_t i)
{
    return is_64 ? ((const int64_t *)topk_idx)[i]
                 : ((const int32_t *)topk_idx)[i];
}

static epx_status_t
bad_index(const cpu_plan_t *plan, int64_t token, int64_t k, int64_t expert)
{
    int32_t last = (int32_t)plan->base.key.num_experts - 1;

    if (expert < -1 || expert > last) {
        return epx__fail(EPX_ERR_EXPERT,
                         "topk_idx[%" PRId64 "][%" PRId64 "] is %" PRId64
                         "; allowed are -1 (none) and 0 to %d",
                         token, k, expert, last);
    }
    return epx__fail(EPX_ERR_EXPERT,
                     "topk_idx[%" PRId64 "][%" PRId64 "] is expert %" PRId64
                     " again; the experts of one token must differ",
                     token, k, expert);
}

/* Changes nothing but the scratch stamps, so that bad input changes nothing. */
static inline epx_status_t
validate(cpu_plan_t *plan, int64_t num_tokens, const void *topk_idx, bool is_64)
{
    int64_t topk = plan->base.key.topk;
    int64_t num_experts = plan->base.key.num_experts;

    memset(plan->stamps, 0, (size_t)num_experts * sizeof(*plan->stamps));
    for (int64_t t = 0; t < num_tokens; t++) {
        uint32_t stamp = (uint32_t)t + 1;

        for (int64_t k = 0; k < topk; k++) {
            int64_t expert = read_index(topk_idx, is_64, t * topk + k);

            if (expert == -1) {
                continue;
            }
            if (expert < -1 || expert >= num_experts ||
                plan->stamps[expert] == stamp) {
                return bad_index(plan, t, k, expert);
            }
            plan->stamps[expert] = stamp;
        }
    }
    return EPX_OK;
}

/* Ranks as a set of bits, so that they come out in ascending order. */
#define SET_WORDS (EPX_MAX_RANKS / 64)

typedef struct rank_set {
    uint64_t words[SET_WORDS];
} rank_set_t;

/* A token has a rank on a node: once for each, since the ranks of a node need
 * not come one after the other. */
static inline void
take_node(cpu_plan_t *plan, int32_t t, int32_t node)
{
    int64_t begin = node * plan->token_capacity;
    uint32_t count = plan->sent_nodes[node];

    if (count == 0 || plan->node_tokens[begin + count - 1] != t) {
        plan->node_tokens[begin + count] = t;
        plan->node_ordinals[begin + t] = (int32_t)count;
        plan->sent_nodes[node]++;
    }
}

/* Count the ranks of the set, write their routes if wanted, and empty it. */
static inline void
take_ranks(cpu_plan_t *plan, rank_set_t *set, int32_t num_words,
           cpu_route_t *routes)
{
    int32_t count = 0;

    for (int32_t w = 0; w < num_words; w++) {
        for (uint64_t bits = set->words[w]; bits != 0; bits &= bits - 1) {
            int32_t rank = w * 64 + __builtin_ctzll(bits);
            uint32_t ordinal = plan->sent_tokens[rank]++;

            if (routes != NULL) {
                routes[count++] = (cpu_route_t){ rank, (int32_t)ordinal };
            }
        }
        set->words[w] = 0;
    }
    if (routes != NULL && count < (int32_t)plan->base.key.topk) {
        routes[count].rank = -1;
    }
}

static inline void
route_tokens(cpu_plan_t *plan, int64_t num_tokens, const void *topk_idx,
             bool is_64, bool has_masks)
{
    int64_t topk = plan->base.key.topk;
    int32_t num_words = (plan->base.group->num_ranks + 63) / 64;
    bool wants_ordinals = !cpu_is_rank_major(plan);
    bool wants_routes =
        cpu_is_rank_major(plan) || plan->base.key.send_only_row_bytes > 0;
    const epx__nodes_t *all = &plan->base.group->nodes;
    const int32_t *nodes = all->num_nodes > 1 ? all->node_of : NULL;
    rank_set_t set = { { 0 } };

    for (int64_t t = 0; t < num_tokens; t++) {
        for (int64_t i = t * topk; i < (t + 1) * topk; i++) {
            int32_t expert = (int32_t)read_index(topk_idx, is_64, i);

            plan->experts[i] = expert;
            if (has_masks && expert >= 0 && plan->expert_rank[expert] < 0) {
                plan->experts[i] = CPU_EXPERT_DROPPED;
                plan->num_dropped++;
            } else if (expert >= 0) {
                int32_t rank = plan->expert_rank[expert];
                uint32_t ordinal = plan->sent_rows[expert]++;

                set.words[rank / 64] |= UINT64_C(1) << rank % 64;
                if (wants_ordinals) {
                    plan->ordinals[i] = (int32_t)ordinal;
                }
            }
        }
        for (int64_t i = t * topk; nodes != NULL && i < (t + 1) * topk; i++) {
            if (plan->experts[i] >= 0) {
                take_node(plan, (int32_t)t,
                          nodes[plan->expert_rank[plan->experts[i]]]);
            }
        }
        take_ranks(plan, &set, num_words,
                   wants_routes ? plan->routes + t * topk : NULL);
    }
}

static void
count_sent_rows(cpu_plan_t *plan)
{
    bool by_rank = cpu_is_rank_major(plan);
    const uint32_t *counts = by_rank ? plan->sent_tokens : plan->sent_rows;
    int32_t num_counts = by_rank ? plan->base.group->num_ranks
                                 : (int32_t)plan->base.key.num_experts;

    plan->num_sent_rows = 0;
    for (int32_t i = 0; i < num_counts; i++) {
        plan->num_sent_rows += counts[i];
    }
}

static void
post_counts(cpu_plan_t *plan)
{
    epx_group_t *group = plan->base.group;
    size_t num_counts = cpu_num_counts(plan);
    epx__count_row_t head = {
        .step = plan->counts_step,
        .key = plan->base.key,
        .num_tokens = (uint64_t)plan->num_tokens,
        .slots_offset = cpu_slots_offset(plan),
        .slots_channel = plan->slots_channel,
        .slots_turn = plan->slots_turn,
    };

    epx__count_row_t *row =
        epx__map_counts(&group->map, epx__group_segment(group),
                        plan->counts_step, (uint32_t)group->rank);

    *row = head;
    memcpy(epx__count_row_tokens(row), plan->sent_tokens,
           num_counts * sizeof(uint32_t));
    for (int32_t i = 1; i <= group->num_ranks; i++) {
        epx__signal_with(group, (group->rank + i) % group->num_ranks,
                         plan->counts_step, EPX__GATE_READY,
                         EPX__PAYLOAD_COUNTS,
                         sizeof(*row) + num_counts * sizeof(uint32_t));
    }
}

/* Whether new routing can be taken in; no change but to the scratch stamps. */
static epx_status_t
check_routing(cpu_plan_t *plan, int64_t num_tokens, const void *topk_idx)
{
    epx_group_t *group = plan->base.group;
    bool is_stale = cpu_plan_is_stale(plan);
    epx_status_t status = epx__group_check(group);

    if (status != EPX_OK) {
        return status;
    }
    if (plan->pending != EPX__PENDING_NONE && !is_stale) {
        return epx__fail(EPX_ERR_STATE,
                         "the plan has a send-only operation open; "
                         "epx_complete must come before its next routing");
    }
    /* One function each, so that the loops have no branch on the type. */
    status = plan->base.key.idx_dtype == EPX_I64
                 ? validate(plan, num_tokens, topk_idx, true)
                 : validate(plan, num_tokens, topk_idx, false);
    /* Its old counts, if nobody asked for them, have been sent by everyone. */
    if (status == EPX_OK && plan->state == CPU_PLAN_POSTED && !is_stale) {
        (void)cpu_plan_resolve(plan);
        status = epx__group_check(group);
    }
    return status;
}

epx_status_t
cpu_plan_route(cpu_plan_t *plan, int64_t num_tokens, const void *topk_idx)
{
    epx_group_t *group = plan->base.group;
    size_t num_counts = cpu_num_counts(plan);
    bool is_first;
    epx_status_t status = check_routing(plan, num_tokens, topk_idx);

    if (status == EPX_OK && cpu_plan_is_stale(plan)) {
        status = cpu_plan_renew(plan);
    }
    is_first = plan->state == CPU_PLAN_EMPTY;
    if (status == EPX_OK) {
        status = cpu_step_begin(group, &plan->base, EPX__STEP_COUNTS,
                                &plan->counts_step);
    }
    if (status != EPX_OK) {
        return status;
    }
    if (is_first) {
        plan->base.key.plan_id = plan->counts_step;
    }
    plan->num_tokens = num_tokens;
    plan->num_dropped = 0;
    plan->rails_know = false;
    memset(plan->sent_tokens, 0, num_counts * sizeof(uint32_t));
    if (group->nodes.num_nodes > 1) {
        memset(plan->node_ordinals, -1,
               (size_t)group->nodes.num_nodes * (size_t)plan->token_capacity *
                   sizeof(*plan->node_ordinals));
    }
    /* As above; with masks, which cost a little. */
    if (plan->epoch > 0) {
        route_tokens(plan, num_tokens, topk_idx,
                     plan->base.key.idx_dtype == EPX_I64, true);
    } else if (plan->base.key.idx_dtype == EPX_I64) {
        route_tokens(plan, num_tokens, topk_idx, true, false);
    } else {
        route_tokens(plan, num_tokens, topk_idx, false, false);
    }
    count_sent_rows(plan);
    plan->state = CPU_PLAN_POSTED;
    post_counts(plan);
    /* With the counts come the places of the peers' receive slots, which
     * later sends must know without waiting. */
    return plan->slots != NULL && !plan->knows_peer_slots
               ? cpu_plan_resolve(plan)
               : EPX_OK;
}
