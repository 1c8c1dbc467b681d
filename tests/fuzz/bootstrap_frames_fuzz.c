/* SPDX-License-Identifier: MIT */
/*
 * Allgathers over a connection whose other end sends anything, then no more:
 * they end with the blocks in their places or with an error, and no byte
 * outside them is written.
 *
 * Input: which end this is, and whether the other end holds the key (1 byte),
 * how many bytes are gathered (1 byte), what the other end sends.  If it holds
 * the key, each frame gets its right MAC on the way; if not, nothing that it
 * says may pass.
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

static const unsigned char key[EPX__KEY_BYTES] = { 42, 1, 2, 3 };

/* Copies what is said, frame by frame as far as there are frames, and gives
 * each the MAC that belongs there. */
static void
seal(unsigned char *to, const uint8_t *data, size_t size)
{
    epx__link_t link = { .fd = -1 };
    size_t at = 0;
    epx__frame_t frame;

    memcpy(link.key, key, sizeof(key));
    memcpy(to, data, size);
    while (size - at >= EPX__FRAME_BYTES &&
           epx__frame_decode(data + at, &frame) &&
           frame.bytes <= size - at - EPX__FRAME_BYTES) {
        const uint8_t *body = data + at + EPX__FRAME_BYTES;
        const epx__digest_t digest = epx__digest(body, (size_t)frame.bytes);

        link.out = (epx__outbox_t){ 0 };
        epx__link_add(&link, &frame, body, &digest);
        memcpy(to + at, link.out.small, EPX__FRAME_BYTES);
        at += EPX__FRAME_BYTES + (size_t)frame.bytes;
    }
}

/* The other end says all it has to say, and listens on. */
static void
connect_to_sender(int ends[2], const unsigned char *data, size_t size)
{
    require(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0,
                       ends) == 0);
    require(send(ends[1], data, size, MSG_NOSIGNAL) == (ssize_t)size);
    require(shutdown(ends[1], SHUT_WR) == 0);
}

static void
gather(epx__star_t *star, int32_t rank, bool sealed, size_t bytes,
       int64_t deadline_ns)
{
    unsigned char send[256];
    unsigned char recv[2 * 256 + 64];
    epx_status_t status;

    memset(send, 0x3c, sizeof(send));
    memset(recv, CANARY, sizeof(recv));
    status = epx__star_allgather(star, send, recv, bytes, deadline_ns);
    require(status == EPX_OK || status == EPX_ERR_TIMEOUT ||
            status == EPX_ERR_PEER_LOST || status == EPX_ERR_PEER_DATA ||
            status == EPX_ERR_MISMATCH || status == EPX_ERR_BROKEN ||
            status == EPX_ERR_AUTH);
    require(sealed || status != EPX_OK);
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
    unsigned char said[MAX_SENT];
    int64_t deadline_ns = epx__now_ns() + 10 * EPX__NS_PER_SEC;
    epx__star_t *star;
    int32_t rank;
    size_t bytes;
    bool sealed;
    int ends[2];

    if (size < 3 || size > MAX_SENT) {
        return 0;
    }
    rank = data[0] % 2;
    bytes = data[1];
    sealed = (data[0] & 2) != 0;
    if (sealed) {
        seal(said, data + 2, size - 2);
    } else {
        memcpy(said, data + 2, size - 2);
    }
    connect_to_sender(ends, said, size - 2);
    links[1 - rank].fd = ends[0];
    memcpy(links[1 - rank].key, key, sizeof(key));
    require(epx__star_create(rank, 2, links, &star) == EPX_OK);
    (void)epx__star_start(star, deadline_ns);
    gather(star, rank, sealed, bytes, deadline_ns);
    gather(star, rank, sealed, bytes, deadline_ns);
    epx__star_destroy(star);
    (void)close(ends[1]);
    return 0;
}
