/* SPDX-License-Identifier: MIT */
/* What the workers of a phase share out among them. */
#ifndef EPX_ENGINE_CPU_CPU_SHARE_H
#define EPX_ENGINE_CPU_CPU_SHARE_H

#include "core/clock.h"
#include "core/group.h"

#include <stdbool.h>
#include <stdint.h>
#include <time.h>

/* Pieces of `grain` items, so that a worker that is held up does not hold up
 * the rest. */
typedef struct cpu_share {
    /* Whose network worker 0 attends to; NULL: nobody does. */
    epx_group_t *group;
    int64_t num_items;
    int64_t grain;
    int64_t next;
    /* A worker that does nothing else, so that its time tells what the work
     * costs; what follows is its own. */
    int32_t timed_worker;
    bool is_timed;
    int64_t num_timed; /* items that it took */
    int64_t start_ns;  /* its processor time before the first */
    int64_t spent_ns;  /* and from there on until none were left */
} cpu_share_t;

/* See to what goes between nodes; returns whether there was anything to do. */
static inline bool
cpu_attend(epx_group_t *group)
{
    return group->remote.attend != NULL &&
           group->remote.attend(group->remote.context);
}

/* Between nodes, worker 0 leaves the work to the others as long as the network
 * has something for it to do.  A worker alone has nobody to leave it to. */
static inline cpu_share_t
cpu_share_of(epx_group_t *group, int64_t num_items, int32_t num_workers)
{
    bool attends = num_workers > 1 && group->remote.attend != NULL;
    int64_t grain = num_items / ((int64_t)num_workers * 8);

    grain = grain < 1 ? 1 : grain > 64 ? 64 : grain;
    return (cpu_share_t){
        .group = attends ? group : NULL,
        .num_items = num_items,
        .grain = grain,
        .timed_worker = attends ? 1 : 0,
    };
}

static inline bool
cpu_share_is_left(const cpu_share_t *share)
{
    return __atomic_load_n(&share->next, __ATOMIC_RELAXED) < share->num_items;
}

/* Waiting for a core says nothing of the work. */
static inline int64_t
cpu_share_clock_ns(void)
{
    struct timespec ts;

    (void)clock_gettime(CLOCK_THREAD_CPUTIME_ID, &ts);
    return ts.tv_sec * EPX__NS_PER_SEC + ts.tv_nsec;
}

/* The timed worker has taken so many; 0: there were none left. */
static inline void
cpu_share_time(cpu_share_t *share, int64_t taken)
{
    if (share->num_timed == 0) {
        share->start_ns = cpu_share_clock_ns();
    }
    if (taken == 0) {
        share->spent_ns = cpu_share_clock_ns() - share->start_ns;
    }
    share->num_timed += taken;
}

/* The next piece [*begin_p, *end_p); false when there is none. */
static inline bool
cpu_share_next(cpu_share_t *share, int32_t worker, int64_t *begin_p,
               int64_t *end_p)
{
    int64_t end;

    if (worker == 0 && share->group != NULL) {
        while (cpu_share_is_left(share) && cpu_attend(share->group)) {
        }
    }
    *begin_p = __atomic_fetch_add(&share->next, share->grain, __ATOMIC_RELAXED);
    end = *begin_p + share->grain;
    *end_p = end < share->num_items ? end : share->num_items;
    if (share->is_timed && worker == share->timed_worker) {
        cpu_share_time(share, *end_p > *begin_p ? *end_p - *begin_p : 0);
    }
    return *begin_p < share->num_items;
}

#endif
