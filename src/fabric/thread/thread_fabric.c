/* SPDX-License-Identifier: MIT */
/*
 * Ranks that are threads of one process: a segment is private memory, and peers
 * use it at its own address.  The last rank to let go of a segment unmaps it.
 */
#include "fabric/fabric.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

typedef struct segment {
    struct segment *next;
    uint64_t job_id[2];
    int32_t rank;
    char *base;
    uint64_t bytes;
    int references;
} segment_t;

/* The segments whose owners are still there, so that peers can find them. */
static segment_t *segments;
static pthread_mutex_t segments_lock = PTHREAD_MUTEX_INITIALIZER;

static void
publish(segment_t *segment)
{
    (void)pthread_mutex_lock(&segments_lock);
    segment->next = segments;
    segments = segment;
    (void)pthread_mutex_unlock(&segments_lock);
}

static void
withdraw(const segment_t *segment)
{
    segment_t **link = &segments;

    (void)pthread_mutex_lock(&segments_lock);
    while (*link != segment) {
        link = &(*link)->next;
    }
    *link = segment->next;
    (void)pthread_mutex_unlock(&segments_lock);
}

/* A reference to a rank's segment; NULL once its owner has let go of it. */
static segment_t *
find(const epx_group_t *group, int32_t rank)
{
    segment_t *segment;

    (void)pthread_mutex_lock(&segments_lock);
    segment = segments;
    while (segment != NULL &&
           (segment->rank != rank || memcmp(segment->job_id, group->job_id,
                                            sizeof(group->job_id)) != 0)) {
        segment = segment->next;
    }
    if (segment != NULL) {
        (void)__atomic_add_fetch(&segment->references, 1, __ATOMIC_RELAXED);
    }
    (void)pthread_mutex_unlock(&segments_lock);
    return segment;
}

static const char *
thread_obstacle(const epx__fabric_place_t *a, const epx__fabric_place_t *b)
{
    return memcmp(a, b, sizeof(*a)) == 0 ? NULL
                                         : "they are in different processes";
}

static void
segment_release(segment_t *segment)
{
    if (__atomic_sub_fetch(&segment->references, 1, __ATOMIC_ACQ_REL) == 0) {
        (void)munmap(segment->base, segment->bytes);
        free(segment);
    }
}

static epx_status_t
thread_open(epx_group_t *group, uint64_t bytes, epx__fabric_card_t *card)
{
    /* One slot per rank: the segments that this rank holds on to. */
    segment_t **held = calloc((size_t)group->num_ranks, sizeof(*held));
    segment_t *own = calloc(1, sizeof(*own));
    void *base = MAP_FAILED;

    if (held == NULL || own == NULL) {
        (void)epx__fail(EPX_ERR_NO_MEMORY, "no memory for a segment");
        goto fail;
    }
    base = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) {
        (void)epx__fail(EPX_ERR_NO_MEMORY,
                        "cannot map a heap of %" PRIu64 " bytes: %m", bytes);
        goto fail;
    }
    /* Fewer page faults and TLB misses; only a hint. */
    (void)madvise(base, bytes, MADV_HUGEPAGE);
    *own = (segment_t){ NULL,        { group->job_id[0], group->job_id[1] },
                        group->rank, base,
                        bytes,       1 };
    publish(own);
    held[group->rank] = own;
    group->fabric_state = held;
    group->peers[group->rank] = (epx__peer_t){ base, bytes };
    card->segment_bytes = bytes;
    return EPX_OK;

fail:
    free(own);
    free(held);
    return EPX_ERR_NO_MEMORY;
}

static epx_status_t
thread_connect(epx_group_t *group, const epx__fabric_card_t *cards,
               int64_t deadline_ns)
{
    segment_t **held = group->fabric_state;

    (void)deadline_ns;
    for (int32_t rank = 0; rank < group->num_ranks; rank++) {
        segment_t *segment;

        if (rank == group->rank) {
            continue;
        }
        segment = find(group, rank);
        if (segment == NULL || segment->bytes != cards[rank].segment_bytes) {
            if (segment != NULL) {
                segment_release(segment);
            }
            return epx__fail(EPX_ERR_PEER_LOST,
                             "rank %d has left while rank %d was joining it",
                             rank, group->rank);
        }
        held[rank] = segment;
        group->peers[rank] = (epx__peer_t){ segment->base, segment->bytes };
    }
    return EPX_OK;
}

static void
thread_close(epx_group_t *group)
{
    segment_t **held = group->fabric_state;

    if (held == NULL) {
        return;
    }
    withdraw(held[group->rank]);
    for (int32_t rank = 0; rank < group->num_ranks; rank++) {
        if (held[rank] != NULL) {
            segment_release(held[rank]);
        }
    }
    free(held);
    group->fabric_state = NULL;
}

const epx__fabric_ops_t epx__fabric_thread = {
    .name = "thread",
    .obstacle = thread_obstacle,
    .open = thread_open,
    .connect = thread_connect,
    .close = thread_close,
};
