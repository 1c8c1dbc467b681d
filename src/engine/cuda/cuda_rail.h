/* SPDX-License-Identifier: MIT */
/*
 * What goes between the nodes of a CUDA group, as its kernels and its proxy, a
 * thread of the host (cuda_proxy.c), both see it.  It lies in pinned memory of
 * the host, which the device maps, but for rows where the network reaches the
 * card:
 *
 *     mail      a control region (core/control.h) of which words are used:
 *               this rank's own, which the proxy sends, and those of the ranks
 *               of other nodes, which it has received
 *     trips     one for each slot of steps: how far the step's rows have come
 *     regions   what is on its way: of a plan, see cuda_rail_t
 *
 * What goes is the parcel of a step for one rank, its rail or the rank that it
 * is the rail of, in two messages:
 *
 *     head       cuda_parcel_head_t
 *     OUT        i32 tokens[n], experts[n][K] (-1: on another node),
 *                cuda_route_t routes[n][K] (rank -1: the same)
 *     both       f32 weights[n][K], if there are any
 *     OUT        u32 scales[n][S]
 *
 *     both       rows [n], if they have any bytes
 */
#ifndef EPX_ENGINE_CUDA_RAIL_H
#define EPX_ENGINE_CUDA_RAIL_H

#include "core/control.h"

#include <epx/epx.h>

#define CUDA_RAIL_ALIGN 128
#define CUDA_MASKED     (-1)

/* Where a token's row goes: rank -1 for none. */
typedef struct cuda_route {
    int32_t rank;
    uint32_t row;
} cuda_route_t;

typedef struct cuda_parcel_head {
    uint64_t step;
    uint64_t count;
    uint32_t has_weights;
    uint32_t wants_weights; /* OUT of a combine: to come back */
    uint32_t unused[26];
} cuda_parcel_head_t;

/* What the tokens of a lane's parcels have. */
typedef struct cuda_parcel_kind {
    uint32_t topk;
    uint32_t is_out; /* tokens, experts and routes */
    uint64_t num_scales;
    uint64_t row_bytes;
} cuda_parcel_kind_t;

/* Where its arrays begin, and how long its two parts are. */
typedef struct cuda_parcel {
    uint64_t tokens, experts, routes, weights, scales, bytes, row_bytes;
} cuda_parcel_t;

EPX__INLINE cuda_parcel_t
cuda_parcel(const cuda_parcel_kind_t *kind, uint32_t has_weights,
            uint64_t count)
{
    uint64_t topk = kind->topk;
    uint64_t out = kind->is_out != 0 ? count : 0;
    cuda_parcel_t p;

    p.tokens = sizeof(cuda_parcel_head_t);
    p.experts =
        p.tokens + epx__round_up(out * sizeof(int32_t), CUDA_RAIL_ALIGN);
    p.routes = p.experts +
               epx__round_up(out * topk * sizeof(int32_t), CUDA_RAIL_ALIGN);
    p.weights = p.routes + epx__round_up(out * topk * sizeof(cuda_route_t),
                                         CUDA_RAIL_ALIGN);
    p.scales =
        p.weights +
        epx__round_up(has_weights != 0 ? count * topk * sizeof(float) : 0,
                      CUDA_RAIL_ALIGN);
    p.bytes =
        p.scales + epx__round_up(out * kind->num_scales * sizeof(uint32_t),
                                 CUDA_RAIL_ALIGN);
    p.row_bytes = count * kind->row_bytes;
    return p;
}

/* Room for parcels of max_tokens, one behind the other; bytes are of each. */
typedef struct cuda_regions {
    char *heads;
    uint64_t bytes;
    char *rows;
    uint64_t row_bytes;
    uint64_t max_tokens;
} cuda_regions_t;

EPX__INLINE char *
cuda_region(const cuda_regions_t *regions, int32_t i)
{
    return regions->heads + (uint64_t)i * regions->bytes;
}

EPX__INLINE char *
cuda_region_rows(const cuda_regions_t *regions, int32_t i)
{
    return regions->rows + (uint64_t)i * regions->row_bytes;
}

/*
 * Where the parcels of an operation lie.  Towards a node this rank's tokens go
 * to its rail there, and their sums come back; for each rank of another node
 * that this one is the rail of, a forward, it is the other way about.
 *
 *     by_node[OUT], by_forward[BACK]   are sent
 *     by_forward[OUT], by_node[BACK]   have come
 *
 * A plan's regions serve one operation at a time: marks[0] is the last step
 * that has sent from them, marks[CUDA_MARK_FREE] the last that the proxy is
 * done with.
 */
typedef struct cuda_rail {
    cuda_parcel_kind_t kinds[EPX__NUM_LANES];
    cuda_regions_t by_node[EPX__NUM_LANES];    /* [N - 1], see cuda_far_node */
    cuda_regions_t by_forward[EPX__NUM_LANES]; /* [F] */
    uint64_t *marks;
    /* A dispatch into receive slots: both are [ranks of other nodes], for each
     * its own. */
    uint64_t is_slots;
} cuda_rail_t;

#define CUDA_MARK_FREE  16 /* on a line of its own */
#define CUDA_MARK_BYTES 256

/* The number of a node among those that are not this rank's. */
EPX__INLINE int32_t
cuda_far_node(int32_t node, int32_t own)
{
    return node - (node > own ? 1 : 0);
}

/* A step between nodes.  Steps count as in the control region: a word is the
 * step's once it holds its number. */
typedef struct cuda_trip {
    /* The device's. */
    uint64_t begun; /* releases the rest, acquired by the proxy */
    uint64_t kind;  /* epx__step_kind_t */
    cuda_rail_t rail;
    uint64_t packed; /* parcels OUT can be sent, */
    uint64_t summed; /* those BACK, too */
    uint64_t ended;  /* what has come has been read */
    uint64_t unused[8];
    /* The proxy's: */
    uint64_t came[EPX__NUM_LANES]; /* all parcels of a lane, */
    uint64_t closed;               /* and nothing is left to do */
    /* The ranks that have not begun the step, a bit each; and for each lane
     * those that owe this one what it waits for, those among them. */
    uint64_t absent[EPX_MAX_RANKS / 64];
    uint64_t owing[EPX__NUM_LANES][EPX_MAX_RANKS / 64];
} cuda_trip_t;

typedef struct cuda_relay {
    cuda_trip_t trips[EPX__NUM_SLOTS];
} cuda_relay_t;

/* The nodes as kernels see them. */
typedef struct cuda_nodes {
    int32_t num_nodes;
    int32_t own;
    int32_t all_near;         /* a single node, and no rank is masked */
    int32_t far_rank;         /* the lowest on another node: told for all */
    int32_t num_forwards;     /* ranks that this one is the rail of */
    const int32_t *node_of;   /* [R], CUDA_MASKED for a masked rank */
    const int32_t *far_index; /* [R] among the ranks of other nodes */
    cuda_relay_t *relay;
} cuda_nodes_t;

#endif
