/* SPDX-License-Identifier: MIT */
/* In place of the UCX backend, where the library was built without UCX's
 * headers. */
#include "net/net_backend.h"

static epx_status_t
none_open(epx__net_t *net, const epx__net_config_t *config, void **state_p,
          void *address, size_t *address_bytes_p, int *fd_p)
{
    (void)net, (void)config, (void)address, (void)fd_p;
    *state_p = NULL;
    *address_bytes_p = 0;
    return epx__fail(EPX_ERR_UNSUPPORTED,
                     "other hosts are reached with UCX, and this library was "
                     "built without UCX's headers (EPX_UCX=ON asks for them)");
}

const epx__net_backend_t epx__net_ucx = {
    .name = "ucx",
    .open = none_open,
};
