/* SPDX-License-Identifier: MIT */
/* The net's thread: it owns the backend, the heartbeats, and whatever of a peer
 * is not shared. */
#include "net/net_internal.h"

#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <unistd.h>

/* So many messages are acknowledged at once: half of what credit allows. */
#define ACK_DUE_MAX (EPX__NET_CREDIT_PIECES / 2)

/* How long the thread looks on when nothing comes any more. */
#define SPIN_NS (50 * EPX__NS_PER_MS / 1000)

/* How long the thread keeps away from one that helps: at first, and at most as
 * it goes on. */
#define PARK_NS     (100 * EPX__NS_PER_MS / 1000)
#define PARK_MAX_NS EPX__NS_PER_MS

/* How often a thread that sleeps looks into the boxes: puts wake nobody. */
#define BOX_NS EPX__NS_PER_MS

void
epx__net_wake_gates(epx__net_t *net)
{
    for (uint64_t slot = 0; slot < EPX__NUM_SLOTS; slot++) {
        for (int gate = 0; gate < EPX__NUM_GATES; gate++) {
            epx__futex_wake_all(&epx__map_gate(&net->map, net->config.segment,
                                               slot, (epx__gate_t)gate)
                                     ->count);
        }
    }
}

static bool
can_go(const epx__net_peer_t *peer)
{
    uint32_t state = epx__net_state(peer);

    return state != EPX__PEER_NONE && state != EPX__PEER_GONE;
}

void
epx__net_cut(epx__net_t *net, int32_t rank, epx_status_t status,
             const char *why)
{
    epx__net_peer_t *peer = &net->peers[rank];

    if (!can_go(peer)) {
        return;
    }
    peer->error.status = status;
    (void)snprintf(peer->error.text, sizeof(peer->error.text), "rank %d %s",
                   rank, why);
    peer->has_left = epx__net_state(peer) == EPX__PEER_LEFT;
    peer->lost_ns = epx__now_ns();
    /* Acquired in epx__net_state. */
    __atomic_store_n(&peer->state, EPX__PEER_GONE, __ATOMIC_RELEASE);
    net->backend->cancel_peer(net->state, rank);
    epx__net_beats_let_go(net, rank);
    epx__net_drop_all(net, rank);
    epx__net_wake_gates(net);
    epx__net_event_raise(net);
}

void
epx__net_lose(epx__net_t *net, int32_t rank, epx_status_t status,
              const char *why)
{
    char text[sizeof(net->peers[rank].error.text)];

    if (!can_go(&net->peers[rank])) {
        return;
    }
    if (epx__net_state(&net->peers[rank]) == EPX__PEER_LEFT) {
        epx__net_cut(net, rank, EPX_ERR_PEER_LOST, "has closed its group");
        return;
    }
    if (epx__load_u32(&net->closing) == 0) {
        (void)snprintf(text, sizeof(text), "rank %d %s", rank, why);
        epx__log(EPX__LOG_WARN, "%s", text);
        if (net->config.lost != NULL) {
            net->config.lost(net->config.lost_context, rank, status, text);
        }
    }
    epx__net_cut(net, rank, status, why);
}

void
epx__net_link_lost(epx__net_t *net, int32_t rank, const char *why)
{
    char text[256];

    (void)snprintf(text, sizeof(text), "is lost: %s", why);
    epx__net_lose(net, rank, EPX_ERR_PEER_LOST, text);
}

/* Do what is to be done for one peer; idle: nothing else is.  Returns false if
 * that was to see that an acknowledgement can wait. */
static bool
serve(epx__net_t *net, int32_t rank, bool idle)
{
    epx__net_peer_t *peer = &net->peers[rank];
    uint64_t next_sent = peer->next_sent;

    if (epx__net_state(peer) == EPX__PEER_NONE) {
        return true; /* only to wake the thread */
    }
    if (peer->doom != NULL && epx__net_state(peer) != EPX__PEER_GONE) {
        char text[256];

        (void)snprintf(text, sizeof(text), "sent a message %s", peer->doom);
        epx__net_lose(net, rank, EPX_ERR_PEER_DATA, text);
    }
    if (epx__net_state(peer) == EPX__PEER_GONE) {
        epx__net_drop_all(net, rank);
        return true;
    }
    epx__net_pump(net, rank);
    if (peer->ack_due == 0 || peer->ack_is_posted) {
        return true;
    }
    if (idle || peer->ack_due >= ACK_DUE_MAX ||
        net->now_ns >= peer->ack_by_ns) {
        epx__net_send_ack(net, rank);
        return true;
    }
    epx__net_mark(net, rank); /* look again */
    return peer->next_sent != next_sent;
}

/* Returns whether a peer had anything to be done. */
static bool
serve_all(epx__net_t *net, bool idle)
{
    bool any = false;

    for (int32_t first = 0; first < net->config.num_ranks; first += 64) {
        uint64_t bits =
            __atomic_load_n(&net->ready[first / 64], __ATOMIC_RELAXED);

        if (bits == 0) {
            continue;
        }
        bits =
            __atomic_exchange_n(&net->ready[first / 64], 0, __ATOMIC_SEQ_CST);
        while (bits != 0) {
            any = serve(net, first + __builtin_ctzll(bits), idle) || any;
            bits &= bits - 1;
        }
    }
    return any;
}

static bool
anything_ready(const epx__net_t *net)
{
    for (int32_t first = 0; first < net->config.num_ranks; first += 64) {
        if (__atomic_load_n(&net->ready[first / 64], __ATOMIC_SEQ_CST) != 0) {
            return true;
        }
    }
    return false;
}

/* A peer answers every message within a millisecond or so, whatever its engine
 * does. */
static void
look_for_silence(epx__net_t *net, int64_t now)
{
    char why[96];

    (void)snprintf(why, sizeof(why), "it has been silent for %.3f s",
                   (double)net->config.lost_after_ns * 1e-9);
    for (int32_t rank = 0; rank < net->config.num_ranks; rank++) {
        epx__net_peer_t *peer = &net->peers[rank];
        int64_t limit = (int64_t)net->config.lost_after_ns;
        bool is_owing =
            (peer->next_acked != peer->next_sent || peer->owes_note) &&
            now - peer->heard_ns > limit;
        bool is_still = peer->beat.state == EPX__BEAT_UP &&
                        now - peer->beat.heard_ns > limit;
        uint32_t state = epx__net_state(peer);

        if ((state == EPX__PEER_UP || state == EPX__PEER_LEFT) &&
            (is_owing || is_still)) {
            epx__net_link_lost(net, rank, why);
        }
    }
}

/* This thread was away itself: nobody is to blame for what was not read. */
static void
forgive(epx__net_t *net, int64_t now)
{
    for (int32_t rank = 0; rank < net->config.num_ranks; rank++) {
        net->peers[rank].heard_ns = now;
        net->peers[rank].beat.heard_ns = now;
    }
}

static void
tick(epx__net_t *net, int64_t now)
{
    epx__net_beats_read(net, now);
    if (now - net->last_tick_ns > (int64_t)net->config.lost_after_ns / 2) {
        forgive(net, now);
    }
    look_for_silence(net, now);
    epx__net_beats_send(net, now);
    net->last_tick_ns = now;
    net->next_tick_ns = now + net->tick_ns;
}

/* The peer knows that this rank is leaving; or leaves itself, and knows that
 * this rank knows. */
static bool
has_parted_from(epx__net_t *net, int32_t rank)
{
    epx__net_peer_t *peer = &net->peers[rank];

    switch (epx__net_state(peer)) {
    case EPX__PEER_UP:
        return peer->bye_is_sent && epx__net_is_drained(net, rank);
    case EPX__PEER_LEFT:
        return peer->ack_due == 0 && !peer->ack_is_posted;
    default:
        return true;
    }
}

static bool
has_parted(epx__net_t *net)
{
    for (int32_t rank = 0; rank < net->config.num_ranks; rank++) {
        if (!has_parted_from(net, rank)) {
            return false;
        }
    }
    return true;
}

/* Once: every peer is to be told. */
static bool
start_to_part(epx__net_t *net)
{
    if (net->is_parting) {
        return false;
    }
    net->is_parting = true;
    for (int32_t rank = 0; rank < net->config.num_ranks; rank++) {
        epx__net_mark(net, rank);
    }
    return true;
}

static bool
progress(epx__net_t *net, int64_t now, bool may_sleep, int64_t *wake_ns_p)
{
    bool any;

    net->now_ns = now;
    if (now >= net->next_tick_ns) {
        tick(net, now);
    }
    any = serve_all(net, false);
    any = net->backend->poll(net->state, now, may_sleep && !any, wake_ns_p) ||
          any;
    if (net->puts != NULL) {
        any = epx__net_boxes_poll(net) || any;
        *wake_ns_p = now + BOX_NS < *wake_ns_p ? now + BOX_NS : *wake_ns_p;
    }
    if (epx__load_u32(&net->closing) != 0) {
        any = start_to_part(net) || any;
        net->has_closed = has_parted(net) || now >= net->close_by_ns;
    }
    if (any) {
        __atomic_store_n(&net->busy_ns, now, __ATOMIC_RELAXED);
    }
    return any;
}

bool
epx__net_progress(epx__net_t *net, int64_t now_ns)
{
    int64_t wake_ns = INT64_MAX;
    bool any = progress(net, now_ns, false, &wake_ns);

    return serve_all(net, true) || any;
}

/* --- Who turns the crank ------------------------------------------------ */

static bool
take_crank(epx__net_t *net)
{
    return epx__load_u32(&net->crank) == 0 &&
           __atomic_exchange_n(&net->crank, 1, __ATOMIC_ACQUIRE) == 0;
}

static void
leave_crank(epx__net_t *net)
{
    __atomic_store_n(&net->crank, 0, __ATOMIC_RELEASE);
}

void
epx__net_crank_take(epx__net_t *net)
{
    while (!net->config.is_manual && !take_crank(net)) {
        (void)sched_yield();
    }
}

void
epx__net_crank_leave(epx__net_t *net)
{
    if (!net->config.is_manual) {
        leave_crank(net);
    }
}

/* Unless another thread is at it; returns whether there was anything to do. */
static bool
turn_crank(epx__net_t *net, int64_t now)
{
    int64_t wake_ns = INT64_MAX;
    bool any;

    if (!take_crank(net)) {
        return false;
    }
    /* The thread makes way. */
    __atomic_store_n(&net->helped_ns, now, __ATOMIC_RELAXED);
    any = progress(net, now, false, &wake_ns);
    leave_crank(net);
    return any;
}

bool
epx__net_attend(epx__net_t *net)
{
    bool any = !net->config.is_manual && turn_crank(net, epx__now_ns());

    /* What was sent may need more than events of the backend tell; and what was
     * not is for whoever has the crank, who may be about to sleep. */
    if (any || anything_ready(net)) {
        epx__net_wake(net);
    }
    return any;
}

void
epx__net_acknowledge(epx__net_t *net)
{
    if (!net->config.is_manual && take_crank(net)) {
        net->now_ns = epx__now_ns();
        (void)serve_all(net, true);
        leave_crank(net);
    }
}

int64_t
epx__net_help(epx__net_t *net)
{
    int64_t now = epx__now_ns();

    if (net->config.is_manual) {
        return now;
    }
    /* Whether or not it is free: the thread makes way. */
    __atomic_store_n(&net->helped_ns, now, __ATOMIC_RELAXED);
    if (!turn_crank(net, now)) {
        epx__pause();
    }
    return now;
}

void
epx__net_help_end(epx__net_t *net)
{
    __atomic_store_n(&net->helped_ns, 0, __ATOMIC_RELAXED);
    (void)epx__add_u32(&net->parked, 1);
    epx__futex_wake_all(&net->parked);
    if (epx__load_u32(&net->under_way) > 0) {
        epx__net_wake(net);
    }
}

void
epx__net_leave(epx__net_t *net)
{
    if (epx__load_u32(&net->under_way) > 0) {
        epx__net_help_end(net);
    }
}

bool
epx__net_serve_now(epx__net_t *net, int32_t rank)
{
    if (net->config.is_manual || !take_crank(net)) {
        return false;
    }
    net->now_ns = epx__now_ns();
    (void)serve(net, rank, false);
    leave_crank(net);
    /* What was sent may need more than events of the backend tell. */
    epx__net_wake(net);
    return true;
}

/* A thread that waits does the work meanwhile. */
static bool
is_helped(epx__net_t *net, int64_t now)
{
    return now - __atomic_load_n(&net->helped_ns, __ATOMIC_RELAXED) < PARK_NS;
}

/* Long enough not to get into the way of who helps; and no longer than that has
 * lasted, so as to be there soon. */
static void
park(epx__net_t *net, uint32_t parked, int64_t *park_ns)
{
    epx__futex_wait(&net->parked, parked, *park_ns);
    *park_ns = 2 * *park_ns < PARK_MAX_NS ? 2 * *park_ns : PARK_MAX_NS;
}

static void
sleep_until(epx__net_t *net, int64_t wake_ns)
{
    struct epoll_event events[8];
    int64_t left = wake_ns - epx__now_ns();
    int timeout_ms =
        left <= 0 ? 0 : (int)((left + EPX__NS_PER_MS - 1) / EPX__NS_PER_MS);
    uint64_t count;

    (void)epoll_wait(net->epoll_fd, events, 8, timeout_ms);
    (void)!read(net->wake_fd, &count, sizeof(count));
}

/* Nothing has come for a while: leave the crank, and sleep unless something
 * did. */
static void
rest(epx__net_t *net)
{
    int64_t wake_ns = net->next_tick_ns;
    bool is_idle;

    (void)serve_all(net, true);
    epx__store_u32(&net->is_asleep, 1);
    is_idle =
        !anything_ready(net) && !progress(net, epx__now_ns(), true, &wake_ns);
    if (is_idle) {
        epx__net_count(&net->stats.sleeps, 1);
    }
    leave_crank(net);
    if (is_idle) {
        sleep_until(net, wake_ns);
    }
    epx__store_u32(&net->is_asleep, 0);
}

void *
epx__net_thread_main(void *argument)
{
    epx__net_t *net = argument;
    int64_t spin_ns = net->config.spin_ns;
    int64_t park_ns = PARK_NS;

    if (net->config.card_net.enter_thread != NULL) {
        net->config.card_net.enter_thread(net->config.card_net.ordinal);
    }
    /* More is for a thread with a core of its own: those that wait help. */
    if (net->config.core < 0 && spin_ns > SPIN_NS) {
        spin_ns = SPIN_NS;
    }
    /* Who rests acknowledges at once. */
    if (spin_ns < EPX__NET_ACK_NS) {
        spin_ns = EPX__NET_ACK_NS;
    }

    while (!net->has_closed) {
        int64_t now = epx__now_ns();
        int64_t wake_ns = INT64_MAX;
        /* Read before looking: who helps may end that. */
        uint32_t parked = epx__load_u32(&net->parked);

        if (is_helped(net, now)) {
            park(net, parked, &park_ns);
            continue;
        }
        park_ns = PARK_NS;
        if (!take_crank(net)) { /* who has it may not come back to it */
            epx__futex_wait(&net->parked, parked, PARK_NS);
            continue;
        }
        if (!progress(net, now, false, &wake_ns) &&
            now - net->busy_ns >= spin_ns) {
            rest(net);
        } else {
            leave_crank(net);
        }
    }
    return NULL;
}
