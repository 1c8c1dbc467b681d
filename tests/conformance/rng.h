/* SPDX-License-Identifier: MIT */
/* Random numbers that are a function of their keys alone, so that every rank
 * can make the inputs of all ranks by itself. */
#ifndef TESTS_CONFORMANCE_RNG_H
#define TESTS_CONFORMANCE_RNG_H

#include <epx/epx.h>
#include <stdbool.h>
#include <stdint.h>

typedef struct rng {
    uint64_t state;
} rng_t;

/* SplitMix64. */
static inline uint64_t
rng_next(rng_t *rng)
{
    uint64_t z = rng->state += UINT64_C(0x9e3779b97f4a7c15);

    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

static inline rng_t
rng_of(uint64_t seed, uint64_t a, uint64_t b)
{
    rng_t rng = { seed };

    rng.state = rng_next(&rng) ^ a;
    rng.state = rng_next(&rng) ^ b;
    rng.state = rng_next(&rng);
    return rng;
}

/* low..high, both possible. */
static inline int64_t
rng_int(rng_t *rng, int64_t low, int64_t high)
{
    return low + (int64_t)(rng_next(rng) % (uint64_t)(high - low + 1));
}

/* True one time in n. */
static inline bool
rng_one_in(rng_t *rng, int64_t n)
{
    return rng_int(rng, 1, n) == 1;
}

/* count elements of dtype.  special mixes in NaN, infinities, zeros,
 * subnormals, the largest values and blocks of small ones; without it floats
 * are finite and of ordinary size. */
void rng_fill(rng_t *rng, epx_dtype_t dtype, void *data, int64_t count,
              bool special);

#endif
