/* SPDX-License-Identifier: MIT */
#include "core/heap.h"

#include "core/control.h"
#include "core/status.h"

#include <inttypes.h>
#include <stdlib.h>

typedef struct epx__heap_block {
    struct epx__heap_block *next;
    uint64_t offset;
    uint64_t bytes;
    bool used;
    bool is_retired; /* used, but nobody's */
    uint32_t epoch;  /* in which it was retired */
} block_t;

static block_t *
block_new(uint64_t offset, uint64_t bytes, block_t *next)
{
    block_t *block = malloc(sizeof(*block));

    if (block != NULL) {
        *block = (block_t){ .next = next, .offset = offset, .bytes = bytes };
    }
    return block;
}

epx_status_t
epx__heap_open(epx__heap_t *heap, void *base, uint64_t begin, uint64_t end)
{
    heap->base = base;
    heap->begin = begin;
    heap->end = end;
    heap->blocks = block_new(begin, end - begin, NULL);
    if (heap->blocks == NULL) {
        return epx__fail(EPX_ERR_NO_MEMORY, "no memory for the heap's list");
    }
    (void)pthread_mutex_init(&heap->lock, NULL);
    return EPX_OK;
}

void
epx__heap_close(epx__heap_t *heap)
{
    block_t *next;

    for (block_t *block = heap->blocks; block != NULL; block = next) {
        next = block->next;
        free(block);
    }
    (void)pthread_mutex_destroy(&heap->lock);
}

static void
usage_locked(const epx__heap_t *heap, uint64_t *free_p, uint64_t *largest_p)
{
    *free_p = 0;
    *largest_p = 0;
    for (const block_t *b = heap->blocks; b != NULL; b = b->next) {
        if (!b->used) {
            *free_p += b->bytes;
            *largest_p = b->bytes > *largest_p ? b->bytes : *largest_p;
        }
    }
}

/* The first free block of at least `bytes`, cut to size; NULL and *status_p
 * set when there is none. */
static block_t *
take_locked(epx__heap_t *heap, uint64_t bytes, epx_status_t *status_p)
{
    block_t *block = heap->blocks;

    while (block != NULL && (block->used || block->bytes < bytes)) {
        block = block->next;
    }
    if (block == NULL) {
        *status_p = EPX_ERR_HEAP_EXHAUSTED;
        return NULL;
    }
    if (block->bytes > bytes) {
        block_t *rest =
            block_new(block->offset + bytes, block->bytes - bytes, block->next);

        if (rest == NULL) {
            *status_p = EPX_ERR_NO_MEMORY;
            return NULL;
        }
        block->next = rest;
        block->bytes = bytes;
    }
    block->used = true;
    return block;
}

epx_status_t
epx__heap_alloc(epx__heap_t *heap, uint64_t bytes, const char *what,
                void **ptr_p)
{
    epx_status_t status = EPX_ERR_HEAP_EXHAUSTED;
    block_t *block = NULL;
    uint64_t left = 0, largest = 0;

    (void)pthread_mutex_lock(&heap->lock);
    /* Larger than the heap: refuse before rounding up can overflow. */
    if (bytes <= heap->end - heap->begin) {
        uint64_t wanted = bytes == 0 ? 1 : bytes;

        block =
            take_locked(heap, epx__round_up(wanted, EPX__HEAP_ALIGN), &status);
    }
    if (block == NULL) {
        usage_locked(heap, &left, &largest);
    }
    (void)pthread_mutex_unlock(&heap->lock);
    if (block != NULL) {
        *ptr_p = heap->base + block->offset;
        return EPX_OK;
    }
    if (status == EPX_ERR_NO_MEMORY) {
        return epx__fail(status, "no memory for the heap's list");
    }
    return epx__fail(status,
                     "the heap has no %" PRIu64
                     " bytes in one piece for %s; of %" PRIu64 " bytes %" PRIu64
                     " are free, the largest piece has %" PRIu64
                     " (heap_bytes sets the size)",
                     bytes, what, heap->end - heap->begin, left, largest);
}

static void
merge_with_next(block_t *block)
{
    block_t *next = block->next;

    if (next != NULL && !next->used) {
        block->bytes += next->bytes;
        block->next = next->next;
        free(next);
    }
}

static bool
release_locked(epx__heap_t *heap, uint64_t offset)
{
    block_t *before = NULL;
    block_t *block = heap->blocks;

    while (block != NULL && block->offset < offset) {
        before = block;
        block = block->next;
    }
    if (block == NULL || block->offset != offset || !block->used) {
        return false;
    }
    block->used = false;
    block->is_retired = false;
    merge_with_next(block);
    if (before != NULL && !before->used) {
        merge_with_next(before);
    }
    return true;
}

epx_status_t
epx__heap_free(epx__heap_t *heap, void *ptr)
{
    uint64_t offset = (uint64_t)((uintptr_t)ptr - (uintptr_t)heap->base);
    bool known;

    if (offset < heap->begin || offset >= heap->end) {
        return epx__fail(EPX_ERR_WRONG_GROUP,
                         "%p is not memory of this group, whose heap is %p..%p",
                         ptr, (void *)(heap->base + heap->begin),
                         (void *)(heap->base + heap->end));
    }
    (void)pthread_mutex_lock(&heap->lock);
    known = release_locked(heap, offset);
    (void)pthread_mutex_unlock(&heap->lock);
    return known ? EPX_OK
                 : epx__fail(EPX_ERR_INVALID,
                             "%p is in the heap but not the start of an "
                             "allocation, or is freed already",
                             ptr);
}

void
epx__heap_retire(epx__heap_t *heap, const void *ptr, uint32_t epoch)
{
    uint64_t offset = (uint64_t)((uintptr_t)ptr - (uintptr_t)heap->base);

    (void)pthread_mutex_lock(&heap->lock);
    for (block_t *block = heap->blocks; block != NULL; block = block->next) {
        if (block->offset == offset) {
            block->is_retired = true;
            block->epoch = epoch;
        }
    }
    (void)pthread_mutex_unlock(&heap->lock);
}

void
epx__heap_reclaim(epx__heap_t *heap, uint32_t epoch)
{
    block_t *block;

    (void)pthread_mutex_lock(&heap->lock);
    do {
        block = heap->blocks;
        while (block != NULL && (!block->is_retired || block->epoch >= epoch)) {
            block = block->next;
        }
    } while (block != NULL && release_locked(heap, block->offset));
    (void)pthread_mutex_unlock(&heap->lock);
}

bool
epx__heap_find(epx__heap_t *heap, const void *ptr, uint64_t *left_p)
{
    uint64_t offset = (uint64_t)((uintptr_t)ptr - (uintptr_t)heap->base);
    const block_t *block;

    *left_p = 0;
    if (offset < heap->begin || offset >= heap->end) {
        return false;
    }
    (void)pthread_mutex_lock(&heap->lock);
    block = heap->blocks;
    while (block->next != NULL && block->next->offset <= offset) {
        block = block->next;
    }
    if (block->used) {
        *left_p = block->offset + block->bytes - offset;
    }
    (void)pthread_mutex_unlock(&heap->lock);
    return true;
}

void
epx__heap_usage(epx__heap_t *heap, uint64_t *free_p, uint64_t *largest_p)
{
    (void)pthread_mutex_lock(&heap->lock);
    usage_locked(heap, free_p, largest_p);
    (void)pthread_mutex_unlock(&heap->lock);
}
