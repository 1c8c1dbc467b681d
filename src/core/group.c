/* SPDX-License-Identifier: MIT */
#include "core/group.h"

#include "core/atomic.h"
#include "core/clock.h"
#include "core/lost.h"
#include "core/mask.h"
#include "core/rank_list.h"

#include <inttypes.h>
#include <sched.h>
#include <string.h>

/* The first error of an epoch is the one that counts: false for any other. */
static bool
note(epx_group_t *group, uint32_t epoch, const epx__error_t *error,
     bool is_told)
{
    bool is_first;

    (void)pthread_mutex_lock(&group->state_lock);
    is_first =
        group->broken.status == EPX_OK && epx__load_u32(&group->epoch) == epoch;
    if (is_first) {
        group->broken = *error;
        group->is_told = is_told;
        if (group->halt != NULL) {
            epx__store_release_u64(group->halt, 1);
        }
        (void)epx__add_u32(&group->num_tellers, 1);
    }
    (void)pthread_mutex_unlock(&group->state_lock);
    return is_first;
}

static bool
break_group(epx_group_t *group, uint32_t epoch, const epx__error_t *error,
            bool is_told)
{
    bool is_first = note(group, epoch, error, is_told);

    if (is_first) {
        /* Who is masked has nothing to tell. */
        if (error->status != EPX_ERR_MASKED) {
            epx__lost_tell(group, epoch, error);
        }
        /* Of masks whoever agrees on them tells, also those that are masked. */
        if (epx__load_u32(&group->has_remote) != 0 &&
            !epx__mask_has_grown(group)) {
            group->remote.tell(group->remote.context, epoch, error,
                               epx__lost_has_aborted(group, group->rank));
        }
        epx__group_wake(group);
        (void)epx__add_u32(&group->num_tellers, UINT32_MAX);
    }
    return is_first;
}

epx_status_t
epx__group_break(epx_group_t *group, epx_status_t status)
{
    epx__error_t error;

    epx__error_save(&error, status);
    (void)break_group(group, epx__load_u32(&group->epoch), &error, true);
    return status;
}

void
epx__group_end_epoch(epx_group_t *group, uint32_t epoch, epx_status_t status)
{
    epx__error_t error;

    epx__error_save(&error, status);
    (void)break_group(group, epoch, &error, false);
}

void
epx__group_end(epx_group_t *group, epx_status_t status)
{
    epx__group_end_epoch(group, epx__load_u32(&group->epoch), status);
}

void
epx__group_adopt_epoch(epx_group_t *group, uint32_t epoch,
                       const epx__error_t *error)
{
    /* This rank tells it again, before it may leave: else a peer that has not
     * yet heard of the failure could take the leaving for its cause. */
    if (break_group(group, epoch, error, false)) {
        epx__log(EPX__LOG_ERROR, "%s", error->text);
    }
}

void
epx__group_set_halt(epx_group_t *group, uint64_t *halt)
{
    (void)pthread_mutex_lock(&group->state_lock);
    group->halt = halt;
    if (halt != NULL) {
        epx__store_release_u64(halt, group->broken.status != EPX_OK);
    }
    (void)pthread_mutex_unlock(&group->state_lock);
}

static bool
has_failed(epx_group_t *group)
{
    bool has;

    (void)pthread_mutex_lock(&group->state_lock);
    has = group->broken.status != EPX_OK;
    (void)pthread_mutex_unlock(&group->state_lock);
    return has;
}

bool
epx__group_is_broken(epx_group_t *group)
{
    return has_failed(group) || epx__mask_hear(group) || epx__lost_hear(group);
}

void
epx__group_wait_for_tellers(const epx_group_t *group)
{
    while (epx__load_u32(&group->num_tellers) != 0) {
        (void)sched_yield();
    }
}

epx_status_t
epx__group_restore(epx_group_t *group)
{
    epx__error_t broken;

    epx__group_wait_for_tellers(group);
    (void)pthread_mutex_lock(&group->state_lock);
    broken = group->broken;
    group->is_told = true;
    (void)pthread_mutex_unlock(&group->state_lock);
    return epx__mask_holds(group, group->rank) ? epx__mask_refuse(group)
                                               : epx__error_restore(&broken);
}

epx_status_t
epx__group_check(epx_group_t *group)
{
    epx__error_t broken;
    bool is_told;

    if (!epx__group_is_broken(group)) {
        return EPX_OK;
    }
    epx__group_wait_for_tellers(group);
    if (epx__mask_holds(group, group->rank)) {
        return epx__mask_refuse(group);
    }
    (void)pthread_mutex_lock(&group->state_lock);
    broken = group->broken;
    is_told = group->is_told;
    group->is_told = true;
    (void)pthread_mutex_unlock(&group->state_lock);
    return is_told
               ? epx__fail(EPX_ERR_BROKEN,
                           "the group has failed earlier: %.440s", broken.text)
               : epx__error_restore(&broken);
}

epx_status_t
epx__group_check_read(epx_group_t *group)
{
    epx__fence_acquire(); /* what was read, before the alarm and the roll */
    return epx__group_is_broken(group) ? epx__group_restore(group) : EPX_OK;
}

void
epx__group_heap_free(epx_group_t *group, void *block)
{
    if (epx__group_is_broken(group)) {
        epx__heap_retire(&group->heap, block, epx__load_u32(&group->epoch));
    } else {
        (void)epx__heap_free(&group->heap, block);
    }
}

void
epx__group_heap_free_old(epx_group_t *group, void *block)
{
    uint32_t epoch = epx__load_u32(&group->epoch);

    /* Who fails it may be stopped while writing there. */
    epx__heap_retire(&group->heap, block,
                     epx__group_is_broken(group) ? epoch : 0);
    epx__mask_reclaim(group);
}

void
epx__group_count(epx_group_t *group, int32_t *counter, int32_t change)
{
    (void)pthread_mutex_lock(&group->state_lock);
    *counter += change;
    (void)pthread_mutex_unlock(&group->state_lock);
}

void
epx__arrive(const epx__map_t *map, void *segment, uint32_t source,
            uint64_t step, epx__gate_t gate)
{
    uint64_t *arrival = epx__map_arrival(map, segment, step, gate, source);
    epx__gate_line_t *line = epx__map_gate(map, segment, step, gate);
    uint32_t count;

    epx__store_release_u64(arrival, step); /* acquired in arrival_of() */
    count = epx__add_u32(&line->count, 1);
    /* Sequentially consistent, as is the sleeper's store of `sleepers`: either
     * this load sees it, or the sleeper's next look sees the arrival. */
    if (epx__load_u32(&line->sleepers) != 0 &&
        (int32_t)(count - epx__load_u32(&line->wake_at)) >= 0) {
        epx__futex_wake_all(&line->count);
    }
}

void
epx__ring(const epx__map_t *map, void *segment)
{
    for (uint64_t slot = 0; slot < EPX__NUM_SLOTS; slot++) {
        for (int gate = 0; gate < EPX__NUM_GATES; gate++) {
            epx__gate_line_t *line =
                epx__map_gate(map, segment, slot, (epx__gate_t)gate);

            /* One that is about to sleep finds the count changed. */
            (void)epx__add_u32(&line->count, 1);
            epx__futex_wake_all(&line->count);
        }
    }
}

void
epx__group_wake(epx_group_t *group)
{
    char *control = epx__group_control(group, group->rank);

    if (control != NULL) {
        epx__ring(&group->map, control);
    }
    if (epx__load_u32(&group->has_remote) != 0) {
        group->remote.wake(group->remote.context);
    }
}

/* This rank's payload in a segment. */
static void *
payload_at(const epx_group_t *group, void *segment, uint64_t step,
           epx__payload_t payload)
{
    uint32_t rank = (uint32_t)group->rank;

    return payload == EPX__PAYLOAD_POST
               ? (void *)epx__map_post(&group->map, segment, step, rank)
               : epx__map_counts(&group->map, segment, step, rank);
}

void
epx__signal_with(epx_group_t *group, int32_t peer, uint64_t step,
                 epx__gate_t gate, epx__payload_t payload, size_t bytes)
{
    void *segment = group->peers[peer].base;
    const void *from = NULL;

    if (epx__is_masked(group, peer)) {
        return;
    }
    if (payload != EPX__PAYLOAD_NONE) {
        from = payload_at(group, epx__group_segment(group), step, payload);
    }
    if (segment == NULL) {
        epx_status_t status = group->remote.signal(
            group->remote.context, peer, step, gate, payload, from, bytes);

        if (status != EPX_OK) {
            epx__group_end(group, status); /* which the operation finds */
        }
        return;
    }
    if (from != NULL && peer != group->rank) {
        memcpy(payload_at(group, segment, step, payload), from, bytes);
    }
    epx__arrive(&group->map, segment, (uint32_t)group->rank, step, gate);
}

void
epx__signal(epx_group_t *group, int32_t peer, uint64_t step, epx__gate_t gate)
{
    epx__signal_with(group, peer, step, gate, EPX__PAYLOAD_NONE, 0);
}

void
epx__signal_near(epx_group_t *group, uint64_t step, epx__gate_t gate)
{
    const epx__nodes_t *nodes = &group->nodes;
    const int32_t *ranks = epx__node_ranks(nodes, nodes->own);
    int32_t count = epx__node_size(nodes, nodes->own);

    /* Start with the next rank, so that not all write to the first one first.
     */
    for (int32_t i = 1; i <= count; i++) {
        int32_t at = (nodes->index_of[group->rank] + i) % count;

        epx__signal(group, ranks[at], step, gate);
    }
}

typedef struct wait {
    epx_group_t *group;
    uint64_t step;
    epx__gate_t gate;
    bool is_near; /* only for the ranks of this node */
} wait_t;

static uint64_t
arrival_of(const wait_t *wait, int32_t rank)
{
    return epx__load_acquire_u64(
        epx__map_arrival(&wait->group->map, epx__group_segment(wait->group),
                         wait->step, wait->gate, (uint32_t)rank));
}

static bool
is_missing(const void *context, int32_t rank)
{
    const wait_t *wait = context;

    return (!wait->is_near || epx__is_near(&wait->group->nodes, rank)) &&
           arrival_of(wait, rank) < wait->step &&
           !epx__is_masked(wait->group, rank);
}

/* How many ranks from *first_p on have not signalled; moves *first_p to the
 * first of them. */
static uint32_t
count_missing(const wait_t *wait, int32_t *first_p)
{
    int32_t num_ranks = wait->group->num_ranks;
    uint32_t missing = 0;

    while (*first_p < num_ranks && !is_missing(wait, *first_p)) {
        (*first_p)++;
    }
    for (int32_t rank = *first_p; rank < num_ranks; rank++) {
        missing += is_missing(wait, rank);
    }
    return missing;
}

static epx_status_t
wait_timed_out(const wait_t *wait, const char *what)
{
    epx_group_t *group = wait->group;
    epx__rank_list_t list =
        epx__rank_list_make(group->num_ranks, is_missing, wait);

    return epx__group_break(
        group, epx__fail(EPX_ERR_TIMEOUT,
                         "rank %d timed out in %s after %.3f s, waiting for %s",
                         group->rank, what, (double)group->timeout_ns * 1e-9,
                         list.text));
}

/* No signal of a step can be ahead of a step that is open here. */
static epx_status_t
check_arrivals(const wait_t *wait, const char *what)
{
    epx_group_t *group = wait->group;

    for (int32_t rank = 0; rank < group->num_ranks; rank++) {
        bool counts = !wait->is_near || epx__is_near(&group->nodes, rank);
        uint64_t step = counts ? arrival_of(wait, rank) : wait->step;

        if (step != wait->step && !epx__is_masked(group, rank)) {
            return epx__group_break(group,
                                    epx__fail(EPX_ERR_PEER_DATA,
                                              "rank %d signalled step %" PRIu64
                                              " in %s, which is step %" PRIu64,
                                              rank, step, what, wait->step));
        }
    }
    return EPX_OK;
}

/* Whoever has left and still owes its signal will never send it. */
static bool
is_left(const void *context, int32_t rank)
{
    const wait_t *wait = context;

    /* In this order: the second look sees all that came before it left. */
    return is_missing(wait, rank) && epx__lost_has_left(wait->group, rank) &&
           is_missing(wait, rank);
}

static epx_status_t
check_left(const wait_t *wait, const char *what)
{
    epx_group_t *group = wait->group;
    bool any = false;

    for (int32_t rank = 0; rank < group->num_ranks && !any; rank++) {
        any = is_left(wait, rank);
    }
    if (!any) {
        return EPX_OK;
    }
    /* One that left because of a failure has told of it before. */
    if (epx__group_is_broken(group)) {
        return epx__group_restore(group);
    }
    return epx__group_break(
        group,
        epx__fail(EPX_ERR_PEER_LOST,
                  "%s left the group while rank %d waited in %s",
                  epx__rank_list_make(group->num_ranks, is_left, wait).text,
                  group->rank, what));
}

static void
spin(const epx_group_t *group)
{
    if (group->remote.help != NULL && group->spin_ns > 0) {
        group->remote.help(group->remote.context);
    } else {
        epx__pause();
    }
}

/* How long a wait takes for each rank, where somebody wants to know. */
typedef struct stopwatch {
    int64_t *wait_ns; /* [R], NULL: nobody does */
    int64_t start;
    uint64_t is_noted[EPX_MAX_RANKS / 64];
} stopwatch_t;

/* Note the ranks that have come since the last look; at the end all others. */
static void
stopwatch_look(stopwatch_t *watch, const wait_t *wait, bool is_end)
{
    int64_t waited;

    if (watch->wait_ns == NULL) {
        return;
    }
    waited = epx__now_ns() - watch->start;
    for (int32_t rank = 0; rank < wait->group->num_ranks; rank++) {
        uint64_t *noted = &watch->is_noted[rank / 64];
        uint64_t bit = UINT64_C(1) << rank % 64;

        if ((*noted & bit) == 0 && (is_end || !is_missing(wait, rank))) {
            *noted |= bit;
            watch->wait_ns[rank] += waited;
        }
    }
}

/* Nobody waits for this rank, nor for those that have come already. */
static void
stopwatch_start(stopwatch_t *watch, const wait_t *wait)
{
    watch->wait_ns = wait->group->wait_ns;
    if (watch->wait_ns == NULL) {
        return;
    }
    memset(watch->is_noted, 0, sizeof(watch->is_noted));
    for (int32_t rank = 0; rank < wait->group->num_ranks; rank++) {
        if (rank == wait->group->rank || !is_missing(wait, rank)) {
            watch->is_noted[rank / 64] |= UINT64_C(1) << rank % 64;
        }
    }
    watch->start = epx__now_ns();
}

static epx_status_t
wait_until(const wait_t *wait, stopwatch_t *watch, const char *what)
{
    epx_group_t *group = wait->group;
    epx__gate_line_t *line = epx__map_gate(
        &group->map, epx__group_segment(group), wait->step, wait->gate);
    int64_t start = epx__now_ns();
    int64_t deadline = epx__deadline_ns(group->timeout_ns);
    int32_t first = 0;
    epx_status_t status;

    for (uint32_t spins = 0;; spins++) {
        /* Read before looking: a signal that is missed below comes after. */
        uint32_t count = epx__load_u32(&line->count);
        uint32_t missing = count_missing(wait, &first);
        int64_t now;

        if (missing == 0) {
            return check_arrivals(wait, what);
        }
        stopwatch_look(watch, wait, false);
        if (spins % 64 != 63) {
            spin(group);
            if (group->spin_ns > 0) {
                continue;
            }
        }
        if (epx__group_is_broken(group)) {
            return epx__group_restore(group);
        }
        now = epx__now_ns();
        if (now >= deadline) {
            return wait_timed_out(wait, what);
        }
        if (now - start < group->spin_ns) {
            continue;
        }
        if (group->remote.help_end != NULL) {
            group->remote.help_end(group->remote.context);
        }
        status = check_left(wait, what);
        if (status != EPX_OK) {
            return status;
        }
        /* With a stopwatch every rank's signal wakes this one. */
        epx__store_u32(&line->wake_at,
                       count + (watch->wait_ns == NULL ? missing : 1));
        epx__store_u32(&line->sleepers, 1);
        if (count_missing(wait, &first) > 0) {
            epx__futex_wait(&line->count, count, deadline - now);
        }
        epx__store_u32(&line->sleepers, 0);
    }
}

static epx_status_t
wait_for(const wait_t *wait, const char *what)
{
    stopwatch_t watch;
    epx_status_t status;

    stopwatch_start(&watch, wait);
    status = wait_until(wait, &watch, what);
    stopwatch_look(&watch, wait, true);
    return status;
}

epx_status_t
epx__wait_all(epx_group_t *group, uint64_t step, epx__gate_t gate,
              const char *what)
{
    return wait_for(&(wait_t){ group, step, gate, false }, what);
}

epx_status_t
epx__wait_near(epx_group_t *group, uint64_t step, epx__gate_t gate,
               const char *what)
{
    return wait_for(&(wait_t){ group, step, gate, true }, what);
}
