/* SPDX-License-Identifier: MIT */
/* Ranks of one job meet over TCP, and then gather over the connections that
 * they made: join.h, then star.h. */
#ifndef EPX_BOOTSTRAP_RENDEZVOUS_H
#define EPX_BOOTSTRAP_RENDEZVOUS_H

#include "bootstrap/handshake.h"
#include "bootstrap/star.h"

/* Collective.  Rank 0 listens at host:port, the others connect to it; returns
 * once all num_ranks >= 2 ranks are there.  `identity` is not kept. */
epx_status_t epx__rendezvous_open(const epx__identity_t *identity,
                                  const char *host, uint16_t port,
                                  int64_t deadline_ns, epx__star_t **star_p);

#endif
