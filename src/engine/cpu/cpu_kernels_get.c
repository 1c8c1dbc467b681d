/* SPDX-License-Identifier: MIT */
#include "engine/cpu/cpu_kernels.h"

const epx__kernels_t *
epx__kernels_get(void)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")) {
        return &epx__kernels_avx512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        return &epx__kernels_avx2;
    }
#endif
    return &epx__kernels_base;
}
