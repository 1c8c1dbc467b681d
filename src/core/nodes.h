/* SPDX-License-Identifier: MIT */
/*
 * Nodes: sets of ranks whose memory is mapped into each other.  They are
 * numbered in the order of their lowest ranks, and may differ in size.
 *
 * What a rank has for another node goes over the network once, to one rank
 * there: its rail, the rank with the same index among those of its node, or,
 * where the node has fewer, with the index modulo their number.  Ranks that are
 * masked do not count there.
 */
#ifndef EPX_CORE_NODES_H
#define EPX_CORE_NODES_H

#include "core/rank_bits.h"
#include "core/status.h"

#include <stdbool.h>
#include <stdint.h>

typedef struct epx__nodes {
    int32_t num_nodes;
    int32_t own;       /* the node of this rank */
    int32_t *node_of;  /* [R] */
    int32_t *index_of; /* [R] among the ranks of its node */
    int32_t *begin;    /* [num_nodes + 1] of each node's ranks */
    int32_t *ranks;    /* [R] by node, ascending in each */
} epx__nodes_t;

/* node_of is [num_ranks], numbered as above. */
epx_status_t epx__nodes_open(epx__nodes_t *nodes, int32_t rank,
                             int32_t num_ranks, const int32_t *node_of);
void epx__nodes_close(epx__nodes_t *nodes);

static inline int32_t
epx__node_size(const epx__nodes_t *nodes, int32_t node)
{
    return nodes->begin[node + 1] - nodes->begin[node];
}

static inline const int32_t *
epx__node_ranks(const epx__nodes_t *nodes, int32_t node)
{
    return nodes->ranks + nodes->begin[node];
}

/* Whether a rank is on this rank's node. */
static inline bool
epx__is_near(const epx__nodes_t *nodes, int32_t rank)
{
    return nodes->node_of[rank] == nodes->own;
}

/* The rank of `node` that takes in what `rank` of another node sends there; -1:
 * all are masked.  masked is a bit for each rank. */
int32_t epx__rail(const epx__nodes_t *nodes, const uint64_t *masked,
                  int32_t rank, int32_t node);

#endif
