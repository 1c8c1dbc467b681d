/* SPDX-License-Identifier: MIT */
/* A group's net. */
#ifndef EPX_NET_NET_GROUP_H
#define EPX_NET_NET_GROUP_H

#include "net/net.h"

/* Channels of a group's net. */
#define EPX__GROUP_CHANNELS 128

/* Check a caller's settings and fill in defaults. */
epx_status_t epx__network_complete(epx_network_config_t *network);

/*
 * Join the nodes of a group that has several: group->remote is then set, and
 * epx__group_net tells the net.  Collective.  A peer that is lost breaks the
 * group.
 */
epx_status_t epx__group_join_nodes(epx_group_t *group,
                                   const epx_bootstrap_t *bootstrap,
                                   const epx_network_config_t *network);

/* How long the end of an operation that has failed waits for peers to take what
 * is under way: those that live do at once, others are lost by then. */
static inline uint64_t
epx__group_patience_ns(const epx_group_t *group)
{
    return 2 * group->lost_after_ns;
}

/* NULL with a single node. */
static inline epx__net_t *
epx__group_net(const epx_group_t *group)
{
    return group->remote.context;
}

#endif
