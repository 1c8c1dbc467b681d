/* SPDX-License-Identifier: MIT */
/* A connection between two ranks that have shaken hands: it carries frames, and
 * notices every one that is not the other end's next.  rendezvous_wire.h draws
 * them. */
#ifndef EPX_BOOTSTRAP_LINK_H
#define EPX_BOOTSTRAP_LINK_H

#include "bootstrap/io.h"
#include "bootstrap/rendezvous_wire.h"

typedef struct epx__link {
    int fd;
    epx__outbox_t out; /* what is still to be sent */
    unsigned char key[EPX__KEY_BYTES];
    uint64_t num_sent; /* frames */
    uint64_t num_received;
} epx__link_t;

/* SHA-256 of a block; made once where many links send the same. */
typedef struct epx__digest {
    unsigned char bytes[32];
} epx__digest_t;

epx__digest_t epx__digest(const void *block, size_t bytes);

/* Adds a frame's header to the outbox, then, in place, its block of
 * frame->bytes bytes. */
void epx__link_add(epx__link_t *link, const epx__frame_t *frame,
                   const void *block, const epx__digest_t *digest);

/* Adds the report of rank `rank`, which is this end, on `ranks` to an outbox,
 * unless something is still in it, and sends what the socket takes at once: a
 * report is news, not a promise. */
void epx__link_report(epx__link_t *link, int32_t rank, epx__frame_kind_t kind,
                      uint64_t sequence, const epx__rank_set_t *ranks);

/* Whether a frame that has come whole is the next that the other end sent; if
 * not, nothing is left of its body. */
bool epx__link_verify(epx__link_t *link,
                      const unsigned char head[EPX__FRAME_BYTES], void *body,
                      size_t bytes);

#endif
