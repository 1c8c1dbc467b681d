/* SPDX-License-Identifier: MIT */
/* What the workers of a phase share out among them. */
#ifndef EPX_ENGINE_CPU_CPU_SHARE_H
#define EPX_ENGINE_CPU_CPU_SHARE_H

#include "core/group.h"

/* Pieces of `grain` items, so that a worker that is held up does not hold up
 * the rest. */
typedef struct cpu_share {
    const epx__remote_t *helped; /* by worker 0; NULL: nobody */
    int64_t num_items;
    int64_t grain;
    int64_t next;
} cpu_share_t;

/* Between nodes, worker 0 leaves its part to the others while the network has
 * work for it: who waited for the network a moment ago has taken that over from
 * the net's thread (epx__net_help), and what arrives meanwhile would lie there
 * until the next wait.  A worker alone has nobody to leave it to. */
static inline cpu_share_t
cpu_share(const epx_group_t *group, int64_t num_items, int32_t num_workers)
{
    int64_t grain = num_items / ((int64_t)num_workers * 8);
    bool helps =
        num_workers > 1 && group->remote.help != NULL && group->spin_ns > 0;

    return (cpu_share_t){
        .helped = helps ? &group->remote : NULL,
        .num_items = num_items,
        .grain = grain < 1    ? 1
                 : grain > 64 ? 64
                              : grain,
    };
}

/* The next piece [*begin_p, *end_p); false when there is none. */
static inline bool
cpu_share_next(cpu_share_t *share, int32_t worker, int64_t *begin_p,
               int64_t *end_p)
{
    const epx__remote_t *helped = worker == 0 ? share->helped : NULL;
    int64_t end;

    while (helped != NULL && helped->help(helped->context) &&
           __atomic_load_n(&share->next, __ATOMIC_RELAXED) < share->num_items) {
    }
    *begin_p = __atomic_fetch_add(&share->next, share->grain, __ATOMIC_RELAXED);
    end = *begin_p + share->grain;
    *end_p = end < share->num_items ? end : share->num_items;
    return *begin_p < share->num_items;
}

#endif
