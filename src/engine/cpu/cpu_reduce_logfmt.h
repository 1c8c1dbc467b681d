/* SPDX-License-Identifier: MIT */
/*
 * The sum of epx_combine_args_t with EPX_QUANTIZE_LOGFMT10; a part of
 * cpu_kernels.c.  By blocks, whose terms and sums stay in the first cache.
 */
#ifndef EPX_ENGINE_CPU_REDUCE_LOGFMT_H
#define EPX_ENGINE_CPU_REDUCE_LOGFMT_H

#include "engine/common/logfmt.h"

#define BLOCK EPX_LOGFMT_BLOCK

/* The range of a block, as it is sent. */
typedef struct range {
    uint16_t max;
    uint16_t min;
} range_t;

/* Shifted so that what is not a number wraps round to the other end. */
static ALWAYS_INLINE range_t
logfmt_range(const uint16_t *x, size_t length)
{
    const uint16_t to_infinity = 0x8000u - EPX__LOGFMT_INFINITY;
    int16_t max = 0;
    uint16_t min = 0xffff;

    for (size_t i = 0; i < length; i++) {
        uint16_t magnitude = x[i] & BF16_MAGNITUDE;
        int16_t high = (int16_t)(magnitude + to_infinity);
        uint16_t low = (uint16_t)(magnitude - EPX__LOGFMT_NORMAL);

        max = (int16_t)(high > max ? high : max);
        min = (uint16_t)(low < min ? low : min);
    }
    max = (int16_t)(max - to_infinity);
    return max < (int16_t)EPX__LOGFMT_NORMAL
               ? (range_t){ 0, 0 }
               : (range_t){ (uint16_t)max,
                            (uint16_t)(min + EPX__LOGFMT_NORMAL) };
}

static ALWAYS_INLINE void
plain_terms(const uint16_t *x, size_t length, float *restrict terms)
{
    for (size_t i = 0; i < length; i++) {
        terms[i] = epx__f32_from_bf16(x[i]);
    }
}

static ALWAYS_INLINE void
logfmt_terms(const uint16_t *x, size_t length, float *restrict terms)
{
    range_t range = logfmt_range(x, length);
    epx__logfmt_t block = epx__logfmt_block(range.max, range.min);

    for (size_t i = 0; i < length; i++) {
        terms[i] = epx__logfmt_term(&block, x[i]);
    }
}

/* Bit i of a bitmap. */
static ALWAYS_INLINE uint32_t
bit_of(const uint8_t *bitmap, size_t i)
{
    return (uint32_t)bitmap[i / 8] >> i % 8 & 1u;
}

static ALWAYS_INLINE void
packed_terms(const uint8_t *packed, size_t length, float *restrict terms)
{
    const uint8_t *low = packed + EPX__LOGFMT_HEAD;
    const uint8_t *high = low + length;
    const uint8_t *signs = high + length / 8;
    range_t range;
    epx__logfmt_t block;

    memcpy(&range, packed, sizeof(range));
    block = epx__logfmt_block(range.max, range.min);
    for (size_t i = 0; i < length; i++) {
        terms[i] = epx__logfmt_decode(&block, low[i] | bit_of(high, i) << 8,
                                      bit_of(signs, i));
    }
}

static ALWAYS_INLINE void
logfmt_pack(const uint16_t *x, size_t length, uint8_t *restrict packed)
{
    uint8_t *low = packed + EPX__LOGFMT_HEAD;
    uint8_t *high = low + length;
    uint8_t *signs = high + length / 8;
    range_t range = logfmt_range(x, length);
    epx__logfmt_t block = epx__logfmt_block(range.max, range.min);
    uint16_t codes[BLOCK];

    for (size_t i = 0; i < length; i++) {
        codes[i] = (uint16_t)epx__logfmt_encode(&block, x[i]);
    }
    memcpy(packed, &range, sizeof(range));
    for (size_t i = 0; i < length; i++) {
        low[i] = (uint8_t)codes[i];
    }
    for (size_t i = 0; i < length; i += 8) {
        uint32_t top = 0, negative = 0;

        for (size_t j = 0; j < 8; j++) {
            top |= (uint32_t)codes[i + j] >> 8 << j;
            negative |= (uint32_t)x[i + j] >> 15 << j;
        }
        high[i / 8] = (uint8_t)top;
        signs[i / 8] = (uint8_t)negative;
    }
}

/* The terms of one row at element `at`, where a block begins. */
static ALWAYS_INLINE void
row_terms(const epx__reduce_t *reduce, int r, size_t at, size_t length,
          float *restrict terms)
{
    const uint16_t *x = (const uint16_t *)reduce->rows[r] + at;

    switch ((epx__row_kind_t)reduce->kinds[r]) {
    case EPX__ROW_PACKED:
        packed_terms((const uint8_t *)reduce->rows[r] +
                         at / BLOCK * EPX__LOGFMT_PACKED_BLOCK,
                     length, terms);
        break;
    case EPX__ROW_LOGFMT:
        logfmt_terms(x, length, terms);
        break;
    case EPX__ROW_PLAIN:
        plain_terms(x, length, terms);
        break;
    }
}

/* The sums of a block, rounded. */
static ALWAYS_INLINE void
logfmt_sums(const epx__reduce_t *reduce, size_t at, size_t length,
            uint16_t *restrict out)
{
    float sums[BLOCK] = { 0.0f };
    float terms[BLOCK];

    for (int r = 0; r < reduce->num_rows; r++) {
        float weight = reduce->weights == NULL ? 1.0f : reduce->weights[r];

        row_terms(reduce, r, at, length, terms);
        for (size_t i = 0; i < length; i++) {
            sums[i] = fmaf(weight, terms[i], sums[i]);
        }
    }
    for (size_t i = 0; i < length; i++) {
        out[i] = epx__bf16_from_f32(sums[i]);
    }
}

/* A block of the result to `to`, where it is packed if it should be. */
static ALWAYS_INLINE void
logfmt_block(const epx__reduce_t *reduce, size_t at, size_t length, void *to)
{
    uint16_t rounded[BLOCK];

    if (reduce->packs) {
        logfmt_sums(reduce, at, length, rounded);
        logfmt_pack(rounded, length, to);
    } else {
        logfmt_sums(reduce, at, length, to);
    }
}

static void
reduce_logfmt(const epx__reduce_t *reduce)
{
    _Alignas(LINE) uint16_t streamed[BLOCK];
    size_t block_bytes =
        reduce->packs ? EPX__LOGFMT_PACKED_BLOCK : BLOCK * sizeof(uint16_t);
    char *to = reduce->out;
    size_t at = 0;

    for (; at + BLOCK <= reduce->count; at += BLOCK, to += block_bytes) {
        if (reduce->streams) {
            logfmt_block(reduce, at, BLOCK, streamed);
            copy_stream(to, streamed, sizeof(streamed));
        } else {
            logfmt_block(reduce, at, BLOCK, to);
        }
    }
    if (at < reduce->count) {
        logfmt_block(reduce, at, reduce->count - at, to);
    }
}

#undef BLOCK

#endif
