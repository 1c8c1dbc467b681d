/* SPDX-License-Identifier: MIT */
#include "core/nodes.h"

#include <stdlib.h>
#include <string.h>

epx_status_t
epx__nodes_open(epx__nodes_t *nodes, int32_t rank, int32_t num_ranks,
                const int32_t *node_of)
{
    size_t count = (size_t)num_ranks;
    /* One allocation: node_of, index_of, ranks, begin. */
    int32_t *arrays = calloc(4 * count + 1, sizeof(*arrays));

    if (arrays == NULL) {
        return epx__fail(EPX_ERR_NO_MEMORY, "no memory for %d ranks",
                         num_ranks);
    }
    *nodes = (epx__nodes_t){
        .own = node_of[rank],
        .node_of = arrays,
        .index_of = arrays + count,
        .ranks = arrays + 2 * count,
        .begin = arrays + 3 * count,
    };
    memcpy(nodes->node_of, node_of, count * sizeof(*node_of));
    for (int32_t r = 0; r < num_ranks; r++) {
        nodes->index_of[r] = nodes->begin[node_of[r] + 1]++;
        if (node_of[r] >= nodes->num_nodes) {
            nodes->num_nodes = node_of[r] + 1;
        }
    }
    for (int32_t n = 0; n < nodes->num_nodes; n++) {
        nodes->begin[n + 1] += nodes->begin[n];
    }
    for (int32_t r = 0; r < num_ranks; r++) {
        nodes->ranks[nodes->begin[node_of[r]] + nodes->index_of[r]] = r;
    }
    return EPX_OK;
}

void
epx__nodes_close(epx__nodes_t *nodes)
{
    free(nodes->node_of);
    *nodes = (epx__nodes_t){ 0 };
}

int32_t
epx__rail(const epx__nodes_t *nodes, const uint64_t *masked, int32_t rank,
          int32_t node)
{
    const int32_t *ranks = epx__node_ranks(nodes, node);
    int32_t size = epx__node_size(nodes, node);
    int32_t count = 0, at;

    for (int32_t i = 0; i < size; i++) {
        count += !epx__has_rank(masked, ranks[i]);
    }
    if (count == 0) {
        return -1;
    }
    at = nodes->index_of[rank] % count;
    for (int32_t i = 0;; i++) {
        if (!epx__has_rank(masked, ranks[i]) && at-- == 0) {
            return ranks[i];
        }
    }
}
