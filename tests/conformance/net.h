/* SPDX-License-Identifier: MIT */
/* What joins the nodes of a shape: UCX, or a network within the process that is
 * as bad as its seed says. */
#ifndef TESTS_CONFORMANCE_NET_H
#define TESTS_CONFORMANCE_NET_H

#include "conformance/world.h"

typedef enum net_kind {
    NET_UCX = 0,
    NET_SIM, /* delays, reorders, repeats, sends again what it lost */
    NET_CUT, /* the same, until a message vanishes or a rank is cut off */
} net_kind_t;

/* Whether this program was built with it. */
bool net_exists(net_kind_t kind);

/* The network of the next groups, of ranks that are threads. */
void net_open(net_kind_t kind, uint64_t seed, int32_t num_ranks);
void net_close(net_kind_t kind);

#endif
