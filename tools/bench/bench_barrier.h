/* SPDX-License-Identifier: MIT */
/* A barrier in memory that threads or processes share.  It leaves the cores to
 * others when there are fewer of them than parties. */
#ifndef EPX_BENCH_BARRIER_H
#define EPX_BENCH_BARRIER_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

struct bench_barrier {
    _Atomic uint32_t arrived;
    _Atomic uint32_t round; /* the futex word */
    _Atomic uint32_t sleepers;
    uint32_t parties;
    bool spin; /* a short while before sleeping */
};

void bench_barrier_init(struct bench_barrier *barrier, int32_t parties,
                        int32_t cores);

/* False when the deadline (of bench_now_ns) passes first: the barrier cannot be
 * used any more.  What a party wrote before is visible to all afterwards. */
bool bench_barrier_wait(struct bench_barrier *barrier, int64_t deadline_ns);

#define BENCH_NO_DEADLINE INT64_MAX

#endif
