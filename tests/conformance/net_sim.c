/* SPDX-License-Identifier: MIT */
#include "conformance/net.h"
#include "conformance/rng.h"
#include "core/clock.h"
#include "net/sim.h"

static sim_t *sim;

bool
net_exists(net_kind_t kind)
{
    return kind != NET_UCX;
}

/* From a network that only delays to one that does all at once. */
static sim_faults_t
draw_faults(net_kind_t kind, uint64_t seed, int32_t num_ranks)
{
    rng_t rng = rng_of(seed, 0, 91);
    sim_faults_t faults = {
        .max_delay_ns = rng_int(&rng, 1, 400) * (EPX__NS_PER_MS / 1000),
        .retransmit_ns = rng_int(&rng, 1, 5) * EPX__NS_PER_MS,
        .lost_per_mille = (uint32_t)rng_int(&rng, 0, 50),
        .repeated_per_mille = (uint32_t)rng_int(&rng, 0, 200),
        .slow_per_mille = (uint32_t)rng_int(&rng, 0, 500),
    };
    uint64_t at = (uint64_t)rng_int(&rng, 1, 40 * (int64_t)num_ranks);

    if (kind == NET_CUT && rng_one_in(&rng, 2)) {
        faults.vanishes_at = at;
    } else if (kind == NET_CUT) {
        faults.cut_at = at;
        faults.cut_rank = (int32_t)rng_int(&rng, 0, num_ranks - 1);
    }
    return faults;
}

void
net_open(net_kind_t kind, uint64_t seed, int32_t num_ranks)
{
    sim_faults_t faults = draw_faults(kind, seed, num_ranks);

    world_may_lose = kind == NET_CUT;
    sim = sim_create(num_ranks, seed, &faults);
    sim_use(sim);
}

void
net_close(net_kind_t kind)
{
    (void)kind;
    sim_use(NULL);
    sim_destroy(sim);
}
