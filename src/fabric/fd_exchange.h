/* SPDX-License-Identifier: MIT */
/*
 * Handing a descriptor of a segment to every peer of the host.  Each rank
 * listens on a Unix socket, in the abstract namespace, and pushes its own
 * descriptor to every peer's: the sockets' addresses and a token for each rank
 * came through the bootstrap, and the kernel vouches for the user, both ways.
 */
#ifndef EPX_FABRIC_FD_EXCHANGE_H
#define EPX_FABRIC_FD_EXCHANGE_H

#include "fabric/fabric.h"

typedef struct epx__fd_exchange {
    int fd; /* of the own segment; closed with the exchange */
    int listener;
} epx__fd_exchange_t;

#define EPX__FD_EXCHANGE_NONE { -1, -1 }

/* Make the segment that a descriptor of `rank` stands for reachable, and set
 * reach->peers[rank]; the descriptor is the caller's. */
typedef epx_status_t epx__fd_attach_t(const epx_group_t *group,
                                      epx__reach_t *reach, int fd, int32_t rank,
                                      const epx__fabric_card_t *card);

/* NULL if descriptors can go from one to the other; else why not, as an
 * obstacle of a fabric. */
const char *epx__fd_exchange_obstacle(const epx__fabric_place_t *a,
                                      const epx__fabric_place_t *b);

/* Listen, and fill in the card's address and token. */
epx_status_t epx__fd_exchange_open(epx__fd_exchange_t *exchange,
                                   const epx_group_t *group,
                                   epx__fabric_card_t *card);

/* Give exchange->fd to all peers, and take in theirs.  The exchange is closed
 * when this returns. */
epx_status_t epx__fd_exchange_run(epx__fd_exchange_t *exchange,
                                  epx_group_t *group, epx__reach_t *reach,
                                  const epx__fabric_card_t *cards,
                                  int64_t deadline_ns,
                                  epx__fd_attach_t *attach);

void epx__fd_exchange_close(epx__fd_exchange_t *exchange);

#endif
