/* SPDX-License-Identifier: MIT */
/*
 * The sum of epx_combine_args_t for bf16 in vectors; a part of cpu_kernels.c.
 * What has a NaN is summed again by reduce_bf16, which is exact for all.
 */
#ifndef EPX_ENGINE_CPU_REDUCE_BF16_H
#define EPX_ENGINE_CPU_REDUCE_BF16_H

#include "engine/cpu/cpu_vector.h"

/* Vectors whose sums fit the registers, and their elements. */
#define PIECE_VECTORS 4
#define PIECE         ((size_t)PIECE_VECTORS * VECTOR_BYTES / 2)

/* The sums at elements `at` and on go to `out`.  Returns `check` plus all of
 * them, which is NaN if one of them is. */
static ALWAYS_INLINE floats_t
sum_piece(const epx__reduce_t *reduce, size_t at, bool is_weighted,
          bool streams, floats_t check)
{
    char *out = (char *)((uint16_t *)reduce->out + at);
    floats_t even[PIECE_VECTORS] = { 0 };
    floats_t odd[PIECE_VECTORS] = { 0 };

    for (int r = 0; r < reduce->num_rows; r++) {
        const char *row =
            (const char *)((const uint16_t *)reduce->rows[r] + at);
        float weight = is_weighted ? reduce->weights[r] : 1.0f;

#pragma GCC unroll 4 /* or the sums do not stay in registers */
        for (size_t v = 0; v < PIECE_VECTORS; v++) {
            words_t x = words_load(row + v * VECTOR_BYTES);
            floats_t x_even = floats_from_even(x), x_odd = floats_from_odd(x);

            even[v] = is_weighted ? floats_fma(weight, x_even, even[v])
                                  : even[v] + x_even;
            odd[v] = is_weighted ? floats_fma(weight, x_odd, odd[v])
                                 : odd[v] + x_odd;
        }
    }
    for (size_t v = 0; v < PIECE_VECTORS; v++) {
        check += even[v] + odd[v];
        words_store(out + v * VECTOR_BYTES, words_from_floats(even[v], odd[v]),
                    streams);
    }
    return check;
}

static ALWAYS_INLINE void
reduce_pieces(const epx__reduce_t *reduce, bool is_weighted, bool streams)
{
    floats_t check = { 0 };
    size_t i = 0;

    for (; i + PIECE <= reduce->count; i += PIECE) {
        check = sum_piece(reduce, i, is_weighted, streams, check);
    }
    for (; i < reduce->count; i += REDUCE_BLOCK) {
        size_t left = reduce->count - i;

        sum_block_bf16(reduce, i, left < REDUCE_BLOCK ? left : REDUCE_BLOCK,
                       (uint16_t *)reduce->out + i);
    }
    if (floats_have_nan(check)) {
        reduce_bf16(reduce);
    }
}

static void
reduce_bf16_fast(const epx__reduce_t *reduce)
{
    bool streams =
        reduce->streams && (uintptr_t)reduce->out % VECTOR_BYTES == 0;

    if (reduce->weights != NULL && streams) {
        reduce_pieces(reduce, true, true);
    } else if (reduce->weights != NULL) {
        reduce_pieces(reduce, true, false);
    } else if (streams) {
        reduce_pieces(reduce, false, true);
    } else {
        reduce_pieces(reduce, false, false);
    }
}

#endif
