/* SPDX-License-Identifier: MIT */
#include "conformance/late.h"
#include <time.h>

enum {
    TRIES = 5,
    FIRST_MS = 50, /* by which it is late; doubled at each try */
};

void
late_nap(world_rank_t *self, int64_t late_ms)
{
    struct timespec nap = { late_ms / 1000, late_ms % 1000 * 1000000 };

    world_barrier(self);
    if (self->rank == LATE_RANK) {
        nanosleep(&nap, NULL);
    }
}

/* A peer of the late rank has waited long for it, and for nobody else. */
static bool
stands_out(const world_rank_t *self, const int64_t *wait_ns, int64_t late_ms)
{
    int64_t half = LATE_BEFORE + late_ms * 500000;

    for (int32_t r = 0; r < self->num_ranks && self->rank != LATE_RANK; r++) {
        if ((r == LATE_RANK) != (wait_ns[r] >= half)) {
            return false;
        }
    }
    return true;
}

static bool
try_once(world_rank_t *self, const late_call_t *call, int64_t late_ms,
         int64_t *wait_ns)
{
    uint8_t *seen = self->shared; /* by each rank */
    bool by_all = true;

    if (call->run(self, call, late_ms, wait_ns) &&
        wait_ns[self->rank] != LATE_BEFORE) {
        world_fail(self, "%s: rank %d waited for itself", call->name,
                   self->rank);
    }
    seen[self->rank] = stands_out(self, wait_ns, late_ms);
    world_barrier(self);
    for (int32_t r = 0; r < self->num_ranks; r++) {
        by_all = by_all && seen[r];
    }
    return by_all;
}

void
late_check(world_rank_t *self, const late_call_t *call)
{
    int64_t wait_ns[WORLD_MAX_RANKS] = { 0 };
    int64_t late_ms = FIRST_MS;

    for (int i = 0; i < TRIES && world_all_well(self); i++, late_ms *= 2) {
        if (try_once(self, call, late_ms, wait_ns)) {
            return;
        }
    }
    world_fail(self, "%s: rank %d waited %lld ns for rank %d, %lld for rank 0",
               call->name, self->rank,
               (long long)wait_ns[LATE_RANK] - LATE_BEFORE, LATE_RANK,
               (long long)wait_ns[0] - LATE_BEFORE);
}
