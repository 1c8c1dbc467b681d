/* SPDX-License-Identifier: MIT */
/* The worker threads of one rank. */
#ifndef EPX_ENGINE_CPU_CPU_POOL_H
#define EPX_ENGINE_CPU_CPU_POOL_H

#include <epx/epx.h>
#include <stdint.h>

typedef struct epx__pool epx__pool_t;

/* worker is 0 for the calling thread. */
typedef void (*epx__work_fn_t)(void *context, int32_t worker);

/* num_workers - 1 threads, asleep until there is work. */
epx_status_t epx__pool_open(int32_t num_workers, int64_t spin_ns,
                            epx__pool_t **pool_p);
void epx__pool_close(epx__pool_t *pool);

/* Run fn on `num_workers` workers and wait until all have returned. */
void epx__pool_run(epx__pool_t *pool, int32_t num_workers, epx__work_fn_t fn,
                   void *context);

/*
 * Shared out in pieces of `grain` items, so that a worker that is held up does
 * not hold up the rest.  Zero-initialise, with num_items and grain set.
 */
typedef struct epx__share {
    int64_t num_items;
    int64_t grain;
    int64_t next;
} epx__share_t;

/* The next piece [*begin_p, *end_p); 0 when there is none. */
static inline int
epx__share_next(epx__share_t *share, int64_t *begin_p, int64_t *end_p)
{
    int64_t begin =
        __atomic_fetch_add(&share->next, share->grain, __ATOMIC_RELAXED);
    int64_t end = begin + share->grain;

    *begin_p = begin;
    *end_p = end < share->num_items ? end : share->num_items;
    return begin < share->num_items;
}

#endif
