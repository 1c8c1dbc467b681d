/* SPDX-License-Identifier: MIT */
/* For inline functions that C compilers and nvcc both take. */
#ifndef EPX_CORE_HOST_DEVICE_H
#define EPX_CORE_HOST_DEVICE_H

#ifdef __CUDACC__
#define EPX__INLINE static __host__ __device__ __forceinline__
#else
#define EPX__INLINE static inline
#endif

#endif
