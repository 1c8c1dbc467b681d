// SPDX-License-Identifier: MIT
// The element types that combine adds, to and from float32.
#ifndef EPX_ENGINE_CUDA_ELEMENT_CUH
#define EPX_ENGINE_CUDA_ELEMENT_CUH

#include "engine/common/numeric.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace
{

// Elements by 16 bytes, to and from float32.
template <epx_dtype_t DTYPE> struct element;

template <> struct element<EPX_F32> {
    static constexpr int PER_VECTOR = 4;

    static __device__ void load(const uint4 &v, float *to)
    {
        to[0] = epx__f32_from_bits(v.x);
        to[1] = epx__f32_from_bits(v.y);
        to[2] = epx__f32_from_bits(v.z);
        to[3] = epx__f32_from_bits(v.w);
    }

    static __device__ uint4 round(const float *from)
    {
        return make_uint4(
            epx__bits_from_f32(from[0]), epx__bits_from_f32(from[1]),
            epx__bits_from_f32(from[2]), epx__bits_from_f32(from[3]));
    }
};

template <> struct element<EPX_BF16> {
    static constexpr int PER_VECTOR = 8;

    static __device__ void load(const uint4 &v, float *to)
    {
        const uint32_t words[4] = { v.x, v.y, v.z, v.w };

#pragma unroll
        for (int i = 0; i < 4; i++) {
            to[2 * i] = epx__f32_from_bits(words[i] << 16);
            to[2 * i + 1] = epx__f32_from_bits(words[i] & 0xffff0000u);
        }
    }

    static __device__ uint4 round(const float *from)
    {
        uint32_t words[4];

#pragma unroll
        for (int i = 0; i < 4; i++) {
            __nv_bfloat162 pair =
                __floats2bfloat162_rn(from[2 * i], from[2 * i + 1]);

            words[i] = *reinterpret_cast<uint32_t *>(&pair);
        }
        return make_uint4(words[0], words[1], words[2], words[3]);
    }
};

template <> struct element<EPX_F16> {
    static constexpr int PER_VECTOR = 8;

    static __device__ void load(const uint4 &v, float *to)
    {
        const uint32_t words[4] = { v.x, v.y, v.z, v.w };

#pragma unroll
        for (int i = 0; i < 4; i++) {
            __half2 pair = *reinterpret_cast<const __half2 *>(&words[i]);

            to[2 * i] = __low2float(pair);
            to[2 * i + 1] = __high2float(pair);
        }
    }

    static __device__ uint4 round(const float *from)
    {
        uint32_t words[4];

#pragma unroll
        for (int i = 0; i < 4; i++) {
            __half2 pair = __floats2half2_rn(from[2 * i], from[2 * i + 1]);

            words[i] = *reinterpret_cast<uint32_t *>(&pair);
        }
        return make_uint4(words[0], words[1], words[2], words[3]);
    }
};

// BF16 whose rows, unlike biases, count as what LogFMT-10 makes of them.
constexpr epx_dtype_t LOGFMT = (epx_dtype_t)(EPX_I64 + 1);

template <> struct element<LOGFMT>: element<EPX_BF16> {
};

} // namespace

#endif
