/* SPDX-License-Identifier: MIT */
/* The ranks once they have met: rank 0 holds a connection to every other, and
 * gathers over them.  rendezvous_wire.h draws the frames. */
#ifndef EPX_BOOTSTRAP_STAR_H
#define EPX_BOOTSTRAP_STAR_H

#include "bootstrap/link.h"

typedef struct epx__star epx__star_t;

/* `links` is [num_ranks] by rank at rank 0, whose own entry is ignored;
 * elsewhere the one to rank 0.  Takes the connections if it succeeds. */
epx_status_t epx__star_create(int32_t rank, int32_t num_ranks,
                              const epx__link_t *links, epx__star_t **star_p);

/* Ends the join: rank 0 tells that all are there, the others wait for that. */
epx_status_t epx__star_start(epx__star_t *star, int64_t deadline_ns);

/* Both take an epx__star_t, as members of epx_bootstrap_t.  After a failure
 * other than in the arguments every later allgather fails. */
epx_status_t epx__star_allgather(void *context, const void *send, void *recv,
                                 size_t bytes, int64_t deadline_ns);
void epx__star_destroy(void *context);

/* How often rank 0 tells those who wait for whom they wait. */
#define EPX__REPORT_INTERVAL_NS (100 * EPX__NS_PER_MS)

#endif
