/* SPDX-License-Identifier: MIT */
/* Arrays between guards, each with a twin that holds what it should hold. */
#ifndef TESTS_CONFORMANCE_GUARD_H
#define TESTS_CONFORMANCE_GUARD_H

#include "conformance/memory.h"

typedef struct guarded {
    const char *name;
    bool is_input;
    memory_t *memory;
    epx_group_t *group; /* whose heap it is in; NULL: memory's own */
    uint8_t *block;     /* where memory has it */
    uint8_t *twin;
    size_t front; /* guard bytes before the data */
    size_t bytes; /* of data */
    size_t total;
} guarded_t;

/*
 * Makes an array of `bytes` bytes and its twin, both filled with one pattern
 * that depends on the position.  offset displaces the data from an aligned
 * address.  An input on the host, outside EPX memory, has no guard behind it,
 * so that an address checker sees the first byte read beyond its end.
 */
epx_status_t guarded_make(guarded_t *g, const char *name, memory_t *memory,
                          epx_group_t *group, size_t bytes, size_t offset,
                          bool is_input);
epx_status_t guarded_free(guarded_t *g);

/* For EPX, not for the test, which may not be able to look there. */
static inline void *
guarded_data(const guarded_t *g)
{
    return g->block + g->front;
}

static inline void *
guarded_expected(const guarded_t *g)
{
    return g->twin + g->front;
}

/* Gives the array and its twin these contents. */
epx_status_t guarded_fill(guarded_t *g, const void *contents, size_t bytes);

/* Gives the array the contents of its twin. */
epx_status_t guarded_copy_twin(guarded_t *g);

/* Makes the data what it should be: somebody has judged it otherwise.  false:
 * it cannot be read. */
bool guarded_adopt(guarded_t *g);

/* Overwrites an input, which is nobody's any more, and its twin. */
epx_status_t guarded_spoil(guarded_t *g);

/* Compares all of it with the twin, data as elements of dtype (see
 * oracle_difference).  False, with the position and both values in text, at the
 * first difference. */
bool guarded_check(const guarded_t *g, epx_dtype_t dtype, char *text,
                   size_t text_bytes);

#endif
