/* SPDX-License-Identifier: MIT */
/*
 * The segments of ranks that are threads of one process, so that peers find
 * them.  A segment is counted: whoever lets go of it last releases it, be it
 * its owner or a peer.
 */
#ifndef EPX_FABRIC_SEGMENT_REGISTRY_H
#define EPX_FABRIC_SEGMENT_REGISTRY_H

#include "fabric/fabric.h"

typedef struct epx__segment {
    /* Filled in by the owner. */
    char *base;
    uint64_t bytes;
    void *context; /* for release, and for peers of the same fabric */
    void (*release)(struct epx__segment *segment);
    /* The registry's. */
    struct epx__segment *next;
    uint64_t job_id[2];
    int32_t rank;
    epx__purpose_t purpose;
    int references;
} epx__segment_t;

/* The segments that a rank holds on to: [R], NULL where it holds none. */
typedef epx__segment_t *epx__segment_holds_t;

/* Register this rank's own segment, a copy of `own`: reach->state becomes an
 * epx__segment_holds_t *.  On failure nothing has been released. */
epx_status_t epx__segments_open(const epx_group_t *group, epx__reach_t *reach,
                                const epx__segment_t *own);

/* Hold on to the segments of all peers. */
epx_status_t epx__segments_connect(const epx_group_t *group,
                                   epx__reach_t *reach,
                                   const epx__fabric_card_t *cards);

/* Let go of all of them. */
void epx__segments_close(const epx_group_t *group, epx__reach_t *reach);

#endif
