/* SPDX-License-Identifier: MIT */
#include "conformance/guard.h"
#include "oracle/oracle.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { GUARD = 64 };

epx_status_t
guarded_make(guarded_t *g, const char *name, epx_group_t *group, size_t bytes,
             size_t offset, bool is_input)
{
    void *block;

    *g = (guarded_t){ .name = name, .is_input = is_input, .group = group };
    g->front = GUARD + offset;
    g->bytes = bytes;
    g->total = g->front + bytes + (is_input && !group ? 0 : GUARD);
    g->twin = malloc(g->total);
    if (!g->twin) {
        return EPX_ERR_NO_MEMORY;
    }
    if (group) {
        epx_status_t status = epx_mem_alloc(group, g->total, &block);

        if (status != EPX_OK) {
            free(g->twin);
            *g = (guarded_t){ 0 };
            return status;
        }
    } else if (posix_memalign(&block, 64, g->total)) {
        free(g->twin);
        *g = (guarded_t){ 0 };
        return EPX_ERR_NO_MEMORY;
    }
    g->block = block;
    for (size_t i = 0; i < g->total; i++) {
        g->twin[i] = (uint8_t)((i * 151 + (i >> 8) * 13) ^ 0xa5);
    }
    memcpy(g->block, g->twin, g->total);
    return EPX_OK;
}

epx_status_t
guarded_free(guarded_t *g)
{
    epx_status_t status = EPX_OK;

    if (g->group) {
        status = epx_mem_free(g->group, g->block);
    } else {
        free(g->block);
    }
    free(g->twin);
    *g = (guarded_t){ 0 };
    return status;
}

void
guarded_fill(guarded_t *g, const void *contents, size_t bytes)
{
    if (bytes > 0) {
        memcpy(guarded_data(g), contents, bytes);
        memcpy(guarded_expected(g), contents, bytes);
    }
}

void
guarded_spoil(guarded_t *g)
{
    memset(guarded_data(g), 0x7e, g->bytes);
    memset(guarded_expected(g), 0x7e, g->bytes);
}

static bool
check_guard(const guarded_t *g, const char *which, size_t start, size_t bytes,
            char *text, size_t text_bytes)
{
    int64_t i = oracle_difference(EPX_BYTES, g->twin + start, g->block + start,
                                  (int64_t)bytes);

    if (i >= 0) {
        snprintf(text, text_bytes,
                 "%s: byte %lld of the guard %s it was overwritten with 0x%02x",
                 g->name, (long long)i, which, g->block[start + (size_t)i]);
    }
    return i < 0;
}

bool
guarded_check(const guarded_t *g, epx_dtype_t dtype, char *text,
              size_t text_bytes)
{
    size_t size = epx_dtype_size(dtype);
    size_t behind = g->front + g->bytes;
    uint64_t want = 0;
    uint64_t got = 0;
    int64_t i;

    if (memcmp(g->block, g->twin, g->total) == 0) {
        return true;
    }
    if (!check_guard(g, "before", 0, g->front, text, text_bytes) ||
        !check_guard(g, "behind", behind, g->total - behind, text,
                     text_bytes)) {
        return false;
    }
    i = oracle_difference(dtype, guarded_expected(g), guarded_data(g),
                          (int64_t)(g->bytes / size));
    if (i < 0) {
        return true;
    }
    memcpy(&want, g->twin + g->front + (size_t)i * size, size);
    memcpy(&got, g->block + g->front + (size_t)i * size, size);
    snprintf(text, text_bytes,
             "%s: element %lld of %lld: expected 0x%0*llx, got 0x%0*llx",
             g->name, (long long)i, (long long)(g->bytes / size),
             (int)(2 * size), (unsigned long long)want, (int)(2 * size),
             (unsigned long long)got);
    return false;
}
