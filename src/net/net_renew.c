/* SPDX-License-Identifier: MIT */
/* How a net goes on without some of its ranks: core/mask.h. */
#include "net/net_internal.h"

bool
epx__net_is_gone(const epx__net_t *net, int32_t rank, uint64_t grace_ns)
{
    const epx__net_peer_t *peer = &net->peers[rank];

    return epx__net_state(peer) == EPX__PEER_GONE &&
           (peer->has_left || epx__load_u32(&peer->has_ended) != 0 ||
            epx__now_ns() - peer->lost_ns >= (int64_t)grace_ns);
}

void
epx__net_hear_pledge(epx__net_t *net, int32_t rank)
{
    if (net->config.pledged != NULL && epx__load_u32(&net->closing) == 0 &&
        !net->config.pledged(net->config.lost_context, rank,
                             &net->peers[rank].pledge_in)) {
        (void)epx__net_refuse(net, rank, "about masks that cannot be");
    }
}

static bool
is_up(const epx__net_t *net, int32_t rank)
{
    return epx__net_state(&net->peers[rank]) == EPX__PEER_UP;
}

bool
epx__net_pledge(epx__net_t *net, int32_t rank, const epx__pledge_t *pledge)
{
    epx__net_peer_t *peer = &net->peers[rank];
    epx__net_job_t job = {
        .header = { .kind = EPX__NET_KIND_PLEDGE },
        .one = { &peer->pledge_out, sizeof(peer->pledge_out) },
        .num_ranges = 1,
        .bytes = sizeof(peer->pledge_out),
        .done = &peer->pledge_done,
    };

    if (!is_up(net, rank)) {
        return true;
    }
    if (!epx__net_done_test(&peer->pledge_done)) {
        return false;
    }
    peer->pledge_out = *pledge;
    (void)epx__add_u32(&peer->pledge_done.pending, 1);
    if (!epx__net_queue(net, rank, 0, &job)) {
        (void)epx__add_u32(&peer->pledge_done.pending, (uint32_t)-1);
        return false;
    }
    epx__net_mark(net, rank);
    return true;
}

/* With the crank: nothing is under way there, acknowledgements included. */
static bool
is_still(epx__net_t *net, int32_t rank)
{
    const epx__net_peer_t *peer = &net->peers[rank];
    bool is_posted = peer->ack_is_posted || peer->ack_due > 0;

    for (int i = 0; i < EPX__NET_WINDOW && !is_posted; i++) {
        is_posted = peer->outgoing[i].is_posted;
    }
    return !is_posted && epx__net_is_drained(net, rank);
}

bool
epx__net_is_pledged(epx__net_t *net, int32_t rank)
{
    bool is;

    epx__net_crank_take(net);
    is = !is_up(net, rank) || is_still(net, rank);
    epx__net_crank_leave(net);
    return is;
}

/* Whether nothing is under way to those that are not masked; `why` ends those
 * to whom something is. */
static bool
is_quiet(epx__net_t *net, const uint64_t *masked, const char *why)
{
    bool is_quiet = true;

    epx__net_crank_take(net);
    for (int32_t rank = 0; rank < net->config.num_ranks; rank++) {
        if (!is_up(net, rank) || epx__has_rank(masked, rank) ||
            epx__net_is_drained(net, rank)) {
            continue;
        }
        is_quiet = false;
        if (why != NULL) {
            epx__net_link_lost(net, rank, why);
        }
    }
    epx__net_crank_leave(net);
    return is_quiet;
}

void
epx__net_rest(epx__net_t *net, const uint64_t *masked, int64_t deadline_ns)
{
    epx__net_start_rest(net);
    while (!is_quiet(net, masked, NULL)) {
        if (epx__now_ns() >= deadline_ns) {
            (void)is_quiet(net, masked, "it takes nothing any more");
            return;
        }
        epx__net_nap(net);
    }
}

static epx_status_t
close_slots(epx__net_t *net, int64_t deadline_ns)
{
    epx_status_t status = EPX_OK;

    for (int32_t rank = 0; rank < net->config.num_ranks; rank++) {
        for (uint32_t c = 0; c < net->config.num_channels &&
                             epx__net_has_peer(net, rank) && status == EPX_OK;
             c++) {
            status = epx__net_slot_close(net, c, rank, deadline_ns);
        }
    }
    return status;
}

epx_status_t
epx__net_renew(epx__net_t *net, const uint64_t *masked, uint64_t last_step,
               int64_t deadline_ns)
{
    epx__net_crank_take(net);
    for (int32_t rank = 0; rank < net->config.num_ranks; rank++) {
        if (epx__net_has_peer(net, rank) && epx__has_rank(masked, rank)) {
            epx__net_cut(net, rank, EPX_ERR_PEER_LOST, "is masked");
        }
    }
    epx__net_crank_leave(net);
    epx__net_step_begin(net, last_step);
    epx__store_u32(&net->is_told[0], 0);
    epx__store_u32(&net->is_resting, 0);
    epx__store_u32(&net->is_interrupted, 0);
    return close_slots(net, deadline_ns);
}

epx_status_t
epx__net_forget(epx__net_t *net, epx__net_done_t *done, int64_t deadline_ns)
{
    epx_status_t status =
        epx__net_done_wait(net, done, deadline_ns, "giving up what was sent");

    if (!epx__net_done_test(done)) {
        return status;
    }
    *done = (epx__net_done_t){ 0 };
    return EPX_OK;
}
