/* SPDX-License-Identifier: MIT */
/*
 * Allgathers over a connection whose other end sends anything, then no more:
 * they end with the blocks in their places or with an error, and no byte
 * outside them is written.
 *
 * Input: which end this is (1 byte), how many bytes are gathered (1 byte), what
 * the other end sends.
 */
#include "bootstrap/star.h"
#include "core/clock.h"

#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define MAX_SENT 8192
#define CANARY   0xa5

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void
require(bool condition)
{
    if (!condition) {
        abort();
    }
}

/* The other end says all it has to say, and listens on. */
static void
connect_to_sender(int ends[2], const uint8_t *data, size_t size)
{
    require(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0,
                       ends) == 0);
    require(send(ends[1], data, size, MSG_NOSIGNAL) == (ssize_t)size);
    require(shutdown(ends[1], SHUT_WR) == 0);
}

static void
gather(epx__star_t *star, int32_t rank, size_t bytes, int64_t deadline_ns)
{
    unsigned char send[256];
    unsigned char recv[2 * 256 + 64];
    epx_status_t status;

    memset(send, 0x3c, sizeof(send));
    memset(recv, CANARY, sizeof(recv));
    status = epx__star_allgather(star, send, recv, bytes, deadline_ns);
    require(status == EPX_OK || status == EPX_ERR_TIMEOUT ||
            status == EPX_ERR_PEER_LOST || status == EPX_ERR_PEER_DATA ||
            status == EPX_ERR_MISMATCH || status == EPX_ERR_BROKEN);
    require(status == EPX_OK || epx_last_error()[0] != '\0');
    for (size_t i = 0; status == EPX_OK && rank == 0 && i < bytes; i++) {
        require(recv[i] == send[i]);
    }
    for (size_t i = 2 * bytes; i < sizeof(recv); i++) {
        require(recv[i] == CANARY);
    }
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    epx__link_t links[2] = { { .fd = -1 }, { .fd = -1 } };
    int64_t deadline_ns = epx__now_ns() + 10 * EPX__NS_PER_SEC;
    epx__star_t *star;
    int32_t rank;
    size_t bytes;
    int ends[2];

    if (size < 3 || size > MAX_SENT) {
        return 0;
    }
    rank = data[0] % 2;
    bytes = data[1];
    connect_to_sender(ends, data + 2, size - 2);
    links[1 - rank].fd = ends[0];
    require(epx__star_create(rank, 2, links, &star) == EPX_OK);
    (void)epx__star_start(star, deadline_ns);
    gather(star, rank, bytes, deadline_ns);
    gather(star, rank, bytes, deadline_ns);
    epx__star_destroy(star);
    (void)close(ends[1]);
    return 0;
}
