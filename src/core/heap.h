/* SPDX-License-Identifier: MIT */
/*
 * The allocator of a rank's segment.  Its bookkeeping is private memory of this
 * process, so that no peer can corrupt it: a list of blocks in address order,
 * first fit, neighbours merged on free.
 */
#ifndef EPX_CORE_HEAP_H
#define EPX_CORE_HEAP_H

#include <epx/epx.h>
#include <pthread.h>
#include <stdbool.h>

#define EPX__HEAP_ALIGN 4096

struct epx__heap_block;

typedef struct epx__heap {
    char *base; /* offsets count from here: the start of the segment */
    uint64_t begin;
    uint64_t end;
    pthread_mutex_t lock;
    struct epx__heap_block *blocks;
} epx__heap_t;

epx_status_t epx__heap_open(epx__heap_t *heap, void *base, uint64_t begin,
                            uint64_t end);
void epx__heap_close(epx__heap_t *heap);

/* `bytes` of 0 gives a block too.  `what` completes the sentence "... for
 * WHAT". */
epx_status_t epx__heap_alloc(epx__heap_t *heap, uint64_t bytes,
                             const char *what, void **ptr_p);
epx_status_t epx__heap_free(epx__heap_t *heap, void *ptr);

/* Instead: nobody gets the block before what was retired in its epoch, a number
 * of the caller's, is reclaimed: everything from before `epoch`. */
void epx__heap_retire(epx__heap_t *heap, const void *ptr, uint32_t epoch);
void epx__heap_reclaim(epx__heap_t *heap, uint32_t epoch);

/* Whether ptr points into the segment; then *left_p is what its block holds
 * from ptr on (0 when it is in no block). */
bool epx__heap_find(epx__heap_t *heap, const void *ptr, uint64_t *left_p);

void epx__heap_usage(epx__heap_t *heap, uint64_t *free_p, uint64_t *largest_p);

#endif
