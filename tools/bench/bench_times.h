/* SPDX-License-Identifier: MIT */
/* Times of iterations that several parties run together. */
#ifndef EPX_BENCH_TIMES_H
#define EPX_BENCH_TIMES_H

#include <stdbool.h>
#include <stdint.h>

/* CLOCK_MONOTONIC, the same for all processes of the host. */
int64_t bench_now_ns(void);

/* When one party of an iteration began and ended, of bench_now_ns. */
struct bench_span {
    int64_t start;
    int64_t end;
};

/* A series of iterations, each with one span per party. */
struct bench_series {
    struct bench_span *spans; /* [count, parties] */
    int32_t count;
    int32_t parties;
    bool own_clocks; /* each party has a clock of its own */
};

/* Microseconds; an iteration lasts from the first start to the last end.  Where
 * clocks cannot be compared it lasts as long as its mean span. */
struct bench_times {
    double min;
    double p50;
    double p99;
};

/* All zero for an empty series.  False when memory has run out. */
bool bench_series_times(const struct bench_series *series,
                        struct bench_times *times);

#endif
