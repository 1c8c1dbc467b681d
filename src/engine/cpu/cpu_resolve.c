/* SPDX-License-Identifier: MIT */
/* The second half of a plan: with everybody's counts, where every row goes. */
#include "core/agree.h"
#include "core/atomic.h"
#include "engine/common/placement.h"
#include "engine/cpu/cpu_rail.h"

#include <inttypes.h>
#include <string.h>

/* Whether tokens for the nodes can be those: each goes there once, and there to
 * some of its ranks, to each of them once. */
static bool
nodes_are_possible(const cpu_plan_t *plan, const uint32_t *tokens,
                   const uint32_t *of_nodes, uint64_t num_tokens)
{
    const epx__nodes_t *nodes = &plan->base.group->nodes;

    for (int32_t n = 0; n < nodes->num_nodes; n++) {
        const int32_t *ranks = epx__node_ranks(nodes, n);
        uint64_t most = 0, sum = 0;

        for (int32_t i = 0; i < epx__node_size(nodes, n); i++) {
            uint64_t count = tokens[ranks[i]];

            most = count > most ? count : most;
            sum += count;
        }
        if (of_nodes[n] < most || of_nodes[n] > sum ||
            of_nodes[n] > num_tokens) {
            return false;
        }
    }
    return true;
}

/* Whether counts can be those of tokens: each goes to a rank once, and there to
 * 1 to K experts, to each of them once. */
static bool
counts_are_possible(const cpu_plan_t *plan, const uint32_t *counts,
                    uint64_t num_tokens)
{
    int32_t num_ranks = plan->base.group->num_ranks;
    int32_t num_experts = (int32_t)plan->base.key.num_experts;
    const uint32_t *rows = counts + num_ranks;

    for (int32_t r = 0; r < num_ranks; r++) {
        int32_t end = epx__first_expert(num_experts, num_ranks, r + 1);
        uint64_t tokens = counts[r], sum = 0;

        if (tokens > 0 && epx__is_masked(plan->base.group, r)) {
            return false;
        }
        for (int32_t e = epx__first_expert(num_experts, num_ranks, r); e < end;
             e++) {
            if (rows[e] > tokens) {
                return false;
            }
            sum += rows[e];
        }
        if (tokens > num_tokens || tokens > sum ||
            sum > tokens * plan->base.key.topk) {
            return false;
        }
    }
    return plan->base.group->nodes.num_nodes == 1 ||
           nodes_are_possible(plan, counts, rows + num_experts, num_tokens);
}

/* Where the receive slots of a rank of another node are. */
static epx_status_t
read_far_slots(cpu_plan_t *plan, int32_t peer, const epx__count_row_t *head)
{
    const uint32_t first = CPU_SLOT_CHANNEL;

    if (plan->base.key.send_only_row_bytes == 0) {
        return EPX_OK;
    }
    if (head->slots_channel < first ||
        head->slots_channel >= EPX__GROUP_CHANNELS || head->slots_turn == 0) {
        return epx__group_break(
            plan->base.group,
            epx__fail(EPX_ERR_PEER_DATA,
                      "rank %d has its receive slots at turn %" PRIu64
                      " of channel %" PRIu64 "; turns count from 1, and the "
                      "channels of slots are %" PRIu32 " to %d",
                      peer, head->slots_turn, head->slots_channel, first,
                      EPX__GROUP_CHANNELS - 1));
    }
    plan->peer_channels[peer] = (uint32_t)head->slots_channel;
    plan->peer_turns[peer] = head->slots_turn;
    return EPX_OK;
}

/* Copy one rank's count row to plan->count_row and check it. */
static epx_status_t
read_count_row(cpu_plan_t *plan, int32_t peer, int64_t *num_tokens_p)
{
    epx_group_t *group = plan->base.group;
    size_t num_counts = cpu_num_counts(plan);
    epx__count_row_t *shared =
        epx__map_counts(&group->map, epx__group_segment(group),
                        plan->counts_step, (uint32_t)peer);
    epx__count_row_t head;
    uint64_t limit = plan->base.key.max_tokens_per_rank == 0
                         ? INT32_MAX
                         : plan->base.key.max_tokens_per_rank;
    epx_status_t status;

    if (epx__is_masked(group, peer)) {
        memset(plan->count_row, 0, num_counts * sizeof(uint32_t));
        plan->peer_slots[peer] = 0;
        return EPX_OK;
    }
    if (peer == group->rank) {
        /* Not from shared memory: our rows are placed by these. */
        memcpy(plan->count_row, plan->sent_tokens,
               num_counts * sizeof(uint32_t));
        plan->peer_slots[peer] = cpu_slots_offset(plan);
        *num_tokens_p = plan->num_tokens;
        return EPX_OK;
    }
    epx__copy_in(&head, shared, sizeof(head));
    if (head.step != plan->counts_step) {
        return epx__agree_not(peer, group->rank,
                              "the exchange of a plan's counts");
    }
    status = epx__agree_keys(group->rank, &plan->base.key, peer, &head.key);
    if (status != EPX_OK) {
        return status;
    }
    epx__copy_in(plan->count_row, epx__count_row_tokens(shared),
                 num_counts * sizeof(uint32_t));
    if (head.num_tokens > limit ||
        !counts_are_possible(plan, plan->count_row, head.num_tokens)) {
        return epx__group_break(
            group, epx__fail(EPX_ERR_PEER_DATA,
                             "the counts of rank %d cannot be those of its "
                             "%" PRIu64 " tokens with topk %u",
                             peer, head.num_tokens, plan->base.key.topk));
    }
    plan->peer_slots[peer] = head.slots_offset;
    *num_tokens_p = (int64_t)head.num_tokens;
    return epx__is_near(&group->nodes, peer)
               ? EPX_OK
               : read_far_slots(plan, peer, &head);
}

/* Where the rows of a source begin, whose tokens this rank forwards: after
 * those of the lower ranks. */
static void
set_forward(cpu_plan_t *plan, cpu_forward_t *forward, int64_t num_tokens)
{
    const epx_group_t *group = plan->base.group;
    size_t num_ranks = (size_t)group->num_ranks;
    size_t num_experts = plan->base.key.num_experts;
    const uint32_t *nodes = plan->count_row + num_ranks + num_experts;

    forward->num_tokens = nodes[group->nodes.own];
    forward->source_tokens = num_tokens;
    memcpy(forward->rank_base, plan->rank_rows,
           num_ranks * sizeof(*forward->rank_base));
    memcpy(forward->expert_base, plan->expert_total,
           num_experts * sizeof(*forward->expert_base));
    memcpy(forward->counts, plan->count_row,
           (num_ranks + num_experts) * sizeof(*forward->counts));
}

/* Take one source's counts into the prefixes and totals. */
static void
add_source(cpu_plan_t *plan, int32_t source)
{
    const epx_group_t *group = plan->base.group;
    int32_t num_ranks = group->num_ranks;
    int32_t num_experts = (int32_t)plan->base.key.num_experts;
    int32_t first = plan->base.first_expert;
    int32_t num_local = plan->base.num_local_experts;
    const uint32_t *tokens = plan->count_row;
    const uint32_t *rows = plan->count_row + num_ranks;

    plan->recv_tokens[source] = tokens[group->rank];
    for (int32_t i = 0; i < num_local; i++) {
        plan->source_rows[(int64_t)source * num_local + i] =
            plan->expert_total[first + i];
    }
    if (source == group->rank) {
        /* Our rows come after those of the lower ranks. */
        memcpy(plan->rank_base, plan->rank_rows,
               (size_t)num_ranks * sizeof(*plan->rank_base));
        memcpy(plan->expert_base, plan->expert_total,
               (size_t)num_experts * sizeof(*plan->expert_base));
    }
    for (int32_t r = 0; r < num_ranks; r++) {
        plan->rank_rows[r] += tokens[r];
    }
    for (int32_t e = 0; e < num_experts; e++) {
        plan->expert_total[e] += rows[e];
    }
}

/* From an expert's start to the next one's, in the plan's layout. */
static int64_t
expert_stride(const cpu_plan_t *plan, int32_t expert)
{
    int64_t alignment = (int64_t)plan->base.key.expert_alignment;

    if (plan->base.key.layout == EPX_LAYOUT_EXPERT_SLOTS) {
        return (int64_t)plan->base.key.max_tokens_per_rank *
               plan->base.group->num_ranks;
    }
    return (plan->expert_total[expert] + alignment - 1) / alignment * alignment;
}

/* Turn rows within an expert into rows of its rank's buffer. */
static void
place_experts(cpu_plan_t *plan)
{
    const epx_group_t *group = plan->base.group;
    int32_t num_experts = (int32_t)plan->base.key.num_experts;
    int32_t num_local = plan->base.num_local_experts;

    for (int32_t rank = 0; rank < group->num_ranks; rank++) {
        int32_t first = epx__first_expert(num_experts, group->num_ranks, rank);
        int32_t end =
            epx__first_expert(num_experts, group->num_ranks, rank + 1);
        int64_t offset = 0;

        for (int32_t e = first; e < end; e++) {
            plan->expert_base[e] += offset;
            for (int32_t f = 0; f < plan->num_forwards; f++) {
                plan->forwards[f].expert_base[e] += offset;
            }
            if (rank == group->rank) {
                plan->expert_offsets[e - first] = offset;
            }
            offset += expert_stride(plan, e);
        }
        plan->rank_rows[rank] = offset;
        if (rank == group->rank) {
            plan->expert_offsets[num_local] = offset;
        }
    }
    for (int32_t source = 0; source < group->num_ranks; source++) {
        for (int32_t i = 0; i < num_local; i++) {
            plan->source_rows[(int64_t)source * num_local + i] +=
                plan->expert_offsets[i];
        }
    }
}

static epx_status_t
place_rows(cpu_plan_t *plan)
{
    const epx_group_t *group = plan->base.group;
    int64_t capacity = (int64_t)plan->base.key.recv_capacity;
    int32_t num_local = plan->base.num_local_experts;
    int64_t total = 0;

    plan->recv_base[0] = 0;
    for (int32_t r = 0; r < group->num_ranks; r++) {
        plan->recv_base[r + 1] = plan->recv_base[r] + plan->recv_tokens[r];
    }
    memset(plan->expert_offsets, 0,
           ((size_t)num_local + 1) * sizeof(*plan->expert_offsets));
    for (int32_t i = 0; i < num_local; i++) {
        plan->expert_rows[i] = plan->expert_total[plan->base.first_expert + i];
        total += plan->expert_rows[i];
    }
    plan->num_recv_rows =
        cpu_is_rank_major(plan) ? plan->recv_base[group->num_ranks] : total;
    if (!cpu_is_rank_major(plan)) {
        place_experts(plan);
    }
    plan->num_rows = capacity > 0 ? capacity : plan->rank_rows[group->rank];
    for (int32_t r = 0; capacity > 0 && r < group->num_ranks; r++) {
        if (plan->rank_rows[r] > capacity) {
            return epx__fail(EPX_ERR_CAPACITY,
                             "rank %d would receive %" PRId64
                             " rows; the plan's recv_capacity is %" PRId64,
                             r, plan->rank_rows[r], capacity);
        }
    }
    return EPX_OK;
}

static epx_status_t
read_and_place(cpu_plan_t *plan)
{
    const epx_group_t *group = plan->base.group;
    cpu_forward_t *forward = plan->forwards;
    cpu_forward_t *end = forward + plan->num_forwards;
    epx_status_t status = EPX_OK;

    memset(plan->rank_rows, 0,
           (size_t)group->num_ranks * sizeof(*plan->rank_rows));
    memset(plan->expert_total, 0,
           plan->base.key.num_experts * sizeof(*plan->expert_total));
    for (int32_t r = 0; r < group->num_ranks && status == EPX_OK; r++) {
        int64_t num_tokens = 0;

        status = read_count_row(plan, r, &num_tokens);
        if (status == EPX_OK && forward < end && forward->rank == r) {
            set_forward(plan, forward++, num_tokens);
        }
        if (status == EPX_OK) {
            add_source(plan, r);
        }
    }
    plan->knows_peer_slots = plan->knows_peer_slots || status == EPX_OK;
    return status == EPX_OK ? place_rows(plan) : status;
}

epx_status_t
cpu_plan_resolve(cpu_plan_t *plan)
{
    epx_group_t *group = plan->base.group;
    epx_status_t status;

    switch (plan->state) {
    case CPU_PLAN_RESOLVED:
        return EPX_OK;
    case CPU_PLAN_FAILED:
        return epx__error_restore(&plan->error);
    case CPU_PLAN_EMPTY:
        return epx__fail(EPX_ERR_STATE, "the plan has no routing: the call "
                                        "that should have given it failed");
    case CPU_PLAN_POSTED:
        break;
    }
    status = epx__wait_all(group, plan->counts_step, EPX__GATE_READY,
                           "the exchange of a plan's counts");
    if (status == EPX_OK) {
        status = read_and_place(plan);
    }
    cpu_step_end(group, plan->counts_step);
    plan->state = status == EPX_OK ? CPU_PLAN_RESOLVED : CPU_PLAN_FAILED;
    epx__error_save(&plan->error, status);
    return status;
}
