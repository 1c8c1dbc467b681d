/* SPDX-License-Identifier: MIT */
/* How a net learns and tells that the group has failed, and what is then left
 * of it. */
#include "core/lost.h"
#include "net/net_internal.h"

#include <stdio.h>

bool
epx__net_has_left(const epx__net_t *net, int32_t rank)
{
    return epx__net_state(&net->peers[rank]) == EPX__PEER_LEFT;
}

void
epx__net_heard(epx__net_t *net, int32_t rank)
{
    const epx__net_verdict_t *verdict = &net->peers[rank].verdict;
    epx__error_t error = epx__lost_verdict(verdict->status, verdict->text,
                                           sizeof(verdict->text));

    if (net->config.failed != NULL && epx__load_u32(&net->closing) == 0) {
        net->config.failed(net->config.lost_context, rank, &error);
    }
}

void
epx__net_tell(epx__net_t *net, const epx__error_t *error)
{
    const epx__net_job_t job = {
        .header = { .kind = EPX__NET_KIND_VERDICT },
        .one = { &net->verdict, sizeof(net->verdict) },
        .num_ranges = 1,
        .bytes = sizeof(net->verdict),
    };

    if (__atomic_exchange_n(&net->is_told, 1, __ATOMIC_ACQ_REL) != 0) {
        return;
    }
    net->verdict.status = (int32_t)error->status;
    (void)snprintf(net->verdict.text, sizeof(net->verdict.text), "%.*s",
                   (int)sizeof(net->verdict.text) - 1, error->text);
    for (int32_t rank = 0; rank < net->config.num_ranks; rank++) {
        epx__net_peer_t *peer = &net->peers[rank];

        /* A peer whose ring is full will find out by itself. */
        if (epx__net_state(peer) == EPX__PEER_UP &&
            epx__net_ring_push(&peer->rings[0], &job)) {
            epx__net_mark(net, rank);
        }
    }
}

void
epx__net_interrupt(epx__net_t *net)
{
    epx__store_u32(&net->is_interrupted, 1);
    epx__net_event_raise(net);
}

epx_status_t
epx__net_check_waits(const epx__net_t *net)
{
    return epx__load_u32(&net->is_interrupted) == 0
               ? EPX_OK
               : epx__fail(EPX_ERR_BROKEN, "the group has failed");
}

/* Whether the peers have been told, as far as they can be. */
static bool
has_told(epx__net_t *net)
{
    for (int32_t rank = 0; rank < net->config.num_ranks; rank++) {
        epx__net_ring_t *rings = net->peers[rank].rings;

        if (epx__net_state(&net->peers[rank]) == EPX__PEER_UP &&
            epx__load_acquire_u64(&rings[0].tail) !=
                __atomic_load_n(&rings[0].head, __ATOMIC_ACQUIRE)) {
            return false;
        }
    }
    return true;
}

static void
nap(epx__net_t *net)
{
    if (!net->config.is_manual) {
        const struct timespec time = { 0, 200000 };

        (void)nanosleep(&time, NULL);
    } else {
        (void)epx__net_progress(net, epx__now_ns());
    }
}

void
epx__net_abandon(epx__net_t *net, const epx__net_done_t *done,
                 int64_t deadline_ns)
{
    int64_t now = epx__now_ns();
    int64_t told_by_ns = now + (deadline_ns - now) / 4;

    while (!epx__net_done_test(done) && !has_told(net) &&
           epx__now_ns() < told_by_ns) {
        nap(net);
    }
    if (epx__net_done_test(done)) {
        return;
    }
    epx__store_u32(&net->is_abandoned, 1);
    for (int32_t rank = 0; rank < net->config.num_ranks; rank++) {
        if (epx__net_has_peer(net, rank)) {
            epx__net_mark(net, rank);
        }
    }
    while (!epx__net_done_test(done) && epx__now_ns() < deadline_ns) {
        nap(net);
    }
}
