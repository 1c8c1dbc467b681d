/* SPDX-License-Identifier: MIT */
/*
 * Vectors as wide as the registers, in the extension that gcc and clang share,
 * and bf16 in them: two neighbours to a 32-bit word, which a shift and a mask
 * take apart without moving anything between lanes.  Which of the two is called
 * even does not matter, as long as both ways agree.
 */
#ifndef EPX_ENGINE_CPU_VECTOR_H
#define EPX_ENGINE_CPU_VECTOR_H

#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define ALWAYS_INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX2__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif
#define VECTOR_LANES (VECTOR_BYTES / 4)

typedef uint32_t words_t __attribute__((vector_size(VECTOR_BYTES)));
typedef float floats_t __attribute__((vector_size(VECTOR_BYTES)));

static ALWAYS_INLINE words_t
words_load(const void *from)
{
    words_t words;

    memcpy(&words, from, sizeof(words));
    return words;
}

/* Past the caches if `streams`; then `to` is a multiple of VECTOR_BYTES. */
static ALWAYS_INLINE void
words_store(void *to, words_t words, bool streams)
{
#if defined(__AVX512F__)
    if (streams) {
        _mm512_stream_si512(to, (__m512i)words);
        return;
    }
#elif defined(__AVX2__)
    if (streams) {
        _mm256_stream_si256(to, (__m256i)words);
        return;
    }
#elif defined(__x86_64__)
    if (streams) {
        _mm_stream_si128(to, (__m128i)words);
        return;
    }
#endif
    (void)streams;
    memcpy(to, &words, sizeof(words));
}

#define BF16_ODD 0xffff0000u

static ALWAYS_INLINE floats_t
floats_from_even(words_t bf16)
{
    return (floats_t)(bf16 << 16);
}

static ALWAYS_INLINE floats_t
floats_from_odd(words_t bf16)
{
    return (floats_t)(bf16 & BF16_ODD);
}

/* Nearest even, in the upper half of each word; not for NaNs. */
static ALWAYS_INLINE words_t
words_round_bf16(floats_t floats)
{
    words_t bits = (words_t)floats;

    return bits + (0x7fffu + (bits >> 16 & 1));
}

static ALWAYS_INLINE words_t
words_from_floats(floats_t even, floats_t odd)
{
    return words_round_bf16(even) >> 16 | (words_round_bf16(odd) & BF16_ODD);
}

/* sum + factor * x, fused. */
static ALWAYS_INLINE floats_t
floats_fma(float factor, floats_t x, floats_t sum)
{
    float xs[VECTOR_LANES], sums[VECTOR_LANES];

    memcpy(xs, &x, sizeof(x));
    memcpy(sums, &sum, sizeof(sum));
    for (int i = 0; i < VECTOR_LANES; i++) {
        sums[i] = fmaf(factor, xs[i], sums[i]);
    }
    memcpy(&sum, sums, sizeof(sum));
    return sum;
}

static ALWAYS_INLINE bool
floats_have_nan(floats_t floats)
{
    bool found = false;

    for (int i = 0; i < VECTOR_LANES; i++) {
        found |= floats[i] != floats[i];
    }
    return found;
}

#endif
