/* SPDX-License-Identifier: MIT */
/*
 * LogFMT-10, by docs/formats.md: blocks of bf16 as a sign and a level on a
 * logarithmic scale between the largest and the smallest magnitude.  Integers,
 * single precision and fmaf in a fixed order, so that every engine and
 * instruction set gives the same bits; without branches, as numeric.h.
 */
#ifndef EPX_ENGINE_COMMON_LOGFMT_H
#define EPX_ENGINE_COMMON_LOGFMT_H

#include "engine/common/numeric.h"

#include <math.h>
#include <stdbool.h>

/* Magnitudes are bf16 without their sign.  Subnormals count as zeros. */
#define EPX__LOGFMT_NORMAL   0x0080u
#define EPX__LOGFMT_INFINITY 0x7f80u

/* Codes: 0 is zero, the largest level is the block's largest magnitude. */
#define EPX__LOGFMT_TOP 509
#define EPX__LOGFMT_INF 510
#define EPX__LOGFMT_NAN 511

#define EPX__LOGFMT_MOST_RANGE 32.0f /* in powers of two */

/* Adding this rounds to an integer, to nearest even, and leaves it in the low
 * bits. */
#define EPX__LOGFMT_ROUND 0x1.8p23f

/* What the codes of a block mean. */
typedef struct epx__logfmt {
    float max;
    float log_max;
    float inverse; /* levels in a power of two; 0 when there is but one level */
    float bias;
    float step; /* from a level to the one above it, as a logarithm */
} epx__logfmt_t;

EPX__INLINE bool
epx__logfmt_is_number(uint32_t magnitude)
{
    return magnitude - EPX__LOGFMT_NORMAL <
           EPX__LOGFMT_INFINITY - EPX__LOGFMT_NORMAL;
}

/* log2 of a number's magnitude, within 2e-5 and increasing; finite for all. */
EPX__INLINE float
epx__logfmt_log2(uint32_t magnitude)
{
    /* Exact: the mantissa as 1 + m/128, the exponent e below 2^23. */
    float m =
        epx__f32_from_bits((magnitude << 16 & 0x7f0000u) | 0x3f800000u) - 1.0f;
    float e = epx__f32_from_bits(magnitude >> 7 | 0x4b000000u) - 8388735.0f;
    float sum = 0x1.804636p-5f;

    sum = fmaf(sum, m, -0x1.94460ep-3f);
    sum = fmaf(sum, m, 0x1.ac775ap-2f);
    sum = fmaf(sum, m, -0x1.6b77acp-1f);
    sum = fmaf(sum, m, 0x1.7125f8p+0f);
    return fmaf(sum, m, e);
}

/* From the largest and the smallest magnitude of the block's numbers; both 0
 * when it has none. */
EPX__INLINE epx__logfmt_t
epx__logfmt_block(uint32_t max, uint32_t min)
{
    epx__logfmt_t block;
    float range;

    block.max = epx__f32_from_bits(max << 16);
    block.log_max = epx__logfmt_log2(max);
    range = block.log_max - epx__logfmt_log2(min);
    range = range > 0.0f ? range : 0.0f;
    range = range < EPX__LOGFMT_MOST_RANGE ? range : EPX__LOGFMT_MOST_RANGE;
    block.step = range * (1.0f / 508.0f);
    block.inverse = range > 0.0f ? 508.0f / range : 0.0f;
    block.bias = block.step * 0x1.62e43p-4f; /* ln(2) / 8 */
    return block;
}

/* How many levels a number is below the largest, an integer: that of the level
 * which is nearest, but for the last digits; beyond 508 it is sent as zero. */
EPX__INLINE float
epx__logfmt_level(const epx__logfmt_t *block, uint32_t magnitude)
{
    float below = block->log_max - epx__logfmt_log2(magnitude);
    float level = fmaf(below, block->inverse, block->bias);

    return (level + EPX__LOGFMT_ROUND) - EPX__LOGFMT_ROUND;
}

/* The magnitude of a level. */
EPX__INLINE float
epx__logfmt_value(const epx__logfmt_t *block, float level)
{
    float power = -(level * block->step);
    float rounded = power + EPX__LOGFMT_ROUND;
    float rest = power - (rounded - EPX__LOGFMT_ROUND);
    float sum = 0x1.3a0184p-7f;

    sum = fmaf(sum, rest, 0x1.c9fd38p-5f);
    sum = fmaf(sum, rest, 0x1.ec037ep-3f);
    sum = fmaf(sum, rest, 0x1.62e12ap-1f);
    sum = fmaf(sum, rest, 1.0f);
    /* Times the power of two: the integer goes to the exponent. */
    sum = epx__f32_from_bits(epx__bits_from_f32(sum) +
                             (epx__bits_from_f32(rounded) << 23));
    return block->max * sum;
}

/* The code of a bf16; its sign apart. */
EPX__INLINE uint32_t
epx__logfmt_encode(const epx__logfmt_t *block, uint16_t bf16)
{
    uint32_t magnitude = bf16 & 0x7fffu;
    float level = epx__logfmt_level(block, magnitude);
    uint32_t code = magnitude < EPX__LOGFMT_NORMAL || level > 508.0f
                        ? 0
                        : (uint32_t)(EPX__LOGFMT_TOP - (int32_t)level);

    code = magnitude == EPX__LOGFMT_INFINITY ? EPX__LOGFMT_INF : code;
    return magnitude > EPX__LOGFMT_INFINITY ? EPX__LOGFMT_NAN : code;
}

EPX__INLINE float
epx__logfmt_decode(const epx__logfmt_t *block, uint32_t code, uint32_t sign)
{
    float level = (float)(EPX__LOGFMT_TOP - (int32_t)code);
    uint32_t bits = epx__bits_from_f32(epx__logfmt_value(block, level));

    bits = code == 0 ? 0 : bits;
    bits = code == EPX__LOGFMT_INF ? 0x7f800000u : bits;
    bits = code == EPX__LOGFMT_NAN ? 0x7fc00000u : bits;
    return epx__f32_from_bits(sign << 31 | bits);
}

/* The same in one: what a bf16 decodes to after encoding it, but for the bits
 * of a NaN. */
EPX__INLINE float
epx__logfmt_term(const epx__logfmt_t *block, uint16_t bf16)
{
    uint32_t magnitude = bf16 & 0x7fffu;
    float level = epx__logfmt_level(block, magnitude);
    uint32_t bits = epx__bits_from_f32(epx__logfmt_value(block, level));

    bits = magnitude < EPX__LOGFMT_NORMAL || level > 508.0f ? 0 : bits;
    bits = magnitude < EPX__LOGFMT_INFINITY ? bits : magnitude << 16;
    return epx__f32_from_bits((uint32_t)(bf16 & 0x8000u) << 16 | bits);
}

/*
 * A block as it is packed, n channels of it, a multiple of 8:
 *
 *     u16 max, min       magnitudes
 *     u8 low[n]          of each code
 *     u8 high[n / 8]     bit 8 of each code, the first in the lowest bit
 *     u8 signs[n / 8]    likewise
 */
#define EPX__LOGFMT_HEAD         4
#define EPX__LOGFMT_PACKED_BLOCK (EPX__LOGFMT_HEAD + EPX_LOGFMT_BLOCK / 8 * 10)

/* Bytes of a packed row of H channels, a multiple of 8. */
EPX__INLINE int64_t
epx__logfmt_row_bytes(int64_t hidden)
{
    int64_t blocks = (hidden + EPX_LOGFMT_BLOCK - 1) / EPX_LOGFMT_BLOCK;

    return blocks * EPX__LOGFMT_HEAD + hidden / 8 * 10;
}

#endif
