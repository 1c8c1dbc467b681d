/* SPDX-License-Identifier: MIT */
/* Element types, rounded by arithmetic rather than by shifting bits. */
#include "oracle/oracle_internal.h"
#include <assert.h>
#include <math.h>
#include <string.h>

size_t
oracle_elem_size(epx_dtype_t dtype)
{
    switch (dtype) {
    case EPX_F32:
    case EPX_I32:
        return 4;
    case EPX_F16:
    case EPX_BF16:
        return 2;
    case EPX_I64:
        return 8;
    default:
        return 1;
    }
}

/*
 * The value of a small float: sign, exp_bits, man_bits.  Not for the encodings
 * of infinity and NaN, which the callers know.
 */
static double
small_value(uint32_t bits, int exp_bits, int man_bits)
{
    uint32_t man = bits & ((1u << man_bits) - 1);
    int exponent = (int)(bits >> man_bits & ((1u << exp_bits) - 1));
    int bias = (1 << (exp_bits - 1)) - 1;
    bool negative = bits >> (exp_bits + man_bits) & 1;
    double value = exponent == 0 ? ldexp(man, 1 - bias - man_bits)
                                 : ldexp(man + (1u << man_bits),
                                         exponent - bias - man_bits);

    return negative ? -value : value;
}

float
oracle_from_f16(uint16_t bits)
{
    if ((bits & 0x7fff) > 0x7c00) {
        return NAN;
    }
    if ((bits & 0x7fff) == 0x7c00) {
        return bits & 0x8000 ? -INFINITY : INFINITY;
    }
    return (float)small_value(bits, 5, 10);
}

float
oracle_from_bf16(uint16_t bits)
{
    uint32_t upper_half = (uint32_t)bits << 16;
    float value;

    memcpy(&value, &upper_half, 4);
    return value;
}

float
oracle_from_e4m3(uint8_t bits)
{
    return (bits & 0x7f) == 0x7f ? NAN : (float)small_value(bits, 4, 3);
}

/*
 * Nearest, ties to even, of |value| in a format with the smallest normal
 * exponent min_exp and man_bits of fraction: the bits without the sign.  Works
 * for subnormals (the exponent field is then 0) and carries into the exponent.
 */
static uint32_t
nearest_bits(double magnitude, int min_exp, int man_bits)
{
    int exponent = magnitude == 0 ? min_exp : ilogb(magnitude);
    uint32_t steps;

    if (exponent < min_exp) {
        exponent = min_exp;
    }
    steps = (uint32_t)nearbyint(ldexp(magnitude, man_bits - exponent));
    return ((uint32_t)(exponent - min_exp) << man_bits) + steps;
}

uint16_t
oracle_to_f16(float value)
{
    uint16_t sign = signbit(value) ? 0x8000 : 0;

    if (isnan(value)) {
        return 0x7e00;
    }
    /* 65520 is half-way from the largest, 65504, to what would be next. */
    if (fabs((double)value) >= 65520.0) {
        return sign | 0x7c00;
    }
    return (uint16_t)(sign | nearest_bits(fabs((double)value), -14, 10));
}

uint16_t
oracle_to_bf16(float value)
{
    uint16_t sign = signbit(value) ? 0x8000 : 0;
    double largest = ldexp(255, 120); /* next would be 2^128 */

    if (isnan(value)) {
        return 0x7fc0;
    }
    if (fabs((double)value) >= (largest + ldexp(1, 128)) / 2) {
        return sign | 0x7f80;
    }
    return (uint16_t)(sign | nearest_bits(fabs((double)value), -126, 7));
}

uint8_t
oracle_to_e4m3(float value)
{
    uint8_t sign = signbit(value) ? 0x80 : 0;

    if (isnan(value)) {
        return 0x7f;
    }
    if (fabs((double)value) >= 448.0) {
        return sign | 0x7e;
    }
    return (uint8_t)(sign | nearest_bits(fabs((double)value), -6, 3));
}

float
oracle_to_float(epx_dtype_t dtype, const void *data, int64_t i)
{
    const uint8_t *bytes =
        (const uint8_t *)data + (size_t)i * oracle_elem_size(dtype);
    uint16_t half;
    float single;

    switch (dtype) {
    case EPX_F32:
        memcpy(&single, bytes, 4);
        return single;
    case EPX_F16:
        memcpy(&half, bytes, 2);
        return oracle_from_f16(half);
    case EPX_BF16:
        memcpy(&half, bytes, 2);
        return oracle_from_bf16(half);
    case EPX_F8E4M3:
        return oracle_from_e4m3(*bytes);
    default: /* not a float type that EPX computes with */
        assert(dtype == EPX_F8E5M2);
        if ((*bytes & 0x7c) == 0x7c) {
            return *bytes & 3 ? NAN : *bytes & 0x80 ? -INFINITY : INFINITY;
        }
        return (float)small_value(*bytes, 5, 2);
    }
}

void
oracle_put_float(epx_dtype_t dtype, void *data, int64_t i, float value)
{
    uint8_t *bytes = (uint8_t *)data + (size_t)i * oracle_elem_size(dtype);
    uint16_t half;

    if (dtype == EPX_F32) {
        memcpy(bytes, &value, 4);
        return;
    }
    assert(dtype == EPX_F16 || dtype == EPX_BF16);
    half = dtype == EPX_F16 ? oracle_to_f16(value) : oracle_to_bf16(value);
    memcpy(bytes, &half, 2);
}

int64_t
oracle_difference(epx_dtype_t dtype, const void *expected, const void *actual,
                  int64_t count)
{
    size_t size = oracle_elem_size(dtype);
    const uint8_t *a = expected;
    const uint8_t *b = actual;

    if (count == 0 || memcmp(a, b, (size_t)count * size) == 0) {
        return -1;
    }
    for (int64_t i = 0; i < count; i++) {
        if (memcmp(a + (size_t)i * size, b + (size_t)i * size, size) == 0) {
            continue;
        }
        if (dtype < EPX_F32 || dtype > EPX_F8E5M2 ||
            !isnan(oracle_to_float(dtype, a, i)) ||
            !isnan(oracle_to_float(dtype, b, i))) {
            return i;
        }
    }
    return -1;
}

/* ---- quantisation: the formulas of epx_quantize_t, word for word ---- */

static float
block_amax(const uint16_t *bf16, int64_t count)
{
    float amax = 1e-4f;

    for (int64_t i = 0; i < count; i++) {
        float magnitude = fabsf(oracle_from_bf16(bf16[i]));

        if (magnitude > amax) { /* false for a NaN */
            amax = magnitude;
        }
    }
    return amax;
}

/* The least power of two that is not below value. */
static float
power_above(float value, uint32_t *biased_p)
{
    int exponent;
    float power;

    if (isinf(value)) {
        *biased_p = 255;
        return value;
    }
    exponent = -126;
    power = ldexpf(1.0f, exponent);
    while (power < value) {
        exponent++;
        power = ldexpf(1.0f, exponent);
    }
    *biased_p = (uint32_t)(exponent + 127);
    return power;
}

void
oracle_quantize(epx_quantize_t kind, const uint16_t *bf16, int64_t hidden,
                uint8_t *q, uint32_t *scales)
{
    for (int64_t first = 0; first < hidden; first += EPX_SCALE_BLOCK) {
        int64_t block = first / EPX_SCALE_BLOCK;
        int64_t count =
            hidden - first < EPX_SCALE_BLOCK ? hidden - first : EPX_SCALE_BLOCK;
        float amax = block_amax(bf16 + first, count);
        float scale = amax * (1.0f / 448.0f);
        float factor = 448.0f / amax;
        uint32_t biased = 0;

        if (kind != EPX_QUANTIZE_F8E4M3_F32) {
            scale = power_above(scale, &biased);
            factor = 1.0f / scale;
        }
        for (int64_t i = first; i < first + count; i++) {
            q[i] = oracle_to_e4m3(oracle_from_bf16(bf16[i]) * factor);
        }
        if (kind != EPX_QUANTIZE_F8E4M3_UE8M0) {
            memcpy(&scales[block], &scale, 4);
        } else {
            if (block % 4 == 0) {
                scales[block / 4] = 0;
            }
            scales[block / 4] |= biased << (8 * (block % 4));
        }
    }
}
