/* SPDX-License-Identifier: MIT */
#include "net/net_internal.h"

void
epx__net_ring_init(epx__net_ring_t *ring)
{
    for (uint64_t i = 0; i < EPX__NET_RING; i++) {
        ring->cells[i].turn = i;
    }
}

bool
epx__net_ring_push(epx__net_ring_t *ring, const epx__net_job_t *job)
{
    uint64_t tail = __atomic_load_n(&ring->tail, __ATOMIC_RELAXED);

    for (;;) {
        epx__net_cell_t *cell = &ring->cells[tail % EPX__NET_RING];
        /* Released in epx__net_ring_drop. */
        uint64_t turn = epx__load_acquire_u64(&cell->turn);

        if (turn < tail) {
            return false;
        }
        if (turn > tail) { /* another thread has taken it */
            tail = __atomic_load_n(&ring->tail, __ATOMIC_RELAXED);
        } else if (__atomic_compare_exchange_n(&ring->tail, &tail, tail + 1,
                                               true, __ATOMIC_RELAXED,
                                               __ATOMIC_RELAXED)) {
            cell->job = *job;
            /* Acquired in epx__net_ring_first. */
            epx__store_release_u64(&cell->turn, tail + 1);
            return true;
        }
    }
}

epx__net_job_t *
epx__net_ring_first(epx__net_ring_t *ring)
{
    epx__net_cell_t *cell = &ring->cells[ring->head % EPX__NET_RING];

    return epx__load_acquire_u64(&cell->turn) == ring->head + 1 ? &cell->job
                                                                : NULL;
}

void
epx__net_ring_drop(epx__net_ring_t *ring)
{
    epx__net_cell_t *cell = &ring->cells[ring->head % EPX__NET_RING];

    epx__store_release_u64(&cell->turn, ring->head + EPX__NET_RING);
    ring->head++;
}
