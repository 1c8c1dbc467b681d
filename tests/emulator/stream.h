/* SPDX-License-Identifier: MIT */
/* The host's side of launches. */
#ifndef EMULATOR_STREAM_H
#define EMULATOR_STREAM_H

#include "emulator/block.h"

#include <cuda_runtime_api.h>

namespace emulator
{

/* Note an error for cudaGetLastError, and give it back. */
cudaError_t error(cudaError_t found);

/* How much shared memory a kernel may have, and how it divides an SM's. */
struct shared_wish {
    size_t bytes = 48 << 10;
    int carveout = cudaSharedmemCarveoutDefault;
};
cudaError_t wish_shared(const void *kernel, cudaFuncAttribute attribute,
                        int value);

/* kernel() is called by each thread, in stream order. */
cudaError_t launch(const void *function, std::function<void()> kernel,
                   dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream);

/* All blocks of a kernel at the same time; returns when they have ended. */
void run_grid(const launch_t &launch);

} // namespace emulator

#endif
