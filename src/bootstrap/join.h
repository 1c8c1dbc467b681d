/* SPDX-License-Identifier: MIT */
/* How the ranks of a job find rank 0 and prove that they belong together. */
#ifndef EPX_BOOTSTRAP_JOIN_H
#define EPX_BOOTSTRAP_JOIN_H

#include "bootstrap/handshake.h"
#include "bootstrap/star.h"

/* A stranger has this long for the whole handshake... */
#define EPX__HANDSHAKE_NS (5 * EPX__NS_PER_SEC)
/* ... and no more than this many, beside one for each rank, at a time. */
#define EPX__SPARE_STRANGERS 64

/* Rank 0: listens at host:port until every rank has joined; fills links[1..
 * num_ranks-1]. */
epx_status_t epx__join_listen(const epx__identity_t *identity, const char *host,
                              uint16_t port, int64_t deadline_ns,
                              epx__link_t *links);

/* Other ranks: tries to join rank 0 at host:port until it succeeds, is refused,
 * or the deadline passes. */
epx_status_t epx__join_connect(const epx__identity_t *identity,
                               const char *host, uint16_t port,
                               int64_t deadline_ns, epx__link_t *link);

#endif
