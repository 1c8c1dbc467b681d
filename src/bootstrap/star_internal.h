/* SPDX-License-Identifier: MIT */
/* What rank 0's side of the star and the others' share. */
#ifndef EPX_BOOTSTRAP_STAR_INTERNAL_H
#define EPX_BOOTSTRAP_STAR_INTERNAL_H

#include "bootstrap/star.h"
#include "core/status.h"

typedef struct epx__star_peer {
    epx__link_t link;
    /* The frame that is coming in; a block goes to its place at once. */
    unsigned char head[EPX__FRAME_BYTES];
    size_t head_bytes;
    epx__rank_set_t report;
    size_t body_bytes; /* of the block or the report */
    bool arrived;      /* its block of this allgather is complete */
} epx__star_peer_t;

struct epx__star {
    int32_t rank;
    int32_t num_ranks;
    int32_t num_peers; /* num_ranks at rank 0, else 1 */
    uint64_t sequence; /* of the operation under way */
    epx__error_t broken;
    struct pollfd *polls;     /* [num_peers] */
    epx__star_peer_t peers[]; /* [num_peers]; at rank 0 the first is unused */
};

/* One allgather, as the functions below hand it on. */
typedef struct epx__gather {
    const void *send;
    unsigned char *recv; /* [num_ranks, bytes] */
    size_t bytes;
    size_t total_bytes;
    int64_t deadline_ns;
    epx__rank_set_t awaited; /* whom rank 0 waits for, as far as is known */
} epx__gather_t;

/* The operation star->sequence, at rank 0 and elsewhere. */
epx_status_t epx__star_gather_root(epx__star_t *star, epx__gather_t *gather);
epx_status_t epx__star_gather_leaf(epx__star_t *star, epx__gather_t *gather);

/* Adds a block, which stays in place, to what a link sends. */
void epx__star_add_data(const epx__star_t *star, epx__link_t *link,
                        const void *block, size_t bytes,
                        const epx__digest_t *digest);

/* The frame of `rank` that has just come is not the one that it sent. */
epx_status_t epx__star_fail_auth(const epx__star_t *star, int32_t rank);

/* The error that a report stands for, on rank 0 and on those it told. */
epx_status_t epx__star_fail(const epx__star_t *star, epx__frame_kind_t kind,
                            const epx__rank_set_t *ranks);

#endif
