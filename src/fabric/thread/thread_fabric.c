/* SPDX-License-Identifier: MIT */
/*
 * Ranks that are threads of one process: a segment is private memory, and peers
 * use it at its own address.
 */
#include "fabric/fabric.h"
#include "fabric/segment_registry.h"

#include <inttypes.h>
#include <sys/mman.h>

static const char *
thread_obstacle(const epx__fabric_place_t *a, const epx__fabric_place_t *b)
{
    return epx__fabric_same_process(a, b) ? NULL : "are in different processes";
}

static void
thread_release(epx__segment_t *segment)
{
    (void)munmap(segment->base, segment->bytes);
}

static epx_status_t
thread_open(const epx_group_t *group, epx__reach_t *reach, uint64_t bytes,
            epx__fabric_card_t *card)
{
    epx__segment_t own = { .bytes = bytes, .release = thread_release };
    epx_status_t status;
    void *base = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (base == MAP_FAILED) {
        return epx__fail(EPX_ERR_NO_MEMORY,
                         "cannot map a heap of %" PRIu64 " bytes: %m", bytes);
    }
    /* Fewer page faults and TLB misses; only a hint. */
    (void)madvise(base, bytes, MADV_HUGEPAGE);
    own.base = base;
    *(epx__segment_header_t *)base =
        epx__fabric_header(group, group->rank, bytes);
    status = epx__segments_open(group, reach, &own);
    if (status != EPX_OK) {
        (void)munmap(base, bytes);
        return status;
    }
    card->segment_bytes = bytes;
    return EPX_OK;
}

static epx_status_t
thread_connect(epx_group_t *group, epx__reach_t *reach,
               const epx__fabric_card_t *cards, int64_t deadline_ns)
{
    (void)deadline_ns;
    return epx__segments_connect(group, reach, cards);
}

const epx__fabric_ops_t epx__fabric_thread = {
    .name = "thread",
    .obstacle = thread_obstacle,
    .open = thread_open,
    .connect = thread_connect,
    .close = epx__segments_close,
};
