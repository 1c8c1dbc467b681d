/* SPDX-License-Identifier: MIT */
#include "engine/cuda/cuda_pinned.h"

#include <pthread.h>
#include <stdalign.h>
#include <stddef.h>
#include <string.h>

/* In front of each block. */
typedef struct header {
    alignas(64) struct header *next;
    size_t bytes;
} header_t;

enum { KEPT_SLACK = 1 << 16 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static header_t *kept;

/* The smallest kept block of at least so many bytes; NULL when there is none,
 * or it is so large that another plan will want it. */
static header_t *
find_kept(size_t bytes)
{
    header_t **best = NULL;
    header_t *found = NULL;

    (void)pthread_mutex_lock(&lock);
    for (header_t **link = &kept; *link != NULL; link = &(*link)->next) {
        if ((*link)->bytes >= bytes &&
            (*link)->bytes <= 2 * bytes + KEPT_SLACK &&
            (best == NULL || (*link)->bytes < (*best)->bytes)) {
            best = link;
        }
    }
    if (best != NULL) {
        found = *best;
        *best = found->next;
    }
    (void)pthread_mutex_unlock(&lock);
    return found;
}

cudaError_t
cuda_pinned_take(size_t bytes, size_t zeroed_bytes, void **block_p)
{
    header_t *header = find_kept(bytes);

    if (header == NULL) {
        cudaError_t error =
            cudaHostAlloc((void **)&header, sizeof(*header) + bytes,
                          cudaHostAllocPortable | cudaHostAllocMapped);

        if (error != cudaSuccess) {
            return error;
        }
        header->bytes = bytes;
    }
    memset(header + 1, 0, zeroed_bytes);
    *block_p = header + 1;
    return cudaSuccess;
}

void
cuda_pinned_give(void *block)
{
    header_t *header = (header_t *)block - 1;

    if (block == NULL) {
        return;
    }
    (void)pthread_mutex_lock(&lock);
    header->next = kept;
    kept = header;
    (void)pthread_mutex_unlock(&lock);
}
