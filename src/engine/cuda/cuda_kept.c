/* SPDX-License-Identifier: MIT */
#include "engine/cuda/cuda_kept.h"

#include <pthread.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

typedef struct block {
    struct block *next;
    int card;
    size_t bytes;
    void *base;
} block_t;

enum { KEPT_SLACK = 1 << 16 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static block_t *kept, *lent; /* lists */

static block_t *
unlink_block(block_t **link)
{
    block_t *block = *link;

    *link = block->next;
    return block;
}

static void
put_into(block_t **list, block_t *block)
{
    block->next = *list;
    *list = block;
}

/* The smallest kept block of at least so many bytes; NULL when there is none,
 * or it is so large that another plan will want it. */
static block_t *
find_kept(int card, size_t bytes)
{
    block_t **best = NULL;

    for (block_t **link = &kept; *link != NULL; link = &(*link)->next) {
        if ((*link)->card == card && (*link)->bytes >= bytes &&
            (*link)->bytes <= 2 * bytes + KEPT_SLACK &&
            (best == NULL || (*link)->bytes < (*best)->bytes)) {
            best = link;
        }
    }
    return best == NULL ? NULL : unlink_block(best);
}

static cudaError_t
make_block(int card, size_t bytes, block_t **block_p)
{
    block_t *block = malloc(sizeof(*block));
    cudaError_t error;

    if (block == NULL) {
        return cudaErrorMemoryAllocation;
    }
    *block = (block_t){ .card = card, .bytes = bytes };
    error = card == CUDA_KEPT_PINNED
                ? cudaHostAlloc(&block->base, bytes,
                                cudaHostAllocPortable | cudaHostAllocMapped)
                : cudaMalloc(&block->base, bytes);
    if (error != cudaSuccess) {
        free(block);
        return error;
    }
    *block_p = block;
    return cudaSuccess;
}

cudaError_t
cuda_kept_take(int card, size_t bytes, size_t zeroed_bytes, void **base_p)
{
    cudaError_t error = cudaSuccess;
    block_t *block;

    (void)pthread_mutex_lock(&lock);
    block = find_kept(card, bytes);
    (void)pthread_mutex_unlock(&lock);
    if (block == NULL) {
        error = make_block(card, bytes, &block);
    }
    if (error != cudaSuccess) {
        return error;
    }
    if (zeroed_bytes > 0) {
        memset(block->base, 0, zeroed_bytes);
    }
    *base_p = block->base;
    (void)pthread_mutex_lock(&lock);
    put_into(&lent, block);
    (void)pthread_mutex_unlock(&lock);
    return cudaSuccess;
}

void
cuda_kept_give(void *base)
{
    block_t **link = &lent;

    if (base == NULL) {
        return;
    }
    (void)pthread_mutex_lock(&lock);
    while ((*link)->base != base) {
        link = &(*link)->next;
    }
    put_into(&kept, unlink_block(link));
    (void)pthread_mutex_unlock(&lock);
}
