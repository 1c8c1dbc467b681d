/* SPDX-License-Identifier: MIT */
/*
 * Compiled once for each instruction set, with EPX__ISA naming it.  The loops
 * are plain C that compilers vectorise, or the vectors that compilers share;
 * only stores past the caches, which neither can express, use intrinsics.
 */
#include "engine/cpu/cpu_kernels.h"

#include "engine/common/numeric.h"
#include "engine/cpu/cpu_vector.h"

#include <math.h>
#include <string.h>

#define KERNELS_NAME_(isa) epx__kernels_##isa
#define KERNELS_NAME(isa)  KERNELS_NAME_(isa)
#define STRING_(isa)       #isa
#define STRING(isa)        STRING_(isa)

#define LINE 64

static void
copy_stream(void *dst, const void *src, size_t bytes)
{
#if defined(__x86_64__)
    char *to = dst;
    const char *from = src;
    const char *end = from + bytes;

    /* Whole lines, so that the write-combining buffers leave full. */
    for (; ((uintptr_t)to & (LINE - 1)) != 0 && from < end;
         to += 16, from += 16) {
        _mm_stream_si128((__m128i *)to, _mm_loadu_si128((const void *)from));
    }
    for (; end - from >= LINE; to += LINE, from += LINE) {
        /* What follows is likely to be copied next; it may wait in the second
         * cache, and fetching never faults. */
        __builtin_prefetch((const void *)((uintptr_t)from + bytes), 0, 2);
#if defined(__AVX512F__)
        _mm512_stream_si512((void *)to, _mm512_loadu_si512(from));
#else
        for (int i = 0; i < LINE; i += 16) {
            _mm_stream_si128((__m128i *)(to + i),
                             _mm_loadu_si128((const void *)(from + i)));
        }
#endif
    }
    for (; from < end; to += 16, from += 16) {
        _mm_stream_si128((__m128i *)to, _mm_loadu_si128((const void *)from));
    }
#else
    memcpy(dst, src, bytes);
#endif
}

/* Magnitudes of bf16, as integers in their order. */
#define BF16_MAGNITUDE 0x7fffu
#define BF16_INFINITY  0x7f80u

static ALWAYS_INLINE uint16_t
block_max(const uint16_t *x, size_t count)
{
    uint16_t max = 0;

    for (size_t i = 0; i < count; i++) {
        uint16_t magnitude = x[i] & BF16_MAGNITUDE;

        max = magnitude > max ? magnitude : max;
    }
    return max;
}

/* The same where NaNs count as 0. */
static uint16_t
block_max_number(const uint16_t *x, size_t count)
{
    uint16_t max = 0;

    for (size_t i = 0; i < count; i++) {
        uint16_t magnitude = x[i] & BF16_MAGNITUDE;

        if (magnitude > max && magnitude <= BF16_INFINITY) {
            max = magnitude;
        }
    }
    return max;
}

static void
convert_block(const uint16_t *restrict x, size_t count, float factor,
              uint8_t *restrict out)
{
    for (size_t i = 0; i < count; i++) {
        out[i] = epx__f8e4m3_from_f32(epx__f32_from_bf16(x[i]) * factor);
    }
}

/* The same where nothing is NaN or rounds to more than 448; two elements of
 * x to a word, as in cpu_vector.h. */
static ALWAYS_INLINE void
convert_block_finite(const uint16_t *restrict x, size_t count, float factor,
                     uint8_t *restrict out)
{
    size_t num_words = count / 2;
    float scaled = factor * EPX__F8E4M3_SCALE;

    for (size_t i = 0; i < num_words; i++) {
        uint32_t word, magnitudes, even, odd, bytes;
        uint16_t pair;

        memcpy(&word, x + 2 * i, sizeof(word));
        magnitudes = word & (BF16_MAGNITUDE << 16 | BF16_MAGNITUDE);
        even = epx__f8e4m3_magnitude(epx__f32_from_bits(magnitudes << 16) *
                                     scaled);
        odd = epx__f8e4m3_magnitude(epx__f32_from_bits(magnitudes & BF16_ODD) *
                                    scaled);
        bytes = (even & 0xff) | odd << 16 | (word >> 8 & 0x00800080u);
        pair = (uint16_t)(bytes | bytes >> 8);
        memcpy(out + 2 * i, &pair, sizeof(pair));
    }
    convert_block(x + 2 * num_words, count % 2, factor, out + 2 * num_words);
}

static ALWAYS_INLINE epx__block_scale_t
quantize_block(epx_quantize_t kind, const uint16_t *x, size_t count,
               uint16_t max, uint8_t *out)
{
    bool is_finite = max < BF16_INFINITY;
    float amax =
        epx__f32_from_bf16(is_finite ? max : block_max_number(x, count));
    epx__block_scale_t scale = epx__block_scale(
        kind, amax > EPX__QUANTIZE_MIN_AMAX ? amax : EPX__QUANTIZE_MIN_AMAX);

    if (is_finite) {
        convert_block_finite(x, count, scale.factor, out);
    } else {
        convert_block(x, count, scale.factor, out);
    }
    return scale;
}

/* Blocks whose maxima are found before the first of them is converted, so that
 * the way from a maximum to its scale does not hold up the conversions. */
#define QUANTIZE_BATCH 16

/* Conversion gives the memory time to bring the block that is one batch on,
 * which may belong to the next row, or to nothing: fetching never faults. */
static ALWAYS_INLINE void
prefetch_batch_on(const uint16_t *block)
{
    uintptr_t at = (uintptr_t)(const void *)block +
                   (uintptr_t)QUANTIZE_BATCH * EPX_SCALE_BLOCK * sizeof(*block);

    for (size_t i = 0; i < EPX_SCALE_BLOCK * sizeof(*block); i += LINE) {
        __builtin_prefetch((const void *)(at + i));
    }
}

/* Up to QUANTIZE_BATCH blocks; a constant length spares whole blocks the
 * handling of ends. */
static void
quantize_batch(epx_quantize_t kind, const uint16_t *x, size_t count,
               uint8_t *out, float *scales)
{
    size_t num_whole = count / EPX_SCALE_BLOCK;
    size_t rest = count % EPX_SCALE_BLOCK;
    size_t end = num_whole * EPX_SCALE_BLOCK;
    uint16_t max[QUANTIZE_BATCH];

    for (size_t b = 0; b < num_whole; b++) {
        max[b] = block_max(x + b * EPX_SCALE_BLOCK, EPX_SCALE_BLOCK);
    }
    for (size_t b = 0; b < num_whole; b++) {
        prefetch_batch_on(x + b * EPX_SCALE_BLOCK);
        scales[b] =
            quantize_block(kind, x + b * EPX_SCALE_BLOCK, EPX_SCALE_BLOCK,
                           max[b], out + b * EPX_SCALE_BLOCK)
                .scale;
    }
    if (rest > 0) {
        scales[num_whole] = quantize_block(kind, x + end, rest,
                                           block_max(x + end, rest), out + end)
                                .scale;
    }
}

static void
quantize(epx_quantize_t kind, const uint16_t *x, size_t count, uint8_t *out,
         uint32_t *scales)
{
    size_t num_blocks = (count + EPX_SCALE_BLOCK - 1) / EPX_SCALE_BLOCK;
    float batch[QUANTIZE_BATCH] = { 0 };

    if (kind == EPX_QUANTIZE_F8E4M3_UE8M0) {
        memset(scales, 0, (num_blocks + 3) / 4 * sizeof(*scales));
    }
    for (size_t block = 0; block < num_blocks; block++) {
        size_t begin = block * EPX_SCALE_BLOCK;
        size_t most = (size_t)QUANTIZE_BATCH * EPX_SCALE_BLOCK;
        uint32_t bits;

        if (block % QUANTIZE_BATCH == 0) {
            quantize_batch(kind, x + begin,
                           count - begin < most ? count - begin : most,
                           out + begin, batch);
        }
        bits = epx__bits_from_f32(batch[block % QUANTIZE_BATCH]);
        if (kind == EPX_QUANTIZE_F8E4M3_UE8M0) {
            scales[block / 4] |= bits >> 23 << block % 4 * 8;
        } else {
            scales[block] = bits;
        }
    }
}

/* Elements whose sums fit the vector registers, and elements that are rounded
 * before they are streamed out. */
#define REDUCE_BLOCK 64
#define REDUCE_CHUNK 1024

#define REDUCE_TYPE       float
#define REDUCE_NAME(name) name##_f32
#define REDUCE_LOAD(x)    (x)
#define REDUCE_ROUND(x)   (x)
#include "engine/cpu/cpu_reduce.h"

#define REDUCE_TYPE       uint16_t
#define REDUCE_NAME(name) name##_f16
#define REDUCE_LOAD(x)    epx__f32_from_f16(x)
#define REDUCE_ROUND(x)   epx__f16_from_f32(x)
#include "engine/cpu/cpu_reduce.h"

#define REDUCE_TYPE       uint16_t
#define REDUCE_NAME(name) name##_bf16
#define REDUCE_LOAD(x)    epx__f32_from_bf16(x)
#define REDUCE_ROUND(x)   epx__bf16_from_f32(x)
#include "engine/cpu/cpu_reduce.h"
#include "engine/cpu/cpu_reduce_bf16.h"
#include "engine/cpu/cpu_reduce_logfmt.h"

const epx__kernels_t KERNELS_NAME(EPX__ISA) = {
    .isa = STRING(EPX__ISA),
    .copy_stream = copy_stream,
    .quantize = quantize,
    .reduce_f32 = reduce_f32,
    .reduce_f16 = reduce_f16,
    .reduce_bf16 = reduce_bf16_fast,
    .reduce_logfmt = reduce_logfmt,
};
