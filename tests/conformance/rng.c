/* SPDX-License-Identifier: MIT */
#include "conformance/rng.h"
#include <string.h>

/* A float format: where its sign and exponent are. */
typedef struct format {
    int man_bits;
    int exp_bits;
    uint32_t spread; /* exponents on either side of 1.0 */
} format_t;

/* Of a size around 2^centre. */
static uint32_t
ordinary(rng_t *rng, const format_t *f, int centre)
{
    uint64_t bits = rng_next(rng);
    uint32_t bias = (1u << (f->exp_bits - 1)) - 1 + (uint32_t)centre;
    uint32_t exponent =
        bias - f->spread + (uint32_t)((bits >> 32) % (2 * f->spread + 1));
    uint32_t sign = (uint32_t)(bits >> 31 & 1);
    uint32_t man = (uint32_t)bits & ((1u << f->man_bits) - 1);

    return (sign << f->exp_bits | exponent) << f->man_bits | man;
}

static uint32_t
unusual(rng_t *rng, const format_t *f)
{
    uint32_t man_mask = (1u << f->man_bits) - 1;
    uint32_t all_exp = ((1u << f->exp_bits) - 1) << f->man_bits;
    uint32_t sign = (uint32_t)rng_int(rng, 0, 1) << (f->exp_bits + f->man_bits);
    uint32_t man = (uint32_t)rng_next(rng) & man_mask;

    switch (rng_int(rng, 0, 4)) {
    case 0: /* zero */
        return sign;
    case 1: /* infinity */
        return sign | all_exp;
    case 2: /* a NaN, quiet or signalling */
        return sign | all_exp | (man ? man : 1);
    case 3: /* subnormal */
        return sign | man;
    default: /* near the largest */
        return (sign | all_exp) - 1 - (man & 3);
    }
}

void
rng_fill(rng_t *rng, epx_dtype_t dtype, void *data, int64_t count, bool special)
{
    static const format_t f32 = { 23, 8, 8 };
    static const format_t f16 = { 10, 5, 4 };
    static const format_t bf16 = { 7, 8, 8 };
    size_t size = epx_dtype_size(dtype);
    const format_t *f = dtype == EPX_F32   ? &f32
                        : dtype == EPX_F16 ? &f16
                                           : &bf16;
    uint8_t *to = data;
    int64_t oddity = 16; /* one element in this many is unusual */
    int centre = 0;

    if (dtype != EPX_F32 && dtype != EPX_F16 && dtype != EPX_BF16) {
        for (int64_t i = 0; i < count * (int64_t)size; i++) {
            to[i] = (uint8_t)rng_next(rng);
        }
        return;
    }
    for (int64_t i = 0; i < count; i++, to += size) {
        uint32_t bits;

        if (special && i % EPX_SCALE_BLOCK == 0) {
            /* Whole blocks about 1e-4, the least amax of quantisation. */
            centre = f == &bf16 && rng_one_in(rng, 3) ? -22 : 0;
            oddity = rng_int(rng, 1, 200);
        }
        bits = special && rng_one_in(rng, oddity) ? unusual(rng, f)
                                                  : ordinary(rng, f, centre);

        /* x86 and arm64 are little-endian: the low half comes first. */
        memcpy(to, &bits, size);
    }
}
