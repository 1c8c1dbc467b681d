/* SPDX-License-Identifier: MIT */
#include "bench_times.h"

#include <stdlib.h>
#include <time.h>

int64_t
bench_now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

static int
compare_doubles(const void *a, const void *b)
{
    double x = *(const double *)a;
    double y = *(const double *)b;
    return (x > y) - (x < y);
}

/* The smallest value that at least `percent` of all do not exceed. */
static double
percentile(const double *sorted, int32_t count, int32_t percent)
{
    int64_t rank = ((int64_t)count * percent + 99) / 100;
    return sorted[rank > 0 ? rank - 1 : 0];
}

static double
whole_us(const struct bench_span *spans, int32_t parties)
{
    struct bench_span whole = spans[0];
    for (int32_t p = 1; p < parties; p++) {
        if (spans[p].start < whole.start) {
            whole.start = spans[p].start;
        }
        if (spans[p].end > whole.end) {
            whole.end = spans[p].end;
        }
    }
    return (double)(whole.end - whole.start) / 1e3;
}

static double
mean_us(const struct bench_span *spans, int32_t parties)
{
    int64_t sum = 0;
    for (int32_t p = 0; p < parties; p++) {
        sum += spans[p].end - spans[p].start;
    }
    return (double)sum / parties / 1e3;
}

bool
bench_series_times(const struct bench_series *series, struct bench_times *times)
{
    *times = (struct bench_times){ 0 };
    if (!series->count) {
        return true;
    }
    double *us = malloc((size_t)series->count * sizeof *us);
    if (!us) {
        return false;
    }
    for (int32_t i = 0; i < series->count; i++) {
        const struct bench_span *spans =
            &series->spans[(size_t)i * (size_t)series->parties];
        us[i] = series->own_clocks ? mean_us(spans, series->parties)
                                   : whole_us(spans, series->parties);
    }
    qsort(us, (size_t)series->count, sizeof *us, compare_doubles);
    times->min = us[0];
    times->p50 = percentile(us, series->count, 50);
    times->p99 = percentile(us, series->count, 99);
    free(us);
    return true;
}
