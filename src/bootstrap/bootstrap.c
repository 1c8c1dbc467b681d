/* SPDX-License-Identifier: MIT */
#include "bootstrap/bootstrap.h"

#include "core/status.h"

#include <stdint.h>
#include <stdlib.h>

epx_status_t
epx__allgather_check(const void *send, const void *recv, size_t bytes,
                     int32_t num_ranks)
{
    size_t max_bytes = SIZE_MAX / 2 / (size_t)num_ranks;

    if (bytes > max_bytes) {
        return epx__fail(EPX_ERR_INVALID,
                         "bytes is %zu; with %d ranks it is at most %zu", bytes,
                         num_ranks, max_bytes);
    }
    if (bytes > 0 && (send == NULL || recv == NULL)) {
        return epx__fail(EPX_ERR_NULL, "%s is null, bytes is %zu",
                         send == NULL ? "send" : "recv", bytes);
    }
    return EPX_OK;
}

epx_status_t
epx__bootstrap_new(const epx_bootstrap_t *bootstrap,
                   epx_bootstrap_t **bootstrap_p)
{
    epx_bootstrap_t *copy = malloc(sizeof(*copy));

    if (copy == NULL) {
        return epx__fail(EPX_ERR_NO_MEMORY, "no memory for a bootstrap");
    }
    *copy = *bootstrap;
    *bootstrap_p = copy;
    return EPX_OK;
}

void
epx_bootstrap_destroy(epx_bootstrap_t *bootstrap)
{
    if (bootstrap == NULL) {
        return;
    }
    if (bootstrap->destroy != NULL) {
        bootstrap->destroy(bootstrap->context);
    }
    free(bootstrap);
}
