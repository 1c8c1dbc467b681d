/* SPDX-License-Identifier: MIT */
/* The routings that epx-bench draws: valid, repeatable, and as described. */
#include "bench_routing.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#define TOKENS  512
#define TOPK    6
#define EXPERTS 45
#define RANKS   4

struct drawn {
    int64_t idx[TOKENS * TOPK];
    float weights[TOKENS * TOPK];
};

static struct bench_options
options_of(enum bench_routing_kind kind)
{
    return (struct bench_options){ .ranks = RANKS,
                                   .tokens = TOKENS,
                                   .topk = TOPK,
                                   .experts = EXPERTS,
                                   .routing = kind,
                                   .zipf_exponent = 1.5,
                                   .groups = 7,
                                   .groups_per_token = 2,
                                   .seed = 3 };
}

static void
draw(const struct bench_options *options, int32_t rank, uint64_t round,
     struct drawn *drawn)
{
    struct bench_routing routing;
    struct bench_error error = { "" };
    if (!bench_routing_open(&routing, options, &error)) {
        fail_msg("%s", error.text);
    }
    assert_int_equal(bench_routing_tokens(&routing, rank), TOKENS);
    assert_true(
        bench_routing_fill(&routing, rank, round, drawn->idx, drawn->weights));
    bench_routing_close(&routing);
}

static void
check_valid(const struct drawn *drawn)
{
    for (int t = 0; t < TOKENS; t++) {
        const int64_t *idx = &drawn->idx[t * TOPK];
        float sum = 0;
        for (int k = 0; k < TOPK; k++) {
            assert_in_range(idx[k], 0, EXPERTS - 1);
            for (int j = 0; j < k; j++) {
                assert_int_not_equal(idx[j], idx[k]);
            }
            sum += drawn->weights[t * TOPK + k];
        }
        assert_float_equal(sum, 1.0f, 1e-5);
    }
}

static void
test_valid_and_repeatable(void **state)
{
    static struct drawn first;
    static struct drawn again;
    static struct drawn other;
    (void)state;
    for (int kind = BENCH_UNIFORM; kind < BENCH_CSV; kind++) {
        struct bench_options o = options_of((enum bench_routing_kind)kind);
        draw(&o, 1, 5, &first);
        draw(&o, 1, 5, &again);
        check_valid(&first);
        assert_memory_equal(&first, &again, sizeof first);
        draw(&o, 2, 5, &other);
        assert_memory_not_equal(&first, &other, sizeof first);
        draw(&o, 1, 6, &other);
        assert_memory_not_equal(&first, &other, sizeof first);
        o.seed++;
        draw(&o, 1, 5, &other);
        assert_memory_not_equal(&first, &other, sizeof first);
    }
}

static int
most_of_one(const struct drawn *drawn)
{
    int count[EXPERTS] = { 0 };
    int most = 0;
    for (int i = 0; i < TOKENS * TOPK; i++) {
        int n = ++count[drawn->idx[i]];
        most = n > most ? n : most;
    }
    return most;
}

static void
test_popularity(void **state)
{
    static struct drawn drawn;
    struct bench_options o = options_of(BENCH_UNIFORM);
    (void)state;
    /* 68 tokens an expert on average; far from it is a broken draw. */
    draw(&o, 0, 0, &drawn);
    assert_in_range(most_of_one(&drawn), 68, 130);
    o = options_of(BENCH_ZIPF);
    draw(&o, 0, 0, &drawn);
    /* The most popular expert, of weight 1 in 2.6, is in most tokens. */
    assert_in_range(most_of_one(&drawn), TOKENS * 3 / 4, TOKENS);
    o.zipf_exponent = 0;
    draw(&o, 0, 0, &drawn);
    assert_in_range(most_of_one(&drawn), 68, 130);
}

static void
test_groups(void **state)
{
    static struct drawn drawn;
    struct bench_options o = options_of(BENCH_GROUP);
    (void)state;
    draw(&o, 0, 0, &drawn);
    for (int t = 0; t < TOKENS; t++) {
        bool used[7] = { false };
        int count = 0;
        for (int k = 0; k < TOPK; k++) {
            /* 45 experts in 7 groups: 3 of 7, then 4 of 6. */
            int64_t e = drawn.idx[t * TOPK + k];
            int64_t group = e < 21 ? e / 7 : 3 + (e - 21) / 6;
            count += !used[group];
            used[group] = true;
        }
        assert_in_range(count, 1, 2);
    }
}

static void
test_count(void **state)
{
    /* 5 experts on 3 ranks: 0 1, 2 3, 4. */
    const struct bench_options o = { .ranks = 3, .experts = 5, .tokens = 3 };
    const struct bench_routing routing = { .options = &o, .topk = 3 };
    const int64_t idx[] = { 0, 1, 2, -1, -1, -1, 4, -1, 3 };
    (void)state;
    struct bench_traffic n = bench_routing_count(&routing, 3, idx);
    assert_int_equal(n.tokens, 3);
    assert_int_equal(n.tokens_sent, 2);
    assert_int_equal(n.rank_pairs, 4);
    assert_int_equal(n.expert_pairs, 5);
}

/* Seven tokens over four ranks: 2 2 2 1, each round from further on. */
static void
test_file(void **state)
{
    char path[] = P_tmpdir "/epx-bench-routing-XXXXXX.csv";
    struct bench_options o = { .ranks = 4, .experts = 9, .routing = BENCH_CSV };
    struct bench_routing routing;
    struct bench_error error = { "" };
    int64_t idx[7];
    float weights[7];
    (void)state;
    int fd = mkstemps(path, 4);
    assert_true(fd >= 0);
    FILE *file = fdopen(fd, "w");
    assert_non_null(file);
    fputs("expert0,weight0\n0,.0\n1,.1\n2,.2\n3,.3\n4,.4\n5,.5\n6,.6\n", file);
    fclose(file);
    o.routing_text = path;
    if (!bench_routing_open(&routing, &o, &error)) {
        fail_msg("%s", error.text);
    }
    assert_int_equal(routing.topk, 1);
    assert_int_equal(routing.max_tokens, 2);
    assert_int_equal(bench_routing_tokens(&routing, 2), 2);
    assert_int_equal(bench_routing_tokens(&routing, 3), 1);
    assert_true(bench_routing_fill(&routing, 3, 0, idx, weights));
    assert_int_equal(idx[0], 6);
    assert_float_equal(weights[0], 0.6f, 1e-9);
    assert_true(bench_routing_fill(&routing, 2, 2, idx, weights));
    assert_int_equal(idx[0], 6);
    assert_int_equal(idx[1], 0);
    bench_routing_close(&routing);

    o.tokens = 5;
    assert_true(bench_routing_open(&routing, &o, &error));
    assert_int_equal(routing.max_tokens, 5);
    assert_true(bench_routing_fill(&routing, 1, 0, idx, weights));
    assert_int_equal(idx[0], 5);
    assert_int_equal(idx[4], 2);
    bench_routing_close(&routing);

    o.topk = 2;
    assert_false(bench_routing_open(&routing, &o, &error));
    assert_non_null(strstr(error.text, "--topk is 2"));
    unlink(path);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_valid_and_repeatable),
        cmocka_unit_test(test_popularity),
        cmocka_unit_test(test_groups),
        cmocka_unit_test(test_count),
        cmocka_unit_test(test_file),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
