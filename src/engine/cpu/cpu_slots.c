/* SPDX-License-Identifier: MIT */
/*
 * A send-only dispatch that waits for nobody.  Each rank keeps receive slots
 * for every source; a row goes once to each destination rank, into the slot of
 * its ordinal there, and the hook packs the slots into the receive arrays once
 * everybody's counts are known.
 *
 *     slots of a rank     [2][R sources][T_max]
 *     one slot            slot_head_t, i32 experts[K], f32 weights[K],
 *                         then, from the next line on, u32 scales[S], payload
 *
 * The first dimension alternates, for each source, which posts the half that it
 * has filled: it writes the third such dispatch of a plan where the first one
 * was; it has completed the second, for which the receiver signalled, which it
 * did after unpacking the first.
 */
#include "core/atomic.h"
#include "engine/common/placement.h"
#include "engine/cpu/cpu.h"
#include "engine/cpu/cpu_rows.h"

#include <inttypes.h>
#include <string.h>

typedef struct slot_head {
    int32_t src_token;
    int32_t unused[3];
} slot_head_t;

static uint64_t
head_bytes(int32_t topk)
{
    uint64_t per_k = sizeof(int32_t) + sizeof(float);

    return epx__round_up(sizeof(slot_head_t) + (uint64_t)topk * per_k,
                         EPX__LINE);
}

uint64_t
cpu_slot_bytes(int32_t topk, uint64_t row_bytes)
{
    return head_bytes(topk) + epx__round_up(row_bytes, EPX__LINE);
}

typedef struct slot {
    slot_head_t *head;
    int32_t *experts;
    float *weights;
    uint32_t *scales;
    char *payload;
} slot_t;

typedef struct job {
    cpu_plan_t *plan;
    cpu_row_format_t format;
    epx__share_t share; /* of tokens when sending, of sources when packing */
    bool bad_peer;      /* some slot held an impossible value */
} job_t;

/* The slot for a source's ordinal'th token. */
static slot_t
slot_at(const job_t *job, char *slots, uint64_t parity, int32_t source,
        int64_t ordinal)
{
    const cpu_plan_t *plan = job->plan;
    uint64_t ranks = (uint64_t)plan->base.group->num_ranks;
    uint64_t index = (parity * ranks + (uint64_t)source) *
                         plan->base.key.max_tokens_per_rank +
                     (uint64_t)ordinal;
    char *base = slots + index * plan->slot_bytes;
    char *body = base + head_bytes(job->format.topk);
    slot_t slot = { .head = (slot_head_t *)(void *)base };

    slot.experts = (int32_t *)(slot.head + 1);
    slot.weights = (float *)(slot.experts + job->format.topk);
    slot.scales = (uint32_t *)(void *)body;
    slot.payload = body + job->format.num_scales * (int64_t)sizeof(uint32_t);
    return slot;
}

static void
fill_slot(const job_t *job, int64_t t, cpu_route_t route,
          cpu_source_row_t source)
{
    const cpu_plan_t *plan = job->plan;
    const epx_group_t *group = plan->base.group;
    const float *weights = plan->dispatch.args.topk_weights;
    int32_t topk = job->format.topk;
    int32_t first = epx__first_expert((int32_t)plan->base.key.num_experts,
                                      group->num_ranks, route.rank);
    slot_t slot = slot_at(
        job, group->peers[route.rank].base + plan->peer_slots[route.rank],
        plan->num_slot_dispatches % 2, group->rank, route.ordinal);

    slot.head->src_token = (int32_t)t;
    for (int32_t k = 0; k < topk; k++) {
        int32_t expert = plan->experts[t * topk + k];
        bool here = expert >= 0 && plan->expert_rank[expert] == route.rank;

        slot.experts[k] = here ? expert - first : -1;
        slot.weights[k] = here && weights != NULL ? weights[t * topk + k] : 0;
    }
    if (job->format.num_scales > 0) {
        memcpy(slot.scales, source.scales,
               (size_t)job->format.num_scales * sizeof(uint32_t));
    }
    memcpy(slot.payload, source.payload, (size_t)job->format.row_bytes);
}

static void
send_work(void *context, int32_t worker)
{
    job_t *job = context;
    const cpu_plan_t *plan = job->plan;
    int32_t topk = job->format.topk;
    void *scratch = cpu_scratch(cpu_engine(plan->base.group), worker);
    int64_t begin, end;

    while (epx__share_next(&job->share, &begin, &end)) {
        for (int64_t t = begin; t < end; t++) {
            const cpu_route_t *routes = plan->routes + t * topk;
            cpu_source_row_t source = cpu_source_row(plan, scratch, t);

            for (int32_t i = 0; i < topk && routes[i].rank >= 0; i++) {
                fill_slot(job, t, routes[i], source);
            }
        }
    }
}

epx_status_t
cpu_slots_send(cpu_plan_t *plan, epx__post_t *post)
{
    epx_group_t *group = plan->base.group;
    int32_t num_workers = cpu_workers(group, plan->dispatch.args.num_workers);
    job_t job = { .plan = plan, .format = cpu_row_format(plan) };
    uint64_t count =
        2 * (uint64_t)group->num_ranks * plan->base.key.max_tokens_per_rank;

    for (int32_t r = 0; r < group->num_ranks; r++) {
        epx_status_t status =
            cpu_check_extent(group, r, "receive slots", plan->peer_slots[r],
                             count, plan->slot_bytes, EPX__LINE);

        if (status != EPX_OK) {
            return epx__group_break(group, status);
        }
    }
    plan->num_slot_dispatches++;
    job.share.num_items = plan->num_tokens;
    job.share.grain = cpu_grain(plan->num_tokens, num_workers);
    epx__pool_run(cpu_engine(group)->pool, num_workers, send_work, &job);
    /* The rows are in place: this one signal says that and announces the
     * operation's signature. */
    post->step = plan->dispatch.step;
    post->slot_parity = plan->num_slot_dispatches % 2;
    cpu_post_all(group, plan->dispatch.step, post);
    return EPX_OK;
}

/* Copy what all received rows have. */
static void
unpack_common(const job_t *job, const cpu_target_t *own, int64_t row,
              const slot_t *slot)
{
    cpu_put_row(&job->format, own, row, slot->payload, slot->scales);
    if (own->src_token != NULL) {
        own->src_token[row] = slot->head->src_token;
    }
}

/* Copy a slot's experts out of shared memory; false if one is impossible. */
static bool
read_experts(const job_t *job, const slot_t *slot, int32_t *experts)
{
    int32_t num_local = job->plan->base.num_local_experts;

    epx__copy_in(experts, slot->experts,
                 (size_t)job->format.topk * sizeof(*experts));
    for (int32_t k = 0; k < job->format.topk; k++) {
        if (experts[k] < -1 || experts[k] >= num_local) {
            return false;
        }
    }
    return true;
}

static void
unpack_rank_major(const job_t *job, const cpu_target_t *own, int64_t row,
                  const slot_t *slot, const int32_t *experts)
{
    int32_t topk = job->format.topk;

    unpack_common(job, own, row, slot);
    for (int32_t k = 0; k < topk; k++) {
        if (own->topk_idx != NULL) {
            cpu_put_idx(&job->format, own, row, k, experts[k]);
        }
        if (own->topk_weights != NULL) {
            own->topk_weights[row * topk + k] = slot->weights[k];
        }
    }
}

/* The first row for an expert of the source after this one. */
static int64_t
end_of_source(const cpu_plan_t *plan, int32_t source, int32_t expert)
{
    int64_t num_local = plan->base.num_local_experts;

    return source + 1 < plan->base.group->num_ranks
               ? plan->source_rows[(source + 1) * num_local + expert]
               : plan->expert_offsets[expert] + plan->expert_rows[expert];
}

/* next_row is [L]: where the source's next row for each local expert goes. */
static bool
unpack_experts(const job_t *job, const cpu_target_t *own, int32_t source,
               int64_t *next_row, const slot_t *slot, const int32_t *experts)
{
    for (int32_t k = 0; k < job->format.topk; k++) {
        int32_t expert = experts[k];
        int64_t row;

        if (expert == -1) {
            continue;
        }
        row = next_row[expert]++;
        if (row >= end_of_source(job->plan, source, expert)) {
            return false;
        }
        unpack_common(job, own, row, slot);
        if (own->topk_weights != NULL) {
            own->topk_weights[row] = slot->weights[k];
        }
    }
    return true;
}

/* Whether the source has filled just the rows that it counted. */
static bool
is_complete(const cpu_plan_t *plan, int32_t source, const int64_t *next_row)
{
    for (int32_t e = 0; e < plan->base.num_local_experts; e++) {
        if (next_row[e] != end_of_source(plan, source, e)) {
            return false;
        }
    }
    return true;
}

static bool
unpack_source(const job_t *job, const cpu_target_t *own, int32_t source,
              int64_t *next_row)
{
    const cpu_plan_t *plan = job->plan;
    size_t num_local = (size_t)plan->base.num_local_experts;
    uint64_t parity = cpu_engine(plan->base.group)->posts[source].slot_parity;
    int32_t experts[EPX_MAX_TOPK];

    if (parity > 1) {
        return false;
    }
    memcpy(next_row, plan->source_rows + (size_t)source * num_local,
           num_local * sizeof(*next_row));
    for (int64_t i = 0; i < plan->recv_tokens[source]; i++) {
        slot_t slot = slot_at(job, plan->slots, parity, source, i);

        if (!read_experts(job, &slot, experts)) {
            return false;
        }
        if (cpu_is_rank_major(plan)) {
            unpack_rank_major(job, own, plan->recv_base[source] + i, &slot,
                              experts);
        } else if (!unpack_experts(job, own, source, next_row, &slot,
                                   experts)) {
            return false;
        }
    }
    return cpu_is_rank_major(plan) || is_complete(plan, source, next_row);
}

static void
receive_work(void *context, int32_t worker)
{
    job_t *job = context;
    const cpu_plan_t *plan = job->plan;
    int64_t *next_row = cpu_scratch(cpu_engine(plan->base.group), worker);
    cpu_target_t own = cpu_target_own(plan);
    int64_t begin, end;

    while (epx__share_next(&job->share, &begin, &end)) {
        if (!unpack_source(job, &own, (int32_t)begin, next_row)) {
            __atomic_store_n(&job->bad_peer, true, __ATOMIC_RELAXED);
        }
    }
}

epx_status_t
cpu_slots_receive(cpu_plan_t *plan)
{
    epx_group_t *group = plan->base.group;
    int32_t num_workers = cpu_workers(group, plan->dispatch.args.num_workers);
    job_t job = { .plan = plan, .format = cpu_row_format(plan) };

    job.share.num_items = group->num_ranks;
    job.share.grain = 1;
    epx__pool_run(cpu_engine(group)->pool, num_workers, receive_work, &job);
    if (job.bad_peer) {
        return epx__group_break(
            group, epx__fail(EPX_ERR_PEER_DATA,
                             "a receive slot does not fit the counts that its "
                             "source sent"));
    }
    return EPX_OK;
}
