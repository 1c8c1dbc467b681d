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

/* Whether a launch may be, and of how much shared memory. */
cudaError_t allow_shared(const void *kernel, size_t bytes);
size_t shared_allowed(const void *kernel);

/* kernel() is called by each thread, in stream order. */
cudaError_t launch(const void *function, std::function<void()> kernel,
                   dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream);

/* All blocks of a kernel at the same time; returns when they have ended. */
void run_grid(const launch_t &launch);

} // namespace emulator

#endif
