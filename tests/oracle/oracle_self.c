/* SPDX-License-Identifier: MIT */
/* The oracle against results worked out by hand, and its element types against
 * the definition of rounding. */
#include "oracle/oracle.h"
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

static void
assert_bits(float actual, float expected)
{
    uint32_t a;
    uint32_t e;

    memcpy(&a, &actual, 4);
    memcpy(&e, &expected, 4);
    assert_int_equal(a, e);
}

/* ---- element types ---- */

static void
halves_survive_a_round_trip(void **state)
{
    (void)state;
    for (uint32_t bits = 0; bits < 0x10000; bits++) {
        float f16 = oracle_from_f16((uint16_t)bits);
        float bf16 = oracle_from_bf16((uint16_t)bits);
        uint32_t wide = bits << 16;
        float direct;

        memcpy(&direct, &wide, 4);
        if (isnan(f16)) {
            assert_true((oracle_to_f16(f16) & 0x7fff) > 0x7c00);
        } else {
            assert_int_equal(oracle_to_f16(f16), bits);
        }
        if (isnan(direct)) {
            assert_true(isnan(bf16));
            assert_true((oracle_to_bf16(bf16) & 0x7fff) > 0x7f80);
        } else {
            assert_bits(bf16, direct);
            assert_int_equal(oracle_to_bf16(bf16), bits);
        }
    }
}

/* Between two neighbours, the middle goes to the even one, and anything else to
 * the nearer one. */
static void
halves_round_to_nearest_even(void **state)
{
    (void)state;
    for (uint32_t bits = 0; bits < 0x7bff; bits++) {
        float low = oracle_from_f16((uint16_t)bits);
        float high = oracle_from_f16((uint16_t)(bits + 1));
        float middle = (low + high) / 2; /* exact in float32 */

        assert_int_equal(oracle_to_f16(middle), bits + bits % 2);
        assert_int_equal(oracle_to_f16(nextafterf(middle, 0)), bits);
        assert_int_equal(oracle_to_f16(nextafterf(middle, INFINITY)), bits + 1);
        assert_int_equal(oracle_to_f16(-middle), 0x8000 | (bits + bits % 2));
    }
    for (uint32_t bits = 0; bits < 0x7f80; bits++) {
        uint32_t wide = bits << 16 | 0x8000;
        float middle;

        memcpy(&middle, &wide, 4);
        assert_int_equal(oracle_to_bf16(middle), bits + bits % 2);
        assert_int_equal(oracle_to_bf16(nextafterf(middle, 0)), bits);
        if (isfinite(nextafterf(middle, INFINITY))) {
            assert_int_equal(oracle_to_bf16(nextafterf(middle, INFINITY)),
                             bits + 1);
        }
    }
}

static void
halves_overflow_to_infinity(void **state)
{
    (void)state;
    assert_int_equal(oracle_to_f16(65504.0f), 0x7bff);
    assert_int_equal(oracle_to_f16(65519.996f), 0x7bff);
    assert_int_equal(oracle_to_f16(65520.0f), 0x7c00);
    assert_int_equal(oracle_to_f16(-INFINITY), 0xfc00);
    assert_int_equal(oracle_to_bf16(3.4028235e38f), 0x7f80);
    assert_int_equal(oracle_to_bf16(3.3895314e38f), 0x7f7f);
    assert_int_equal(oracle_to_bf16(-INFINITY), 0xff80);
}

static void
e4m3_is_the_ocp_table(void **state)
{
    (void)state;
    assert_bits(oracle_from_e4m3(0x01), 0.001953125f);
    assert_bits(oracle_from_e4m3(0x08), 0.015625f);
    assert_bits(oracle_from_e4m3(0x38), 1.0f);
    assert_bits(oracle_from_e4m3(0x7e), 448.0f);
    assert_bits(oracle_from_e4m3(0x80), -0.0f);
    assert_true(isnan(oracle_from_e4m3(0x7f)));
    assert_true(isnan(oracle_from_e4m3(0xff)));
    for (uint32_t bits = 0; bits < 0x7e; bits++) {
        float low = oracle_from_e4m3((uint8_t)bits);
        float high = oracle_from_e4m3((uint8_t)(bits + 1));
        float middle = (low + high) / 2;

        assert_true(low < high);
        assert_int_equal(oracle_to_e4m3(low), bits);
        assert_int_equal(oracle_to_e4m3(-low), 0x80 | bits);
        assert_int_equal(oracle_to_e4m3(middle), bits + bits % 2);
        assert_int_equal(oracle_to_e4m3(nextafterf(middle, 0)), bits);
        assert_int_equal(oracle_to_e4m3(nextafterf(middle, 1e9f)), bits + 1);
    }
    assert_int_equal(oracle_to_e4m3(1e30f), 0x7e);
    assert_int_equal(oracle_to_e4m3(-449.0f), 0xfe);
    assert_int_equal(oracle_to_e4m3(1e-30f), 0x00);
    assert_int_equal(oracle_to_e4m3(NAN) & 0x7f, 0x7f);
}

static void
quantises_by_the_formulas(void **state)
{
    /* 130 channels: a block of 128 with amax 448 * 3, and a short one of
     * zeros, whose amax is 1e-4. */
    uint16_t x[130] = { 0 };
    uint8_t q[130];
    uint32_t words[2];
    float scales[2];

    (void)state;
    x[0] = oracle_to_bf16(1344.0f);
    x[1] = oracle_to_bf16(-672.0f);
    x[127] = oracle_to_bf16(3.0f);
    oracle_quantize(EPX_QUANTIZE_F8E4M3_F32, x, 130, q, words);
    memcpy(scales, words, sizeof(scales));
    assert_bits(scales[0], 1344.0f * (1.0f / 448.0f));
    assert_bits(scales[1], 1e-4f * (1.0f / 448.0f));
    assert_int_equal(q[0], 0x7e);
    assert_int_equal(q[1], oracle_to_e4m3(-224.0f));
    assert_int_equal(q[127], oracle_to_e4m3(1.0f));
    assert_int_equal(q[128], 0);

    oracle_quantize(EPX_QUANTIZE_F8E4M3_POW2, x, 130, q, words);
    memcpy(scales, words, sizeof(scales));
    assert_bits(scales[0], 4.0f);
    assert_bits(scales[1], ldexpf(1, -22)); /* 2.2e-7 < 2^-22 = 2.4e-7 */
    assert_int_equal(q[0], oracle_to_e4m3(336.0f));

    oracle_quantize(EPX_QUANTIZE_F8E4M3_UE8M0, x, 130, q, words);
    assert_int_equal(words[0], 129u | 105u << 8);
    assert_int_equal(q[127], oracle_to_e4m3(0.75f));
}

/* ---- routing: two ranks, three experts (0 and 1 on rank 0, 2 on rank 1) ----
 */

enum { R = 2, K = 2, E = 3 };
static const int32_t idx0[] = { 0, 2, 1, 0, -1, 2 };
static const int32_t idx1[] = { 1, -1, -1, -1 };

static void
route(epx_plan_args_t *args, epx_layout_t layout)
{
    for (int r = 0; r < R; r++) {
        args[r] = (epx_plan_args_t)EPX_PLAN_ARGS_INIT;
        args[r].layout = layout;
        args[r].num_experts = E;
        args[r].topk = K;
        args[r].idx_dtype = EPX_I32;
        args[r].num_tokens = r == 0 ? 3 : 2;
        args[r].topk_idx = r == 0 ? idx0 : idx1;
        args[r].max_tokens_per_rank = 4;
        args[r].expert_alignment = layout == EPX_LAYOUT_EXPERT_MAJOR ? 4 : 0;
    }
}

static void
assert_rows(const oracle_t *o, int32_t rank, const int32_t (*want)[4],
            int64_t num_want)
{
    int64_t count;
    const oracle_row_t *rows = oracle_rows(o, rank, &count);

    assert_int_equal(count, num_want);
    for (int64_t i = 0; i < count; i++) {
        assert_int_equal(rows[i].row, want[i][0]);
        assert_int_equal(rows[i].src_rank, want[i][1]);
        assert_int_equal(rows[i].token, want[i][2]);
        assert_int_equal(rows[i].k, want[i][3]);
    }
}

static void
rank_major_rows(void **state)
{
    static const int32_t on0[][4] = { { 0, 0, 0, -1 },
                                      { 1, 0, 1, -1 },
                                      { 2, 1, 0, -1 } };
    static const int32_t on1[][4] = { { 0, 0, 0, -1 }, { 1, 0, 2, -1 } };
    epx_plan_args_t args[R];
    epx_plan_counts_t counts;
    oracle_t *o;
    int32_t rank;

    (void)state;
    route(args, EPX_LAYOUT_RANK_MAJOR);
    o = oracle_create(R, args);
    assert_rows(o, 0, on0, 3);
    assert_rows(o, 1, on1, 2);
    counts = oracle_counts(o, 0);
    assert_int_equal(counts.num_rows, 3);
    assert_int_equal(counts.num_recv_tokens, 3);
    assert_int_equal(counts.num_recv_rows, 3);
    assert_int_equal(counts.rank_tokens[0], 2);
    assert_int_equal(counts.rank_tokens[1], 1);
    assert_int_equal(counts.expert_rows[0], 2);
    assert_int_equal(counts.expert_rows[1], 2);
    assert_int_equal(counts.expert_offsets[2], 0);
    assert_int_equal(oracle_row_of(o, 0, 2, 1, &rank), 1);
    assert_int_equal(rank, 1);
    assert_int_equal(oracle_row_of(o, 0, 2, 0, &rank), -1);
    assert_int_equal(rank, -1);
    oracle_destroy(o);
}

static void
expert_major_rows(void **state)
{
    static const int32_t on0[][4] = {
        { 0, 0, 0, 0 }, { 1, 0, 1, 1 }, { 2, -1, -1, -1 }, { 3, -1, -1, -1 },
        { 4, 0, 1, 0 }, { 5, 1, 0, 0 }, { 6, -1, -1, -1 }, { 7, -1, -1, -1 },
    };
    epx_plan_args_t args[R];
    epx_plan_counts_t counts;
    oracle_t *o;

    (void)state;
    route(args, EPX_LAYOUT_EXPERT_MAJOR);
    o = oracle_create(R, args);
    assert_rows(o, 0, on0, 8);
    counts = oracle_counts(o, 0);
    assert_int_equal(counts.num_rows, 8);
    assert_int_equal(counts.num_recv_rows, 4);
    assert_int_equal(counts.num_recv_tokens, 3);
    assert_int_equal(counts.expert_offsets[1], 4);
    assert_int_equal(counts.expert_offsets[2], 8);
    counts = oracle_counts(o, 1);
    assert_int_equal(counts.first_expert, 2);
    assert_int_equal(counts.num_local_experts, 1);
    assert_int_equal(counts.num_rows, 4);
    assert_int_equal(oracle_most_rows(o), 8);
    oracle_destroy(o);
}

static void
expert_slots_rows(void **state)
{
    static const int32_t on0[][4] = {
        { 0, 0, 0, 0 }, { 1, 0, 1, 1 }, { 8, 0, 1, 0 }, { 9, 1, 0, 0 }
    };
    epx_plan_args_t args[R];
    epx_plan_counts_t counts;
    oracle_t *o;

    (void)state;
    route(args, EPX_LAYOUT_EXPERT_SLOTS);
    o = oracle_create(R, args);
    assert_rows(o, 0, on0, 4);
    counts = oracle_counts(o, 0);
    assert_int_equal(counts.num_rows, 16);
    assert_int_equal(counts.expert_offsets[1], 8);
    assert_int_equal(counts.expert_offsets[2], 16);
    oracle_destroy(o);
}

/* ---- data ---- */

static void
dispatch_writes_what_it_should(void **state)
{
    float x0[3 * 4] = { 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12 };
    float x1[2 * 4] = { 21, 22, 23, 24, 25, 26, 27, 28 };
    float w0[3 * K] = { .1f, .2f, .3f, .4f, .5f, .6f };
    float w1[2 * K] = { .7f, .8f, .9f, 1.0f };
    float recv_x[4 * 4] = { 0 };
    float recv_w[4 * K] = { 0 };
    int32_t recv_idx[4 * K] = { 0 };
    int32_t recv_src[4] = { 77, 77, 77, 77 };
    int32_t recv_counts[2];
    epx_plan_args_t plan[R];
    epx_dispatch_args_t args[R];
    oracle_arrays_t arrays = { args, K };
    char text[200];
    oracle_t *o;

    (void)state;
    route(plan, EPX_LAYOUT_RANK_MAJOR);
    o = oracle_create(R, plan);
    for (int r = 0; r < R; r++) {
        args[r] = (epx_dispatch_args_t)EPX_DISPATCH_ARGS_INIT;
        args[r].hidden = 4;
        args[r].dtype = EPX_F32;
        args[r].x = r == 0 ? x0 : x1;
        args[r].topk_weights = r == 0 ? w0 : w1;
    }
    args[0].recv_x = recv_x;
    args[0].recv_topk_idx = recv_idx;
    args[0].recv_topk_weights = recv_w;
    args[0].recv_src_token = recv_src;
    args[0].recv_expert_counts = recv_counts;
    oracle_dispatch(o, 0, oracle_token_of_arrays, &arrays, &args[0]);
    assert_memory_equal(recv_x, x0, 2 * 16);
    assert_memory_equal(recv_x + 8, x1, 16);
    assert_int_equal(recv_idx[0], 0);
    assert_int_equal(recv_idx[1], -1);
    assert_int_equal(recv_idx[2], 1);
    assert_int_equal(recv_idx[3], 0);
    assert_bits(recv_w[0], .1f);
    assert_bits(recv_w[1], 0);
    assert_bits(recv_w[3], .4f);
    assert_bits(recv_w[4], .7f);
    assert_int_equal(recv_src[2], 0);
    assert_int_equal(recv_src[3], 77);
    assert_int_equal(recv_counts[1], 2);

    assert_true(oracle_check_dispatch(o, 0, oracle_token_of_arrays, &arrays,
                                      &args[0], text, sizeof(text)));
    recv_x[9] = 0;
    assert_false(oracle_check_dispatch(o, 0, oracle_token_of_arrays, &arrays,
                                       &args[0], text, sizeof(text)));
    assert_non_null(strstr(text, "recv_x row 2 (rank 1's token 0)"));
    oracle_destroy(o);
}

static void
combine_sums_in_order(void **state)
{
    /* Token 0 of rank 0 went to expert 0 (rank 0, row 0) and expert 2 (rank 1,
     * row 0); token 2 to expert 2 alone (rank 1, row 1). */
    float x0[8 * 4] = { 1e8f, 1, 2, 3 };
    float x1[4 * 4] = { 1, 10, 20, 30, 100, 200, 300, 400 };
    float bias[3 * 4] = { -1e8f, 5 };
    float weights[3 * K] = { 1, 0.5f, 1, 1, 1, 2 };
    float out[3 * 4];
    epx_plan_args_t plan[R];
    epx_combine_args_t args[R];
    oracle_outputs_t outputs = { args, 1 };
    oracle_t *o;

    (void)state;
    route(plan, EPX_LAYOUT_EXPERT_MAJOR);
    o = oracle_create(R, plan);
    for (int r = 0; r < R; r++) {
        args[r] = (epx_combine_args_t)EPX_COMBINE_ARGS_INIT;
        args[r].hidden = 4;
        args[r].dtype = EPX_F32;
        args[r].x = r == 0 ? x0 : x1;
    }
    args[0].bias[1] = bias;
    args[0].topk_weights = weights;
    args[0].out = out;
    oracle_combine(o, 0, oracle_output_of_arrays, &outputs, &args[0]);
    assert_bits(out[0], 0.5f); /* (-1e8 + 1e8) + 0.5, not 0 */
    assert_bits(out[1], 11);
    assert_bits(out[8], 200);
    assert_bits(out[11], 800);
    oracle_destroy(o);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(halves_survive_a_round_trip),
        cmocka_unit_test(halves_round_to_nearest_even),
        cmocka_unit_test(halves_overflow_to_infinity),
        cmocka_unit_test(e4m3_is_the_ocp_table),
        cmocka_unit_test(quantises_by_the_formulas),
        cmocka_unit_test(rank_major_rows),
        cmocka_unit_test(expert_major_rows),
        cmocka_unit_test(expert_slots_rows),
        cmocka_unit_test(dispatch_writes_what_it_should),
        cmocka_unit_test(combine_sums_in_order),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
