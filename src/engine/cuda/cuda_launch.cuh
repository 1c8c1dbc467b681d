// SPDX-License-Identifier: MIT
#ifndef EPX_ENGINE_CUDA_LAUNCH_CUH
#define EPX_ENGINE_CUDA_LAUNCH_CUH

#include <cuda_runtime.h>

// Load a kernel, which may then have so many bytes of dynamic shared memory.
//
// All kernels divide an SM's memory between L1 and shared memory alike.  One
// that divides it otherwise than the last may be held back until the kernels
// before it have ended, whatever their streams, and holds back those after it:
// one that waits for a peer's must not, in a process that has both.
template <typename Args>
static cudaError_t
load(void (*kernel)(const Args), size_t max_shared)
{
    cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)max_shared);

    return error == cudaSuccess
               ? cudaFuncSetAttribute(
                     kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                     cudaSharedmemCarveoutMaxShared)
               : error;
}

// Launch a kernel, which takes one argument struct.
template <typename Args>
static cudaError_t
launch(void (*kernel)(const Args), int num_blocks, int num_threads,
       size_t shared_bytes, const Args &args, cudaStream_t stream)
{
    void *params[] = { const_cast<Args *>(&args) };

    return cudaLaunchKernel(kernel, dim3(num_blocks), dim3(num_threads), params,
                            shared_bytes, stream);
}

#endif
