// SPDX-License-Identifier: MIT
// BF16 to F8E4M3 by warps, with the bits of engine/common/numeric.h.
#ifndef EPX_ENGINE_CUDA_QUANTIZE_CUH
#define EPX_ENGINE_CUDA_QUANTIZE_CUH

#include "engine/common/numeric.h"
#include "engine/cuda/cuda_ptx.cuh"

#include <cuda_fp8.h>

// Two values at once, where the hardware rounds and saturates as we do.
EPX__DEVICE uint32_t
f8e4m3x2_from_f32(float low, float high)
{
#if __CUDA_ARCH__ >= 890
    return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE,
                                    __NV_E4M3);
#else
    return epx__f8e4m3_from_f32(low) | epx__f8e4m3_from_f32(high) << 8;
#endif
}

// Magnitudes of bf16 grow as their bits do.
constexpr uint32_t BF16_INFINITY = 0x7f80u;

// A pair of magnitudes, a NaN as 0.
EPX__DEVICE uint32_t
without_nan(uint32_t pair)
{
    uint32_t low = pair & 0xffffu, high = pair >> 16;

    return (low > BF16_INFINITY ? 0 : low) | (high > BF16_INFINITY ? 0 : high)
                                                 << 16;
}

// The largest of half a warp's pairs.
EPX__DEVICE uint32_t
max_of_block(uint32_t pair)
{
#pragma unroll
    for (int step = 8; step > 0; step /= 2) {
        pair = max_u16x2(pair, __shfl_xor_sync(~0u, pair, step));
    }
    return max(pair & 0xffffu, pair >> 16);
}

// Eight neighbours a lane, a block of EPX_SCALE_BLOCK for each half of the warp
// (zeros where a block is short): all lanes call it.
EPX__DEVICE uint2
quantize_octet(epx_quantize_t kind, uint4 x, float *scale_p)
{
    const uint32_t words[4] = { x.x, x.y, x.z, x.w };
    uint32_t max = 0;

    static_assert(EPX_SCALE_BLOCK == 16 * 8, "a block for half a warp");
#pragma unroll
    for (int i = 0; i < 4; i++) {
        max = max_u16x2(max, words[i] & 0x7fff7fffu);
    }
    max = max_of_block(max);
    if (__any_sync(~0u, max > BF16_INFINITY)) {
        // The same without NaNs.
        max = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            max = max_u16x2(max, without_nan(words[i] & 0x7fff7fffu));
        }
        max = max_of_block(max);
    }
    float amax = epx__f32_from_bf16((uint16_t)max);
    epx__block_scale_t scale = epx__block_scale(
        kind, amax > EPX__QUANTIZE_MIN_AMAX ? amax : EPX__QUANTIZE_MIN_AMAX);
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float low = epx__f32_from_bits(words[i] << 16) * scale.factor;
        float high = epx__f32_from_bits(words[i] & 0xffff0000u) * scale.factor;

        pairs[i] = f8e4m3x2_from_f32(low, high);
    }
    *scale_p = scale.scale;
    return make_uint2(pairs[0] | pairs[1] << 16, pairs[2] | pairs[3] << 16);
}

// Note a block's scale among those of its chunk; words are zero before.
EPX__DEVICE void
scale_put(epx_quantize_t kind, uint32_t *words, int block, float scale)
{
    uint32_t bits = epx__bits_from_f32(scale);

    if (kind == EPX_QUANTIZE_F8E4M3_UE8M0) {
        reinterpret_cast<uint8_t *>(words)[block] = (uint8_t)(bits >> 23);
    } else {
        words[block] = bits;
    }
}

#endif
