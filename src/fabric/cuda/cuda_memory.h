/* SPDX-License-Identifier: MIT */
/*
 * Memory of cards that can be mapped by others: allocated through the driver's
 * virtual memory management (VMM), or by cudaMalloc where legacy IPC handles
 * need it.  All of these are called with the card entered.
 */
#ifndef EPX_FABRIC_CUDA_CUDA_MEMORY_H
#define EPX_FABRIC_CUDA_CUDA_MEMORY_H

#include <cuda.h>
#include <epx/epx.h>
#include <stdbool.h>

/* A mapping in this process's address space; base is NULL when there is none.
 * Closing it gives back the physical memory once nobody maps it any more. */
typedef struct epx__cuda_block {
    char *base;
    uint64_t bytes;   /* rounded up to what can be mapped */
    uint64_t allowed; /* a bit for each card that VMM lets reach it */
    void (*unmap)(struct epx__cuda_block *block);
} epx__cuda_block_t;

/* An allocation of at least `bytes`, for this card's use.  `shareable` gets
 * the handle of that type: an int for a file descriptor, a CUmemFabricHandle,
 * and nothing with CU_MEM_HANDLE_TYPE_NONE, where it may be NULL. */
epx_status_t epx__cuda_block_create(int32_t ordinal,
                                    CUmemAllocationHandleType type,
                                    uint64_t bytes, void *shareable,
                                    epx__cuda_block_t *block);

/* The same by cudaMalloc; `shareable` is a cudaIpcMemHandle_t, or NULL. */
epx_status_t epx__cuda_block_malloc(uint64_t bytes, void *shareable,
                                    epx__cuda_block_t *block);

/* A peer's, by what create or malloc gave it: an os_handle as
 * cuMemImportFromShareableHandle takes it, or a cudaIpcMemHandle_t. */
epx_status_t epx__cuda_block_import(int32_t ordinal,
                                    CUmemAllocationHandleType type,
                                    void *os_handle, uint64_t mapped_bytes,
                                    epx__cuda_block_t *block);
epx_status_t epx__cuda_block_open_ipc(const void *handle, uint64_t mapped_bytes,
                                      epx__cuda_block_t *block);

/* Let another card of this process use a block that one of its threads has
 * made.  The threads of several ranks may do so at a time. */
epx_status_t epx__cuda_block_allow(int32_t ordinal, epx__cuda_block_t *block);

void epx__cuda_block_close(epx__cuda_block_t *block);

/* Whether memory of a type can be made and exported on the card: a driver may
 * say so and yet refuse it, for want of a service or a permission. */
bool epx__cuda_can_share(int32_t ordinal, CUmemAllocationHandleType type);

/* Copy (source NULL: zero) and wait for it, in a stream of our own: the default
 * one would wait for other ranks' kernels, and they perhaps for us. */
epx_status_t epx__cuda_copy(void *destination, const void *source,
                            size_t bytes);

#endif
