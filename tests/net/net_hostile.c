/* SPDX-License-Identifier: MIT */
/*
 * The second wire, and a peer that puts what it likes into its box: every word
 * and every field that does not fit is refused, its sender is bad, and nothing
 * is written that it should not.
 */
#include "net/net_internal.h"
#include "sim.h"
#include "world.h"

#include <string.h>
#include <sys/mman.h>

#define CHANNEL    1
#define SLOT_BYTES 4096
#define BYTES      64
#define PATTERN    77

/* What the peer puts: a field of the header, or what is none. */
typedef enum target {
    NOTHING,
    FIELD,
    CLOSED, /* a field of a piece for a slot that is closed */
    WORD,
    ACK,
    NOTE, /* a field of it */
} target_t;

typedef struct tamper {
    const char *what;
    target_t target;
    size_t at;
    size_t bytes;
    uint64_t value;
    const char *why; /* the end of the sentence */
} tamper_t;

#define TAMPER(target, record, field, value, why)                            \
    { #field, target, offsetof(record, field), sizeof(((record *)0)->field), \
      value,  why }
#define HEADER(field, value, why) \
    TAMPER(FIELD, epx__net_header_t, field, value, why)
/* The same of a piece for a slot that is closed. */
#define STRAY(field, value, why) \
    TAMPER(CLOSED, epx__net_header_t, field, value, why)
#define KEY(field, value, why) TAMPER(NOTE, epx__net_note_t, field, value, why)

#define OTHER_RANK "in the name of another rank"
#define NOT_FIT    "that does not fit its slot"
#define NOT_TURN   "with a sequence number that is not its turn"
#define NOT_WORD   "of another sequence number than its word says"
#define NOT_SENT   "that acknowledges what was not sent"
#define NOT_OPEN   "for a turn that is not open"
#define NO_CHANNEL "for a channel that there is not"
#define NO_STEP    "for a step that is not open"
#define NO_KIND    "of a kind that there is not"
#define NO_SLOT    "about a slot that cannot be"

static const tamper_t tampers[] = {
    { "nothing", NOTHING, 0, 0, 0, NULL },
    HEADER(magic, 0, "of another protocol"),
    HEADER(version, EPX__NET_VERSION + 1, "of another protocol"),
    HEADER(group, 0, "of another group"),
    HEADER(group, UINT64_MAX, "of another group"),
    HEADER(source, 0, OTHER_RANK),
    HEADER(source, 2, OTHER_RANK),
    HEADER(source, UINT32_MAX, OTHER_RANK),
    { "word", WORD, 0, 0, 2, NOT_TURN },
    { "word", WORD, 0, 0, EPX__NET_WINDOW + 1, NOT_TURN },
    { "word", WORD, 0, 0, UINT64_C(1) << 63, NOT_TURN },
    { "word", WORD, 0, 0, UINT64_MAX, NOT_TURN },
    HEADER(sequence, 0, NOT_WORD),
    HEADER(sequence, 2, NOT_WORD),
    HEADER(sequence, UINT64_MAX, NOT_WORD),
    { "ack", ACK, 0, 0, 1000, NOT_SENT },
    { "ack", ACK, 0, 0, UINT64_MAX, NOT_SENT },
    HEADER(acked, 1000, NOT_SENT),
    HEADER(acked_bits, UINT64_MAX, NOT_SENT),
    HEADER(kind, 0, NO_KIND),
    HEADER(kind, 255, NO_KIND),
    HEADER(kind, EPX__NET_KIND_ACK,
           "with fields that an acknowledgement has not"),
    HEADER(kind, EPX__NET_KIND_BYE, "with fields that a farewell has not"),
    HEADER(kind, EPX__NET_KIND_VERDICT, "with a verdict of another size"),
    HEADER(kind, EPX__NET_KIND_NOTE, "with fields that a note has not"),
    HEADER(kind, EPX__NET_KIND_POST, NO_STEP),
    HEADER(channel, 4, NO_CHANNEL),
    HEADER(channel, UINT32_MAX, NO_CHANNEL),
    HEADER(turn, 0, NOT_OPEN),
    HEADER(turn, 3, NOT_OPEN),
    HEADER(turn, UINT64_MAX, NOT_OPEN),
    HEADER(bytes, 0, "without bytes"),
    HEADER(bytes, SLOT_BYTES + 1, NOT_FIT),
    HEADER(bytes, UINT64_MAX, NOT_FIT),
    HEADER(total, BYTES - 1, NOT_FIT),
    HEADER(total, SLOT_BYTES + 1, NOT_FIT),
    HEADER(total, UINT64_MAX, NOT_FIT),
    HEADER(offset, SLOT_BYTES - BYTES + 1, NOT_FIT),
    HEADER(offset, SLOT_BYTES, NOT_FIT),
    HEADER(offset, UINT64_MAX, NOT_FIT),
    HEADER(gate, EPX__NUM_GATES, NO_STEP),
    HEADER(step, 2 + EPX__MAX_OPEN, NO_STEP),
    HEADER(step, UINT64_MAX, NO_STEP),
    HEADER(kind, EPX__NET_KIND_PLEDGE, "with a pledge of another size"),
    STRAY(turn, 0, NOT_OPEN),
    STRAY(offset, UINT64_MAX, NOT_FIT),
    STRAY(total, BYTES - 1, NOT_FIT),
    STRAY(bytes, 0, "without bytes"),
    STRAY(gate, EPX__NUM_GATES, NO_STEP),
    STRAY(step, UINT64_MAX, NO_STEP),
    KEY(bytes, 0, NO_SLOT),
    KEY(address, UINT64_MAX, NO_SLOT),
    KEY(key_bytes, EPX__NET_KEY_BYTES + 1, NO_SLOT),
    KEY(key_bytes, UINT32_MAX, NO_SLOT),
    KEY(key_bytes, 0, NO_SLOT),
    KEY(key_bytes, 1, "about a slot with a key of no use"),
    KEY(bytes, SLOT_BYTES - 1, "about a slot with a key of no use"),
};

/* Between two pages that nobody may touch. */
static char *
guarded(void)
{
    char *pages = mmap(NULL, (size_t)3 * EPX__PAGE, PROT_NONE,
                       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    CHECK(pages != MAP_FAILED, "%m");
    CHECK(mprotect(pages + EPX__PAGE, EPX__PAGE, PROT_READ | PROT_WRITE) == 0,
          "%m");
    fill(pages + EPX__PAGE, EPX__PAGE, PATTERN);
    return pages + EPX__PAGE;
}

static void
set(void *record, const tamper_t *tamper)
{
    memcpy((char *)record + tamper->at, &tamper->value, tamper->bytes);
}

/* As the network would put it: into the box of this rank at its peer. */
static void
put_badly(rank_t *rank, epx__net_t *victim, uint64_t sequence,
          const tamper_t *tamper)
{
    char *box = victim->peers[rank->rank].box_here;
    char *cell = box + epx__net_box_cell(&victim->box, sequence);
    uint64_t word_at = tamper->target == ACK ? 0 : epx__net_box_word(sequence);
    epx__net_header_t header = {
        .magic = EPX__NET_MAGIC,
        .version = EPX__NET_VERSION,
        .kind = EPX__NET_KIND_PIECE,
        .group = victim->group,
        .source = (uint32_t)rank->rank,
        .channel = CHANNEL,
        .sequence = sequence,
        .turn = 1,
        .bytes = BYTES,
        .total = tamper->target == NOTHING ? BYTES : SLOT_BYTES,
    };
    const uint64_t key = SLOT_BYTES;
    epx__net_note_t note = { .address = 4096,
                             .bytes = SLOT_BYTES,
                             .key_bytes = sizeof(key) };
    uint64_t word = tamper->target == WORD || tamper->target == ACK
                        ? tamper->value
                        : sequence;

    memcpy(note.key, &key, sizeof(key));
    header.channel += tamper->target == CLOSED;
    if (tamper->target == FIELD || tamper->target == CLOSED) {
        set(&header, tamper);
    } else if (tamper->target == NOTE) {
        set(&note, tamper);
        header.kind = EPX__NET_KIND_NOTE;
        header.bytes = sizeof(note);
        header.total = 0;
    }
    memcpy(cell, &header, sizeof(header));
    memcpy(cell + sizeof(header), &note, sizeof(note));
    /* Acquired where boxes are looked into. */
    epx__store_release_u64((uint64_t *)(void *)(box + word_at), word);
}

typedef struct play {
    const tamper_t *tamper;
    rank_t *rank; /* the victim, 0 */
    epx__net_t *victim;
} play_t;

/* The good message lands, and the bytes that it has; nothing else does. */
static void
check_refused(rank_t *rank, const tamper_t *tamper, const char *slot,
              const char *segment, const char *before)
{
    int64_t deadline = rank_deadline(rank);
    const char *tail = NULL;

    while (num_lost(rank) == 0 && tamper->why != NULL &&
           epx__now_ns() < deadline) {
        (void)usleep(100);
    }
    if (tamper->why != NULL) {
        tail = strstr(rank->lost_text, tamper->why);
    }
    CHECK(tamper->why == NULL ||
              (rank->lost_rank == 1 && rank->lost_status == EPX_ERR_PEER_DATA &&
               tail != NULL && strcmp(tail, tamper->why) == 0),
          "%s %llx: \"%s\", not \"%s\"", tamper->what,
          (unsigned long long)tamper->value, rank->lost_text, tamper->why);
    CHECK(tamper->why == NULL || differs(slot, EPX__PAGE, PATTERN) < 0,
          "%s %llx: byte %lld of the slot has changed", tamper->what,
          (unsigned long long)tamper->value,
          (long long)differs(slot, EPX__PAGE, PATTERN));
    CHECK(memcmp(segment, before, rank->map.heap) == 0,
          "%s %llx: the control region has changed", tamper->what,
          (unsigned long long)tamper->value);
}

static void
be_victim(rank_t *rank, play_t *play)
{
    char *slot = guarded();
    void *const halves[2] = { slot, slot };
    char *segment = rank->peers[rank->rank].base;
    char *before = malloc(rank->map.heap);

    epx__net_step_begin(rank->net, 1);
    memcpy(before, segment, rank->map.heap);
    CHECK_OK(epx__net_slot_open(rank->net, CHANNEL, 1, 1, halves, SLOT_BYTES));
    play->rank = rank;
    play->victim = rank->net;
    rank_barrier(rank);
    rank_barrier(rank);
    while (play->tamper->why == NULL &&
           !epx__net_arrived(rank->net, CHANNEL, 1, 1, NULL)) {
        (void)usleep(100);
    }
    check_refused(rank, play->tamper, slot, segment, before);
    free(before);
    (void)munmap(slot - EPX__PAGE, (size_t)3 * EPX__PAGE);
}

static void
hostile_main(rank_t *rank)
{
    play_t *play = rank->world->argument;
    int64_t deadline = rank_deadline(rank);

    if (rank->rank == 0) {
        be_victim(rank, play);
    } else {
        rank_barrier(rank);
        put_badly(rank, play->victim, 1, play->tamper);
        rank_barrier(rank);
        /* What this rank's net acknowledges goes into the same word. */
        while (play->tamper->target == ACK && num_lost(play->rank) == 0 &&
               epx__now_ns() < deadline) {
            put_badly(rank, play->victim, 1, play->tamper);
            (void)usleep(100);
        }
    }
    rank_barrier(rank);
    rank->net->config.timeout_ns = 1; /* nobody says farewell */
}

static void
run(rank_main_t *main, void *argument)
{
    const sim_faults_t faults = { .max_delay_ns = EPX__NS_PER_MS / 20 };
    world_t world = world_make(2, &sim_backend);
    sim_t *sim = sim_create(2, 1, &faults);

    world.backend_context = sim;
    world.beat_ns = 0;
    world.wire = EPX__NET_WIRE_RMA;
    world.argument = argument;
    world_run_threads(&world, main);
    sim_destroy(sim);
}

/* A slot that the peer told, and that is too small for what is to be sent. */
static void
small_slot_main(rank_t *rank)
{
    char *slot = guarded();
    void *const halves[2] = { slot, slot };
    struct iovec range = { slot, SLOT_BYTES };
    epx__net_done_t done = { 0 };
    const epx__net_send_t send = { .peer = 1,
                                   .channel = CHANNEL,
                                   .turn = 1,
                                   .total = SLOT_BYTES,
                                   .ranges = &range,
                                   .num_ranges = 1,
                                   .done = &done };

    if (rank->rank == 1) {
        CHECK_OK(epx__net_slot_open(rank->net, CHANNEL, 0, 1, halves,
                                    SLOT_BYTES - 1));
    }
    rank_barrier(rank);
    if (rank->rank == 0) {
        CHECK_OK(epx__net_send(rank->net, &send));
        CHECK(epx__net_done_wait(rank->net, &done, rank_deadline(rank),
                                 "a small slot") == EPX_ERR_PEER_DATA,
              "%s", rank->lost_text);
        CHECK(strstr(rank->lost_text, "smaller than its turn") != NULL, "%s",
              rank->lost_text);
    }
    rank_barrier(rank);
    CHECK(differs(slot, EPX__PAGE, PATTERN) < 0, "a byte of rank %d changed",
          rank->rank);
    rank->net->config.timeout_ns = 1;
}

static void
await_stat(rank_t *rank, size_t at, uint64_t least)
{
    int64_t deadline = rank_deadline(rank);
    uint64_t value = 0;

    while (value < least && epx__now_ns() < deadline) {
        epx__net_stats_t stats;

        epx__net_stats_get(rank->net, &stats);
        memcpy(&value, (const char *)&stats + at, sizeof(value));
        (void)usleep(100);
    }
    CHECK(value == least, "%llu, not %llu", (unsigned long long)value,
          (unsigned long long)least);
}

/* A second note on a slot, while bytes are on their way to where the first one
 * told: the network stands still. */
static void
early_note_main(rank_t *rank)
{
    const tamper_t note = { "note", NOTE, 0, 0, 0, NULL };
    play_t *play = rank->world->argument;
    char *slot = guarded();
    void *const halves[2] = { slot, slot };
    struct iovec range = { slot, SLOT_BYTES };
    epx__net_done_t done = { 0 };
    const epx__net_send_t send = { .peer = 1,
                                   .channel = CHANNEL,
                                   .turn = 1,
                                   .total = SLOT_BYTES,
                                   .ranges = &range,
                                   .num_ranges = 1,
                                   .done = &done };

    if (rank->rank == 1) {
        CHECK_OK(
            epx__net_slot_open(rank->net, CHANNEL, 0, 1, halves, SLOT_BYTES));
        rank_barrier(rank);
        put_badly(rank, play->victim, 3, &note);
    } else {
        await_stat(rank, offsetof(epx__net_stats_t, messages_received), 2);
        sim_cut(rank->world->backend_context, 0, true);
        CHECK_OK(epx__net_send(rank->net, &send));
        await_stat(rank, offsetof(epx__net_stats_t, messages_sent), 1);
        play->victim = rank->net;
        rank_barrier(rank);
        CHECK(epx__net_done_wait(rank->net, &done, rank_deadline(rank),
                                 "a slot in use") == EPX_ERR_PEER_DATA &&
                  strstr(rank->lost_text, "that is in use") != NULL,
              "%s", rank->lost_text);
    }
    rank_barrier(rank);
    rank->net->config.timeout_ns = 1;
}

/* The caller's own mistake, or what a peer has made it believe. */
static void
no_channel_main(rank_t *rank)
{
    const uint32_t channels[] = { rank->world->num_channels, UINT32_MAX };

    for (size_t i = 0; i < 2; i++) {
        const epx__net_send_t send = { .peer = 1 - rank->rank,
                                       .channel = channels[i],
                                       .turn = 1 };
        epx_status_t status = epx__net_send(rank->net, &send);

        CHECK(status == EPX_ERR_INVALID, "channel %u: %d", channels[i],
              (int)status);
    }
    rank_barrier(rank);
}

int
main(void)
{
    play_t early = { 0 };

    for (size_t i = 0; i < sizeof(tampers) / sizeof(tampers[0]); i++) {
        play_t play = { .tamper = &tampers[i] };

        run(hostile_main, &play);
    }
    run(small_slot_main, NULL);
    run(no_channel_main, NULL);
    run(early_note_main, &early);
    return 0;
}
