/* SPDX-License-Identifier: MIT */
/* The receiving half of a link: every message is checked before it gets a
 * place, and counts only once it has landed. */
#include "core/group.h"
#include "net/net_internal.h"

/* How long the acknowledgement of a piece waits for the rest of its turn, where
 * more comes: a message of its own costs more than it is worth, unless the
 * sender needs credit. */
#define ACK_PART_NS (500 * EPX__NS_PER_MS / 1000)

uint64_t
epx__net_refuse(epx__net_t *net, int32_t rank, const char *why)
{
    epx__net_count(&net->stats.refused, 1);
    if (rank >= 0 && net->peers[rank].doom == NULL) {
        net->peers[rank].doom = why;
        epx__net_mark(net, rank);
    }
    return EPX__NET_DROP;
}

/* A place in the slot, and no way back: the slot is not closed while it has
 * writers.  False: it has been closed this moment. */
static bool
place_piece(epx__net_t *net, epx__net_peer_t *peer,
            const epx__net_header_t *header, void **to_p)
{
    epx__net_half_t *half =
        &peer->slots[header->channel].halves[header->turn % 2];

    (void)epx__add_u32(&half->writers, 1);
    if (__atomic_load_n(&half->open_turn, __ATOMIC_SEQ_CST) != header->turn) {
        (void)epx__add_u32(&half->writers, (uint32_t)-1);
        epx__net_event_raise(net);
        return false;
    }
    if (half->turn != header->turn) {
        half->turn = header->turn;
        half->total = header->total;
        half->step = header->step;
        half->gate = header->gate;
        half->placed = 0;
        half->landed = 0;
    }
    half->placed += header->bytes;
    *to_p = half->base + header->offset;
    return true;
}

static bool
place(epx__net_t *net, int32_t rank, const epx__net_header_t *header,
      void **to_p)
{
    char *segment = net->config.segment;

    *to_p = NULL;
    switch (header->kind) {
    case EPX__NET_KIND_POST:
        *to_p = epx__map_post(&net->map, segment, header->step, (uint32_t)rank);
        return true;
    case EPX__NET_KIND_COUNTS:
        *to_p =
            epx__map_counts(&net->map, segment, header->step, (uint32_t)rank);
        return true;
    case EPX__NET_KIND_VERDICT:
        *to_p = &net->peers[rank].verdict;
        return true;
    case EPX__NET_KIND_PLEDGE:
        *to_p = &net->peers[rank].pledge_in;
        return true;
    case EPX__NET_KIND_NOTE:
        *to_p = &net->peers[rank].note;
        return true;
    case EPX__NET_KIND_PIECE:
        return place_piece(net, &net->peers[rank], header, to_p);
    default:
        return true;
    }
}

static void
note_ack_due(epx__net_t *net, int32_t rank, bool is_part)
{
    epx__net_peer_t *peer = &net->peers[rank];
    int64_t by_ns = net->now_ns + (is_part ? ACK_PART_NS : EPX__NET_ACK_NS);

    if (peer->ack_due++ == 0 || by_ns < peer->ack_by_ns) {
        peer->ack_by_ns = by_ns;
    }
    epx__net_mark(net, rank);
}

/* The message counts: it will be acknowledged.  Part: more is to come of its
 * turn. */
static void
take_in(epx__net_t *net, int32_t rank, const epx__net_header_t *header,
        bool is_part)
{
    epx__net_peer_t *peer = &net->peers[rank];

    epx__net_count(&net->stats.messages_received, 1);
    epx__net_count(&net->stats.bytes_received, header->bytes);
    peer->finished |= UINT64_C(1) << (header->sequence - peer->next_received);
    while ((peer->finished & 1) != 0) {
        peer->finished >>= 1;
        peer->started >>= 1;
        peer->next_received++;
    }
    note_ack_due(net, rank, is_part);
}

uint64_t
epx__net_came(epx__net_t *net, int32_t rank, const void *bytes_of_header,
              size_t header_bytes, uint64_t bytes, void **to_p)
{
    epx__net_peer_t *peer = rank >= 0 ? &net->peers[rank] : NULL;
    epx__net_header_t header;
    epx__net_view_t view;
    bool is_stray;
    const char *why;

    if (peer == NULL) {
        return epx__net_refuse(net, rank, "without being known");
    }
    if (epx__net_state(peer) == EPX__PEER_GONE || peer->doom != NULL) {
        return EPX__NET_DROP;
    }
    view = (epx__net_view_t){
        .group = net->group,
        .source = (uint32_t)rank,
        .num_channels = net->config.num_channels,
        .map = &net->map,
        .slots = peer->slots,
        .last_step = epx__load_acquire_u64(&net->last_step),
        .next_received = peer->next_received,
        .started = peer->started,
        .next_sent = peer->next_sent,
        .has_notes = net->puts != NULL,
    };
    why = epx__net_check(&view, bytes_of_header, header_bytes, bytes, &header,
                         &is_stray);
    if (why != NULL) {
        return epx__net_refuse(net, rank, why);
    }
    epx__net_acked(net, rank, header.acked, header.acked_bits);
    if (header.kind == EPX__NET_KIND_ACK) {
        return EPX__NET_DROP;
    }
    if (epx__net_is_duplicate(&view, header.sequence)) {
        epx__net_count(&net->stats.duplicates, 1);
        note_ack_due(net, rank, false); /* the sender may have missed it */
        return EPX__NET_DROP;
    }
    peer->started |= UINT64_C(1) << (header.sequence - peer->next_received);
    peer->landings[header.sequence % EPX__NET_WINDOW] = header;
    /* Strays are of ranks that do not know yet that this one is leaving, say,
     * or has given up an operation: nobody waits for the bytes. */
    if (is_stray || !place(net, rank, &header, to_p)) {
        take_in(net, rank, &header, false);
        return EPX__NET_DROP;
    }
    return header.sequence;
}

/* Raise the arrival as a mapped peer would have, unless it has been. */
static void
arrive(epx__net_t *net, int32_t rank, uint64_t step, uint32_t gate)
{
    void *segment = net->config.segment;
    const uint64_t *arrival = epx__map_arrival(
        &net->map, segment, step, (epx__gate_t)gate, (uint32_t)rank);

    if (epx__load_acquire_u64(arrival) < step) {
        epx__arrive(&net->map, segment, (uint32_t)rank, step,
                    (epx__gate_t)gate);
    }
}

static void
finish_turn(epx__net_t *net, int32_t rank, epx__net_half_t *half)
{
    half->received = half->total;
    /* Acquired in epx__net_arrived. */
    epx__store_release_u64(&half->done_turn, half->turn);
    if (half->step != 0) {
        arrive(net, rank, half->step, half->gate);
    }
}

/* Returns whether its turn is whole. */
static bool
land_piece(epx__net_t *net, int32_t rank, const epx__net_header_t *header,
           bool ok)
{
    epx__net_half_t *half =
        &net->peers[rank].slots[header->channel].halves[header->turn % 2];
    /* Else its turn has been given up, and another has begun since. */
    bool counts = ok && half->turn == header->turn;
    bool is_whole;

    half->landed += counts ? header->bytes : 0;
    is_whole = counts && half->landed == half->total;
    if (is_whole) {
        finish_turn(net, rank, half);
    }
    (void)epx__add_u32(&half->writers, (uint32_t)-1);
    if (is_whole ||
        __atomic_load_n(&half->open_turn, __ATOMIC_SEQ_CST) != header->turn) {
        epx__net_event_raise(net);
    }
    return is_whole;
}

void
epx__net_landed(epx__net_t *net, int32_t rank, uint64_t landing, bool ok)
{
    epx__net_peer_t *peer = &net->peers[rank];
    const epx__net_header_t *header =
        &peer->landings[landing % EPX__NET_WINDOW];
    bool is_part = false;

    if (header->kind == EPX__NET_KIND_PIECE) {
        is_part = !land_piece(net, rank, header, ok);
    } else if (header->kind == EPX__NET_KIND_BYE) {
        __atomic_store_n(&peer->state, EPX__PEER_LEFT, __ATOMIC_RELEASE);
        epx__net_wake_gates(net);
        epx__net_event_raise(net);
    } else if (header->kind == EPX__NET_KIND_VERDICT && ok) {
        epx__net_heard(net, rank);
    } else if (header->kind == EPX__NET_KIND_PLEDGE && ok) {
        epx__net_hear_pledge(net, rank);
    } else if (header->kind == EPX__NET_KIND_NOTE) {
        epx__net_told(net, rank, header);
    } else if (ok) {
        arrive(net, rank, header->step, header->gate);
    }
    if (ok) { /* else its link is lost, too */
        take_in(net, rank, header, is_part);
    }
}
