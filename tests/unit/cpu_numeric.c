/* SPDX-License-Identifier: MIT */
/* Conversions between float32 and the small formats, against the oracle's,
 * which round by arithmetic. */
#include "api_common.h"
#include "conformance/rng.h"
#include "engine/common/numeric.h"
#include "oracle/oracle.h"

#include <math.h>

enum { HALVES = 1 << 16 };

/* ---- to float32: every input ---- */

static void
every_bf16_and_f16(void **state)
{
    (void)state;
    for (uint32_t i = 0; i < HALVES; i++) {
        uint16_t half = (uint16_t)i;
        float from_bf16 = epx__f32_from_bf16(half);
        float from_f16 = epx__f32_from_f16(half);
        float want = oracle_from_f16(half);

        assert_int_equal(epx__bits_from_f32(from_bf16), i << 16);
        if (isnan(want)) {
            assert_true(isnan(from_f16));
            continue;
        }
        assert_int_equal(epx__bits_from_f32(from_f16),
                         epx__bits_from_f32(want));
    }
}

/* ---- from float32 ---- */

static void
check_result(const char *format, uint32_t bits, uint32_t want, uint32_t got)
{
    if (want != got) {
        fail_msg("%s of float32 %#010x: expected %#x, got %#x", format, bits,
                 want, got);
    }
}

/* A NaN gives the one NaN that docs/formats.md promises. */
static void
check_f32(uint32_t bits)
{
    float value = epx__f32_from_bits(bits);
    bool is_nan = isnan(value);

    check_result("bf16", bits, is_nan ? 0x7fff : oracle_to_bf16(value),
                 epx__bf16_from_f32(value));
    check_result("f16", bits, is_nan ? 0x7fff : oracle_to_f16(value),
                 epx__f16_from_f32(value));
    check_result("e4m3", bits, is_nan ? 0x7f : oracle_to_e4m3(value),
                 epx__f8e4m3_from_f32(value));
}

/* Every sign, exponent and upper mantissa, with the lower halves where bf16
 * decides how to round and some at random. */
static void
every_high_half(void **state)
{
    static const uint16_t low[] = { 0, 1, 0x7fff, 0x8000, 0x8001, 0xffff };
    rng_t rng = rng_of(1, 1, 1);

    (void)state;
    for (uint32_t high = 0; high < HALVES; high++) {
        for (size_t i = 0; i < sizeof(low) / sizeof(*low); i++) {
            check_f32(high << 16 | low[i]);
        }
        for (int i = 0; i < 8; i++) {
            check_f32(high << 16 | (uint16_t)rng_next(&rng));
        }
    }
}

/* A float32 and its neighbours, with either sign. */
static void
check_around(float value)
{
    uint32_t bits = epx__bits_from_f32(value);

    for (uint32_t b = bits < 2 ? 0 : bits - 2; b <= bits + 2; b++) {
        check_f32(b);
        check_f32(b | 0x80000000u);
    }
}

/* Every value of a format, and the middle between it and the next, exactly: the
 * sum of two neighbours has few bits. */
static void
check_steps(float (*value_of)(uint32_t bits), uint32_t num_finite)
{
    for (uint32_t i = 0; i + 1 < num_finite; i++) {
        float low = value_of(i);
        float high = value_of(i + 1);

        check_around(low);
        check_around(low + (high - low) / 2);
    }
    check_around(value_of(num_finite - 1));
}

static float
f16_value(uint32_t bits)
{
    return oracle_from_f16((uint16_t)bits);
}

static float
bf16_value(uint32_t bits)
{
    return oracle_from_bf16((uint16_t)bits);
}

static float
e4m3_value(uint32_t bits)
{
    return oracle_from_e4m3((uint8_t)bits);
}

static void
every_midpoint(void **state)
{
    (void)state;
    check_steps(f16_value, 0x7c00);
    check_steps(bf16_value, 0x7f80);
    check_steps(e4m3_value, 0x7f);
}

static void
ends_of_the_range(void **state)
{
    static const float ends[] = {
        0x1p-149f,                              /* float32's least */
        0x1p-126f,                              /* its least normal number */
        0x1p-25f,                               /* half of f16's least */
        0x1p-24f,        0x1p-14f,    0x1p-10f, /* half of e4m3's least */
        0x1p-9f,         0x1p-6f,     448.0f,   /* e4m3's largest, */
        464.0f,                    /* and half-way to where the next would be */
        480.0f,          65504.0f, /* f16's largest */
        65520.0f,                  /* half-way to where the next would be */
        65536.0f,        0x1.fep127f, /* bf16's largest */
        0x1.ffp127f,                  /* half-way to where the next would be */
        0x1.fffffep127f,
    };

    (void)state;
    for (size_t i = 0; i < sizeof(ends) / sizeof(*ends); i++) {
        check_around(ends[i]);
    }
    for (uint32_t nan = 0x7f800000u; nan < 0x7f800010u; nan++) {
        check_f32(nan); /* infinity, then signalling NaNs */
        check_f32(nan | 0x80000000u);
        check_f32(nan | 0x00400000u);
    }
    assert_int_equal(epx__f8e4m3_from_f32(INFINITY), 0x7e);
    assert_int_equal(epx__f8e4m3_from_f32(-INFINITY), 0xfe);
    assert_int_equal(epx__f8e4m3_from_f32(-0.0f), 0x80);
    assert_int_equal(epx__f16_from_f32(-0.0f), 0x8000);
    assert_int_equal(epx__bf16_from_f32(-0.0f), 0x8000);
}

/* What a format holds survives the way through float32. */
static void
round_trips(void **state)
{
    (void)state;
    for (uint32_t i = 0; i < HALVES; i++) {
        uint16_t half = (uint16_t)i;

        if ((half & 0x7fff) <= 0x7f80) {
            assert_int_equal(epx__bf16_from_f32(epx__f32_from_bf16(half)), i);
        }
        if ((half & 0x7fff) <= 0x7c00) {
            assert_int_equal(epx__f16_from_f32(epx__f32_from_f16(half)), i);
        }
    }
    for (uint32_t i = 0; i < 256; i++) {
        if ((i & 0x7f) != 0x7f) {
            assert_int_equal(epx__f8e4m3_from_f32(oracle_from_e4m3((uint8_t)i)),
                             i);
        }
    }
}

/* ---- scales ---- */

/* The scale of every largest magnitude, told by a block of that one value. */
static void
every_block_scale(void **state)
{
    (void)state;
    for (uint32_t i = 0; i <= 0x7f80; i++) {
        uint16_t half = (uint16_t)i;
        float value = epx__f32_from_bf16(half);
        float amax =
            value > EPX__QUANTIZE_MIN_AMAX ? value : EPX__QUANTIZE_MIN_AMAX;

        for (int kind = EPX_QUANTIZE_F8E4M3_F32;
             kind <= EPX_QUANTIZE_F8E4M3_UE8M0; kind++) {
            epx__block_scale_t scale =
                epx__block_scale((epx_quantize_t)kind, amax);
            uint32_t bits = epx__bits_from_f32(scale.scale);
            uint32_t want;
            uint8_t q;

            oracle_quantize((epx_quantize_t)kind, &half, 1, &q, &want);
            check_result("scale", i << 16, want,
                         kind == EPX_QUANTIZE_F8E4M3_UE8M0 ? bits >> 23 : bits);
            check_result("q", i << 16, q,
                         epx__f8e4m3_from_f32(value * scale.factor));
        }
    }
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_bf16_and_f16),
        cmocka_unit_test(every_high_half),
        cmocka_unit_test(every_midpoint),
        cmocka_unit_test(ends_of_the_range),
        cmocka_unit_test(round_trips),
        cmocka_unit_test(every_block_scale),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
