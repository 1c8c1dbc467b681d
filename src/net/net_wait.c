/* SPDX-License-Identifier: MIT */
/* What engines wait for: turns that come, sends that are done. */
#include "core/rank_list.h"
#include "net/net_internal.h"

#include <inttypes.h>

uint32_t
epx__net_event(const epx__net_t *net)
{
    return epx__load_u32(&net->event);
}

void
epx__net_event_raise(epx__net_t *net)
{
    (void)epx__add_u32(&net->event, 1);
    /* Sequentially consistent, as is the sleeper's: either this load sees it,
     * or the sleeper finds the word changed. */
    if (epx__load_u32(&net->sleepers) != 0) {
        epx__futex_wake_all(&net->event);
    }
}

/* Help until the word changes, or nothing has come for a while. */
static bool
help_until(epx__net_t *net, uint32_t event, int64_t deadline_ns)
{
    int64_t start = epx__now_ns();
    int64_t now;

    if (net->config.spin_ns <= 0) {
        epx__net_help_end(net);
        return false;
    }
    do {
        now = epx__net_help(net);
        if (epx__load_u32(&net->event) != event) {
            return true;
        }
        if (now - start >= net->config.spin_ns) {
            start = __atomic_load_n(&net->busy_ns, __ATOMIC_RELAXED);
        }
    } while (now < deadline_ns && now - start < net->config.spin_ns);
    epx__net_help_end(net);
    return false;
}

void
epx__net_event_wait(epx__net_t *net, uint32_t event, int64_t deadline_ns)
{
    int64_t now;

    if (help_until(net, event, deadline_ns)) {
        return;
    }
    now = epx__now_ns();
    (void)epx__add_u32(&net->sleepers, 1);
    if (now < deadline_ns && epx__load_u32(&net->event) == event) {
        epx__futex_wait(&net->event, event, deadline_ns - now);
    }
    (void)epx__add_u32(&net->sleepers, (uint32_t)-1);
}

epx_status_t
epx__net_peer_status(epx__net_t *net, int32_t rank)
{
    epx__net_peer_t *peer = &net->peers[rank];

    switch (epx__net_state(peer)) {
    case EPX__PEER_GONE:
        return epx__error_restore(&peer->error);
    case EPX__PEER_LEFT:
        return epx__fail(EPX_ERR_PEER_LOST, "rank %d has closed its group",
                         rank);
    default:
        return EPX_OK;
    }
}

bool
epx__net_has_peer(const epx__net_t *net, int32_t rank)
{
    return rank >= 0 && rank < net->config.num_ranks &&
           epx__net_state(&net->peers[rank]) != EPX__PEER_NONE;
}

/* --- Sends ------------------------------------------------------------- */

void
epx__net_done_drop(epx__net_t *net, epx__net_done_t *done, int32_t rank,
                   epx_status_t status)
{
    if (done == NULL) {
        return;
    }
    if (status != EPX_OK && done->status == EPX_OK) {
        done->rank = rank;
        done->status = status;
    }
    /* A release of what is above; acquired in epx__net_done_test.  The engine's
     * memory may be gone right after. */
    if (epx__add_u32(&done->pending, (uint32_t)-1) == 0) {
        epx__net_event_raise(net);
    }
}

bool
epx__net_done_test(const epx__net_done_t *done)
{
    return epx__load_u32(&done->pending) == 0;
}

epx_status_t
epx__net_done_wait(epx__net_t *net, epx__net_done_t *done, int64_t deadline_ns,
                   const char *what)
{
    epx_status_t status;

    for (;;) {
        uint32_t event = epx__net_event(net);

        if (epx__net_done_test(done)) {
            break;
        }
        status = epx__net_check_waits(net);
        if (status != EPX_OK) {
            return status;
        }
        if (epx__now_ns() >= deadline_ns) {
            return epx__fail(EPX_ERR_TIMEOUT,
                             "rank %d timed out in %s, waiting for peers to "
                             "acknowledge %" PRIu32 " messages",
                             net->config.rank, what,
                             epx__load_u32(&done->pending));
        }
        epx__net_event_wait(net, event, deadline_ns);
    }
    if (done->status == EPX_OK) {
        return EPX_OK;
    }
    if (done->status == EPX_ERR_BROKEN) {
        return epx__fail(EPX_ERR_BROKEN, "the group has failed");
    }
    return epx__net_peer_status(net, done->rank);
}

/* --- Turns ------------------------------------------------------------- */

bool
epx__net_arrived(epx__net_t *net, uint32_t channel, int32_t source,
                 uint64_t turn, uint64_t *bytes_p)
{
    const epx__net_half_t *half =
        &net->peers[source].slots[channel].halves[turn % 2];

    /* Released in finish_turn(). */
    if (epx__load_acquire_u64(&half->done_turn) < turn) {
        return false;
    }
    if (bytes_p != NULL) {
        *bytes_p = half->received;
    }
    return true;
}

typedef struct wait {
    epx__net_t *net;
    uint32_t channel;
    uint64_t turn;
    const bool *sources;
} wait_t;

static bool
is_missing(const void *context, int32_t rank)
{
    const wait_t *wait = context;

    return epx__net_has_peer(wait->net, rank) &&
           (wait->sources == NULL || wait->sources[rank]) &&
           !epx__net_arrived(wait->net, wait->channel, rank, wait->turn, NULL);
}

epx_status_t
epx__net_wait(epx__net_t *net, uint32_t channel, uint64_t turn,
              const bool *sources, int64_t deadline_ns, const char *what)
{
    const wait_t wait = { net, channel, turn, sources };
    int32_t rank = 0;
    epx_status_t status;

    while (rank < net->config.num_ranks) {
        uint32_t event = epx__net_event(net);
        /* Read before looking: what it sent may have come before it went. */
        bool is_gone = epx__net_state(&net->peers[rank]) >= EPX__PEER_LEFT;

        if (!is_missing(&wait, rank)) {
            rank++;
            continue;
        }
        if (is_gone) {
            return epx__net_peer_status(net, rank);
        }
        status = epx__net_check_waits(net);
        if (status != EPX_OK) {
            return status;
        }
        if (epx__now_ns() >= deadline_ns) {
            epx__rank_list_t list =
                epx__rank_list_make(net->config.num_ranks, is_missing, &wait);

            return epx__fail(EPX_ERR_TIMEOUT,
                             "rank %d timed out in %s, waiting for %s",
                             net->config.rank, what, list.text);
        }
        epx__net_event_wait(net, event, deadline_ns);
    }
    return EPX_OK;
}

/* --- Slots ------------------------------------------------------------- */

/* Nothing may come any more. */
static void
shut(epx__net_slot_t *slot)
{
    for (int i = 0; i < 2; i++) {
        /* Sequentially consistent, as is the thread's: either it sees that the
         * turn is closed, or epx__net_slot_close sees the writer. */
        __atomic_store_n(&slot->halves[i].open_turn, 0, __ATOMIC_SEQ_CST);
    }
}

epx_status_t
epx__net_slot_open(epx__net_t *net, uint32_t channel, int32_t source,
                   uint64_t turn, void *const halves[2], uint64_t bytes)
{
    epx__net_slot_t *slot;
    epx_status_t status;

    if (channel >= net->config.num_channels || turn == 0 ||
        !epx__net_has_peer(net, source)) {
        return epx__fail(EPX_ERR_INVALID,
                         "no slot for turn %" PRIu64 " of channel %" PRIu32
                         " from rank %d; there are %" PRIu32 " channels, and "
                         "turns count from 1",
                         turn, channel, source, net->config.num_channels);
    }
    slot = &net->peers[source].slots[channel];
    if (slot->halves[0].open_turn != 0 || slot->halves[1].open_turn != 0) {
        return epx__fail(EPX_ERR_STATE,
                         "the slot of channel %" PRIu32 " and rank %d is open",
                         channel, source);
    }
    slot->bytes = bytes;
    for (uint64_t t = turn; t < turn + 2; t++) {
        epx__net_half_t *half = &slot->halves[t % 2];

        half->base = halves[t % 2];
        half->turn = 0;
        half->done_turn = 0;
        /* Acquired in the check of a piece. */
        epx__store_release_u64(&half->open_turn, t);
    }
    status = epx__net_slot_lend(net, channel, source, turn, halves, bytes);
    if (status != EPX_OK) {
        shut(slot);
    }
    return status;
}

void
epx__net_slot_release(epx__net_t *net, uint32_t channel, int32_t source,
                      uint64_t turn)
{
    epx__net_half_t *half = &net->peers[source].slots[channel].halves[turn % 2];

    epx__store_release_u64(&half->open_turn, turn + 2);
}

/* Until nothing writes to these halves of a slot any more. */
static epx_status_t
wait_quiet(epx__net_t *net, uint32_t channel, int32_t source,
           const epx__net_half_t *const halves[2], int64_t deadline_ns)
{
    for (;;) {
        uint32_t event = epx__net_event(net);

        if (epx__load_u32(&halves[0]->writers) == 0 &&
            epx__load_u32(&halves[1]->writers) == 0) {
            return EPX_OK;
        }
        if (epx__now_ns() >= deadline_ns) {
            return epx__fail(EPX_ERR_TIMEOUT,
                             "rank %d still writes to its slot of channel "
                             "%" PRIu32,
                             source, channel);
        }
        epx__net_event_wait(net, event, deadline_ns);
    }
}

epx_status_t
epx__net_slot_give_up(epx__net_t *net, uint32_t channel, int32_t source,
                      uint64_t turn, int64_t deadline_ns)
{
    epx__net_half_t *half = &net->peers[source].slots[channel].halves[turn % 2];
    const epx__net_half_t *const both[2] = { half, half };

    /* As in shut(). */
    __atomic_store_n(&half->open_turn, turn + 2, __ATOMIC_SEQ_CST);
    return wait_quiet(net, channel, source, both, deadline_ns);
}

epx_status_t
epx__net_slot_close(epx__net_t *net, uint32_t channel, int32_t source,
                    int64_t deadline_ns)
{
    epx__net_slot_t *slot = &net->peers[source].slots[channel];
    const epx__net_half_t *const both[2] = { &slot->halves[0],
                                             &slot->halves[1] };
    epx_status_t status;

    shut(slot);
    status = wait_quiet(net, channel, source, both, deadline_ns);
    return status == EPX_OK
               ? epx__net_slot_take_back(net, channel, source, deadline_ns)
               : status;
}
