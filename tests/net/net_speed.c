/* SPDX-License-Identifier: MIT */
/*
 * How much the net costs on top of UCX: both in one run, in turns, over
 * loopback and between two network namespaces where that is possible.  Prints
 * the medians and their ratios; judges nothing.
 *
 *     net_speed [ROUNDS [SPIN_US]]
 */
#include "core/atomic.h"
#include "hosts.h"
#include "needs.h"
#include "raw.h"

#include <string.h>

#define MAX_ROUNDS    99
#define MAX_BYTES     ((size_t)64 << 20)
#define NUM_LATENCIES 4

static const size_t latency_bytes[NUM_LATENCIES] = { 0, 4096, 65536, 1 << 20 };
static int rounds = 5;
static int64_t spin_us = 1000;

typedef struct bench {
    rank_t *rank;
    raw_t *raw;
    uint64_t step;
    uint64_t turn;
    char *from;
    char *halves[2];
} bench_t;

static double
median(double *values, int count)
{
    for (int i = 1; i < count; i++) {
        for (int j = i; j > 0 && values[j] < values[j - 1]; j--) {
            double swap = values[j];

            values[j] = values[j - 1];
            values[j - 1] = swap;
        }
    }
    return values[count / 2];
}

static void
send_turn(bench_t *b, size_t bytes, epx__net_done_t *done)
{
    struct iovec range = { b->from, bytes };
    const epx__net_send_t send = { .peer = 1 - b->rank->rank,
                                   .turn = b->turn,
                                   .total = bytes,
                                   .ranges = &range,
                                   .num_ranges = 1,
                                   .done = done };

    CHECK_OK(epx__net_send(b->rank->net, &send));
    /* The list of ranges is this function's. */
    CHECK_OK(epx__net_done_wait(b->rank->net, done, rank_deadline(b->rank),
                                "a send"));
}

static void
await_turn(bench_t *b)
{
    CHECK_OK(epx__net_wait(b->rank->net, 0, b->turn, NULL,
                           rank_deadline(b->rank), "a turn"));
    epx__net_slot_release(b->rank->net, 0, 1 - b->rank->rank, b->turn);
}

static void
await_signal(bench_t *b)
{
    void *segment = b->rank->peers[b->rank->rank].base;

    epx__arrive(&b->rank->map, segment, (uint32_t)b->rank->rank, b->step,
                EPX__GATE_READY);
    CHECK_OK(epx__wait_all(&b->rank->group, b->step, EPX__GATE_READY, "speed"));
}

/* A post, there and back. */
static double
signal_latency(bench_t *b, int trips)
{
    int64_t start = epx__now_ns();
    int32_t peer = 1 - b->rank->rank;

    for (int i = 0; i < trips; i++) {
        b->step++;
        epx__net_step_begin(b->rank->net, b->step);
        if (b->rank->rank == 1) {
            await_signal(b);
        }
        CHECK_OK(epx__net_signal(b->rank->net, peer, b->step, EPX__GATE_READY,
                                 EPX__PAYLOAD_POST, b->from,
                                 sizeof(epx__post_t), false));
        if (b->rank->rank == 0) {
            await_signal(b);
        }
    }
    return (double)(epx__now_ns() - start) * 1e-9 / trips / 2;
}

static double
turn_latency(bench_t *b, size_t bytes, int trips)
{
    struct iovec range = { b->from, bytes };
    epx__net_done_t done = { 0 };
    int64_t start = epx__now_ns();

    for (int i = 0; i < trips; i++) {
        epx__net_send_t send = { .peer = 1 - b->rank->rank,
                                 .total = bytes,
                                 .ranges = &range,
                                 .num_ranges = 1,
                                 .done = &done };

        send.turn = ++b->turn;
        if (b->rank->rank == 1) {
            await_turn(b);
        }
        CHECK_OK(epx__net_send(b->rank->net, &send));
        if (b->rank->rank == 0) {
            await_turn(b);
        }
    }
    CHECK_OK(epx__net_done_wait(b->rank->net, &done, rank_deadline(b->rank),
                                "sends"));
    return (double)(epx__now_ns() - start) * 1e-9 / trips / 2;
}

/* One transfer of all the bytes, then an empty one back. */
static double
turn_bandwidth(bench_t *b, size_t bytes)
{
    epx__net_done_t done = { 0 };
    int64_t start;

    rank_barrier(b->rank);
    start = epx__now_ns();
    b->turn++;
    if (b->rank->rank == 0) {
        send_turn(b, bytes, &done);
        await_turn(b);
    } else {
        await_turn(b);
        send_turn(b, 0, &done);
    }
    return (double)bytes / ((double)(epx__now_ns() - start) * 1e-9);
}

static void
print_latency(const char *what, size_t bytes, double *raw, double *net)
{
    double a = median(raw, rounds), b = median(net, rounds);

    printf("  %-9s %8zu bytes  raw %7.2f us   net %7.2f us   %.2f x\n", what,
           bytes, a * 1e6, b * 1e6, b / a);
}

static void
measure_latency(bench_t *b)
{
    double raw[MAX_ROUNDS] = { 0 }, net[MAX_ROUNDS] = { 0 };

    for (int round = 0; round < rounds; round++) {
        rank_barrier(b->rank);
        raw[round] = raw_latency(b->raw, sizeof(epx__post_t), 1000, false);
        rank_barrier(b->rank);
        net[round] = signal_latency(b, 1000);
    }
    if (b->rank->rank == 0) {
        print_latency("signal", sizeof(epx__post_t), raw, net);
    }
    for (int i = 0; i < NUM_LATENCIES; i++) {
        size_t bytes = latency_bytes[i];
        int trips = bytes >= 1 << 20 ? 100 : 1000;

        for (int round = 0; round < rounds; round++) {
            rank_barrier(b->rank);
            raw[round] = raw_latency(b->raw, bytes, trips, bytes >= 1 << 19);
            rank_barrier(b->rank);
            net[round] = turn_latency(b, bytes, trips);
        }
        if (b->rank->rank == 0) {
            print_latency("transfer", bytes, raw, net);
        }
    }
}

/* The same 64 MiB each way of sending them, several times. */
static double
mean_bandwidth(bench_t *b, int way)
{
    enum { TIMES = 8, MIB = 1 << 20 };
    double seconds = 0;

    for (int i = 0; i < TIMES; i++) {
        seconds += 1 / (way == 2 ? turn_bandwidth(b, MAX_BYTES)
                                 : raw_bandwidth(b->raw, MIB, MAX_BYTES / MIB,
                                                 16, way == 1));
    }
    return TIMES / seconds;
}

static void
measure_bandwidth(bench_t *b)
{
    double values[3][MAX_ROUNDS] = { 0 };
    double eager, rendezvous, net;

    for (int round = 0; round < rounds; round++) {
        for (int way = 0; way < 3; way++) {
            values[way][round] = mean_bandwidth(b, way);
        }
    }
    eager = median(values[0], rounds);
    rendezvous = median(values[1], rounds);
    net = median(values[2], rounds);
    if (b->rank->rank == 0) {
        printf("  bandwidth 64 MiB  raw eager %.2f, rendezvous %.2f GB/s   "
               "net %.2f GB/s   %.2f x\n",
               eager * 1e-9, rendezvous * 1e-9, net * 1e-9,
               net / (rendezvous > eager ? rendezvous : eager));
    }
}

static void
bench_main(rank_t *rank)
{
    bench_t b = { .rank = rank, .raw = raw_open(rank) };

    b.from = malloc(MAX_BYTES);
    memset(b.from, 1, MAX_BYTES);
    for (int i = 0; i < 2; i++) {
        b.halves[i] = malloc(MAX_BYTES);
        memset(b.halves[i], 0, MAX_BYTES);
    }
    CHECK_OK(epx__net_slot_open(rank->net, 0, 1 - rank->rank, 1,
                                (void *const *)b.halves, MAX_BYTES));
    rank_barrier(rank);
    measure_latency(&b);
    measure_bandwidth(&b);
    if (rank->rank == 0) {
        epx__net_stats_t stats;

        epx__net_stats_get(rank->net, &stats);
        printf("  messages %llu, acks %llu, sleeps %llu\n",
               (unsigned long long)stats.messages_sent,
               (unsigned long long)stats.acks_sent,
               (unsigned long long)stats.sleeps);
    }
    rank_barrier(rank);
    raw_close(b.raw);
    free(b.from);
    free(b.halves[0]);
    free(b.halves[1]);
    fflush(stdout);
}

int
main(int argc, char **argv)
{
    world_t world = world_make(2, &epx__net_ucx);

    rounds = argc > 1 ? atoi(argv[1]) : rounds;
    spin_us = argc > 2 ? atoi(argv[2]) : spin_us;
    if (rounds < 1 || rounds > MAX_ROUNDS || !has_ucx()) {
        return 77;
    }
    world.spin_ns = spin_us * 1000;
    printf("loopback\n");
    fflush(stdout);
    world_run_processes(&world, bench_main, NULL, NULL);
    if (hosts_make()) {
        printf("between two hosts (veth)\n");
        fflush(stdout);
        world.device = HOSTS_DEVICE;
        world_run_processes(&world, bench_main, hosts_enter, NULL);
        hosts_remove();
    }
    return 0;
}
