/* SPDX-License-Identifier: MIT */
#include "bootstrap/bootstrap.h"
#include "bootstrap/star_internal.h"

#include <inttypes.h>
#include <sodium.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

epx_status_t
epx__star_create(int32_t rank, int32_t num_ranks, const epx__link_t *links,
                 epx__star_t **star_p)
{
    int32_t num_peers = rank == 0 ? num_ranks : 1;
    epx__star_t *star =
        calloc(1, sizeof(*star) + (size_t)num_peers * sizeof(epx__star_peer_t));
    struct pollfd *polls = calloc((size_t)num_peers, sizeof(*polls));

    if (star == NULL || polls == NULL) {
        free(star);
        free(polls);
        return epx__fail(EPX_ERR_NO_MEMORY,
                         "no memory for the connections of %d ranks",
                         num_ranks);
    }
    star->rank = rank;
    star->num_ranks = num_ranks;
    star->num_peers = num_peers;
    star->polls = polls;
    for (int32_t i = 0; i < num_peers; i++) {
        star->peers[i].link = links[i];
    }
    if (rank == 0) {
        star->peers[0].link = (epx__link_t){ .fd = -1 };
    }
    *star_p = star;
    return EPX_OK;
}

void
epx__star_destroy(void *context)
{
    epx__star_t *star = context;

    for (int32_t i = 0; i < star->num_peers; i++) {
        if (star->peers[i].link.fd >= 0) {
            (void)close(star->peers[i].link.fd);
        }
        sodium_memzero(star->peers[i].link.key, EPX__KEY_BYTES);
    }
    free(star->polls);
    free(star);
}

void
epx__star_add_data(const epx__star_t *star, epx__link_t *link,
                   const void *block, size_t bytes, const epx__digest_t *digest)
{
    const epx__frame_t frame = {
        .kind = EPX__FRAME_DATA,
        .rank = star->rank,
        .sequence = star->sequence,
        .bytes = bytes,
    };

    epx__link_add(link, &frame, block, digest);
}

epx_status_t
epx__star_fail_auth(const epx__star_t *star, int32_t rank)
{
    return epx__fail(EPX_ERR_AUTH,
                     "what came as rank %d's part of allgather %" PRIu64
                     " is not what that rank sent; its MAC is wrong",
                     rank, star->sequence);
}

epx_status_t
epx__star_fail(const epx__star_t *star, epx__frame_kind_t kind,
               const epx__rank_set_t *ranks)
{
    epx__rank_list_t list = epx__rank_set_list(ranks, star->num_ranks);

    if (kind == EPX__FRAME_LATE && star->sequence == 0) {
        return epx__fail(EPX_ERR_TIMEOUT, "%s of %d did not join in time",
                         list.text, star->num_ranks);
    }
    if (kind == EPX__FRAME_LATE) {
        return epx__fail(EPX_ERR_TIMEOUT,
                         "%s of %d kept allgather %" PRIu64
                         " waiting past its deadline",
                         list.text, star->num_ranks, star->sequence);
    }
    if (kind == EPX__FRAME_LOST && star->sequence == 0) {
        return epx__fail(EPX_ERR_PEER_LOST,
                         "%s went away before all %d ranks had joined",
                         list.text, star->num_ranks);
    }
    if (kind == EPX__FRAME_LOST) {
        return epx__fail(EPX_ERR_PEER_LOST,
                         "%s went away before allgather %" PRIu64
                         " was complete",
                         list.text, star->sequence);
    }
    return epx__fail(EPX_ERR_MISMATCH,
                     "%s passed another number of bytes to allgather %" PRIu64
                     " than rank 0",
                     list.text, star->sequence);
}

static epx_status_t
run(epx__star_t *star, epx__gather_t *gather)
{
    epx_status_t status = star->rank == 0 ? epx__star_gather_root(star, gather)
                                          : epx__star_gather_leaf(star, gather);

    if (status != EPX_OK) {
        epx__error_save(&star->broken, status);
        for (int32_t i = 0; i < star->num_peers; i++) {
            /* What was sent arrives, then the other end sees ours. */
            (void)shutdown(star->peers[i].link.fd, SHUT_WR);
        }
    }
    star->sequence++;
    return status;
}

epx_status_t
epx__star_start(epx__star_t *star, int64_t deadline_ns)
{
    epx__gather_t gather = { .deadline_ns = deadline_ns };

    return run(star, &gather);
}

epx_status_t
epx__star_allgather(void *context, const void *send, void *recv, size_t bytes,
                    int64_t deadline_ns)
{
    epx__star_t *star = context;
    epx__gather_t gather = {
        .send = send,
        .recv = recv,
        .bytes = bytes,
        .total_bytes = bytes * (size_t)star->num_ranks,
        .deadline_ns = deadline_ns,
    };
    epx_status_t status =
        epx__allgather_check(send, recv, bytes, star->num_ranks);

    if (status != EPX_OK) {
        return status;
    }
    if (star->broken.status != EPX_OK) {
        return epx__fail(EPX_ERR_BROKEN, "the bootstrap has failed earlier: %s",
                         star->broken.text);
    }
    return run(star, &gather);
}
