/* SPDX-License-Identifier: MIT */
/* Rank 0's side of an allgather: collect every block, then send all of them to
 * everybody. */
#include "bootstrap/star_internal.h"
#include "core/clock.h"

#include <inttypes.h>
#include <string.h>

_Static_assert(EPX__REPORT_BYTES + EPX__FRAME_BYTES <= EPX__OUTBOX_BYTES,
               "a result's header fits behind a report");
_Static_assert(EPX__CHALLENGE_BYTES + EPX__VERDICT_BYTES + EPX__FRAME_BYTES <=
                   EPX__OUTBOX_BYTES,
               "or behind all that the handshake said");

/* Rank 0 tells the others why the operation fails; those whose connection does
 * not take it at once find out by themselves. */
static void
tell_all(epx__star_t *star, epx__frame_kind_t kind,
         const epx__rank_set_t *ranks)
{
    for (int32_t rank = 1; rank < star->num_ranks; rank++) {
        epx__link_report(&star->peers[rank].link, 0, kind, star->sequence,
                         ranks);
    }
}

static epx_status_t
fail_with(epx__star_t *star, epx__frame_kind_t kind,
          const epx__rank_set_t *ranks)
{
    tell_all(star, kind, ranks);
    return epx__star_fail(star, kind, ranks);
}

static epx_status_t
fail_one(epx__star_t *star, epx__frame_kind_t kind, int32_t rank)
{
    epx__rank_set_t ranks = { { 0 } };

    epx__rank_set_add(&ranks, rank);
    return fail_with(star, kind, &ranks);
}

/* To the others it comes to the same as if the rank had gone. */
static void
tell_all_lost(epx__star_t *star, int32_t rank)
{
    epx__rank_set_t ranks = { { 0 } };

    epx__rank_set_add(&ranks, rank);
    tell_all(star, EPX__FRAME_LOST, &ranks);
}

static epx_status_t
fail_auth(epx__star_t *star, int32_t rank)
{
    tell_all_lost(star, rank);
    return epx__star_fail_auth(star, rank);
}

static epx_status_t
fail_data(epx__star_t *star, int32_t rank)
{
    tell_all_lost(star, rank);
    return epx__fail(EPX_ERR_PEER_DATA,
                     "rank %d sent what cannot be part of allgather %" PRIu64,
                     rank, star->sequence);
}

/* A rank sends its block, and perhaps, later, that it has waited too long. */
static epx_status_t
check_head(epx__star_t *star, const epx__gather_t *gather, int32_t rank,
           epx__frame_t *frame)
{
    const epx__star_peer_t *peer = &star->peers[rank];
    epx__frame_kind_t due = peer->arrived ? EPX__FRAME_LATE : EPX__FRAME_DATA;

    if (!epx__frame_decode(peer->head, frame) || frame->kind != due ||
        frame->rank != rank || frame->sequence != star->sequence ||
        (peer->arrived && frame->bytes != EPX__RANK_SET_BYTES)) {
        return fail_data(star, rank);
    }
    if (!peer->arrived && frame->bytes != gather->bytes) {
        return fail_one(star, EPX__FRAME_DISAGREE, rank);
    }
    return EPX_OK;
}

/* Takes in one frame of a rank, as far as it has come. */
static epx_status_t
read_peer(epx__star_t *star, const epx__gather_t *gather, int32_t rank)
{
    epx__star_peer_t *peer = &star->peers[rank];
    int fd = peer->link.fd;
    epx__frame_t frame = { 0 };
    unsigned char *body = peer->arrived ? peer->report.bits
                          : gather->bytes == 0
                              ? NULL
                              : gather->recv + (size_t)rank * gather->bytes;
    epx__io_t io =
        epx__io_read(fd, peer->head, EPX__FRAME_BYTES, &peer->head_bytes);

    if (io == EPX__IO_DONE) {
        epx_status_t status = check_head(star, gather, rank, &frame);

        if (status != EPX_OK) {
            return status;
        }
        io = epx__io_read(fd, body, (size_t)frame.bytes, &peer->body_bytes);
    }
    if (io == EPX__IO_CLOSED) {
        return fail_one(star, EPX__FRAME_LOST, rank);
    }
    if (io == EPX__IO_AGAIN) {
        return EPX_OK;
    }
    if (!epx__link_verify(&peer->link, peer->head, body, (size_t)frame.bytes)) {
        return fail_auth(star, rank);
    }
    if (peer->arrived) {
        return fail_with(star, EPX__FRAME_LATE, &peer->report);
    }
    peer->arrived = true;
    peer->head_bytes = 0;
    peer->body_bytes = 0;
    return EPX_OK;
}

/* Polls every peer for `events`, and for room where something is to be sent. */
static epx_status_t
poll_peers(epx__star_t *star, short events, int64_t until_ns)
{
    for (int32_t rank = 0; rank < star->num_ranks; rank++) {
        epx__link_t *link = &star->peers[rank].link;
        bool full = !epx__outbox_empty(&link->out);

        star->polls[rank].fd = events != 0 || full ? link->fd : -1;
        star->polls[rank].events = (short)(full ? events | POLLOUT : events);
        star->polls[rank].revents = 0;
    }
    if (epx__poll_until(star->polls, (size_t)star->num_ranks, until_ns) < 0) {
        return epx__fail(EPX_ERR_SYSTEM, "poll failed: %m");
    }
    return EPX_OK;
}

static epx_status_t
flush_peer(epx__star_t *star, int32_t rank)
{
    epx__link_t *link = &star->peers[rank].link;

    return epx__outbox_flush(&link->out, link->fd) == EPX__IO_CLOSED
               ? fail_one(star, EPX__FRAME_LOST, rank)
               : EPX_OK;
}

/* Serves whatever the last poll found ready. */
static epx_status_t
serve(epx__star_t *star, const epx__gather_t *gather)
{
    for (int32_t rank = 1; rank < star->num_ranks; rank++) {
        short ready = star->polls[rank].revents;
        epx_status_t status = EPX_OK;

        if (ready & ~POLLOUT) {
            status = read_peer(star, gather, rank);
        }
        if (status == EPX_OK && (ready & POLLOUT)) {
            status = flush_peer(star, rank);
        }
        if (status != EPX_OK) {
            return status;
        }
    }
    return EPX_OK;
}

/* Counts who is still awaited, into gather->awaited. */
static int32_t
count_awaited(const epx__star_t *star, epx__gather_t *gather)
{
    int32_t count = 0;

    gather->awaited = (epx__rank_set_t){ { 0 } };
    for (int32_t rank = 1; rank < star->num_ranks; rank++) {
        if (!star->peers[rank].arrived) {
            epx__rank_set_add(&gather->awaited, rank);
            count++;
        }
    }
    return count;
}

static void
report_waiting(epx__star_t *star, const epx__gather_t *gather)
{
    for (int32_t rank = 1; rank < star->num_ranks; rank++) {
        epx__star_peer_t *peer = &star->peers[rank];

        /* Whoever has not come does not read either. */
        if (peer->arrived) {
            epx__link_report(&peer->link, 0, EPX__FRAME_WAITING, star->sequence,
                             &gather->awaited);
        }
    }
}

static epx_status_t
collect(epx__star_t *star, epx__gather_t *gather)
{
    int64_t report_ns = epx__now_ns() + EPX__REPORT_INTERVAL_NS;
    int32_t num_reported = 0;
    int32_t num_awaited;

    while ((num_awaited = count_awaited(star, gather)) > 0) {
        int64_t now = epx__now_ns();
        epx_status_t status;

        if (now >= gather->deadline_ns) {
            return fail_with(star, EPX__FRAME_LATE, &gather->awaited);
        }
        if (now >= report_ns) {
            if (num_awaited != num_reported) {
                report_waiting(star, gather);
                num_reported = num_awaited;
            }
            report_ns = now + EPX__REPORT_INTERVAL_NS;
        }
        status = poll_peers(
            star, POLLIN,
            report_ns < gather->deadline_ns ? report_ns : gather->deadline_ns);
        if (status == EPX_OK) {
            status = serve(star, gather);
        }
        if (status != EPX_OK) {
            return status;
        }
    }
    return EPX_OK;
}

/* Sends what the outboxes hold; gather->awaited is who does not take it. */
static epx_status_t
empty_outboxes(epx__star_t *star, epx__gather_t *gather)
{
    for (;;) {
        bool done = true;
        epx_status_t status;

        gather->awaited = (epx__rank_set_t){ { 0 } };
        for (int32_t rank = 1; rank < star->num_ranks; rank++) {
            status = flush_peer(star, rank);
            if (status != EPX_OK) {
                return status;
            }
            if (!epx__outbox_empty(&star->peers[rank].link.out)) {
                epx__rank_set_add(&gather->awaited, rank);
                done = false;
            }
        }
        if (done) {
            return EPX_OK;
        }
        if (epx__now_ns() >= gather->deadline_ns) {
            return fail_with(star, EPX__FRAME_LATE, &gather->awaited);
        }
        status = poll_peers(star, 0, gather->deadline_ns);
        if (status != EPX_OK) {
            return status;
        }
    }
}

epx_status_t
epx__star_gather_root(epx__star_t *star, epx__gather_t *gather)
{
    epx__digest_t digest;
    epx_status_t status;

    for (int32_t rank = 1; rank < star->num_ranks; rank++) {
        epx__star_peer_t *peer = &star->peers[rank];

        peer->head_bytes = 0;
        peer->body_bytes = 0;
        peer->arrived = star->sequence == 0; /* the join has no blocks */
    }
    if (gather->bytes > 0) {
        memmove(gather->recv, gather->send, gather->bytes);
    }
    status = collect(star, gather);
    if (status != EPX_OK) {
        return status;
    }
    digest = epx__digest(gather->recv, gather->total_bytes);
    for (int32_t rank = 1; rank < star->num_ranks; rank++) {
        epx__star_add_data(star, &star->peers[rank].link, gather->recv,
                           gather->total_bytes, &digest);
    }
    return empty_outboxes(star, gather);
}
