/* SPDX-License-Identifier: MIT */
/*
 * Ranks that are processes of one host.  A segment is a memfd, sealed so that
 * no peer can resize it; it has no name, so nothing is left behind and nobody
 * can open it.
 */
#include "fabric/fabric.h"
#include "fabric/fd_exchange.h"

#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define REQUIRED_SEALS (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)

static epx_status_t
map_segment(int fd, uint64_t bytes, epx__peer_t *peer)
{
    void *base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

    if (base == MAP_FAILED) {
        return epx__fail(EPX_ERR_NO_MEMORY,
                         "cannot map a heap of %" PRIu64 " bytes: %m", bytes);
    }
    (void)madvise(base, bytes, MADV_HUGEPAGE); /* only a hint */
    *peer = (epx__peer_t){ base, bytes };
    return EPX_OK;
}

static epx_status_t
create_segment(const epx_group_t *group, epx__reach_t *reach, uint64_t bytes,
               int *fd_p)
{
    int fd = memfd_create("epx-segment", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    epx__peer_t *own = &reach->peers[group->rank];
    epx_status_t status;

    if (fd < 0) {
        return epx__fail(EPX_ERR_SYSTEM, "memfd_create failed: %m");
    }
    *fd_p = fd;
    if (ftruncate(fd, (off_t)bytes) != 0) {
        return epx__fail(EPX_ERR_NO_MEMORY,
                         "cannot make a heap of %" PRIu64 " bytes: %m", bytes);
    }
    if (fcntl(fd, F_ADD_SEALS, REQUIRED_SEALS) != 0) {
        return epx__fail(EPX_ERR_SYSTEM, "cannot seal the heap: %m");
    }
    status = map_segment(fd, bytes, own);
    if (status == EPX_OK) {
        *(epx__segment_header_t *)own->base =
            epx__fabric_header(group, group->rank, bytes);
    }
    return status;
}

static void
shm_close(const epx_group_t *group, epx__reach_t *reach)
{
    epx__fd_exchange_t *exchange = reach->state;

    if (exchange == NULL) {
        return;
    }
    for (int32_t rank = 0; rank < group->num_ranks; rank++) {
        if (reach->peers[rank].base != NULL) {
            (void)munmap(reach->peers[rank].base, reach->peers[rank].bytes);
        }
    }
    epx__fd_exchange_close(exchange);
    free(exchange);
    reach->state = NULL;
}

static epx_status_t
shm_open_segment(const epx_group_t *group, epx__reach_t *reach, uint64_t bytes,
                 epx__fabric_card_t *card)
{
    epx__fd_exchange_t *exchange = malloc(sizeof(*exchange));
    epx_status_t status;

    if (exchange == NULL) {
        return epx__fail(EPX_ERR_NO_MEMORY, "no memory for a segment");
    }
    *exchange = (epx__fd_exchange_t)EPX__FD_EXCHANGE_NONE;
    reach->state = exchange;
    status = create_segment(group, reach, bytes, &exchange->fd);
    if (status == EPX_OK) {
        status = epx__fd_exchange_open(exchange, group, card);
    }
    card->segment_bytes = bytes;
    return status;
}

static epx_status_t
attach_segment(const epx_group_t *group, epx__reach_t *reach, int fd,
               int32_t rank, const epx__fabric_card_t *card)
{
    uint64_t bytes = card->segment_bytes;
    struct stat info;
    int seals = fcntl(fd, F_GET_SEALS);
    epx_status_t status;

    if (fstat(fd, &info) != 0 || (uint64_t)info.st_size != bytes || seals < 0 ||
        (seals & REQUIRED_SEALS) != REQUIRED_SEALS) {
        return epx__fail(EPX_ERR_PEER_DATA,
                         "the segment of rank %d has %" PRId64
                         " bytes and seals %#x; expected %" PRIu64
                         " bytes and seals %#x",
                         rank, (int64_t)info.st_size, (unsigned)seals, bytes,
                         REQUIRED_SEALS);
    }
    status = map_segment(fd, bytes, &reach->peers[rank]);
    if (status == EPX_OK) {
        /* A copy, since the peer can write to it. */
        epx__segment_header_t header =
            *(const epx__segment_header_t *)reach->peers[rank].base;

        status = epx__fabric_check_header(group, rank, bytes, &header);
    }
    return status;
}

static epx_status_t
shm_connect(epx_group_t *group, epx__reach_t *reach,
            const epx__fabric_card_t *cards, int64_t deadline_ns)
{
    return epx__fd_exchange_run(reach->state, group, reach, cards, deadline_ns,
                                attach_segment);
}

const epx__fabric_ops_t epx__fabric_shm = {
    .name = "shm",
    .obstacle = epx__fd_exchange_obstacle,
    .open = shm_open_segment,
    .connect = shm_connect,
    .close = shm_close,
};
