/* SPDX-License-Identifier: MIT */
/* Slots of the second wire are lent and given back, also when that fails half
 * way; two halves in one place are lent once. */
#include "sim.h"
#include "world.h"

#include <unistd.h>

#define CHANNEL 1
#define BYTES   ((uint64_t)1 << 16)

static char memory[2][BYTES]; /* of rank 0's slots */
static char payload[BYTES];   /* rank 1's */

static void
check_shares(const rank_t *rank, int expected)
{
    int count = sim_num_shares(rank->world->backend_context, rank->rank);

    CHECK(count == expected, "%d shares, not %d", count, expected);
}

/* Turn 1 of a new slot, or a later one. */
static void
receive(rank_t *rank, uint64_t turn, char *half_0, char *half_1, int num_shares)
{
    void *const halves[2] = { half_0, half_1 };

    CHECK_OK(epx__net_slot_open(rank->net, CHANNEL, 1, turn, halves, BYTES));
    check_shares(rank, num_shares);
    rank_barrier(rank);
    CHECK_OK(epx__net_wait(rank->net, CHANNEL, turn, NULL, rank_deadline(rank),
                           "a turn"));
    CHECK(differs(halves[turn % 2], BYTES, turn) < 0, "turn %llu, byte %lld",
          (unsigned long long)turn,
          (long long)differs(halves[turn % 2], BYTES, turn));
    CHECK_OK(epx__net_slot_close(rank->net, CHANNEL, 1, rank_deadline(rank)));
    check_shares(rank, 1);
    rank_barrier(rank);
}

/* As a signal would make sure, which comes after them. */
static void
await_notes(rank_t *rank, uint64_t count)
{
    int64_t deadline = rank_deadline(rank);
    epx__net_stats_t stats = { 0 };

    while (stats.messages_received < count && epx__now_ns() < deadline) {
        epx__net_stats_get(rank->net, &stats);
        (void)usleep(100);
    }
    CHECK(stats.messages_received == count, "%llu notes, not %llu",
          (unsigned long long)stats.messages_received,
          (unsigned long long)count);
}

static void
send_turn(rank_t *rank, uint64_t turn, uint64_t num_notes)
{
    struct iovec range = { payload, BYTES };
    epx__net_done_t done = { 0 };
    const epx__net_send_t send = { .peer = 0,
                                   .channel = CHANNEL,
                                   .turn = turn,
                                   .total = BYTES,
                                   .ranges = &range,
                                   .num_ranges = 1,
                                   .done = &done };

    fill(payload, BYTES, turn);
    rank_barrier(rank);
    await_notes(rank, num_notes);
    CHECK_OK(epx__net_send(rank->net, &send));
    CHECK_OK(epx__net_done_wait(rank->net, &done, rank_deadline(rank), "turn"));
    rank_barrier(rank);
}

static void
lend_main(rank_t *rank)
{
    if (rank->rank == 0) {
        void *const halves[2] = { memory[0], memory[1] };
        epx_status_t status =
            epx__net_slot_open(rank->net, CHANNEL, 1, 1, halves, BYTES);

        /* The boxes, one half; not the other. */
        CHECK(status == EPX_ERR_SYSTEM, "%d", (int)status);
        check_shares(rank, 2);
        CHECK_OK(
            epx__net_slot_close(rank->net, CHANNEL, 1, rank_deadline(rank)));
        check_shares(rank, 1);
        receive(rank, 1, memory[0], memory[1], 3);
        receive(rank, 2, memory[0], memory[0], 2);
    } else {
        send_turn(rank, 1, 1 + 2);
        send_turn(rank, 2, 1 + 2 + 2);
    }
    CHECK(num_lost(rank) == 0, "%s", rank->lost_text);
}

int
main(void)
{
    const sim_faults_t faults = { .unshared_at = 3 };
    world_t world = world_make(2, &sim_backend);
    sim_t *sim = sim_create(2, 1, &faults);

    world.backend_context = sim;
    world.beat_ns = 0;
    world.wire = EPX__NET_WIRE_RMA;
    world_run_threads(&world, lend_main);
    sim_destroy(sim);
    return 0;
}
