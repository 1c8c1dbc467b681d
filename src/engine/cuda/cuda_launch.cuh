// SPDX-License-Identifier: MIT
#ifndef EPX_ENGINE_CUDA_LAUNCH_CUH
#define EPX_ENGINE_CUDA_LAUNCH_CUH

#include "engine/cuda/cuda_kernels.h"

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

template <typename Args>
static const cuda_view_t &
view_of(const Args &args)
{
    return args.view;
}

static inline const cuda_view_t &
view_of(const cuda_fused_args_t &args)
{
    return args.move.view;
}

static inline const cuda_view_t &
view_of(const cuda_unpack_args_t &args)
{
    return args.move.view;
}

// Launch a kernel, which takes one argument struct.
//
// Its blocks may be on the device while the kernel before it ends, if that one
// allows it (grid_release), so that a launch takes no time of its own.  So
// every kernel begins with grid_wait.  A kernel of ours allows it once it waits
// for no peer any more: blocks that wait for it hold SMs, which a peer may
// need.
template <typename Args>
static cudaError_t
launch(void (*kernel)(const Args), int num_blocks, int num_threads,
       size_t shared_bytes, const Args &args, cudaStream_t stream)
{
    cudaLaunchAttribute early = {};
    cudaLaunchConfig_t config = {
        dim3(num_blocks), dim3(num_threads), shared_bytes, stream, &early, 0,
    };

    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    config.numAttrs = view_of(args).starts_early ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, args);
}

#endif
