/* SPDX-License-Identifier: MIT */
/*
 * An allocator for torch.cuda.MemPool whose memory is EPX's: what PyTorch makes
 * in such a pool, peers reach in one hop.  Each block goes back to the group
 * that it is from, whichever the thread is using by then.
 */
#include <epx/epx.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/types.h>

#define POOL_API __attribute__((visibility("default")))

typedef struct pool_block {
    void *ptr;
    epx_group_t *group;
    struct pool_block *next;
} pool_block_t;

static pthread_mutex_t pool_lock = PTHREAD_MUTEX_INITIALIZER;
static pool_block_t *pool_blocks;
static _Thread_local epx_group_t *pool_group;

POOL_API epx_group_t *epx_pool_use(epx_group_t *group);
POOL_API void *epx_pool_alloc(ssize_t bytes, int device, void *stream);
POOL_API void epx_pool_free(void *ptr, ssize_t bytes, int device, void *stream);

/* The group that this thread allocates from; returns the one before. */
epx_group_t *
epx_pool_use(epx_group_t *group)
{
    epx_group_t *before = pool_group;

    pool_group = group;
    return before;
}

/* NULL is what PyTorch takes for being out of memory. */
void *
epx_pool_alloc(ssize_t bytes, int device, void *stream)
{
    pool_block_t *block = malloc(sizeof(*block));

    (void)device;
    (void)stream;
    if (block == NULL || bytes < 0 ||
        epx_mem_alloc(pool_group, (uint64_t)bytes, &block->ptr) != EPX_OK) {
        free(block);
        return NULL;
    }
    block->group = pool_group;
    (void)pthread_mutex_lock(&pool_lock);
    block->next = pool_blocks;
    pool_blocks = block;
    (void)pthread_mutex_unlock(&pool_lock);
    return block->ptr;
}

void
epx_pool_free(void *ptr, ssize_t bytes, int device, void *stream)
{
    pool_block_t **link = &pool_blocks;
    pool_block_t *block;

    (void)bytes;
    (void)device;
    (void)stream;
    (void)pthread_mutex_lock(&pool_lock);
    while (*link != NULL && (*link)->ptr != ptr) {
        link = &(*link)->next;
    }
    block = *link;
    if (block != NULL) {
        *link = block->next;
    }
    (void)pthread_mutex_unlock(&pool_lock);
    if (block != NULL) {
        (void)epx_mem_free(block->group, block->ptr);
        free(block);
    }
}
