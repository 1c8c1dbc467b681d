/* SPDX-License-Identifier: MIT */
#include "fabric/segment_registry.h"

#include <stdlib.h>
#include <string.h>

/* Those whose owners are still there. */
static epx__segment_t *segments;
static pthread_mutex_t segments_lock = PTHREAD_MUTEX_INITIALIZER;

static void
publish(epx__segment_t *segment)
{
    (void)pthread_mutex_lock(&segments_lock);
    segment->next = segments;
    segments = segment;
    (void)pthread_mutex_unlock(&segments_lock);
}

static void
withdraw(const epx__segment_t *segment)
{
    epx__segment_t **link = &segments;

    (void)pthread_mutex_lock(&segments_lock);
    while (*link != segment) {
        link = &(*link)->next;
    }
    *link = segment->next;
    (void)pthread_mutex_unlock(&segments_lock);
}

/* A reference to a rank's segment; NULL once its owner has let go of it. */
static epx__segment_t *
find(const epx_group_t *group, const epx__reach_t *reach, int32_t rank)
{
    epx__segment_t *segment;

    (void)pthread_mutex_lock(&segments_lock);
    segment = segments;
    while (
        segment != NULL &&
        (segment->rank != rank || segment->purpose != reach->purpose ||
         memcmp(segment->job_id, group->job_id, sizeof(group->job_id)) != 0)) {
        segment = segment->next;
    }
    if (segment != NULL) {
        (void)__atomic_add_fetch(&segment->references, 1, __ATOMIC_RELAXED);
    }
    (void)pthread_mutex_unlock(&segments_lock);
    return segment;
}

static void
let_go(epx__segment_t *segment)
{
    if (__atomic_sub_fetch(&segment->references, 1, __ATOMIC_ACQ_REL) == 0) {
        segment->release(segment);
        free(segment);
    }
}

epx_status_t
epx__segments_open(const epx_group_t *group, epx__reach_t *reach,
                   const epx__segment_t *own)
{
    epx__segment_holds_t *holds =
        calloc((size_t)group->num_ranks, sizeof(epx__segment_holds_t));
    epx__segment_t *segment = malloc(sizeof(*segment));

    if (holds == NULL || segment == NULL) {
        free(segment);
        free(holds);
        return epx__fail(EPX_ERR_NO_MEMORY, "no memory for a segment");
    }
    *segment = *own;
    memcpy(segment->job_id, group->job_id, sizeof(segment->job_id));
    segment->rank = group->rank;
    segment->purpose = reach->purpose;
    segment->references = 1;
    publish(segment);
    holds[group->rank] = segment;
    reach->peers[group->rank] = (epx__peer_t){ own->base, own->bytes };
    reach->state = holds;
    return EPX_OK;
}

epx_status_t
epx__segments_connect(const epx_group_t *group, epx__reach_t *reach,
                      const epx__fabric_card_t *cards)
{
    epx__segment_holds_t *holds = reach->state;

    for (int32_t rank = 0; rank < group->num_ranks; rank++) {
        epx__segment_t *segment;

        if (rank == group->rank || !epx__is_near(&group->nodes, rank)) {
            continue;
        }
        segment = find(group, reach, rank);
        if (segment == NULL || segment->bytes != cards[rank].segment_bytes) {
            if (segment != NULL) {
                let_go(segment);
            }
            return epx__fail(EPX_ERR_PEER_LOST,
                             "rank %d has left while rank %d was joining it",
                             rank, group->rank);
        }
        holds[rank] = segment;
        reach->peers[rank] = (epx__peer_t){ segment->base, segment->bytes };
    }
    return EPX_OK;
}

void
epx__segments_close(const epx_group_t *group, epx__reach_t *reach)
{
    epx__segment_holds_t *holds = reach->state;

    if (holds == NULL) {
        return;
    }
    withdraw(holds[group->rank]);
    for (int32_t rank = 0; rank < group->num_ranks; rank++) {
        if (holds[rank] != NULL) {
            let_go(holds[rank]);
        }
    }
    free(holds);
    reach->state = NULL;
}
