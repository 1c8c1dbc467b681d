/* SPDX-License-Identifier: MIT */
/*
 * Several messages that come as one, and a peer that puts together what it
 * likes: what is right before the first that is not lands, nothing after it
 * does, and no byte beyond those that came is read.
 */
#include "net/net_internal.h"
#include "sim.h"
#include "world.h"

#include <string.h>

enum { CHANNEL = 1, PIECES = 3, BYTES = 64, PATTERN = 77 };

#define OTHER_LENGTH "of another length than its header says"
#define OTHER_SIZE   "with a header of another size"

/* A good bundle, but for a field of one of its headers and its length. */
typedef struct fault {
    const char *what;
    int piece;
    size_t at;
    size_t bytes;
    uint64_t value;
    int64_t longer;  /* by so many bytes */
    unsigned lands;  /* bit i: piece i */
    const char *why; /* the end of the sentence; NULL: it is not refused */
} fault_t;

#define FIELD(piece, field, value, lands, why) \
    { #field,                                  \
      piece,                                   \
      offsetof(epx__net_header_t, field),      \
      sizeof(((epx__net_header_t *)0)->field), \
      value,                                   \
      0,                                       \
      lands,                                   \
      why }
#define LENGTH(longer, lands, why) { "length", 0, 0, 0, 0, longer, lands, why }

static const fault_t faults[] = {
    LENGTH(0, 7, NULL),
    LENGTH(1, 7, OTHER_SIZE),
    LENGTH(sizeof(epx__net_header_t) - 1, 7, OTHER_SIZE),
    LENGTH(sizeof(epx__net_header_t), 7, "of another protocol"),
    LENGTH(-1, 3, OTHER_LENGTH),
    LENGTH(-BYTES, 3, OTHER_LENGTH),
    LENGTH(-BYTES - 1, 3, OTHER_SIZE),
    LENGTH(-(int64_t)(BYTES + sizeof(epx__net_header_t)), 3, NULL),
    FIELD(0, bytes, UINT64_MAX, 0, OTHER_LENGTH),
    FIELD(1, bytes, UINT64_MAX, 1, OTHER_LENGTH),
    FIELD(2, bytes, BYTES + 1, 3, OTHER_LENGTH),
    FIELD(1, magic, 0, 1, "of another protocol"),
    FIELD(1, group, 0, 1, "of another group"),
    FIELD(1, source, 0, 1, "in the name of another rank"),
    FIELD(2, source, 2, 3, "in the name of another rank"),
    FIELD(1, sequence, 1, 5, NULL), /* it has come before */
    FIELD(1, sequence, 0, 1, "with a sequence number that is not its turn"),
    FIELD(1, kind, EPX__NET_KIND_ACK, 1,
          "with fields that an acknowledgement has not"),
    FIELD(1, kind, 255, 1, "of a kind that there is not"),
    FIELD(1, offset, (PIECES - 1) * BYTES + 1, 1, "that does not fit its slot"),
    FIELD(2, turn, 4, 3, "for a turn that is not open"),
};

/* What follows the first header, in `rest`; returns its bytes. */
static size_t
make(const rank_t *rank, const epx__net_t *victim, const fault_t *fault,
     epx__net_header_t *first, char *rest)
{
    size_t used = 0;

    for (int i = 0; i < PIECES; i++) {
        epx__net_header_t header = {
            .magic = EPX__NET_MAGIC,
            .version = EPX__NET_VERSION,
            .kind = EPX__NET_KIND_PIECE,
            .group = victim->group,
            .source = (uint32_t)rank->rank,
            .channel = CHANNEL,
            .sequence = (uint64_t)i + 1,
            .turn = 1,
            .offset = (uint64_t)i * BYTES,
            .bytes = BYTES,
            .total = PIECES * BYTES,
        };

        if (fault->bytes > 0 && fault->piece == i) {
            memcpy((char *)&header + fault->at, &fault->value, fault->bytes);
        }
        if (i == 0) {
            *first = header;
        } else {
            memcpy(rest + used, &header, sizeof(header));
            used += sizeof(header);
        }
        memset(rest + used, 'a' + i, BYTES);
        used += BYTES;
    }
    return (size_t)((int64_t)used + fault->longer);
}

/* As the transport would bring it, in memory of just that size. */
static void
come(const rank_t *rank, epx__net_t *victim, const fault_t *fault)
{
    char rest[(PIECES + 1) * (sizeof(epx__net_header_t) + BYTES)] = { 0 };
    epx__net_header_t first;
    size_t bytes = make(rank, victim, fault, &first, rest);
    char *exact = malloc(bytes);

    memcpy(exact, rest, bytes);
    epx__net_crank_take(victim);
    epx__net_came_whole(victim, rank->rank, &first, sizeof(first), exact,
                        bytes);
    epx__net_crank_leave(victim);
    free(exact);
}

static void
check_slot(const fault_t *fault, const char *slot)
{
    for (int i = 0; i < (PIECES + 1) * BYTES; i++) {
        int piece = i / BYTES;
        char want = (fault->lands >> piece & 1) != 0 ? (char)('a' + piece)
                                                     : (char)PATTERN;

        CHECK(slot[i] == want, "%s of piece %d: byte %d is %d, not %d",
              fault->what, fault->piece, i, slot[i], want);
    }
}

static void
check_refused(rank_t *rank, const fault_t *fault)
{
    int64_t deadline = rank_deadline(rank);
    const char *tail;

    while (fault->why != NULL && num_lost(rank) == 0 &&
           epx__now_ns() < deadline) {
        (void)usleep(100);
    }
    if (fault->why == NULL) {
        CHECK(num_lost(rank) == 0, "%s of piece %d: %s", fault->what,
              fault->piece, rank->lost_text);
        return;
    }
    tail = num_lost(rank) > 0 ? strstr(rank->lost_text, fault->why) : NULL;
    CHECK(tail != NULL && strcmp(tail, fault->why) == 0 &&
              rank->lost_status == EPX_ERR_PEER_DATA,
          "%s of piece %d: \"%s\", not \"%s\"", fault->what, fault->piece,
          rank->lost_text, fault->why);
}

typedef struct play {
    const fault_t *fault;
    epx__net_t *victim; /* rank 0's */
} play_t;

static void
bundle_main(rank_t *rank)
{
    static char slot[(PIECES + 1) * BYTES];
    void *const halves[2] = { slot, slot };
    play_t *play = rank->world->argument;
    bool is_whole;

    if (rank->rank == 0) {
        memset(slot, PATTERN, sizeof(slot));
        CHECK_OK(epx__net_slot_open(rank->net, CHANNEL, 1, 1, halves,
                                    PIECES * BYTES));
        play->victim = rank->net;
    }
    rank_barrier(rank);
    if (rank->rank == 1) {
        come(rank, play->victim, play->fault);
    }
    rank_barrier(rank);
    if (rank->rank == 0) {
        check_slot(play->fault, slot);
        check_refused(rank, play->fault);
        is_whole = epx__net_arrived(rank->net, CHANNEL, 1, 1, NULL);
        CHECK(is_whole == (play->fault->lands == 7), "%s of piece %d: %d",
              play->fault->what, play->fault->piece, is_whole);
    }
    rank_barrier(rank);
    rank->net->config.timeout_ns = 1; /* nobody says farewell */
}

int
main(void)
{
    for (size_t i = 0; i < sizeof(faults) / sizeof(faults[0]); i++) {
        const sim_faults_t none = { 0 };
        play_t play = { .fault = &faults[i] };
        world_t world = world_make(2, &sim_backend);
        sim_t *sim = sim_create(2, 1, &none);

        world.backend_context = sim;
        world.beat_ns = 0;
        world.wire = EPX__NET_WIRE_AM;
        world.argument = &play;
        world_run_threads(&world, bundle_main);
        sim_destroy(sim);
    }
    return 0;
}
