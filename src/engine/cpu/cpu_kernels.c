/* SPDX-License-Identifier: MIT */
/*
 * Compiled once for each instruction set, with EPX__ISA naming it.  The loops
 * are plain C that compilers vectorise; only stores past the caches, which C
 * cannot express, use intrinsics.
 */
#include "engine/cpu/cpu_kernels.h"

#include "engine/common/numeric.h"

#include <math.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

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

/* The largest magnitude of a block, as bf16 bits; NaNs count as 0. */
static uint16_t
block_amax(const uint16_t *x, size_t count)
{
    uint16_t amax = 0;

    for (size_t i = 0; i < count; i++) {
        uint16_t magnitude = x[i] & 0x7fffu;

        magnitude = magnitude > 0x7f80u ? 0 : magnitude;
        amax = magnitude > amax ? magnitude : amax;
    }
    return amax;
}

static void
quantize(epx_quantize_t kind, const uint16_t *x, size_t count, uint8_t *out,
         uint32_t *scales)
{
    size_t num_blocks = (count + EPX_SCALE_BLOCK - 1) / EPX_SCALE_BLOCK;

    if (kind == EPX_QUANTIZE_F8E4M3_UE8M0) {
        memset(scales, 0, (num_blocks + 3) / 4 * sizeof(*scales));
    }
    for (size_t block = 0; block < num_blocks; block++) {
        size_t begin = block * EPX_SCALE_BLOCK;
        size_t left = count - begin;
        size_t length = left < EPX_SCALE_BLOCK ? left : EPX_SCALE_BLOCK;
        float amax = epx__f32_from_bf16(block_amax(x + begin, length));
        epx__block_scale_t scale = epx__block_scale(
            kind,
            amax > EPX__QUANTIZE_MIN_AMAX ? amax : EPX__QUANTIZE_MIN_AMAX);
        uint32_t bits = epx__bits_from_f32(scale.scale);

        for (size_t i = begin; i < begin + length; i++) {
            out[i] =
                epx__f8e4m3_from_f32(epx__f32_from_bf16(x[i]) * scale.factor);
        }
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

const epx__kernels_t KERNELS_NAME(EPX__ISA) = {
    .isa = STRING(EPX__ISA),
    .copy_stream = copy_stream,
    .quantize = quantize,
    .reduce_f32 = reduce_f32,
    .reduce_f16 = reduce_f16,
    .reduce_bf16 = reduce_bf16,
};
