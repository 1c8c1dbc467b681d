/* SPDX-License-Identifier: MIT */
/*
 * Cached stores or stores past the caches: which is faster depends on the
 * machine and on how much an operation writes, so it is measured while working.
 * The kind never changes a result.
 *
 * Operations are classed by the power of two of the bytes they write.  In each
 * class the kinds are tried in turn, for a few operations each, since the first
 * ones find the caches as the other kind left them; then the better is used,
 * and the other tried again now and then.
 */
#ifndef EPX_ENGINE_CPU_STORE_CHOICE_H
#define EPX_ENGINE_CPU_STORE_CHOICE_H

#include "engine/cpu/cpu_share.h"

#include <stdbool.h>
#include <stdint.h>

#define CPU_STORE_CLASSES 48
#define CPU_STORE_TRIAL \
    UINT64_C(4)              /* operations of one trial; the last one counts */
#define CPU_STORE_PERIOD 256 /* operations from one trial to the next */

typedef struct cpu_store_class {
    /* ns per byte, smoothed, 0: not known; by kind: cached, streaming */
    double cost[2];
    uint64_t num_uses;
    bool streams; /* the better kind, as of the last operation in no trial */
} cpu_store_class_t;

typedef struct cpu_store_choice {
    cpu_store_class_t classes[CPU_STORE_CLASSES];
} cpu_store_choice_t;

static inline cpu_store_class_t *
cpu_store_class(cpu_store_choice_t *choice, uint64_t bytes)
{
    int log2 = bytes == 0 ? 0 : 63 - __builtin_clzll(bytes);

    return &choice->classes[log2 < CPU_STORE_CLASSES ? log2
                                                     : CPU_STORE_CLASSES - 1];
}

/* One operation that is being measured. */
typedef struct cpu_store_timer {
    cpu_store_class_t *class;
    const cpu_share_t *share;
    uint64_t bytes;
    bool streams;
} cpu_store_timer_t;

/* Whether the class's next operation belongs to a trial. */
static inline bool
cpu_store_is_trial(const cpu_store_class_t *class)
{
    return class->num_uses % CPU_STORE_PERIOD < CPU_STORE_TRIAL ||
           class->num_uses < 2 * CPU_STORE_TRIAL;
}

/* The kind for the class's next operation. */
static inline bool
cpu_store_choose(cpu_store_class_t *class)
{
    if (class->num_uses < 2 * CPU_STORE_TRIAL) {
        return class->num_uses >= CPU_STORE_TRIAL;
    }
    if (cpu_store_is_trial(class)) {
        return !class->streams;
    }
    class->streams = class->cost[1] > 0 && class->cost[1] < class->cost[0];
    return class->streams;
}

/* Choose for an operation that writes `bytes`, about as many for each item of
 * the share. */
static inline cpu_store_timer_t
cpu_store_start(cpu_store_choice_t *choice, uint64_t bytes, cpu_share_t *share)
{
    cpu_store_class_t *class = cpu_store_class(choice, bytes);

    share->is_timed = true;
    return (cpu_store_timer_t){ class, share, bytes, cpu_store_choose(class) };
}

/* Once the work is done.  No time is known if other workers took it all, and no
 * kind's that has never been timed. */
static inline void
cpu_store_stop(const cpu_store_timer_t *timer)
{
    const cpu_share_t *share = timer->share;
    cpu_store_class_t *class = timer->class;
    double *mean = &class->cost[timer->streams];

    if (share->num_timed > 0) {
        double bytes = (double)timer->bytes * (double)share->num_timed /
                       (double)share->num_items;
        double cost = (double)share->spent_ns / (bytes + 1);

        *mean = cpu_store_is_trial(class) || *mean == 0
                    ? cost
                    : *mean + (cost - *mean) / 4;
    }
    class->num_uses++;
}

#endif
