/* SPDX-License-Identifier: MIT */
/* Signals and transfers arrive whole and right, over UCX and over the simulated
 * network at its worst, on both wires, and with nothing of a slot's in a box.
 */
#include "exchange.h"
#include "needs.h"
#include "sim.h"

static const uint64_t small_sizes[] = { 0,     1,    7,       64,     65535,
                                        65536, 4096, 1 << 20, 300000, 0,
                                        13,    1,    262144,  262143, 5 };
static const uint64_t large_sizes[] = { 1 << 20, (1 << 20) + 1, 64 << 20,
                                        3 << 20, 100 };

#define COUNT(array) ((int)(sizeof(array) / sizeof((array)[0])))

typedef struct way {
    epx__net_wire_t wire;
    uint32_t num_card_channels;
} way_t;

static void
over_sim(way_t way, int32_t num_ranks, const uint64_t *sizes, int num_sizes,
         uint64_t num_seeds)
{
    const sim_faults_t faults = { .max_delay_ns = EPX__NS_PER_MS / 2,
                                  .retransmit_ns = 2 * EPX__NS_PER_MS,
                                  .lost_per_mille = 50,
                                  .repeated_per_mille = 100,
                                  .slow_per_mille = 200 };

    for (uint64_t seed = 1; seed <= num_seeds; seed++) {
        exchange_t exchange = { sizes, num_sizes, seed };
        world_t world = world_make(num_ranks, &sim_backend);
        sim_t *sim = sim_create(num_ranks, seed, &faults);

        world.backend_context = sim;
        world.wire = way.wire;
        world.num_card_channels = way.num_card_channels;
        world.beat_ns = 0;
        world.argument = &exchange;
        world_run_threads(&world, exchange_main);
        sim_destroy(sim);
    }
}

static void
over_ucx(way_t way, int32_t num_ranks, const uint64_t *sizes, int num_sizes,
         bool processes)
{
    exchange_t exchange = { sizes, num_sizes, 1 };
    world_t world = world_make(num_ranks, &epx__net_ucx);

    world.wire = way.wire;
    world.num_card_channels = way.num_card_channels;
    world.argument = &exchange;
    if (processes) {
        world_run_processes(&world, exchange_main, NULL, NULL);
    } else {
        world_run_threads(&world, exchange_main);
    }
}

int
main(void)
{
    static const way_t ways[] = { { EPX__NET_WIRE_AM, 0 },
                                  { EPX__NET_WIRE_RMA, 0 },
                                  { EPX__NET_WIRE_RMA, 4 } };

    for (int i = 0; i < COUNT(ways); i++) {
        over_sim(ways[i], 2, small_sizes, COUNT(small_sizes), 20);
        over_sim(ways[i], 4, small_sizes, COUNT(small_sizes), 10);
        over_sim(ways[i], 2, large_sizes, COUNT(large_sizes), 1);
    }
    if (!has_ucx()) {
        return 77;
    }
    for (int i = 0; i < COUNT(ways); i++) {
        over_ucx(ways[i], 2, small_sizes, COUNT(small_sizes), true);
        over_ucx(ways[i], 4, small_sizes, COUNT(small_sizes), true);
        over_ucx(ways[i], 2, large_sizes, COUNT(large_sizes), true);
        over_ucx(ways[i], 3, small_sizes, COUNT(small_sizes), false);
    }
    /* As on other transports: long pieces, by rendezvous. */
    CHECK(setenv("UCX_TLS", "tcp,self", 1) == 0, "setenv");
    over_ucx(ways[0], 2, large_sizes, COUNT(large_sizes), true);
    return 0;
}
