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
 * The first dimension alternates with the plan's turns, and for each source,
 * which posts the half that it has filled: it writes the third turn where the
 * first one was; it has completed the second, for which the receiver signalled,
 * which it did after unpacking the first.
 *
 * For a rank of another node the slots of an ordinal's run are filled here, and
 * sent; the net puts them into its slots, the half by the turn.
 *
 * Between nodes combines take turns, too: the slots of a source hold the parcel
 * that it has for this rank as its rail, which so need not wait for its post.
 */
#include "core/atomic.h"
#include "core/clock.h"
#include "core/mask.h"
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
    char **far_slots;  /* [R] sending: those for ranks of other nodes */
    cpu_share_t share; /* of tokens when sending, of sources when packing */
    bool bad_peer;     /* some slot held an impossible value */
    bool is_cut_short; /* ranks are being masked */
} job_t;

/* Those for one source. */
static uint64_t
source_bytes(const cpu_plan_t *plan)
{
    return plan->base.key.max_tokens_per_rank * plan->slot_bytes;
}

/* The slots for a source's tokens, among those of a rank. */
static char *
slots_of(const cpu_plan_t *plan, char *slots, uint64_t parity, int32_t source)
{
    uint64_t ranks = (uint64_t)plan->base.group->num_ranks;

    return slots + (parity * ranks + (uint64_t)source) * source_bytes(plan);
}

static slot_t
slot_at(const job_t *job, char *slots, int64_t ordinal)
{
    char *base = slots + (uint64_t)ordinal * job->plan->slot_bytes;
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
    char *slots = epx__is_near(&group->nodes, route.rank)
                      ? slots_of(plan,
                                 group->peers[route.rank].base +
                                     plan->peer_slots[route.rank],
                                 plan->num_slot_turns % 2, group->rank)
                      : job->far_slots[route.rank];
    slot_t slot = slot_at(job, slots, route.ordinal);

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

    while (cpu_share_next(&job->share, worker, &begin, &end)) {
        for (int64_t t = begin; t < end; t++) {
            const cpu_route_t *routes = plan->routes + t * topk;
            cpu_source_row_t source = cpu_source_row(plan, scratch, t);

            if (epx__mask_has_grown(plan->base.group)) {
                __atomic_store_n(&job->is_cut_short, true, __ATOMIC_RELAXED);
                return;
            }
            for (int32_t i = 0; i < topk && routes[i].rank >= 0; i++) {
                fill_slot(job, t, routes[i], source);
            }
        }
    }
}

/* The turn that is open, or was last, where the plan's first was `first`. */
static uint64_t
turn_of(const cpu_plan_t *plan, uint64_t first)
{
    return first + plan->num_slot_turns - 1;
}

static uint64_t
parity_of(const cpu_plan_t *plan, int32_t source)
{
    const epx_group_t *group = plan->base.group;

    return epx__is_near(&group->nodes, source)
               ? cpu_engine(group)->posts[source].slot_parity
               : turn_of(plan, plan->slots_turn) % 2;
}

/* ---- ranks of other nodes ---- */

/* Calls for each of them that is not masked. */
static epx_status_t
each_far_rank(cpu_plan_t *plan, epx_status_t (*call)(cpu_plan_t *, int32_t))
{
    const epx_group_t *group = plan->base.group;
    epx_status_t status = EPX_OK;

    for (int32_t r = 0; r < group->num_ranks && status == EPX_OK; r++) {
        if (!epx__is_near(&group->nodes, r) && !epx__is_masked(group, r)) {
            status = call(plan, r);
        }
    }
    return status;
}

static epx_status_t
open_far_slot(cpu_plan_t *plan, int32_t rank)
{
    void *const halves[2] = { slots_of(plan, plan->slots, 0, rank),
                              slots_of(plan, plan->slots, 1, rank) };

    return epx__net_slot_open(epx__group_net(plan->base.group),
                              plan->slots_channel, rank, plan->slots_turn,
                              halves, source_bytes(plan));
}

static epx_status_t
close_far_slot(cpu_plan_t *plan, int32_t rank)
{
    return epx__net_slot_close(epx__group_net(plan->base.group),
                               plan->slots_channel, rank,
                               epx__deadline_ns(plan->base.group->timeout_ns));
}

static epx_status_t
give_up_far_slot(cpu_plan_t *plan, int32_t rank)
{
    const epx_group_t *group = plan->base.group;

    return epx__net_slot_give_up(epx__group_net(group), plan->slots_channel,
                                 rank, turn_of(plan, plan->slots_turn),
                                 epx__deadline_ns(group->timeout_ns));
}

static epx_status_t
release_far_slot(cpu_plan_t *plan, int32_t rank)
{
    epx__net_slot_release(epx__group_net(plan->base.group), plan->slots_channel,
                          rank, turn_of(plan, plan->slots_turn));
    return EPX_OK;
}

cpu_turn_t
cpu_slots_turn_there(const cpu_plan_t *plan, int32_t rank)
{
    return (cpu_turn_t){ plan->peer_channels[rank],
                         turn_of(plan, plan->peer_turns[rank]) };
}

cpu_turn_t
cpu_slots_turn_here(const cpu_plan_t *plan)
{
    return (cpu_turn_t){ plan->slots_channel, turn_of(plan, plan->slots_turn) };
}

const char *
cpu_slots_parcel(const cpu_plan_t *plan, int32_t source)
{
    return slots_of(plan, plan->slots, parity_of(plan, source), source);
}

bool
cpu_slots_take_parcels(const cpu_plan_t *plan, uint64_t bytes)
{
    return plan->slots != NULL && bytes <= source_bytes(plan);
}

void
cpu_slots_begin_turn(cpu_plan_t *plan)
{
    plan->num_slot_turns++;
}

epx_status_t
cpu_slots_end_turn(cpu_plan_t *plan, epx_status_t status)
{
    epx__error_t error;
    epx_status_t quiet;

    if (status == EPX_OK) {
        return each_far_rank(plan, release_far_slot);
    }
    epx__error_save(&error, status);
    if (!epx__group_is_broken(plan->base.group)) {
        quiet = each_far_rank(plan, give_up_far_slot);
        if (quiet != EPX_OK) {
            (void)epx__group_break(plan->base.group, quiet);
        }
    }
    return epx__error_restore(&error);
}

/* Memory for what goes to each rank, and the range that describes it. */
static epx_status_t
reserve_far_slots(cpu_plan_t *plan, job_t *job)
{
    const epx_group_t *group = plan->base.group;
    cpu_lane_t *lane = plan->dispatch.lanes[EPX__LANE_OUT];
    uint64_t ranks = (uint64_t)group->num_ranks;
    uint64_t bytes = ranks * (sizeof(char *) + sizeof(struct iovec)) +
                     2 * (uint64_t)EPX__LINE;
    epx_status_t status;

    for (int32_t r = 0; r < group->num_ranks; r++) {
        if (!epx__is_near(&group->nodes, r)) {
            bytes += plan->sent_tokens[r] * plan->slot_bytes;
        }
    }
    status = cpu_lane_reserve(lane, bytes);
    if (status != EPX_OK) {
        return status;
    }
    job->far_slots = cpu_lane_out(lane, ranks * sizeof(char *));
    for (int32_t r = 0; r < group->num_ranks; r++) {
        job->far_slots[r] =
            epx__is_near(&group->nodes, r)
                ? NULL
                : cpu_lane_out(lane, plan->sent_tokens[r] * plan->slot_bytes);
    }
    return EPX_OK;
}

static epx_status_t
send_far_slots(cpu_plan_t *plan, const job_t *job)
{
    epx_group_t *group = plan->base.group;
    cpu_lane_t *lane = plan->dispatch.lanes[EPX__LANE_OUT];
    struct iovec *ranges =
        cpu_lane_out(lane, (uint64_t)group->num_ranks * sizeof(*ranges));
    epx_status_t status = EPX_OK;

    for (int32_t i = 1; i < group->num_ranks && status == EPX_OK; i++) {
        int32_t r = (group->rank + i) % group->num_ranks;

        if (job->far_slots[r] != NULL && plan->sent_tokens[r] > 0) {
            ranges[r] =
                (struct iovec){ job->far_slots[r],
                                plan->sent_tokens[r] * plan->slot_bytes };
            status =
                cpu_lane_send(group, lane, r, cpu_slots_turn_there(plan, r),
                              &ranges[r], 1, true);
        }
    }
    return status;
}

static epx_status_t
await_far_slots(cpu_plan_t *plan)
{
    epx_group_t *group = plan->base.group;
    bool *wanted = cpu_engine(group)->rails->wanted;
    cpu_turn_t turn = cpu_slots_turn_here(plan);
    epx_status_t status;

    for (int32_t r = 0; r < group->num_ranks; r++) {
        wanted[r] = !epx__is_near(&group->nodes, r) && plan->recv_tokens[r] > 0;
    }
    status = cpu_turn_wait(group, turn, "a send-only dispatch between nodes");
    for (int32_t r = 0; r < group->num_ranks && status == EPX_OK; r++) {
        if (wanted[r]) {
            status = cpu_turn_check(group, turn, r,
                                    (uint64_t)plan->recv_tokens[r] *
                                        plan->slot_bytes);
        }
    }
    return status;
}

epx_status_t
cpu_slots_open(cpu_plan_t *plan)
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
    plan->slots_epoch = plan->epoch;
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
    if (status != EPX_OK || group->nodes.num_nodes == 1) {
        plan->slots = status == EPX_OK ? slots : NULL;
        return status;
    }
    status =
        cpu_slot_channel_take(group, &plan->slots_channel, &plan->slots_turn);
    if (status != EPX_OK) {
        (void)epx__heap_free(&group->heap, slots);
        return status;
    }
    plan->slots = slots;
    return each_far_rank(plan, open_far_slot);
}

epx_status_t
cpu_slots_renew(cpu_plan_t *plan)
{
    epx_status_t status = EPX_OK;

    if (plan->slots != NULL && plan->base.group->nodes.num_nodes > 1) {
        /* Whether they are still open from an attempt that failed or not; peers
         * learn of the turns anew. */
        status = each_far_rank(plan, close_far_slot);
        plan->slots_turn += plan->num_slot_turns + 1;
        if (status == EPX_OK) {
            status = each_far_rank(plan, open_far_slot);
        }
    }
    plan->num_slot_turns = 0;
    return status;
}

/* Once the group is broken, peers may still write to what this gives back. */
void
cpu_slots_close(cpu_plan_t *plan)
{
    epx_group_t *group = plan->base.group;

    if (plan->slots == NULL) {
        return;
    }
    if (group->nodes.num_nodes > 1) {
        /* When it is broken, nobody opens others before all are closed. */
        if (!epx__group_is_broken(group) &&
            each_far_rank(plan, close_far_slot) != EPX_OK) {
            return;
        }
        cpu_slot_channel_give(group, plan->slots_channel,
                              turn_of(plan, plan->slots_turn));
    }
    if (plan->slots_epoch != epx__load_u32(&group->epoch)) {
        epx__group_heap_free_old(group, plan->slots);
        return;
    }
    epx__group_heap_free(group, plan->slots);
}

static uint64_t
sent_slots(const cpu_plan_t *plan)
{
    uint64_t count = 0;

    for (int32_t r = 0; r < plan->base.group->num_ranks; r++) {
        count += plan->sent_tokens[r];
    }
    return count;
}

epx_status_t
cpu_slots_send(cpu_plan_t *plan, epx__post_t *post)
{
    epx_group_t *group = plan->base.group;
    int32_t num_workers = cpu_workers_for(
        sent_slots(plan) * (uint64_t)plan->dispatch.shape.row_bytes,
        cpu_workers(group, plan->dispatch.args.num_workers));
    job_t job = { .plan = plan, .format = cpu_row_format(plan) };
    uint64_t count =
        2 * (uint64_t)group->num_ranks * plan->base.key.max_tokens_per_rank;

    for (int32_t r = 0; r < group->num_ranks; r++) {
        epx_status_t status =
            epx__is_near(&group->nodes, r) && !epx__is_masked(group, r)
                ? cpu_check_extent(group, r, "receive slots",
                                   plan->peer_slots[r], count, plan->slot_bytes,
                                   EPX__LINE)
                : EPX_OK;

        if (status != EPX_OK) {
            return epx__group_break(group, status);
        }
    }
    if (group->nodes.num_nodes > 1) {
        epx_status_t status = reserve_far_slots(plan, &job);

        if (status != EPX_OK) { /* the peers wait for it */
            return epx__group_break(group, status);
        }
    }
    cpu_slots_begin_turn(plan);
    job.share = cpu_share_of(group, plan->num_tokens, num_workers);
    epx__pool_run(cpu_engine(group)->pool, num_workers, send_work, &job);
    if (job.is_cut_short) {
        return epx__group_check(group);
    }
    if (group->nodes.num_nodes > 1) {
        epx_status_t status = send_far_slots(plan, &job);

        if (status != EPX_OK) {
            return status;
        }
    }
    /* The rows are in place, or on their way to other nodes: this one signal
     * says that and announces the operation's signature. */
    post->step = plan->dispatch.step;
    post->slot_parity = plan->num_slot_turns % 2;
    cpu_post_all(group, plan->dispatch.step, post);
    (void)cpu_attend(group); /* to the slots, the post and the counts */
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
    uint64_t parity = parity_of(plan, source);
    char *slots;
    int32_t experts[EPX_MAX_TOPK];

    if (parity > 1) {
        return false;
    }
    memcpy(next_row, plan->source_rows + (size_t)source * num_local,
           num_local * sizeof(*next_row));
    slots = slots_of(plan, plan->slots, parity, source);
    for (int64_t i = 0; i < plan->recv_tokens[source]; i++) {
        slot_t slot = slot_at(job, slots, i);

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

    while (cpu_share_next(&job->share, worker, &begin, &end)) {
        if (!unpack_source(job, &own, (int32_t)begin, next_row)) {
            __atomic_store_n(&job->bad_peer, true, __ATOMIC_RELAXED);
        }
    }
}

epx_status_t
cpu_slots_receive(cpu_plan_t *plan)
{
    epx_group_t *group = plan->base.group;
    int32_t num_workers =
        cpu_workers_for((uint64_t)plan->num_recv_rows *
                            (uint64_t)plan->dispatch.shape.row_bytes,
                        cpu_workers(group, plan->dispatch.args.num_workers));
    job_t job = { .plan = plan, .format = cpu_row_format(plan) };

    if (group->nodes.num_nodes > 1) {
        epx_status_t status = await_far_slots(plan);

        if (status != EPX_OK) {
            return status;
        }
    }
    job.share = cpu_share_of(group, group->num_ranks, num_workers);
    job.share.grain = 1; /* a source may have sent far more than another */
    epx__pool_run(cpu_engine(group)->pool, num_workers, receive_work, &job);
    if (job.bad_peer) {
        return epx__group_break(
            group, epx__fail(EPX_ERR_PEER_DATA,
                             "a receive slot does not fit the counts that its "
                             "source sent"));
    }
    return EPX_OK;
}
