// SPDX-License-Identifier: MIT
#ifndef EPX_ENGINE_CUDA_LAUNCH_CUH
#define EPX_ENGINE_CUDA_LAUNCH_CUH

#include <cuda_runtime.h>

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
