/* SPDX-License-Identifier: MIT */
/* The second wire, the sender's side: a message is put in parts, then flushed,
 * then the word is put that tells of it. */
#include "net/net_internal.h"

/* Where the payload of a message goes, and by what. */
typedef struct target {
    void *reach;
    uint64_t address;
} target_t;

static void
put_range(epx__net_put_t *put, void *reach, uint64_t address,
          const struct iovec *range, bool is_on_card)
{
    put->pending++;
    put->net->puts->put(put->net->state, put->rank, reach, address, range,
                        is_on_card, put);
}

static void
put_flush(epx__net_put_t *put)
{
    put->pending++;
    put->net->puts->flush(put->net->state, put->rank, put);
}

static target_t
payload_target(const epx__net_t *net, const epx__net_peer_t *peer,
               const epx__net_header_t *header)
{
    const epx__net_reach_t *slot;

    if (epx__net_goes_to_box(net, header)) {
        return (target_t){ peer->box.reach,
                           peer->box.address +
                               epx__net_box_cell(&net->box, header->sequence) +
                               sizeof(*header) };
    }
    /* epx__net_has_place has seen that the whole turn fits. */
    slot = &peer->slots_there[epx__net_half(header->channel, header->turn)];
    return (target_t){ slot->reach, slot->address + header->offset };
}

/* All that has to be there before the word is. */
static void
put_message(epx__net_put_t *put)
{
    const epx__net_t *net = put->net;
    const epx__net_peer_t *peer = &net->peers[put->rank];
    epx__net_message_t *message = put->message;
    epx__net_header_t *header = &message->header;
    target_t to = payload_target(net, peer, header);
    const struct iovec all = { header, sizeof(*header) };
    bool is_on_card = header->kind == EPX__NET_KIND_PIECE &&
                      epx__net_is_on_card(net, header->channel);

    for (uint32_t i = 0; i < message->num_ranges; i++) {
        const struct iovec *range = &message->ranges[i];

        if (range->iov_len > 0) {
            put_range(put, to.reach, to.address, range, is_on_card);
            to.address += range->iov_len;
        }
    }
    put_range(put, peer->box.reach,
              peer->box.address +
                  epx__net_box_cell(&net->box, header->sequence),
              &all, false);
    put_flush(put);
}

/* Nothing follows on a sequenced word: its message is acknowledged.  That of an
 * acknowledgement is flushed, for the next one goes to the same place. */
static void
put_word(epx__net_put_t *put)
{
    const epx__net_peer_t *peer = &put->net->peers[put->rank];
    const struct iovec range = { &put->word, sizeof(put->word) };

    put->is_last = true;
    put_range(put, peer->box.reach, peer->box.address + put->word_at, &range,
              false);
    if (put->word_at == 0) {
        put_flush(put);
    }
}

void
epx__net_put_ended(epx__net_put_t *put, bool ok)
{
    put->has_failed = put->has_failed || !ok;
    if (--put->pending > 0) {
        return;
    }
    if (put->is_last || put->has_failed) {
        epx__net_sent(put->net, put->rank, put->message);
        return;
    }
    put->pending = 1; /* not over before all has begun */
    put_word(put);
    epx__net_put_ended(put, true);
}

void
epx__net_move(epx__net_t *net, int32_t rank, epx__net_message_t *message)
{
    epx__net_peer_t *peer = &net->peers[rank];
    uint64_t sequence = message->header.sequence;
    bool is_ack = message == &peer->ack;
    epx__net_put_t *put;

    if (net->puts == NULL) {
        net->backend->post(net->state, rank, message);
        return;
    }
    put = &peer->puts[is_ack ? EPX__NET_WINDOW : sequence % EPX__NET_WINDOW];
    *put = (epx__net_put_t){
        .net = net,
        .rank = rank,
        .message = message,
        .word = is_ack ? message->header.acked : sequence,
        .word_at = is_ack ? 0 : epx__net_box_word(sequence),
        .pending = 1,
    };
    if (!is_ack) {
        put_message(put);
    }
    epx__net_put_ended(put, true);
}

/* --- Where slots are --------------------------------------------------- */

bool
epx__net_has_place(epx__net_t *net, int32_t rank, const epx__net_job_t *job)
{
    epx__net_peer_t *peer = &net->peers[rank];
    const epx__net_header_t *header = &job->header;
    const epx__net_reach_t *slot;

    if (net->puts == NULL ||
        epx__net_fits_box(net, header->channel, header->total)) {
        return true;
    }
    slot = &peer->slots_there[epx__net_half(header->channel, header->turn)];
    if (slot->reach == NULL) {
        if (!peer->owes_note && peer->next_acked == peer->next_sent) {
            peer->heard_ns = net->now_ns; /* its turn to tell */
        }
        peer->owes_note = true;
        return false;
    }
    if (header->total > slot->bytes) {
        (void)epx__net_refuse(net, rank,
                              "about a slot that is smaller than its turn");
        return false;
    }
    return true;
}

/* Whether a piece that is put to that half of a slot is not over: not
 * acknowledged, or not all there, whatever the peer says of it. */
static bool
is_in_use(const epx__net_t *net, const epx__net_peer_t *peer, uint64_t half)
{
    for (int i = 0; i < EPX__NET_WINDOW; i++) {
        const epx__net_outgoing_t *out = &peer->outgoing[i];
        const epx__net_header_t *header = &out->message.header;

        if (!epx__net_goes_to_box(net, header) &&
            epx__net_half(header->channel, header->turn) == half &&
            (!out->is_acked || (out->is_posted && !peer->puts[i].is_last))) {
            return true;
        }
    }
    return false;
}

void
epx__net_told(epx__net_t *net, int32_t rank, const epx__net_header_t *header)
{
    epx__net_peer_t *peer = &net->peers[rank];
    const epx__net_note_t *note = &peer->note;
    uint64_t half = epx__net_half(header->channel, header->turn);
    epx__net_reach_t *slot = &peer->slots_there[half];

    if (note->bytes == 0 || note->address > UINT64_MAX - note->bytes ||
        note->key_bytes == 0 || note->key_bytes > sizeof(note->key)) {
        (void)epx__net_refuse(net, rank, "about a slot that cannot be");
        return;
    }
    /* The key to the old place goes: a peer acknowledges what was put there
     * before it gives the place up. */
    if (is_in_use(net, peer, half)) {
        (void)epx__net_refuse(net, rank, "about a slot that is in use");
        return;
    }
    slot->reach = net->puts->reach(net->state, rank, note, slot->reach);
    slot->address = note->address;
    slot->bytes = note->bytes;
    peer->owes_note = false;
    if (slot->reach == NULL) {
        (void)epx__net_refuse(net, rank, "about a slot with a key of no use");
        return;
    }
    epx__net_mark(net, rank); /* for the transfers that waited for it */
}
