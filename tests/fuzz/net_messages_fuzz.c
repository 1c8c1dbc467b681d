/* SPDX-License-Identifier: MIT */
/*
 * A net whose only peer sends anything, on either wire, while this rank goes on
 * as an engine does: opens and closes slots, sends, starts steps.  Nothing is
 * written but where a message may write, and what has arrived fits its slot.
 *
 * Input: the wire (1 byte), then actions.  An action is a byte, whose lowest
 * bits choose it:
 *
 *     0   a message of so many raw bytes (1 byte) as its header
 *     1   a message that is right but for what is overwritten: a kind (1 byte),
 *         which fields (2 bytes, a bit each), a value for each (8 bytes)
 *     2   on the first wire: a bundle of up to 4 such messages, then so many
 *         raw bytes (1 byte); on the second: a word (8 bytes) into the place of
 *         the next one
 *     3   this rank: the rest of the action's byte tells what
 *
 * Payloads repeat the action's byte.
 */
#include "net/net_internal.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum {
    PEER = 1,
    NUM_CHANNELS = 4,
    NUM_CARD_CHANNELS = 1,
    SLOT_BYTES = 3000, /* more than fits a box, and less than a page */
    PATTERN = 0x5a,
    MAX_EXPERTS = 8,
};

typedef struct input {
    const uint8_t *data;
    size_t left;
} input_t;

typedef struct victim {
    epx__net_t *net;
    epx__map_t map;
    char *segment;
    char *halves[NUM_CHANNELS][2];
    bool is_open[NUM_CHANNELS];
    uint64_t next_turn[NUM_CHANNELS]; /* to the peer */
    uint64_t step;
    uint64_t sequence; /* of the peer's next message */
    char sent[SLOT_BYTES];
    struct iovec range;
    epx__net_done_t done;
} victim_t;

static void
require(bool condition)
{
    if (!condition) {
        abort();
    }
}

static uint64_t
take(input_t *input, size_t bytes)
{
    uint64_t value = 0;
    size_t count = bytes < input->left ? bytes : input->left;

    memcpy(&value, input->data, count);
    input->data += count;
    input->left -= count;
    return value;
}

/* ---- a network that takes everything, and of which nothing comes ---- */

static epx_status_t
open_nothing(epx__net_t *net, const epx__net_config_t *config, void **state_p,
             void *address, size_t *address_bytes_p, int *fd_p)
{
    (void)config, (void)address, (void)fd_p;
    *state_p = net;
    *address_bytes_p = 0;
    return EPX_OK;
}

static epx_status_t
connect_nothing(void *state, int32_t peer, const void *address,
                size_t address_bytes)
{
    (void)state, (void)peer, (void)address, (void)address_bytes;
    return EPX_OK;
}

static void
post_nowhere(void *state, int32_t peer, epx__net_message_t *message)
{
    epx__net_sent(state, peer, message);
}

static bool
poll_nothing(void *state, int64_t now_ns, bool may_sleep, int64_t *wake_ns_p)
{
    (void)state, (void)now_ns, (void)may_sleep, (void)wake_ns_p;
    return false;
}

static void
cancel_nobody(void *state, int32_t peer)
{
    (void)state, (void)peer;
}

static void
close_nothing(void *state)
{
    (void)state;
}

static bool
are_native(const epx__net_config_t *config)
{
    (void)config;
    return false;
}

static epx_status_t
share_nothing(void *state, void *memory, uint64_t bytes, bool is_on_card,
              epx__net_note_t *note, void **share_p)
{
    (void)is_on_card;
    *share_p = state;
    note->address = (uint64_t)(uintptr_t)memory;
    note->bytes = bytes;
    note->key_bytes = 1;
    return EPX_OK;
}

static void
unshare_nothing(void *state, void *share)
{
    require(share == state);
}

/* Keys that begin with an even byte are of use. */
static void *
reach_nothing(void *state, int32_t peer, const epx__net_note_t *note, void *old)
{
    (void)peer, (void)old;
    return note->key[0] % 2 == 0 ? state : NULL;
}

static void
put_nowhere(void *state, int32_t peer, void *reach, uint64_t address,
            const struct iovec *range, bool is_on_card, epx__net_put_t *put)
{
    (void)peer, (void)address, (void)range, (void)is_on_card;
    require(reach == state);
    epx__net_put_ended(put, true);
}

static void
flush_nothing(void *state, int32_t peer, epx__net_put_t *put)
{
    (void)state, (void)peer;
    epx__net_put_ended(put, true);
}

static const epx__net_puts_t puts_nowhere = {
    .are_native = are_native,
    .share = share_nothing,
    .unshare = unshare_nothing,
    .reach = reach_nothing,
    .put = put_nowhere,
    .flush = flush_nothing,
};

static const epx__net_backend_t nowhere = {
    .name = "nowhere",
    .open = open_nothing,
    .connect = connect_nothing,
    .post = post_nowhere,
    .poll = poll_nothing,
    .cancel_peer = cancel_nobody,
    .close = close_nothing,
    .puts = &puts_nowhere,
};

/* ---- this rank ---- */

/* The peer says what this rank does. */
static epx_status_t
gather(void *context, const void *send, void *recv, size_t bytes,
       int64_t deadline_ns)
{
    char *both = recv;

    (void)context, (void)deadline_ns;
    memcpy(both, send, bytes);
    memcpy(both + bytes, send, bytes);
    if (bytes == sizeof(epx__net_card_t)) {
        ((epx__net_card_t *)(void *)(both + bytes))->rank = PEER;
    }
    return EPX_OK;
}

static bool
take_pledge(void *context, int32_t rank, const epx__pledge_t *pledge)
{
    (void)context;
    require(rank == PEER);
    return pledge->stage % 2 == 0;
}

static void
take_failure(void *context, int32_t rank, uint32_t epoch,
             const epx__error_t *error, bool has_aborted)
{
    (void)context, (void)epoch, (void)has_aborted;
    require(rank == PEER && memchr(error->text, '\0', sizeof(error->text)));
}

static void
be_born(victim_t *v, epx__net_wire_t wire)
{
    epx__net_config_t config = {
        .num_ranks = 2,
        .group_id = { 17, 42 },
        .allgather = gather,
        .map = &v->map,
        .num_channels = NUM_CHANNELS,
        .card_net.num_channels = NUM_CARD_CHANNELS,
        .timeout_ns = 1,
        .lost_after_ns = (uint64_t)EPX__NS_PER_SEC,
        .core = -1,
        .is_manual = true,
        .failed = take_failure,
        .pledged = take_pledge,
        .backend = &nowhere,
        .wire = wire,
    };

    *v = (victim_t){ .sequence = 1 };
    v->map = epx__map_make(2, MAX_EXPERTS);
    v->segment = aligned_alloc(EPX__PAGE, v->map.heap);
    memset(v->segment, 0, v->map.heap);
    v->range = (struct iovec){ v->sent, sizeof(v->sent) };
    config.segment = v->segment;
    for (int c = 0; c < NUM_CHANNELS; c++) {
        v->next_turn[c] = 1;
        /* Apart, so that the sanitizer sees who leaves one. */
        v->halves[c][0] = malloc(SLOT_BYTES);
        v->halves[c][1] = malloc(SLOT_BYTES);
        memset(v->halves[c][0], PATTERN, SLOT_BYTES);
        memset(v->halves[c][1], PATTERN, SLOT_BYTES);
    }
    require(epx__net_open(&v->net, &config) == EPX_OK);
}

static void
progress(victim_t *v)
{
    (void)epx__net_progress(v->net, epx__now_ns());
}

/* On the second wire no thread of the host writes to what may be a card's. */
static void
check_card_channel(const victim_t *v)
{
    for (int i = 0; i < SLOT_BYTES && v->net->puts != NULL; i++) {
        require(v->halves[NUM_CHANNELS - 1][0][i] == PATTERN &&
                v->halves[NUM_CHANNELS - 1][1][i] == PATTERN);
    }
}

static void
die(victim_t *v)
{
    check_card_channel(v);
    /* What is still under way goes, too. */
    epx__net_interrupt(v->net);
    for (uint32_t c = 0; c < NUM_CHANNELS; c++) {
        if (v->is_open[c]) {
            (void)epx__net_slot_close(v->net, c, PEER, 0);
        }
    }
    epx__net_close(v->net);
    for (int c = 0; c < NUM_CHANNELS; c++) {
        free(v->halves[c][0]);
        free(v->halves[c][1]);
    }
    free(v->segment);
}

static void
open_or_close(victim_t *v, uint32_t channel)
{
    void *const halves[2] = { v->halves[channel][0], v->halves[channel][1] };

    if (v->is_open[channel]) {
        v->is_open[channel] =
            epx__net_slot_close(v->net, channel, PEER, 0) != EPX_OK;
    } else {
        v->is_open[channel] =
            epx__net_slot_open(v->net, channel, PEER, 1 + v->step, halves,
                               SLOT_BYTES) == EPX_OK;
    }
}

static void
send_slot(victim_t *v, uint32_t channel)
{
    const epx__net_send_t transfer = {
        .peer = PEER,
        .channel = channel,
        .turn = v->next_turn[channel],
        .total = SLOT_BYTES,
        .ranges = &v->range,
        .num_ranges = 1,
        .done = &v->done,
    };

    if (epx__net_send(v->net, &transfer) == EPX_OK) {
        v->next_turn[channel]++;
    }
}

static void
check_arrived(victim_t *v, uint32_t channel)
{
    for (uint64_t turn = 1; turn < 8; turn++) {
        uint64_t bytes = 0;

        if (v->is_open[channel] &&
            epx__net_arrived(v->net, channel, PEER, turn, &bytes)) {
            require(bytes <= SLOT_BYTES);
            epx__net_slot_release(v->net, channel, PEER, turn);
        }
    }
}

static void
act(victim_t *v, unsigned what)
{
    uint32_t channel = what / 8 % NUM_CHANNELS;

    switch (what % 8) {
    case 0:
        open_or_close(v, channel);
        break;
    case 1:
        send_slot(v, channel);
        break;
    case 2:
        v->step++;
        epx__net_step_begin(v->net, v->step);
        break;
    case 3:
        check_arrived(v, channel);
        break;
    default:
        progress(v);
        break;
    }
}

/* ---- the peer ---- */

/* As the transport of the first wire brings it. */
static void
come(victim_t *v, const void *header, size_t header_bytes, uint64_t bytes,
     int filling)
{
    void *to = NULL;
    uint64_t landing =
        epx__net_came(v->net, PEER, header, header_bytes, bytes, &to);

    if (landing != EPX__NET_DROP) {
        require(bytes == 0 || to != NULL);
        if (bytes > 0) {
            memset(to, filling, bytes);
        }
        epx__net_landed(v->net, PEER, landing, filling % 16 != 15);
    }
    v->sequence = v->net->peers[PEER].next_received;
}

/* As a put of the second. */
static void
put(victim_t *v, const epx__net_header_t *header, int filling)
{
    epx__net_peer_t *peer = &v->net->peers[PEER];
    char *cell = peer->box_here + epx__net_box_cell(&v->net->box, v->sequence);

    memset(cell, filling, v->net->box.cell_bytes);
    memcpy(cell, header, sizeof(*header));
    epx__store_release_u64(
        (uint64_t *)(void *)(peer->box_here + epx__net_box_word(v->sequence)),
        v->sequence);
    progress(v);
    v->sequence = peer->next_received;
}

static uint64_t
bytes_of(epx__net_kind_t kind)
{
    switch (kind) {
    case EPX__NET_KIND_POST:
        return sizeof(epx__post_t);
    case EPX__NET_KIND_COUNTS:
        return sizeof(epx__count_row_t);
    case EPX__NET_KIND_VERDICT:
        return sizeof(epx__net_verdict_t);
    case EPX__NET_KIND_NOTE:
        return sizeof(epx__net_note_t);
    case EPX__NET_KIND_PLEDGE:
        return sizeof(epx__pledge_t);
    case EPX__NET_KIND_PIECE:
        return SLOT_BYTES;
    default:
        return 0;
    }
}

static epx__net_header_t
good_header(const victim_t *v, epx__net_kind_t kind)
{
    bool is_signal =
        kind >= EPX__NET_KIND_SIGNAL && kind <= EPX__NET_KIND_COUNTS;
    bool has_turn = kind == EPX__NET_KIND_PIECE || kind == EPX__NET_KIND_NOTE;

    return (epx__net_header_t){
        .magic = EPX__NET_MAGIC,
        .version = EPX__NET_VERSION,
        .kind = (uint8_t)kind,
        .group = v->net->group,
        .source = PEER,
        .sequence = kind == EPX__NET_KIND_ACK ? 0 : v->sequence,
        .step = is_signal ? v->step + 1 : 0,
        .turn = has_turn ? 1 : 0,
        .bytes = bytes_of(kind),
        .total = kind == EPX__NET_KIND_PIECE ? SLOT_BYTES : 0,
    };
}

static void
overwrite(epx__net_header_t *header, input_t *input)
{
#define FIELD(field)                                                   \
    do {                                                               \
        if ((fields & bit) != 0) {                                     \
            header->field = (__typeof__(header->field))take(input, 8); \
        }                                                              \
        bit <<= 1;                                                     \
    } while (0)
    uint64_t fields = take(input, 2), bit = 1;

    FIELD(channel);
    FIELD(sequence);
    FIELD(acked);
    FIELD(acked_bits);
    FIELD(step);
    FIELD(turn);
    FIELD(offset);
    FIELD(bytes);
    FIELD(total);
    FIELD(gate);
    FIELD(source);
    FIELD(group);
    FIELD(version);
    FIELD(magic);
#undef FIELD
}

static void
say(victim_t *v, input_t *input, unsigned action)
{
    epx__net_header_t header = good_header(v, (epx__net_kind_t)take(input, 1));

    overwrite(&header, input);
    if (v->net->puts != NULL) {
        put(v, &header, (int)action);
    } else {
        come(v, &header, sizeof(header), header.bytes, (int)action);
    }
}

static void
say_raw(victim_t *v, input_t *input, unsigned action)
{
    size_t bytes = take(input, 1);

    bytes = bytes < input->left ? bytes : input->left;
    come(v, input->data, bytes, action, (int)action);
    input->data += bytes;
    input->left -= bytes;
}

/* Their numbers follow each other.  In memory of just that size, so that the
 * sanitizer sees who reads on. */
static void
say_bundle(victim_t *v, input_t *input, unsigned action)
{
    unsigned count = 1 + action / 4 % 4;
    epx__net_header_t first = { 0 };
    char *rest = NULL;
    size_t bytes = 0, tail;

    for (unsigned i = 0; i < count; i++) {
        epx__net_header_t header =
            good_header(v, (epx__net_kind_t)take(input, 1));
        size_t payload, start = i == 0 ? 0 : sizeof(header);

        header.sequence += header.sequence > 0 ? i : 0;
        overwrite(&header, input);
        payload = header.bytes < SLOT_BYTES ? header.bytes : SLOT_BYTES;
        rest = realloc(rest, bytes + start + payload + 1);
        if (i == 0) {
            first = header;
        }
        memcpy(rest + bytes, &header, start);
        memset(rest + bytes + start, (int)action, payload);
        bytes += start + payload;
    }
    tail = take(input, 1);
    tail = tail < input->left ? tail : input->left;
    rest = realloc(rest, bytes + tail + 1);
    memcpy(rest + bytes + 1, input->data, tail);
    memmove(rest + 1, rest, bytes);
    input->data += tail;
    input->left -= tail;
    epx__net_came_whole(v->net, PEER, &first, sizeof(first), rest + 1,
                        bytes + tail);
    free(rest);
    v->sequence = v->net->peers[PEER].next_received;
}

static void
put_word(victim_t *v, input_t *input)
{
    epx__net_peer_t *peer = &v->net->peers[PEER];
    uint64_t word = take(input, 8);

    epx__store_release_u64(
        (uint64_t *)(void *)(peer->box_here + epx__net_box_word(v->sequence)),
        word);
    progress(v);
    v->sequence = peer->next_received;
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    input_t input = { data, size };
    victim_t victim;

    be_born(&victim,
            take(&input, 1) % 2 == 0 ? EPX__NET_WIRE_AM : EPX__NET_WIRE_RMA);
    while (input.left > 0) {
        unsigned action = (unsigned)take(&input, 1);

        switch (action % 4) {
        case 0:
            say_raw(&victim, &input, action);
            break;
        case 1:
            say(&victim, &input, action);
            break;
        case 2:
            if (victim.net->puts != NULL) {
                put_word(&victim, &input);
            } else {
                say_bundle(&victim, &input, action);
            }
            break;
        default:
            act(&victim, action / 4);
            break;
        }
    }
    die(&victim);
    return 0;
}
