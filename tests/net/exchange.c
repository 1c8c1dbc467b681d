/* SPDX-License-Identifier: MIT */
#include "exchange.h"

#include <string.h>

#define CHANNEL    1
#define MAX_PARTS  3
#define MAX_RANGES 5

/* All that a rank sends to one peer in one step. */
typedef struct parcel {
    char *bytes;
    struct iovec ranges[MAX_PARTS * MAX_RANGES];
} parcel_t;

typedef struct state {
    rank_t *rank;
    const exchange_t *exchange;
    uint64_t max_bytes;
    parcel_t *parcels; /* [R] */
    char **halves[2];  /* [R] */
    epx__net_done_t done;
} state_t;

static uint64_t
seed_of(const state_t *s, uint64_t step, int32_t from, int32_t to)
{
    return s->exchange->seed * 1000003 + step * 10007 + (uint64_t)from * 101 +
           (uint64_t)to;
}

/* The longest transfers are as long as the step says, others shorter. */
static uint64_t
bytes_of(const state_t *s, uint64_t step, int32_t from, int32_t to)
{
    uint64_t bytes = s->exchange->sizes[step - 1];

    return (from + to) % 3 == 2 ? bytes / 2 : bytes;
}

/* Cut what goes to a peer into parts, and those into ranges, and send the parts
 * from last to first, some of them later. */
static void
send_parcel(state_t *s, uint64_t step, int32_t peer)
{
    int32_t own = s->rank->rank;
    uint64_t seed = seed_of(s, step, own, peer);
    uint64_t total = bytes_of(s, step, own, peer);
    uint64_t num_parts = total < 100 ? 1 : 1 + seed % MAX_PARTS;
    parcel_t *parcel = &s->parcels[peer];
    epx__net_send_t send = { .peer = peer,
                             .channel = CHANNEL,
                             .turn = step,
                             .total = total,
                             .arrive_gate = EPX__GATE_DONE,
                             .arrive_step = step % 2 == 0 ? step : 0,
                             .done = &s->done };

    fill(parcel->bytes, total, seed);
    for (uint64_t part = num_parts; part-- > 0;) {
        uint64_t begin = total * part / num_parts;
        uint64_t end = total * (part + 1) / num_parts;
        uint64_t num_ranges = total < 100 ? total > 0 : 1 + seed % MAX_RANGES;
        struct iovec *ranges = parcel->ranges + part * MAX_RANGES;

        for (uint64_t i = 0; i < num_ranges; i++) {
            uint64_t from = begin + (end - begin) * i / num_ranges;
            uint64_t to = begin + (end - begin) * (i + 1) / num_ranges;

            ranges[i] = (struct iovec){ parcel->bytes + from, to - from };
        }
        send.offset = begin;
        send.ranges = ranges;
        send.num_ranges = (uint32_t)num_ranges;
        send.is_for_later = (seed / MAX_RANGES + part) % 2 == 0;
        CHECK_OK(epx__net_send(s->rank->net, &send));
    }
}

static void
check_parcel(state_t *s, uint64_t step, int32_t peer)
{
    uint64_t bytes = 0;
    uint64_t expected = bytes_of(s, step, peer, s->rank->rank);
    int64_t bad;

    CHECK(epx__net_arrived(s->rank->net, CHANNEL, peer, step, &bytes),
          "turn %llu of rank %d", (unsigned long long)step, peer);
    CHECK(bytes == expected, "%llu, not %llu", (unsigned long long)bytes,
          (unsigned long long)expected);
    bad = differs(s->halves[step % 2][peer], bytes,
                  seed_of(s, step, peer, s->rank->rank));
    CHECK(bad < 0, "byte %lld of %llu in step %llu", (long long)bad,
          (unsigned long long)bytes, (unsigned long long)step);
}

/* READY carries a post or a count row, every other step the one or the other.
 */
static void
signal_ready(state_t *s, uint64_t step)
{
    rank_t *rank = s->rank;
    void *segment = rank->peers[rank->rank].base;
    bool is_post = step % 2 == 0;
    void *own = is_post ? (void *)epx__map_post(&rank->map, segment, step,
                                                (uint32_t)rank->rank)
                        : (void *)epx__map_counts(&rank->map, segment, step,
                                                  (uint32_t)rank->rank);
    size_t bytes = is_post ? sizeof(epx__post_t) : rank->map.count_row_bytes;

    fill(own, bytes, seed_of(s, step, rank->rank, 0));
    epx__net_step_begin(rank->net, step);
    epx__arrive(&rank->map, segment, (uint32_t)rank->rank, step,
                EPX__GATE_READY);
    for (int32_t peer = 0; peer < rank->world->num_ranks; peer++) {
        if (peer != rank->rank) {
            CHECK_OK(epx__net_signal(rank->net, peer, step, EPX__GATE_READY,
                                     is_post ? EPX__PAYLOAD_POST
                                             : EPX__PAYLOAD_COUNTS,
                                     own, bytes, step % 4 >= 2));
        }
    }
}

static void
check_ready(state_t *s, uint64_t step)
{
    rank_t *rank = s->rank;
    void *segment = rank->peers[rank->rank].base;
    bool is_post = step % 2 == 0;

    CHECK_OK(epx__wait_all(&rank->group, step, EPX__GATE_READY, "ready"));
    for (int32_t peer = 0; peer < rank->world->num_ranks; peer++) {
        const void *row =
            is_post ? (const void *)epx__map_post(&rank->map, segment, step,
                                                  (uint32_t)peer)
                    : (const void *)epx__map_counts(&rank->map, segment, step,
                                                    (uint32_t)peer);
        size_t bytes =
            is_post ? sizeof(epx__post_t) : rank->map.count_row_bytes;

        CHECK(differs(row, bytes, seed_of(s, step, peer, 0)) < 0,
              "row of rank %d in step %llu", peer, (unsigned long long)step);
    }
}

/* In even steps the transfers themselves raise DONE. */
static void
run_step(state_t *s, uint64_t step)
{
    rank_t *rank = s->rank;
    void *segment = rank->peers[rank->rank].base;

    signal_ready(s, step);
    for (int32_t i = 1; i < rank->world->num_ranks; i++) {
        send_parcel(s, step, (rank->rank + i) % rank->world->num_ranks);
    }
    /* Else nobody does for a while, and the net's thread has to. */
    for (uint64_t i = 0; i < step % 3; i++) {
        (void)epx__net_attend(rank->net);
        epx__net_acknowledge(rank->net);
    }
    check_ready(s, step);
    CHECK_OK(epx__net_wait(rank->net, CHANNEL, step, NULL, rank_deadline(rank),
                           "a turn"));
    epx__arrive(&rank->map, segment, (uint32_t)rank->rank, step,
                EPX__GATE_DONE);
    if (step % 2 == 0) {
        CHECK_OK(epx__wait_all(&rank->group, step, EPX__GATE_DONE, "done"));
    }
    for (int32_t peer = 0; peer < rank->world->num_ranks; peer++) {
        if (peer == rank->rank) {
            continue;
        }
        check_parcel(s, step, peer);
        epx__net_slot_release(rank->net, CHANNEL, peer, step);
        if (step % 2 != 0) {
            CHECK_OK(epx__net_signal(rank->net, peer, step, EPX__GATE_DONE,
                                     EPX__PAYLOAD_NONE, NULL, 0, false));
        }
    }
    if (step % 2 != 0) {
        CHECK_OK(epx__wait_all(&rank->group, step, EPX__GATE_DONE, "done"));
    }
    CHECK_OK(epx__net_done_wait(rank->net, &s->done, rank_deadline(rank),
                                "its sends"));
}

static void
open_slots(state_t *s)
{
    rank_t *rank = s->rank;
    size_t num_ranks = (size_t)rank->world->num_ranks;

    s->parcels = calloc(num_ranks, sizeof(*s->parcels));
    s->halves[0] = calloc(num_ranks, sizeof(char *));
    s->halves[1] = calloc(num_ranks, sizeof(char *));
    for (int32_t peer = 0; peer < rank->world->num_ranks; peer++) {
        void *halves[2];

        if (peer == rank->rank) {
            continue;
        }
        s->parcels[peer].bytes = malloc(s->max_bytes + 1);
        for (int i = 0; i < 2; i++) {
            s->halves[i][peer] = malloc(s->max_bytes + 1);
            halves[i] = s->halves[i][peer];
        }
        CHECK_OK(epx__net_slot_open(rank->net, CHANNEL, peer, 1, halves,
                                    s->max_bytes));
    }
}

void
exchange_main(rank_t *rank)
{
    state_t s = { .rank = rank, .exchange = rank->world->argument };

    for (int i = 0; i < s.exchange->num_sizes; i++) {
        s.max_bytes = s.exchange->sizes[i] > s.max_bytes ? s.exchange->sizes[i]
                                                         : s.max_bytes;
    }
    open_slots(&s);
    rank_barrier(rank);
    for (int i = 0; i < s.exchange->num_sizes; i++) {
        run_step(&s, (uint64_t)i + 1);
    }
    for (int32_t peer = 0; peer < rank->world->num_ranks; peer++) {
        if (peer != rank->rank) {
            CHECK_OK(epx__net_slot_close(rank->net, CHANNEL, peer,
                                         rank_deadline(rank)));
        }
        free(s.parcels[peer].bytes);
        free(s.halves[0][peer]);
        free(s.halves[1][peer]);
    }
    CHECK(num_lost(rank) == 0, "%s", rank->lost_text);
    free(s.parcels);
    free(s.halves[0]);
    free(s.halves[1]);
}
