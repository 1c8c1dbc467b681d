/* SPDX-License-Identifier: MIT */
/* How a net learns and tells that the group has failed, and what is then left
 * of it. */
#include "core/lost.h"
#include "net/net_internal.h"

#include <stdio.h>

bool
epx__net_has_left(const epx__net_t *net, int32_t rank)
{
    const epx__net_peer_t *peer = &net->peers[rank];
    uint32_t state = epx__net_state(peer);

    return state == EPX__PEER_LEFT ||
           (state == EPX__PEER_GONE && peer->has_left);
}

void
epx__net_heard(epx__net_t *net, int32_t rank)
{
    const epx__net_verdict_t *verdict = &net->peers[rank].verdict;
    epx__error_t error = epx__lost_verdict(verdict->status, verdict->text,
                                           sizeof(verdict->text));

    if (net->config.failed != NULL && epx__load_u32(&net->closing) == 0) {
        net->config.failed(net->config.lost_context, rank, verdict->epoch,
                           &error, verdict->has_aborted != 0);
    }
}

void
epx__net_tell(epx__net_t *net, uint32_t epoch, const epx__error_t *error,
              bool has_aborted)
{
    epx__net_verdict_t *verdict = &net->verdicts[has_aborted];
    const epx__net_job_t job = {
        .header = { .kind = EPX__NET_KIND_VERDICT },
        .one = { verdict, sizeof(*verdict) },
        .num_ranges = 1,
        .bytes = sizeof(*verdict),
    };

    if (__atomic_exchange_n(&net->is_told[has_aborted], 1, __ATOMIC_ACQ_REL) !=
        0) {
        return;
    }
    verdict->status = (int32_t)error->status;
    verdict->epoch = epoch;
    verdict->has_aborted = has_aborted;
    (void)snprintf(verdict->text, sizeof(verdict->text), "%.*s",
                   (int)sizeof(verdict->text) - 1, error->text);
    for (int32_t rank = 0; rank < net->config.num_ranks; rank++) {
        epx__net_peer_t *peer = &net->peers[rank];

        /* A peer whose ring is full will find out by itself. */
        if (epx__net_state(peer) == EPX__PEER_UP &&
            epx__net_queue(net, rank, 0, &job)) {
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

void
epx__net_start_rest(epx__net_t *net)
{
    epx__store_u32(&net->is_resting, 1);
    for (int32_t rank = 0; rank < net->config.num_ranks; rank++) {
        if (epx__net_has_peer(net, rank)) {
            epx__net_mark(net, rank);
        }
    }
}

void
epx__net_nap(epx__net_t *net)
{
    if (!net->config.is_manual) {
        const struct timespec time = { 0, 200000 };

        (void)nanosleep(&time, NULL);
    } else {
        (void)epx__net_progress(net, epx__now_ns());
    }
}

/* With the crank: whether the peer still has some of what counts there. */
static bool
holds(const epx__net_peer_t *peer, const epx__net_done_t *done)
{
    bool any = false;

    for (int i = 0; i < EPX__NET_WINDOW && !any; i++) {
        any = peer->outgoing[i].done == done;
    }
    return any;
}

static void
let_go(epx__net_t *net, const epx__net_done_t *done)
{
    epx__net_crank_take(net);
    for (int32_t rank = 0; rank < net->config.num_ranks; rank++) {
        if (epx__net_state(&net->peers[rank]) == EPX__PEER_UP &&
            holds(&net->peers[rank], done)) {
            epx__net_cut(net, rank, EPX_ERR_BROKEN,
                         "is let go, for the group has failed");
        }
    }
    epx__net_crank_leave(net);
}

void
epx__net_abandon(epx__net_t *net, const epx__net_done_t *done,
                 int64_t deadline_ns)
{
    int64_t now = epx__now_ns();
    int64_t until_ns = now + (deadline_ns - now) / 4 * 3;

    if (epx__net_done_test(done)) {
        return;
    }
    epx__net_start_rest(net);
    while (!epx__net_done_test(done) && epx__now_ns() < until_ns) {
        epx__net_nap(net);
    }
    if (epx__net_done_test(done)) {
        return;
    }
    let_go(net, done);
    while (!epx__net_done_test(done) && epx__now_ns() < deadline_ns) {
        epx__net_nap(net);
    }
}
