/* SPDX-License-Identifier: MIT */
/* As CUDA rounds: to nearest even, every NaN to 0x7fff. */
#ifndef EMULATOR_CUDA_FP16_H
#define EMULATOR_CUDA_FP16_H

#include "engine/common/numeric.h"

struct __half2 {
    uint16_t x, y;
};

static inline __half2
__floats2half2_rn(float low, float high)
{
    return { epx__f16_from_f32(low), epx__f16_from_f32(high) };
}

static inline float
__low2float(__half2 pair)
{
    return epx__f32_from_f16(pair.x);
}

static inline float
__high2float(__half2 pair)
{
    return epx__f32_from_f16(pair.y);
}

#endif
