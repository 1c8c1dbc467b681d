/* SPDX-License-Identifier: MIT */
/* What launchers say in the environment: any text gives a launch that makes
 * sense, or a sentence.  Input: lines NAME=VALUE. */
#include "bootstrap/launch_env.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void
require(bool condition)
{
    if (!condition) {
        abort();
    }
}

/* The context is a sequence of NAME=VALUE strings that ends with an empty one.
 */
static const char *
get(void *context, const char *name)
{
    const char *at = context;
    size_t length = strlen(name);

    for (; *at != '\0'; at += strlen(at) + 1) {
        if (strncmp(at, name, length) == 0 && at[length] == '=') {
            return at + length + 1;
        }
    }
    return NULL;
}

static void
check(const epx__launch_t *launch)
{
    size_t host_bytes = strnlen(launch->host, sizeof(launch->host));

    require(launch->num_ranks >= 1 && launch->num_ranks <= EPX_MAX_RANKS);
    require(launch->rank >= 0 && launch->rank < launch->num_ranks);
    require(host_bytes < sizeof(launch->host));
    require((launch->num_ranks == 1) == (host_bytes == 0));
    require((launch->num_ranks == 1) == (launch->port == 0));
    require(strpbrk(launch->host, " \t/[]") == NULL);
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    char *text = calloc(size + 2, 1);
    epx__launch_t launch;
    epx_status_t status;

    require(text != NULL);
    for (size_t i = 0; i < size; i++) {
        text[i] = data[i] == '\n' ? '\0' : (char)data[i];
    }
    status = epx__launch_parse(get, text, &launch);
    require(status == EPX_OK || status == EPX_ERR_ENVIRONMENT);
    if (status == EPX_OK) {
        check(&launch);
    } else {
        require(epx_last_error()[0] != '\0');
    }
    free(text);
    return 0;
}
