/* SPDX-License-Identifier: MIT */
#include "core/mask_far.h"

#include "core/atomic.h"
#include "core/mask.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

/* What a rank of another node has said. */
typedef struct voice {
    epx__pledge_t heard;  /* under state_lock */
    epx__pledge_t told;   /* what the net was given for it; under op_lock */
    uint32_t has_aborted; /* atomic */
} voice_t;

struct epx__far {
    voice_t *voices; /* [R] */
    /* A failure of an epoch that others have begun already; under state_lock.
     */
    uint32_t early_epoch;
    epx__error_t early;
};

epx_status_t
epx__far_open(epx_group_t *group)
{
    epx__far_t *far = calloc(1, sizeof(*far));

    group->far = far;
    if (far != NULL) {
        far->voices = calloc((size_t)group->num_ranks, sizeof(*far->voices));
    }
    return far != NULL && far->voices != NULL
               ? EPX_OK
               : epx__fail(EPX_ERR_NO_MEMORY, "no memory for %d ranks",
                           group->num_ranks);
}

void
epx__far_close(epx_group_t *group)
{
    if (group->far != NULL) {
        free(group->far->voices);
        free(group->far);
        group->far = NULL;
    }
}

/* ---- from the net ---- */

/* Wake this rank where it agrees on who is masked. */
static void
ring_own(const epx_group_t *group)
{
    epx__ring(&group->map, epx__group_control(group, group->rank));
}

/* Whether it can be: of ranks that there are, and never of the one that tells.
 */
static bool
is_possible(const epx_group_t *group, int32_t rank, const epx__pledge_t *pledge)
{
    for (int32_t r = group->num_ranks; r < EPX_MAX_RANKS; r++) {
        if (epx__has_rank(pledge->masked, r)) {
            return false;
        }
    }
    return !epx__has_rank(pledge->masked, rank) &&
           pledge->stage >= EPX__STAGE_KNOWS &&
           pledge->stage <= EPX__STAGE_READY;
}

bool
epx__far_hear(epx_group_t *group, int32_t rank, const epx__pledge_t *pledge)
{
    epx__pledge_t copy = *pledge;

    if (!is_possible(group, rank, &copy)) {
        return false;
    }
    if (group->far == NULL || epx__mask_holds(group, rank)) {
        return true; /* who is masked masks nobody */
    }
    (void)pthread_mutex_lock(&group->state_lock);
    group->far->voices[rank].heard = copy;
    (void)pthread_mutex_unlock(&group->state_lock);
    for (int32_t r = 0; r < group->num_ranks; r++) {
        if (r != group->rank && epx__has_rank(copy.masked, r)) {
            epx__mask_add(group, r);
        }
    }
    /* Itself last: then it adds nobody any more. */
    if (epx__has_rank(copy.masked, group->rank)) {
        epx__mask_add(group, group->rank);
    }
    (void)epx__group_is_broken(group); /* it is, once the roll has grown */
    ring_own(group);
    return true;
}

void
epx__far_fail(epx_group_t *group, int32_t rank, uint32_t epoch,
              const epx__error_t *error, bool has_aborted)
{
    bool is_early = false;

    if (epx__is_masked(group, rank)) {
        return;
    }
    if (group->far != NULL) {
        if (has_aborted) {
            epx__store_u32(&group->far->voices[rank].has_aborted, 1);
            ring_own(group);
        }
        (void)pthread_mutex_lock(&group->state_lock);
        is_early = epoch > epx__load_u32(&group->epoch);
        if (is_early) {
            group->far->early_epoch = epoch;
            group->far->early = *error;
        }
        (void)pthread_mutex_unlock(&group->state_lock);
    }
    if (!is_early) {
        epx__group_adopt_epoch(group, epoch, error);
    }
}

/* ---- for the agreement ---- */

bool
epx__far_has_come(epx_group_t *group, int32_t rank, const uint64_t *masked,
                  epx__stage_t stage, uint64_t *last_step_p)
{
    epx__pledge_t heard;

    (void)pthread_mutex_lock(&group->state_lock);
    heard = group->far->voices[rank].heard;
    (void)pthread_mutex_unlock(&group->state_lock);
    *last_step_p = heard.last_step;
    return heard.stage >= (uint32_t)stage &&
           memcmp(heard.masked, masked, sizeof(heard.masked)) == 0;
}

bool
epx__far_has_aborted(const epx_group_t *group, int32_t rank)
{
    return group->far != NULL &&
           epx__load_u32(&group->far->voices[rank].has_aborted) != 0;
}

bool
epx__far_tell(epx_group_t *group, const epx__pledge_t *pledge)
{
    bool all = true;

    for (int32_t rank = 0; rank < group->num_ranks; rank++) {
        epx__pledge_t *told = &group->far->voices[rank].told;

        if (epx__is_near(&group->nodes, rank) ||
            memcmp(told, pledge, sizeof(*told)) == 0) {
            continue;
        }
        if (group->remote.pledge(group->remote.context, rank, pledge)) {
            *told = *pledge;
        } else {
            /* Nobody waits for who is masked. */
            all = all && epx__has_rank(pledge->masked, rank);
        }
    }
    return all;
}

void
epx__far_adopt(epx_group_t *group, uint32_t epoch)
{
    epx__error_t early;
    bool is_early;

    (void)pthread_mutex_lock(&group->state_lock);
    is_early = group->far->early_epoch == epoch;
    early = group->far->early;
    (void)pthread_mutex_unlock(&group->state_lock);
    if (is_early) {
        epx__group_adopt_epoch(group, epoch, &early);
    }
}
