// SPDX-License-Identifier: MIT
// BF16 as LogFMT-10 decodes it, by warps, with the bits of
// engine/common/logfmt.h.
#ifndef EPX_ENGINE_CUDA_LOGFMT_CUH
#define EPX_ENGINE_CUDA_LOGFMT_CUH

#include "engine/common/logfmt.h"
#include "engine/cuda/cuda_ptx.cuh"

// Two magnitudes of bf16 in a word, shifted so that as signed halves infinities
// and NaNs are below all, and zeros and subnormals below the numbers.
#define LOGFMT_TO_INFINITY (0x8000u - EPX__LOGFMT_INFINITY)

EPX__DEVICE uint32_t
logfmt_keys(uint32_t magnitudes)
{
    return magnitudes + (LOGFMT_TO_INFINITY << 16 | LOGFMT_TO_INFINITY);
}

// The larger of both halves, in the lower one.
EPX__DEVICE uint32_t
logfmt_larger_half(uint32_t keys)
{
    return __vmaxs2(keys, keys >> 16) & 0xffffu;
}

// What the codes of a block mean that eight neighbouring lanes hold.
EPX__DEVICE epx__logfmt_t
logfmt_meaning(const uint32_t *words)
{
    // The largest keys; for the smallest number, those of 0x7fff less it, which
    // exchanges infinities with zeros, and numbers among themselves.
    uint32_t highs = 0x80008000u, lows = 0x80008000u;

#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint32_t magnitudes = words[i] & 0x7fff7fffu;

        highs = __vmaxs2(highs, logfmt_keys(magnitudes));
        lows = __vmaxs2(lows, logfmt_keys(magnitudes ^ 0x7fff7fffu));
    }
    uint32_t both = logfmt_larger_half(highs) << 16 | logfmt_larger_half(lows);
#pragma unroll
    for (int step = EPX_LOGFMT_BLOCK / 8 / 2; step > 0; step /= 2) {
        both = __vmaxs2(both, __shfl_xor_sync(~0u, both, step));
    }
    int max = (int16_t)(both >> 16) - (int)LOGFMT_TO_INFINITY;
    int min = 0x7fff - ((int16_t)both - (int)LOGFMT_TO_INFINITY);
    bool has_numbers = max >= (int)EPX__LOGFMT_NORMAL;

    return epx__logfmt_block(has_numbers ? (uint32_t)max : 0,
                             has_numbers ? (uint32_t)min : 0);
}

// Eight neighbours a lane, a block for eight lanes (zeros where a block is
// short): all lanes call it.
EPX__DEVICE void
logfmt_octet(const uint4 &x, float *terms)
{
    const uint32_t words[4] = { x.x, x.y, x.z, x.w };
    epx__logfmt_t block = logfmt_meaning(words);

    static_assert(EPX_LOGFMT_BLOCK == 8 * 8, "a block for eight lanes");
#pragma unroll
    for (int i = 0; i < 4; i++) {
        terms[2 * i] = epx__logfmt_term(&block, (uint16_t)words[i]);
        terms[2 * i + 1] = epx__logfmt_term(&block, (uint16_t)(words[i] >> 16));
    }
}

#endif
