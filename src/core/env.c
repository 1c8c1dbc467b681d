/* SPDX-License-Identifier: MIT */
#include "core/env.h"

#include "core/status.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>

const char *
epx__env_string(const char *name)
{
    return secure_getenv(name);
}

epx_status_t
epx__parse_uint(const char *name, const char *text, uint64_t min, uint64_t max,
                uint64_t *value_p)
{
    char *end = NULL;
    unsigned long long value;

    errno = 0;
    /* strtoull accepts white space and signs, so look at the first byte. */
    value = text[0] >= '0' && text[0] <= '9' ? strtoull(text, &end, 10) : 0;
    if (end == NULL || *end != '\0' || errno != 0 || value < min ||
        value > max) {
        return epx__fail(EPX_ERR_ENVIRONMENT,
                         "%s is \"%.40s\"; it must be a whole number from "
                         "%" PRIu64 " to %" PRIu64,
                         name, text, min, max);
    }
    *value_p = value;
    return EPX_OK;
}
