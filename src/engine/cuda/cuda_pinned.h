/* SPDX-License-Identifier: MIT */
/*
 * Host memory that devices write.  Giving it back to CUDA waits for the device,
 * which may be waiting for a peer that this thread should have started: so it
 * is kept for the next group instead, for as long as the process lives.
 */
#ifndef EPX_ENGINE_CUDA_PINNED_H
#define EPX_ENGINE_CUDA_PINNED_H

#include <cuda_runtime_api.h>

/* The first zeroed_bytes are zero. */
cudaError_t cuda_pinned_take(size_t bytes, size_t zeroed_bytes, void **block_p);
/* NULL is allowed. */
void cuda_pinned_give(void *block);

#endif
