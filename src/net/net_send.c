/* SPDX-License-Identifier: MIT */
/* The sending half of a link: the window, the cutting of transfers into pieces,
 * and acknowledgements. */
#include "net/net_internal.h"

static epx__net_outgoing_t *
outgoing(epx__net_peer_t *peer, uint64_t sequence)
{
    return &peer->outgoing[sequence % EPX__NET_WINDOW];
}

/* Whether the window lets one more message through, and the place that it would
 * take is free: an older one may be acknowledged, and yet with the backend. */
static bool
has_room(epx__net_peer_t *peer)
{
    const epx__net_outgoing_t *next = outgoing(peer, peer->next_sent);

    return peer->next_sent - peer->next_acked < EPX__NET_WINDOW &&
           !next->is_posted;
}

/* Say what has been received, as every header does. */
static void
stamp(epx__net_t *net, epx__net_peer_t *peer, epx__net_header_t *header)
{
    header->magic = EPX__NET_MAGIC;
    header->version = EPX__NET_VERSION;
    header->group = net->group;
    header->source = (uint32_t)net->config.rank;
    header->acked = peer->next_received - 1;
    header->acked_bits = peer->finished;
    /* On the second wire the end that a farewell announces may cut it short:
     * what it acknowledges is said once more, and flushed. */
    if (net->puts == NULL || header->kind != EPX__NET_KIND_BYE) {
        peer->ack_due = 0;
    }
}

/* The message in the place of next_sent is complete but for what all have. */
static void
post(epx__net_t *net, int32_t rank, epx__net_outgoing_t *out)
{
    epx__net_peer_t *peer = &net->peers[rank];
    epx__net_header_t *header = &out->message.header;

    if (peer->next_acked == peer->next_sent) {
        peer->heard_ns = net->now_ns; /* its turn to answer */
    }
    stamp(net, peer, header);
    header->sequence = peer->next_sent++;
    out->is_posted = true;
    out->is_acked = false;
    (void)epx__add_u32(&net->under_way, 1);
    peer->credit_used += header->bytes;
    epx__net_count(&net->stats.messages_sent, 1);
    epx__net_count(&net->stats.bytes_sent, header->bytes);
    epx__net_bundle_add(net, rank, &out->message);
}

static void
post_signal(epx__net_t *net, int32_t rank, const epx__net_job_t *job)
{
    epx__net_peer_t *peer = &net->peers[rank];
    epx__net_outgoing_t *out = outgoing(peer, peer->next_sent);

    out->message = (epx__net_message_t){ .header = job->header,
                                         .num_ranges = job->num_ranges,
                                         .one = job->one };
    out->message.ranges = &out->message.one;
    out->message.header.bytes = job->bytes;
    out->done = job->done;
    post(net, rank, out);
}

/* Whole ranges as far as they fit into a piece, or a part of one; empty ranges
 * do not count. */
static void
cut(const epx__net_t *net, epx__net_peer_t *peer, const epx__net_job_t *job,
    epx__net_message_t *message)
{
    uint32_t max_ranges = net->puts != NULL ? EPX__NET_PUT_RANGES : UINT32_MAX;
    const struct iovec *range = job->ranges + peer->job_range;
    uint64_t bytes = 0;
    uint32_t count = 0, used = 0;

    message->header = job->header;
    message->header.offset += peer->job_cut;
    while (peer->job_offset == 0 && peer->job_range + count < job->num_ranges &&
           range[count].iov_len <= net->piece_bytes - bytes &&
           (used < max_ranges || range[count].iov_len == 0)) {
        bytes += range[count].iov_len;
        used += range[count].iov_len > 0;
        count++;
    }
    message->ranges = range;
    message->num_ranges = bytes > 0 ? count : 0;
    if (count == 0 && job->num_ranges > 0) {
        uint64_t left = range->iov_len - peer->job_offset;

        bytes = left < net->piece_bytes ? left : net->piece_bytes;
        message->one =
            (struct iovec){ (char *)range->iov_base + peer->job_offset, bytes };
        message->ranges = &message->one;
        message->num_ranges = 1;
        peer->job_offset += bytes;
        if (bytes == left) {
            count = 1;
            peer->job_offset = 0;
        }
    }
    peer->job_range += count;
    peer->job_cut += bytes;
    message->header.bytes = bytes;
}

/* Returns whether that was the last of the job. */
static bool
post_piece(epx__net_t *net, int32_t rank, const epx__net_job_t *job)
{
    epx__net_peer_t *peer = &net->peers[rank];
    epx__net_outgoing_t *out = outgoing(peer, peer->next_sent);
    bool is_last;

    cut(net, peer, job, &out->message);
    is_last = peer->job_cut == job->bytes;
    out->done = job->done;
    if (is_last) { /* which takes over what the job has counted */
        peer->job_range = 0;
        peer->job_offset = 0;
        peer->job_cut = 0;
    } else if (out->done != NULL) {
        (void)epx__add_u32(&out->done->pending, 1);
    }
    post(net, rank, out);
    return is_last;
}

static void
take(epx__net_t *net, epx__net_ring_t *ring)
{
    bool was_full =
        epx__load_acquire_u64(&ring->tail) - ring->head >= EPX__NET_RING;

    epx__net_ring_drop(ring);
    (void)epx__add_u32(&net->under_way, (uint32_t)-1);
    if (was_full) {
        epx__net_event_raise(net);
    }
}

/* Let go of what is left of the transfers. */
static void
drop_transfers(epx__net_t *net, int32_t rank)
{
    epx__net_peer_t *peer = &net->peers[rank];
    epx__net_job_t *job;

    while ((job = epx__net_ring_first(&peer->rings[1])) != NULL) {
        epx__net_done_drop(net, job->done, rank, EPX_ERR_BROKEN);
        take(net, &peer->rings[1]);
    }
    peer->job_range = 0;
    peer->job_offset = 0;
    peer->job_cut = 0;
    peer->owes_note = false;
}

void
epx__net_pump(epx__net_t *net, int32_t rank)
{
    epx__net_peer_t *peer = &net->peers[rank];
    epx__net_job_t *job;

    if (epx__load_u32(&net->is_resting) != 0) {
        drop_transfers(net, rank);
    }

    while (has_room(peer) &&
           (job = epx__net_ring_first(&peer->rings[0])) != NULL) {
        post_signal(net, rank, job);
        take(net, &peer->rings[0]);
    }
    while (has_room(peer) &&
           peer->credit_used < EPX__NET_CREDIT_PIECES * net->piece_bytes &&
           (job = epx__net_ring_first(&peer->rings[1])) != NULL &&
           epx__net_has_place(net, rank, job)) {
        if (post_piece(net, rank, job)) {
            take(net, &peer->rings[1]);
        }
    }
    if (epx__load_u32(&net->closing) != 0 && !peer->bye_is_sent &&
        has_room(peer) && epx__net_is_drained(net, rank)) {
        const epx__net_job_t bye = { .header = { .kind = EPX__NET_KIND_BYE } };

        peer->bye_is_sent = true;
        post_signal(net, rank, &bye);
    }
    epx__net_bundle_post(net, rank);
}

bool
epx__net_is_drained(epx__net_t *net, int32_t rank)
{
    epx__net_peer_t *peer = &net->peers[rank];

    return peer->next_acked == peer->next_sent &&
           epx__net_ring_first(&peer->rings[0]) == NULL &&
           epx__net_ring_first(&peer->rings[1]) == NULL;
}

void
epx__net_send_ack(epx__net_t *net, int32_t rank)
{
    epx__net_peer_t *peer = &net->peers[rank];

    peer->ack.header = (epx__net_header_t){ .kind = EPX__NET_KIND_ACK };
    stamp(net, peer, &peer->ack.header);
    peer->ack_is_posted = true;
    epx__net_count(&net->stats.acks_sent, 1);
    epx__net_move(net, rank, &peer->ack);
}

/* Both have happened, in either order: its memory is the engine's again. */
static void
finish(epx__net_t *net, int32_t rank, epx__net_outgoing_t *out)
{
    epx__net_done_t *done = out->done;

    out->done = NULL;
    if (done != NULL) {
        epx__net_done_drop(net, done, rank,
                           epx__net_state(&net->peers[rank]) == EPX__PEER_GONE
                               ? EPX_ERR_PEER_LOST
                               : EPX_OK);
    }
}

/* Look again at a peer for which something may have been held back. */
static void
mark_if_more(epx__net_t *net, int32_t rank)
{
    epx__net_peer_t *peer = &net->peers[rank];

    if (peer->ack_due > 0 || epx__load_u32(&net->closing) != 0 ||
        epx__net_ring_first(&peer->rings[0]) != NULL ||
        epx__net_ring_first(&peer->rings[1]) != NULL) {
        epx__net_mark(net, rank);
    }
}

void
epx__net_sent(epx__net_t *net, int32_t rank, epx__net_message_t *message)
{
    epx__net_peer_t *peer = &net->peers[rank];
    epx__net_outgoing_t *out = (epx__net_outgoing_t *)message;

    if (message == &peer->ack) {
        peer->ack_is_posted = false;
    } else {
        out->is_posted = false;
        (void)epx__add_u32(&net->under_way, (uint32_t)-1);
        if (out->is_acked) {
            finish(net, rank, out);
        }
    }
    mark_if_more(net, rank);
}

static void
set_acked(epx__net_t *net, int32_t rank, uint64_t sequence)
{
    epx__net_peer_t *peer = &net->peers[rank];
    epx__net_outgoing_t *out = outgoing(peer, sequence);

    if (!out->is_acked) {
        out->is_acked = true;
        peer->credit_used -= out->message.header.bytes;
        if (!out->is_posted) {
            finish(net, rank, out);
        }
    }
}

void
epx__net_acked(epx__net_t *net, int32_t rank, uint64_t acked, uint64_t bits)
{
    epx__net_peer_t *peer = &net->peers[rank];
    uint64_t before = peer->next_acked;

    for (uint64_t s = before; s < peer->next_sent; s++) {
        if (s <= acked || (s - acked - 1 < EPX__NET_WINDOW &&
                           (bits >> (s - acked - 1) & 1) != 0)) {
            set_acked(net, rank, s);
        }
    }
    while (peer->next_acked < peer->next_sent &&
           outgoing(peer, peer->next_acked)->is_acked) {
        peer->next_acked++;
    }
    if (peer->next_acked != before) {
        peer->heard_ns = net->now_ns;
        mark_if_more(net, rank);
    }
}

void
epx__net_drop_all(epx__net_t *net, int32_t rank)
{
    epx__net_peer_t *peer = &net->peers[rank];
    epx__net_job_t *job;

    for (uint64_t s = peer->next_acked; s < peer->next_sent; s++) {
        set_acked(net, rank, s);
    }
    peer->next_acked = peer->next_sent;
    for (int i = 0; i < 2; i++) {
        while ((job = epx__net_ring_first(&peer->rings[i])) != NULL) {
            epx__net_done_drop(net, job->done, rank, EPX_ERR_PEER_LOST);
            take(net, &peer->rings[i]);
        }
    }
}
