/* SPDX-License-Identifier: MIT */
/* How the ranks that remain agree on who is masked: core/mask.h. */
#include "core/clock.h"
#include "core/lost.h"
#include "core/mask.h"
#include "core/mask_far.h"
#include "core/rank_list.h"
#include "core/watch.h"

#include <inttypes.h>
#include <string.h>

/* No rank comes near the last of them. */
#define STEP_MASK ((UINT64_C(1) << EPX__JOINED_SHIFT) - 1)

/* Ranks of a group are not further apart (core/control.h); each epoch that one
 * has missed took the others on to the next multiple of the slots. */
static uint64_t
most_apart(uint32_t epoch)
{
    return (2 + (uint64_t)epoch) * EPX__NUM_SLOTS;
}

/* How often to look whether a peer is lost, which nobody wakes this rank for.
 */
#define LOOK_NS EPX__NS_PER_MS

/* One call of epx__mask_agree. */
typedef struct call {
    epx_group_t *group;
    const int32_t *ranks;
    int32_t num_ranks;
    uint32_t epoch;                      /* the roll's length */
    uint64_t masked[EPX_MAX_RANKS / 64]; /* who stands on it */
    uint64_t last_step; /* of those that do not, when all have joined */
    /* When the masked ranks of other nodes have been told long enough. */
    uint32_t told_epoch;
    int64_t told_by_ns;
} call_t;

static bool
is_on_roll(const call_t *call, int32_t rank)
{
    return epx__has_rank(call->masked, rank);
}

/* Read all of the roll.  Peers may have written rubbish. */
static epx_status_t
read_roll(call_t *call)
{
    const epx_group_t *group = call->group;

    call->epoch = 0;
    memset(call->masked, 0, sizeof(call->masked));
    while (call->epoch < (uint32_t)group->num_ranks) {
        int32_t entry = epx__load_u16(&group->roll[call->epoch]);

        if (entry == 0) {
            return EPX_OK;
        }
        if (entry > group->num_ranks || is_on_roll(call, entry - 1)) {
            return epx__mask_bad_entry(group, call->epoch, entry);
        }
        call->masked[(entry - 1) / 64] |= UINT64_C(1) << (entry - 1) % 64;
        call->epoch++;
    }
    return epx__fail(EPX_ERR_PEER_DATA, "all %d ranks are masked",
                     group->num_ranks);
}

/* Of two ranks that have lost touch, the lower one gives up the other at once,
 * and the higher one only when it has heard nothing of that: so one is left. */
static uint64_t
grace_of(const epx_group_t *group, int32_t rank)
{
    return rank < group->rank ? group->lost_after_ns : 0;
}

static bool
is_lost(const epx_group_t *group, int32_t rank, uint64_t grace_ns)
{
    if (rank == group->rank) {
        return false;
    }
    if (epx__lost_has_left(group, rank)) {
        return true;
    }
    return epx__is_near(&group->nodes, rank)
               ? epx__watch_has_lost(group, rank)
               : group->remote.is_gone(group->remote.context, rank, grace_ns);
}

/* A rank that is lost and not on the roll; -1 for none. */
static int32_t
next_lost(const call_t *call, bool has_grace)
{
    const epx_group_t *group = call->group;

    for (int32_t rank = 0; rank < group->num_ranks; rank++) {
        if (!is_on_roll(call, rank) &&
            is_lost(group, rank, has_grace ? grace_of(group, rank) : 0)) {
            return rank;
        }
    }
    return -1;
}

/* A rank that ought to be on the roll and is not; -1 for none. */
static int32_t
next_to_mask(const call_t *call)
{
    for (int32_t i = 0; i < call->num_ranks; i++) {
        if (!is_on_roll(call, call->ranks[i])) {
            return call->ranks[i];
        }
    }
    return next_lost(call, true);
}

static uint64_t
joined_of(const epx_group_t *group, int32_t rank)
{
    /* Acquires what that rank did in earlier epochs. */
    return epx__load_acquire_u64(&epx__lost_vitals(group, rank)->joined);
}

/* Whether a rank that remains has joined this very epoch, and up to which step
 * it has been. */
static bool
has_joined(const call_t *call, int32_t rank, uint64_t *last_step_p)
{
    epx_group_t *group = call->group;
    uint64_t joined;

    if (!epx__is_near(&group->nodes, rank)) {
        return epx__far_has_come(group, rank, call->masked, EPX__STAGE_JOINED,
                                 last_step_p);
    }
    joined = joined_of(group, rank);
    *last_step_p = joined & STEP_MASK;
    return joined >> EPX__JOINED_SHIFT == call->epoch;
}

static bool
has_not_joined(const void *context, int32_t rank)
{
    const call_t *call = context;
    uint64_t step;

    return rank != call->group->rank && !is_on_roll(call, rank) &&
           !has_joined(call, rank, &step);
}

/* Whether a rank of another node that remains cannot be signalled yet. */
static bool
is_not_ready(const void *context, int32_t rank)
{
    const call_t *call = context;
    uint64_t step;

    return !epx__is_near(&call->group->nodes, rank) &&
           !is_on_roll(call, rank) &&
           !epx__far_has_come(call->group, rank, call->masked, EPX__STAGE_READY,
                              &step);
}

static bool
are_ready(const call_t *call)
{
    for (int32_t rank = 0; rank < call->group->num_ranks; rank++) {
        if (is_not_ready(call, rank)) {
            return false;
        }
    }
    return true;
}

/* Tell the ranks of other nodes how far this one has come; false: not all. */
static bool
tell_far(const call_t *call)
{
    epx_group_t *group = call->group;
    epx__pledge_t pledge = { .last_step = group->joined_step };

    if (group->far == NULL) {
        return true;
    }
    pledge.stage = group->joined != call->epoch    ? EPX__STAGE_KNOWS
                   : group->renewed != call->epoch ? EPX__STAGE_JOINED
                                                   : EPX__STAGE_READY;
    memcpy(pledge.masked, call->masked, sizeof(pledge.masked));
    return epx__far_tell(group, &pledge);
}

/* With several nodes: of the ranks that have taken part so far. */
static epx_status_t
check_majority(const call_t *call)
{
    const epx_group_t *group = call->group;
    int32_t before = 0, after = 0, lowest = -1;

    for (int32_t rank = 0; rank < group->num_ranks; rank++) {
        if (!epx__is_masked(group, rank)) {
            lowest = lowest < 0 ? rank : lowest;
            before++;
            after += !is_on_roll(call, rank);
        }
    }
    if (group->far == NULL || 2 * after > before ||
        (2 * after == before && !is_on_roll(call, lowest))) {
        return EPX_OK;
    }
    return epx__fail(EPX_ERR_PEER_LOST,
                     "only %d of %d ranks remain%s: those of other nodes might "
                     "go on by themselves; make a new group",
                     after, before,
                     2 * after == before ? ", without the lowest" : "");
}

/* Say that this rank has ended whatever it did. */
static epx_status_t
join(const call_t *call)
{
    epx_group_t *group = call->group;
    epx__vitals_t *own = epx__lost_vitals(group, group->rank);
    uint64_t last_step = group->last_step;
    epx_status_t status = EPX_OK;

    if (group->joined == call->epoch) {
        return EPX_OK;
    }
    if (group->renewal != NULL) {
        status = group->renewal->rest(group, call->masked, &last_step);
    }
    if (status == EPX_OK) {
        group->joined = call->epoch;
        group->joined_step = last_step & STEP_MASK;
        epx__store_release_u64(&own->joined,
                               (uint64_t)call->epoch << EPX__JOINED_SHIFT |
                                   group->joined_step);
        epx__mask_ring(group);
    }
    return status;
}

static epx_status_t
bad_step(const call_t *call, int32_t rank, uint64_t step)
{
    const epx_group_t *group = call->group;

    return epx__fail(EPX_ERR_PEER_DATA,
                     "rank %d says that it has come to step %" PRIu64
                     "; rank %d has come to step %" PRIu64
                     ", and they can be %" PRIu64 " apart",
                     rank, step, group->rank, group->joined_step,
                     most_apart(call->epoch));
}

/* Whether all have joined this epoch, and up to which step they have been.  Who
 * has joined a later one has found the roll longer, as this rank will. */
static epx_status_t
look_for_joined(call_t *call, bool *all_p)
{
    const epx_group_t *group = call->group;
    uint64_t own = group->joined_step, apart = most_apart(call->epoch);

    call->last_step = own;
    *all_p = true;
    for (int32_t rank = 0; rank < group->num_ranks && *all_p; rank++) {
        uint64_t step;

        if (rank == group->rank || is_on_roll(call, rank)) {
            continue;
        }
        *all_p = has_joined(call, rank, &step);
        if (*all_p && (step > own + apart || own > step + apart)) {
            return bad_step(call, rank, step);
        }
        call->last_step =
            *all_p && step > call->last_step ? step : call->last_step;
    }
    /* Slots are taken in turn from the first one on. */
    call->last_step = epx__round_up(call->last_step, EPX__NUM_SLOTS);
    return EPX_OK;
}

/* False if another thread has aborted the group. */
static bool
begin_epoch(const call_t *call)
{
    epx_group_t *group = call->group;

    (void)pthread_mutex_lock(&group->state_lock);
    if (epx__lost_has_aborted(group, group->rank)) {
        (void)pthread_mutex_unlock(&group->state_lock);
        return false;
    }
    for (int i = 0; i < EPX_MAX_RANKS / 64; i++) {
        __atomic_store_n(&group->masked[i], call->masked[i], __ATOMIC_RELAXED);
    }
    /* Releases the mask; acquired by the watch. */
    epx__store_u32(&group->epoch, call->epoch);
    group->broken = (epx__error_t){ .status = EPX_OK };
    group->is_told = false;
    if (group->halt != NULL) {
        epx__store_release_u64(group->halt, 0);
    }
    (void)pthread_mutex_unlock(&group->state_lock);
    group->last_step = call->last_step;
    memset(group->open_steps, 0, sizeof(group->open_steps));
    if (group->far != NULL) {
        epx__far_adopt(group, call->epoch);
    }
    epx__mask_reclaim(group);
    epx__log(EPX__LOG_INFO, "rank %d begins epoch %u", group->rank,
             call->epoch);
    return true;
}

static epx_status_t
timed_out(const call_t *call)
{
    const epx_group_t *group = call->group;
    double seconds = (double)group->timeout_ns * 1e-9;

    if (call->epoch == epx__load_u32(&group->epoch)) {
        return epx__fail(EPX_ERR_TIMEOUT,
                         "rank %d timed out in epx_group_mask after %.3f s: "
                         "no rank that is not masked is known to be lost, or "
                         "was named",
                         group->rank, seconds);
    }
    return epx__fail(
        EPX_ERR_TIMEOUT,
        "rank %d timed out in epx_group_mask after %.3f s, waiting for %s",
        group->rank, seconds,
        epx__rank_list_make(group->num_ranks,
                            group->far != NULL && group->renewed == call->epoch
                                ? is_not_ready
                                : has_not_joined,
                            call)
            .text);
}

/* Until somebody rings, or it is time to look again. */
static void
doze(const epx_group_t *group, uint32_t count, int64_t left_ns)
{
    epx__futex_wait(epx__group_bell(group), count,
                    left_ns < LOOK_NS ? left_ns : LOOK_NS);
}

/* Of those that remain; -1 for nobody. */
static int32_t
who_aborted(const call_t *call)
{
    for (int32_t rank = 0; rank < call->group->num_ranks; rank++) {
        if (!is_on_roll(call, rank) &&
            (epx__lost_has_aborted(call->group, rank) ||
             epx__far_has_aborted(call->group, rank))) {
            return rank;
        }
    }
    return -1;
}

/* Whether the ranks of other nodes that are masked know it, as far as they can
 * be told: then nothing more goes to them. */
static bool
masked_are_told(call_t *call)
{
    const epx_group_t *group = call->group;
    int64_t now = epx__now_ns();

    if (call->told_epoch != call->epoch) {
        call->told_epoch = call->epoch;
        call->told_by_ns = now + (int64_t)(group->lost_after_ns / EPX__BEATS);
    }
    for (int32_t rank = 0; rank < group->num_ranks; rank++) {
        if (is_on_roll(call, rank) && !epx__is_masked(group, rank) &&
            !epx__is_near(&group->nodes, rank) &&
            !group->remote.is_told(group->remote.context, rank)) {
            return now >= call->told_by_ns;
        }
    }
    return true;
}

/* This rank has joined the epoch: once all have, begin it. */
static epx_status_t
begin(call_t *call, bool *is_done_p)
{
    epx_group_t *group = call->group;
    bool have_all = false;
    epx_status_t status = look_for_joined(call, &have_all);

    have_all = tell_far(call) && have_all;
    if (status != EPX_OK || !have_all || !masked_are_told(call)) {
        return status;
    }
    /* The epoch ends here, too, if nobody has noticed: who tells of that is
     * done before its net is made ready. */
    (void)epx__group_is_broken(group);
    epx__group_wait_for_tellers(group);
    if (group->renewal != NULL && group->renewed != call->epoch) {
        status = group->renewal->renew(group, call->masked, call->last_step);
    }
    if (status != EPX_OK) {
        return status;
    }
    group->renewed = call->epoch;
    if (!tell_far(call) || (group->far != NULL && !are_ready(call)) ||
        !begin_epoch(call)) {
        return EPX_OK;
    }
    /* Who was lost up to here is seen; who is lost from now on fails the group
     * again. */
    *is_done_p = next_lost(call, false) < 0;
    return EPX_OK;
}

/* One look around: whether there is nothing left to do. */
static epx_status_t
advance(call_t *call, bool *is_done_p)
{
    epx_group_t *group = call->group;
    epx_status_t status = read_roll(call);
    int32_t rank;

    if (status != EPX_OK) {
        return status;
    }
    if (is_on_roll(call, group->rank)) {
        return epx__mask_refuse(group);
    }
    rank = who_aborted(call);
    if (rank >= 0) {
        return epx__fail(EPX_ERR_ABORTED, "rank %d aborted the group", rank);
    }
    rank = next_to_mask(call);
    if (rank >= 0) {
        epx__mask_add(group, rank);
        return EPX_OK;
    }
    if (call->epoch == epx__load_u32(&group->epoch)) {
        *is_done_p = !epx__group_is_broken(group) && next_lost(call, false) < 0;
        return EPX_OK;
    }
    status = check_majority(call);
    (void)tell_far(call);
    if (status == EPX_OK) {
        status = join(call);
    }
    return status == EPX_OK ? begin(call, is_done_p) : status;
}

epx_status_t
epx__mask_agree(epx_group_t *group, const int32_t *ranks, int32_t num_ranks)
{
    call_t call = { .group = group, .ranks = ranks, .num_ranks = num_ranks };
    int64_t deadline = epx__deadline_ns(group->timeout_ns);
    bool is_done = false;

    for (;;) {
        /* Read before looking: what is missed below rings after. */
        uint32_t count = epx__load_u32(epx__group_bell(group));
        uint32_t epoch = call.epoch;
        epx_status_t status = advance(&call, &is_done);
        int64_t now;

        if (status != EPX_OK || is_done) {
            return status;
        }
        now = epx__now_ns();
        if (now >= deadline) {
            return timed_out(&call);
        }
        if (call.epoch == epoch) {
            doze(group, count, deadline - now);
        }
    }
}
