/* SPDX-License-Identifier: MIT */
/* Non-blocking reads and writes that remember how far they have come. */
#ifndef EPX_BOOTSTRAP_IO_H
#define EPX_BOOTSTRAP_IO_H

#include <poll.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum epx__io {
    EPX__IO_DONE,
    EPX__IO_AGAIN,  /* the socket has no more for now */
    EPX__IO_CLOSED, /* by the peer; errno tells how, 0 is an orderly end */
} epx__io_t;

/* Reads until `want` bytes lie at `to`, of which *have_p are there already. */
epx__io_t epx__io_read(int fd, void *to, size_t want, size_t *have_p);

#define EPX__OUTBOX_BYTES 256

/* What is to be sent: small messages, kept here, then at most one block of the
 * caller's. */
typedef struct epx__outbox {
    unsigned char small[EPX__OUTBOX_BYTES];
    size_t small_bytes;
    const void *block;
    size_t block_bytes;
    size_t sent; /* of small and block together */
} epx__outbox_t;

static inline bool
epx__outbox_empty(const epx__outbox_t *box)
{
    return box->sent == box->small_bytes + box->block_bytes;
}

/* Room for a message of `bytes` behind what is there.  The caller knows that it
 * fits, and that no block has been given. */
unsigned char *epx__outbox_add(epx__outbox_t *box, size_t bytes);

/* Sends what the socket takes; DONE when the box is empty. */
epx__io_t epx__outbox_flush(epx__outbox_t *box, int fd);

/* poll() until deadline_ns of CLOCK_MONOTONIC.  Returns the number of ready
 * descriptors, 0 also after a signal, -1 on failure. */
int epx__poll_until(struct pollfd *polls, size_t num_polls,
                    int64_t deadline_ns);

#endif
