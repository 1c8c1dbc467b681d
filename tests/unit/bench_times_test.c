/* SPDX-License-Identifier: MIT */
/* An iteration's time and the percentiles of many. */
#include "bench_times.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

static void
test_first_start_to_last_end(void **state)
{
    struct bench_span spans[] = { { 5000, 9000 }, { 4000, 8000 } };
    struct bench_series series = { spans, 1, 2, false };
    struct bench_times times;
    (void)state;
    assert_true(bench_series_times(&series, &times));
    assert_float_equal(times.min, 5.0, 0);
    assert_float_equal(times.p50, 5.0, 0);
    assert_float_equal(times.p99, 5.0, 0);
    /* Spans of 4 and 4 us, whenever they were. */
    series.own_clocks = true;
    assert_true(bench_series_times(&series, &times));
    assert_float_equal(times.p50, 4.0, 0);
    spans[1].end += 3000;
    assert_true(bench_series_times(&series, &times));
    assert_float_equal(times.p50, 5.5, 0);
}

static void
test_percentiles(void **state)
{
    struct bench_span spans[200];
    struct bench_times times;
    (void)state;
    for (int i = 0; i < 200; i++) {
        /* 1..200 us, in some order. */
        int64_t us = (i * 77) % 200 + 1;
        spans[i] = (struct bench_span){ 100, 100 + us * 1000 };
    }
    struct bench_series series = { spans, 200, 1, false };
    assert_true(bench_series_times(&series, &times));
    assert_float_equal(times.min, 1.0, 0);
    assert_float_equal(times.p50, 100.0, 0);
    assert_float_equal(times.p99, 198.0, 0);
    series.count = 0;
    assert_true(bench_series_times(&series, &times));
    assert_float_equal(times.p50, 0.0, 0);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_first_start_to_last_end),
        cmocka_unit_test(test_percentiles),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
