/* SPDX-License-Identifier: MIT */
#include "api/api_args.h"

#include "core/status.h"

#include <string.h>

/* No struct will ever be this large: a size beyond is not a size. */
#define MAX_BYTES 4096

static epx_status_t
check_size(const void *args, size_t first_bytes, const char *name,
           size_t *bytes_p)
{
    if (args == NULL) {
        return epx__fail(EPX_ERR_NULL, "%s is null", name);
    }
    memcpy(bytes_p, args, sizeof(*bytes_p));
    if (*bytes_p < first_bytes || *bytes_p > MAX_BYTES) {
        return epx__fail(EPX_ERR_INVALID,
                         "%s->size is %zu; it must be %zu to %d (start from "
                         "its _INIT macro)",
                         name, *bytes_p, first_bytes, MAX_BYTES);
    }
    return EPX_OK;
}

epx_status_t
epx__args_copy(void *to, size_t bytes, const void *from, size_t first_bytes,
               const char *name)
{
    const char *source = from;
    size_t given = 0;
    epx_status_t status = check_size(from, first_bytes, name, &given);

    if (status != EPX_OK) {
        return status;
    }
    for (size_t i = bytes; i < given; i++) {
        if (source[i] != 0) {
            return epx__fail(EPX_ERR_UNSUPPORTED,
                             "%s sets byte %zu, a field that this version, "
                             "which knows %zu bytes, does not have",
                             name, i, bytes);
        }
    }
    memset(to, 0, bytes);
    memcpy(to, from, given < bytes ? given : bytes);
    memcpy(to, &bytes, sizeof(bytes));
    return EPX_OK;
}

epx_status_t
epx__args_return(void *to, const void *from, size_t bytes, size_t first_bytes,
                 const char *name)
{
    size_t given = 0;
    epx_status_t status = check_size(to, first_bytes, name, &given);

    if (status == EPX_OK) {
        memcpy((char *)to + sizeof(given), (const char *)from + sizeof(given),
               (given < bytes ? given : bytes) - sizeof(given));
    }
    return status;
}
