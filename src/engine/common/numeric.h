/* SPDX-License-Identifier: MIT */
/*
 * Conversions between float32 and the small formats, in integer and single
 * precision arithmetic alone, so that every engine and instruction set gives
 * the same bits.  Written without branches so that compilers vectorise loops
 * over them.  docs/formats.md has the formats and their sources.
 */
#ifndef EPX_ENGINE_COMMON_NUMERIC_H
#define EPX_ENGINE_COMMON_NUMERIC_H

#include "engine/common/placement.h"

#include <stdint.h>
#include <string.h>

EPX__INLINE uint32_t
epx__bits_from_f32(float value)
{
    uint32_t bits;

    memcpy(&bits, &value, sizeof(bits));
    return bits;
}

EPX__INLINE float
epx__f32_from_bits(uint32_t bits)
{
    float value;

    memcpy(&value, &bits, sizeof(value));
    return value;
}

EPX__INLINE float
epx__f32_from_bf16(uint16_t value)
{
    return epx__f32_from_bits((uint32_t)value << 16);
}

/* Nearest even; every NaN becomes 0x7fff, as GPUs have it. */
EPX__INLINE uint16_t
epx__bf16_from_f32(float value)
{
    uint32_t bits = epx__bits_from_f32(value);
    uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;

    return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fffu : rounded);
}

EPX__INLINE float
epx__f32_from_f16(uint16_t value)
{
    uint32_t sign = (uint32_t)(value & 0x8000u) << 16;
    uint32_t magnitude = (uint32_t)(value & 0x7fffu) << 13;
    /* Re-bias the exponent by multiplying, which also normalises subnormals:
     * 2^112 is the difference of the biases, 127 - 15. */
    float scaled = epx__f32_from_bits(magnitude) * 0x1p112f;
    uint32_t finite = epx__bits_from_f32(scaled);
    uint32_t special = magnitude | 0x7f800000u;

    return epx__f32_from_bits(
        sign | ((value & 0x7c00u) == 0x7c00u ? special : finite));
}

/* Nearest even; every NaN becomes 0x7fff. */
EPX__INLINE uint16_t
epx__f16_from_f32(float value)
{
    uint32_t bits = epx__bits_from_f32(value);
    uint32_t sign = bits >> 16 & 0x8000u;
    uint32_t magnitude = bits & 0x7fffffffu;
    /* 112 << 23 takes the biases' difference off the exponent. */
    uint32_t normal =
        (magnitude + 0xfffu + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
    /* Next to 0.5 a unit in the last place is 2^-24, f16's smallest step. */
    uint32_t subnormal =
        epx__bits_from_f32(epx__f32_from_bits(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t result = magnitude < 0x38800000u ? subnormal : normal;

    result = magnitude >= 0x477ff000u ? 0x7c00u : result; /* 65520 and up */
    result = magnitude > 0x7f800000u ? 0x7fffu : sign | result;
    return (uint16_t)result;
}

/*
 * The low byte is E4M3, to nearest even, of a value that is not negative, not
 * NaN and below 464, from where on 448 would not be the nearest; what is above
 * the low byte has no meaning.  `scaled` is EPX__F8E4M3_SCALE times the value.
 * Adding 2^20 times its power of two, or that of 2^-6 below E4M3's normal
 * numbers, leaves the mantissa that E4M3 has, its leading bit included, at the
 * end of the sum, rounded by the addition.  The power's exponent goes above the
 * leading bit; the scale makes all constants there a multiple of 256.
 */
#define EPX__F8E4M3_SCALE 0x1p7f

EPX__INLINE uint32_t
epx__f8e4m3_magnitude(float scaled)
{
    uint32_t power = epx__bits_from_f32(scaled) & 0x7f800000u;
    float magic;

    power = power < 0x40000000u ? 0x40000000u : power; /* 2^-6, scaled */
    magic = epx__f32_from_bits(power + (20u << 23));
    return epx__bits_from_f32(scaled + magic) + (power >> 20);
}

/* Nearest even, saturating at 448; every NaN becomes 0x7f. */
EPX__INLINE uint8_t
epx__f8e4m3_from_f32(float value)
{
    uint32_t bits = epx__bits_from_f32(value);
    uint32_t sign = bits >> 24 & 0x80u;
    uint32_t magnitude = bits & 0x7fffffffu;
    uint32_t limited = magnitude < 0x43e00000u ? magnitude : 0x43e00000u;
    uint32_t result =
        epx__f8e4m3_magnitude(epx__f32_from_bits(limited) * EPX__F8E4M3_SCALE);

    return (uint8_t)(magnitude > 0x7f800000u ? 0x7fu : sign | result);
}

/* The scale of a block whose largest magnitude is amax >= 1e-4, by the rules of
 * epx_quantize_t, and the factor that its values are multiplied by. */
typedef struct epx__block_scale {
    float scale;
    float factor;
} epx__block_scale_t;

#define EPX__QUANTIZE_MIN_AMAX 1e-4f
#define EPX__F8E4M3_MAX        448.0f

EPX__INLINE epx__block_scale_t
epx__block_scale(epx_quantize_t quantize, float amax)
{
    epx__block_scale_t result;

    result.scale = amax * (1.0f / EPX__F8E4M3_MAX);
    if (quantize == EPX_QUANTIZE_F8E4M3_F32) {
        result.factor = EPX__F8E4M3_MAX / amax;
    } else {
        uint32_t bits = epx__bits_from_f32(result.scale);
        /* ceil(log2) of a normal number: up unless it is a power of two. */
        uint32_t exponent = (bits >> 23) + ((bits & 0x7fffffu) != 0);

        result.scale = epx__f32_from_bits(exponent << 23);
        result.factor = 1.0f / result.scale;
    }
    return result;
}

#endif
