/* SPDX-License-Identifier: MIT */
#ifndef EPX_NET_UCX_UCX_SETTINGS_H
#define EPX_NET_UCX_UCX_SETTINGS_H

#include "net/net.h"
#include "net/ucx/ucx_library.h"

/* UCX's configuration: what the environment says, then the net's config, and
 * what is known to be right where neither says anything. */
epx_status_t epx__ucx_settings(const epx__ucx_library_t *ucx,
                               const epx__net_config_t *config,
                               ucp_config_t **settings_p);

#endif
