/* SPDX-License-Identifier: MIT */
#include "conformance/guard.h"
#include "oracle/oracle.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { GUARD = 64 };

/* Memory for the array and its twin, without contents. */
static epx_status_t
take_blocks(guarded_t *g)
{
    epx_status_t status = EPX_OK;
    void *block = NULL;

    g->twin = malloc(g->total);
    if (!g->twin) {
        return EPX_ERR_NO_MEMORY;
    }
    if (g->group) {
        status = epx_mem_alloc(g->group, g->total, &block);
    } else {
        block = g->memory->ops->alloc(g->memory, g->total);
        status = block ? EPX_OK : EPX_ERR_NO_MEMORY;
    }
    g->block = block;
    if (status != EPX_OK) {
        free(g->twin);
    }
    return status;
}

epx_status_t
guarded_make(guarded_t *g, const char *name, memory_t *memory,
             epx_group_t *group, size_t bytes, size_t offset, bool is_input)
{
    bool open_end = is_input && !group && memory->on_host;
    epx_status_t status;

    *g = (guarded_t){
        .name = name, .is_input = is_input, .memory = memory, .group = group
    };
    g->front = GUARD + offset;
    g->bytes = bytes;
    g->total = g->front + bytes + (open_end ? 0 : GUARD);
    status = take_blocks(g);
    if (status != EPX_OK) {
        *g = (guarded_t){ 0 };
        return status;
    }
    for (size_t i = 0; i < g->total; i++) {
        g->twin[i] = (uint8_t)((i * 151 + (i >> 8) * 13) ^ 0xa5);
    }
    status = guarded_copy_twin(g);
    if (status != EPX_OK) {
        guarded_free(g);
    }
    return status;
}

epx_status_t
guarded_free(guarded_t *g)
{
    epx_status_t status = EPX_OK;

    if (g->group) {
        status = epx_mem_free(g->group, g->block);
    } else if (g->memory) {
        g->memory->ops->free(g->memory, g->block);
    }
    free(g->twin);
    *g = (guarded_t){ 0 };
    return status;
}

epx_status_t
guarded_copy_twin(guarded_t *g)
{
    return g->memory->ops->upload(g->memory, g->block, g->twin, g->total)
               ? EPX_OK
               : EPX_ERR_SYSTEM;
}

epx_status_t
guarded_fill(guarded_t *g, const void *contents, size_t bytes)
{
    if (bytes > 0) {
        memcpy(guarded_expected(g), contents, bytes);
    }
    return guarded_copy_twin(g);
}

bool
guarded_adopt(guarded_t *g)
{
    return g->memory->ops->download(g->memory, guarded_expected(g),
                                    guarded_data(g), g->bytes);
}

epx_status_t
guarded_spoil(guarded_t *g)
{
    memset(guarded_expected(g), 0x7e, g->bytes);
    return guarded_copy_twin(g);
}

static bool
check_guard(const guarded_t *g, const uint8_t *actual, const char *which,
            size_t start, size_t bytes, char *text, size_t text_bytes)
{
    int64_t i = oracle_difference(EPX_BYTES, g->twin + start, actual + start,
                                  (int64_t)bytes);

    if (i >= 0) {
        snprintf(text, text_bytes,
                 "%s: byte %lld of the guard %s it was overwritten with 0x%02x",
                 g->name, (long long)i, which, actual[start + (size_t)i]);
    }
    return i < 0;
}

static bool
check_data(const guarded_t *g, const uint8_t *actual, epx_dtype_t dtype,
           char *text, size_t text_bytes)
{
    size_t size = epx_dtype_size(dtype);
    uint64_t want = 0;
    uint64_t got = 0;
    int64_t i = oracle_difference(dtype, guarded_expected(g), actual + g->front,
                                  (int64_t)(g->bytes / size));

    if (i < 0) {
        return true;
    }
    memcpy(&want, g->twin + g->front + (size_t)i * size, size);
    memcpy(&got, actual + g->front + (size_t)i * size, size);
    snprintf(text, text_bytes,
             "%s: element %lld of %lld: expected 0x%0*llx, got 0x%0*llx",
             g->name, (long long)i, (long long)(g->bytes / size),
             (int)(2 * size), (unsigned long long)want, (int)(2 * size),
             (unsigned long long)got);
    return false;
}

static bool
check_all(const guarded_t *g, const uint8_t *actual, epx_dtype_t dtype,
          char *text, size_t text_bytes)
{
    size_t behind = g->front + g->bytes;

    return memcmp(actual, g->twin, g->total) == 0 ||
           (check_guard(g, actual, "before", 0, g->front, text, text_bytes) &&
            check_guard(g, actual, "behind", behind, g->total - behind, text,
                        text_bytes) &&
            check_data(g, actual, dtype, text, text_bytes));
}

bool
guarded_check(const guarded_t *g, epx_dtype_t dtype, char *text,
              size_t text_bytes)
{
    uint8_t *copy;
    bool ok;

    if (g->memory->on_host) {
        return check_all(g, g->block, dtype, text, text_bytes);
    }
    copy = malloc(g->total);
    ok = copy && g->memory->ops->download(g->memory, copy, g->block, g->total);
    if (!ok) {
        snprintf(text, text_bytes, "%s cannot be read back", g->name);
    } else {
        ok = check_all(g, copy, dtype, text, text_bytes);
    }
    free(copy);
    return ok;
}
