/* SPDX-License-Identifier: MIT */
/*
 * Memory that devices write and that is not of the heap: the host's, pinned, or
 * a card's.  Giving it back to CUDA waits for the device, which may be waiting
 * for a peer that this thread should have started: so it is kept for the next
 * group instead, for as long as the process lives.
 */
#ifndef EPX_ENGINE_CUDA_KEPT_H
#define EPX_ENGINE_CUDA_KEPT_H

#include <cuda_runtime_api.h>

/* In the place of a card: the host. */
#define CUDA_KEPT_PINNED (-1)

/* Of a card it is the one that has been entered.  The first zeroed_bytes are
 * zero: of a card's memory none are. */
cudaError_t cuda_kept_take(int card, size_t bytes, size_t zeroed_bytes,
                           void **base_p);
/* NULL is allowed. */
void cuda_kept_give(void *base);

#endif
