/* SPDX-License-Identifier: MIT */
/*
 * The memory that a rank's arrays lie in and the streams that its calls run on:
 * one interface over the CPU and over a card.  Whatever fails is noted with
 * world_fail.
 *
 * Ranks share the first card, or are spread over the first EPX_TEST_CARDS, or
 * as many as there are.  A call of CUDA's that waits for a card waits for the
 * kernels of all ranks on it, so all that a rank needs of the card is taken
 * when its memory is opened, which comes before its group.
 */
#ifndef TESTS_CONFORMANCE_MEMORY_H
#define TESTS_CONFORMANCE_MEMORY_H

#include "conformance/world.h"

enum { MEMORY_MAX_STREAMS = 3 };

typedef struct memory memory_t;

typedef struct memory_ops {
    void (*close)(memory_t *memory);
    /* Memory outside the group's heap, aligned to 64 bytes; NULL if there is
     * none left. */
    void *(*alloc)(memory_t *memory, size_t bytes);
    void (*free)(memory_t *memory, void *ptr);
    /* Copies to and from arrays, in the group's heap or not; complete when they
     * return. */
    bool (*upload)(memory_t *memory, void *to, const void *from, size_t bytes);
    bool (*download)(memory_t *memory, void *to, const void *from,
                     size_t bytes);
    /* Fills in the streams, which some engines make for a group. */
    bool (*open_streams)(memory_t *memory, epx_group_t *group);
    bool (*close_streams)(memory_t *memory);
    /* Until all has run that the stream was given. */
    bool (*synchronize)(memory_t *memory, epx_stream_t stream);
} memory_ops_t;

struct memory {
    const memory_ops_t *ops;
    world_rank_t *self;
    epx_device_t device;
    int32_t ordinal;     /* of the card */
    bool on_host;        /* arrays can be looked at where they are */
    bool is_async;       /* a call on any stream may return before it is done */
    int32_t min_workers; /* what a group of so many ranks may ask for */
    int32_t max_workers;
    epx_stream_t streams[MEMORY_MAX_STREAMS];
    int32_t num_streams;
};

/*
 * Call once in main, before any world: NULL, or why there can be no ranks of
 * this device here.  It leaves CUDA alone in this process, which may fork
 * ranks.
 */
const char *memory_obstacle(epx_device_t device);

/* NULL when it failed. */
memory_t *memory_open(world_rank_t *self, epx_device_t device);

/* NULL is allowed.  With a card, only when the group of no rank that shares it
 * is in use any more. */
void memory_close(memory_t *memory);

/* ---- the kinds of memory ---- */

memory_t *memory_cpu_open(world_rank_t *self);

#ifdef EPX_TEST_CUDA
const char *memory_cuda_obstacle(void);
memory_t *memory_cuda_open(world_rank_t *self);
#endif

#endif
