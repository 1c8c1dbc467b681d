/* SPDX-License-Identifier: MIT */
#include "bench_rank.h"
#include "bench_rng.h"

#include <string.h>

/* Names the sequences of random numbers; the routing has its own. */
#define TOKEN_STREAM  2u
#define OUTPUT_STREAM 3u

/* Finite values of both signs from 1/2 to 2: `keep` are the bits left to
 * chance, `base` the bits of the exponent that are always set. */
static void
fill_row(struct bench_rng *rng, epx_dtype_t dtype, void *row, size_t bytes)
{
    uint64_t keep = UINT64_C(0x80ff80ff80ff80ff);
    uint64_t base = UINT64_C(0x3f003f003f003f00);
    if (dtype == EPX_F32) {
        keep = UINT64_C(0x80ffffff80ffffff);
        base = UINT64_C(0x3f0000003f000000);
    } else if (dtype == EPX_F16) {
        keep = UINT64_C(0x87ff87ff87ff87ff);
        base = UINT64_C(0x3800380038003800);
    } else if (dtype == EPX_F8E4M3) {
        keep = UINT64_C(0x8f8f8f8f8f8f8f8f);
        base = UINT64_C(0x3030303030303030);
    }
    char *at = row;
    for (size_t i = 0; i + 8 <= bytes; i += 8) {
        uint64_t word = (bench_rng_next(rng) & keep) | base;
        memcpy(at + i, &word, sizeof word);
    }
}

void
bench_data_token(const struct bench_run *run, int32_t rank, uint64_t round,
                 int64_t token, void *row, uint32_t *scales)
{
    const struct bench_options *o = run->options;
    struct bench_rng rng = bench_rng_make(
        o->seed, TOKEN_STREAM + ((uint64_t)rank << 8), round, (uint64_t)token);
    fill_row(&rng, o->dtype, row, run->shape.x_bytes);
    for (int32_t s = 0; scales && s < run->shape.given_scales; s++) {
        scales[s] = 0x3f000000u | (uint32_t)(bench_rng_next(&rng) >> 41);
    }
}

void
bench_data_output(const struct bench_run *run, int32_t rank, uint64_t round,
                  int64_t row, void *x)
{
    struct bench_rng rng = bench_rng_make(run->options->seed,
                                          OUTPUT_STREAM + ((uint64_t)rank << 8),
                                          round, (uint64_t)row);
    fill_row(&rng, run->shape.combine_dtype, x, run->shape.combine_bytes);
}
