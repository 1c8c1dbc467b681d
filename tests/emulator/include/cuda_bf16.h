/* SPDX-License-Identifier: MIT */
/* As CUDA rounds: to nearest even, every NaN to 0x7fff. */
#ifndef EMULATOR_CUDA_BF16_H
#define EMULATOR_CUDA_BF16_H

#include "engine/common/numeric.h"

struct __nv_bfloat162 {
    uint16_t x, y;
};

static inline __nv_bfloat162
__floats2bfloat162_rn(float low, float high)
{
    return { epx__bf16_from_f32(low), epx__bf16_from_f32(high) };
}

#endif
