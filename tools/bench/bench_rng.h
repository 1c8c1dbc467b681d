/* SPDX-License-Identifier: MIT */
/* splitmix64: small, fast, and any 64-bit state is a good one. */
#ifndef EPX_BENCH_RNG_H
#define EPX_BENCH_RNG_H

#include <stdint.h>

struct bench_rng {
    uint64_t state;
};

static inline uint64_t
bench_rng_next(struct bench_rng *rng)
{
    uint64_t z = rng->state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* One independent sequence for each (seed, a, b, c). */
static inline struct bench_rng
bench_rng_make(uint64_t seed, uint64_t a, uint64_t b, uint64_t c)
{
    struct bench_rng rng = { seed };
    rng.state = bench_rng_next(&rng) ^ a;
    rng.state = bench_rng_next(&rng) ^ b;
    rng.state = bench_rng_next(&rng) ^ c;
    return rng;
}

/* 0..bound-1; the bias of 2^-32 does not matter here. */
static inline uint32_t
bench_rng_below(struct bench_rng *rng, uint32_t bound)
{
    return (uint32_t)(((bench_rng_next(rng) >> 32) * bound) >> 32);
}

/* Uniform in (0, 1]. */
static inline double
bench_rng_unit(struct bench_rng *rng)
{
    return (double)((bench_rng_next(rng) >> 11) + 1) * 0x1p-53;
}

#endif
