/* SPDX-License-Identifier: MIT */
/* The second wire, the receiver's side: boxes that peers put messages into, and
 * slots that are lent to them. */
#include "net/net_internal.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

epx__net_box_t
epx__net_box_make(const epx__map_t *map)
{
    epx__net_box_t box = { 0 };

    box.inline_bytes = map->count_row_bytes > sizeof(epx__net_verdict_t)
                           ? map->count_row_bytes
                           : sizeof(epx__net_verdict_t);
    _Static_assert(sizeof(epx__net_verdict_t) >= sizeof(epx__net_note_t) &&
                       sizeof(epx__net_verdict_t) >= sizeof(epx__pledge_t) &&
                       sizeof(epx__net_verdict_t) >= sizeof(epx__post_t),
                   "whatever is no piece fits");
    box.inline_bytes = epx__round_up(box.inline_bytes, 8);
    box.cells = epx__round_up(epx__net_box_word(EPX__NET_WINDOW - 1) + 8, 64);
    box.cell_bytes =
        epx__round_up(sizeof(epx__net_header_t) + box.inline_bytes, 64);
    box.bytes = box.cells + EPX__NET_WINDOW * box.cell_bytes;
    return box;
}

/* --- Opening and closing ----------------------------------------------- */

/* How many boxes `keeper` keeps for ranks lower than this: those that are apart
 * from it have one each, in their order. */
static uint64_t
boxes_before(const epx__net_config_t *config, int32_t keeper, int32_t rank)
{
    uint64_t count = 0;

    for (int32_t r = 0; r < rank; r++) {
        count += epx__net_is_apart(config, keeper, r);
    }
    return count;
}

epx_status_t
epx__net_boxes_open(epx__net_t *net, epx__net_note_t *note)
{
    const epx__net_config_t *config = &net->config;
    uint64_t count = boxes_before(config, config->rank, config->num_ranks);
    uint64_t bytes;
    char *next;
    void *share;

    net->box = epx__net_box_make(&net->map);
    bytes = epx__round_up((count > 0 ? count : 1) * net->box.bytes, EPX__PAGE);
    net->boxes = aligned_alloc(EPX__PAGE, bytes);
    if (net->boxes == NULL) {
        return epx__fail(EPX_ERR_NO_MEMORY,
                         "no memory for what %" PRIu64 " ranks put here",
                         count);
    }
    memset(net->boxes, 0, bytes);
    next = net->boxes;
    for (int32_t rank = 0; rank < config->num_ranks; rank++) {
        if (epx__net_is_apart(config, config->rank, rank)) {
            net->peers[rank].box_here = next;
            next += net->box.bytes;
        }
    }
    return net->puts->share(net->state, net->boxes, bytes, false, note, &share);
}

epx_status_t
epx__net_boxes_reach(epx__net_t *net, int32_t rank, const epx__net_note_t *note)
{
    epx__net_reach_t *box = &net->peers[rank].box;
    uint64_t at =
        boxes_before(&net->config, rank, net->config.rank) * net->box.bytes;

    if (note->key_bytes == 0 || note->key_bytes > sizeof(note->key) ||
        note->address > UINT64_MAX - note->bytes ||
        note->bytes < at + net->box.bytes) {
        return epx__fail(EPX_ERR_PEER_DATA,
                         "rank %d has no place for the messages of rank %d",
                         rank, net->config.rank);
    }
    box->reach = net->puts->reach(net->state, rank, note, NULL);
    box->address = note->address + at;
    box->bytes = net->box.bytes;
    return box->reach != NULL
               ? EPX_OK
               : epx__fail(EPX_ERR_SYSTEM,
                           "rank %d cannot use the key to the memory of rank "
                           "%d",
                           net->config.rank, rank);
}

void
epx__net_boxes_close(epx__net_t *net)
{
    for (int32_t rank = 0; net->peers != NULL && rank < net->config.num_ranks;
         rank++) {
        epx__net_peer_t *peer = &net->peers[rank];

        for (uint32_t i = 0;
             peer->lent != NULL && i < 2 * net->config.num_channels; i++) {
            free(peer->lent[i]);
        }
        free(peer->lent);
        free(peer->slots_there);
        free(peer->puts);
    }
    free(net->boxes);
}

/* --- Taking messages ---------------------------------------------------- */

static uint64_t
load_word(const char *box, uint64_t at)
{
    /* An acquire of what was put before the peer's flush. */
    return epx__load_acquire_u64((const uint64_t *)(const void *)(box + at));
}

/* As a message that only acknowledges says it; the word has no room for what
 * came out of turn, of which there is none here. */
static void
take_ack(epx__net_t *net, int32_t rank, uint64_t acked)
{
    const epx__net_header_t header = {
        .magic = EPX__NET_MAGIC,
        .version = EPX__NET_VERSION,
        .kind = EPX__NET_KIND_ACK,
        .group = net->group,
        .source = (uint32_t)rank,
        .acked = acked,
    };
    void *to;

    (void)epx__net_came(net, rank, &header, sizeof(header), 0, &to);
}

static void
take_message(epx__net_t *net, int32_t rank, uint64_t sequence)
{
    const char *cell =
        net->peers[rank].box_here + epx__net_box_cell(&net->box, sequence);
    epx__net_header_t header;
    uint64_t landing;
    void *to;

    epx__copy_in(&header, cell, sizeof(header));
    if (header.sequence != sequence) {
        (void)epx__net_refuse(net, rank,
                              "of another sequence number than its word says");
        return;
    }
    landing =
        epx__net_came(net, rank, &header, sizeof(header), header.bytes, &to);
    if (landing == EPX__NET_DROP) {
        return;
    }
    if (header.bytes > 0 && epx__net_goes_to_box(net, &header)) {
        epx__copy_in(to, cell + sizeof(header), header.bytes);
    }
    epx__net_landed(net, rank, landing, true);
}

static bool
may_come(const epx__net_peer_t *peer)
{
    uint32_t state = epx__net_state(peer);

    return (state == EPX__PEER_UP || state == EPX__PEER_LEFT) &&
           peer->doom == NULL;
}

/* In the order of their numbers, so that a note is known when what was sent
 * after it is. */
static bool
poll_box(epx__net_t *net, int32_t rank)
{
    epx__net_peer_t *peer = &net->peers[rank];
    const char *box = peer->box_here;
    uint64_t acked = load_word(box, 0);
    bool any = acked != peer->box_acked;

    if (any) {
        peer->box_acked = acked;
        take_ack(net, rank, acked);
    }
    for (int i = 0; i < EPX__NET_WINDOW && may_come(peer); i++) {
        uint64_t next = peer->next_received;
        uint64_t word = load_word(box, epx__net_box_word(next));
        uint64_t before = next > EPX__NET_WINDOW ? next - EPX__NET_WINDOW : 0;

        if (word == before) {
            return any;
        }
        any = true;
        if (word == next) {
            take_message(net, rank, next);
        } else {
            (void)epx__net_refuse(net, rank,
                                  "with a sequence number that is not its "
                                  "turn");
        }
    }
    return any;
}

bool
epx__net_boxes_poll(epx__net_t *net)
{
    bool any = false;

    for (int32_t rank = 0; rank < net->config.num_ranks; rank++) {
        if (may_come(&net->peers[rank])) {
            any = poll_box(net, rank) || any;
        }
    }
    return any;
}

/* --- Lending slots ------------------------------------------------------ */

/* The share of the memory; `like` is the half that lies in the same place,
 * whose share serves both, or NULL. */
static epx_status_t
share_half(epx__net_t *net, uint32_t channel, const epx__net_lent_t *like,
           void *memory, uint64_t bytes, epx__net_lent_t *lent)
{
    epx_status_t status;

    if (like != NULL) {
        lent->note = like->note;
        return EPX_OK;
    }
    epx__net_crank_take(net);
    status = net->puts->share(net->state, memory, bytes,
                              epx__net_is_on_card(net, channel), &lent->note,
                              &lent->share);
    epx__net_crank_leave(net);
    return status;
}

static epx_status_t
lend_half(epx__net_t *net, uint32_t channel, int32_t source, uint64_t turn,
          const epx__net_lent_t *like, void *memory, uint64_t bytes)
{
    epx__net_lent_t *lent = calloc(1, sizeof(*lent));
    epx__net_job_t note = { .header = { .kind = EPX__NET_KIND_NOTE,
                                        .channel = channel,
                                        .turn = turn },
                            .num_ranges = 1,
                            .bytes = sizeof(lent->note) };
    epx_status_t status;

    if (lent == NULL) {
        return epx__fail(EPX_ERR_NO_MEMORY, "no memory to lend a slot");
    }
    status = share_half(net, channel, like, memory, bytes, lent);
    if (status != EPX_OK) {
        free(lent);
        return status;
    }
    net->peers[source].lent[epx__net_half(channel, turn)] = lent;
    lent->told.pending = 1;
    note.one = (struct iovec){ &lent->note, sizeof(lent->note) };
    note.done = &lent->told;
    status = epx__net_submit(net, source, 0, &note, false);
    if (status != EPX_OK) {
        lent->told.pending = 0;
    }
    return status;
}

epx_status_t
epx__net_slot_lend(epx__net_t *net, uint32_t channel, int32_t source,
                   uint64_t turn, void *const halves[2], uint64_t bytes)
{
    epx__net_lent_t *const *lent = net->peers[source].lent;
    epx_status_t status;

    /* What fits a box needs no slot to be put to; and who is gone needs none.
     */
    if (net->puts == NULL || epx__net_fits_box(net, channel, bytes) ||
        epx__net_state(&net->peers[source]) != EPX__PEER_UP) {
        return EPX_OK;
    }
    status =
        lend_half(net, channel, source, turn, NULL, halves[turn % 2], bytes);
    if (status != EPX_OK) {
        return status;
    }
    return lend_half(net, channel, source, turn + 1,
                     halves[0] == halves[1] ? lent[epx__net_half(channel, turn)]
                                            : NULL,
                     halves[(turn + 1) % 2], bytes);
}

static bool
is_told(const epx__net_lent_t *lent)
{
    return lent == NULL || epx__net_done_test(&lent->told);
}

epx_status_t
epx__net_slot_take_back(epx__net_t *net, uint32_t channel, int32_t source,
                        int64_t deadline_ns)
{
    epx__net_lent_t **lent;

    if (net->puts == NULL) {
        return EPX_OK;
    }
    lent = &net->peers[source].lent[epx__net_half(channel, 0)];
    for (;;) {
        uint32_t event = epx__net_event(net);

        if (is_told(lent[0]) && is_told(lent[1])) {
            break;
        }
        if (epx__now_ns() >= deadline_ns) {
            return epx__fail(EPX_ERR_TIMEOUT,
                             "rank %d has not heard of its slot of channel "
                             "%" PRIu32,
                             source, channel);
        }
        epx__net_event_wait(net, event, deadline_ns);
    }
    epx__net_crank_take(net);
    for (int i = 0; i < 2; i++) {
        if (lent[i] != NULL) {
            if (lent[i]->share != NULL) {
                net->puts->unshare(net->state, lent[i]->share);
            }
            free(lent[i]);
            lent[i] = NULL;
        }
    }
    epx__net_crank_leave(net);
    return EPX_OK;
}
