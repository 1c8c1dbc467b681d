/* SPDX-License-Identifier: MIT */
/* The ranks once they have met: rank 0 holds a connection to every other, and
 * gathers over them.  rendezvous_wire.h draws the frames. */
#ifndef EPX_BOOTSTRAP_STAR_H
#define EPX_BOOTSTRAP_STAR_H

#include "bootstrap/io.h"
#include "bootstrap/rendezvous_wire.h"

/* A connection and what is still to be sent on it. */
typedef struct epx__link {
    int fd;
    epx__outbox_t out;
} epx__link_t;

typedef struct epx__star epx__star_t;

/* `links` is [num_ranks] by rank at rank 0, whose own entry is ignored;
 * elsewhere the one to rank 0.  Takes the connections if it succeeds. */
epx_status_t epx__star_create(int32_t rank, int32_t num_ranks,
                              const epx__link_t *links, epx__star_t **star_p);

/* Ends the join: rank 0 tells that all are there, the others wait for that. */
epx_status_t epx__star_start(epx__star_t *star, int64_t deadline_ns);

/* As in epx_bootstrap_t.  After a failure other than in the arguments every
 * later call fails. */
epx_status_t epx__star_allgather(epx__star_t *star, const void *send,
                                 void *recv, size_t bytes, int64_t deadline_ns);

void epx__star_destroy(epx__star_t *star);

/* How often rank 0 tells those who wait for whom they wait. */
#define EPX__REPORT_INTERVAL_NS (100 * EPX__NS_PER_MS)

/* Adds this rank's report on `ranks` to an outbox, unless something is still in
 * it, and sends what the socket takes at once: a report is news, not a promise.
 */
void epx__link_report(epx__link_t *link, int32_t rank, epx__frame_kind_t kind,
                      uint64_t sequence, const epx__rank_set_t *ranks);

#endif
