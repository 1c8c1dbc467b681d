/* SPDX-License-Identifier: MIT */
#include "core/mask.h"

#include "core/lost.h"
#include "core/mask_far.h"
#include "core/watch.h"

/* Where the roll of this node is kept. */
static void *
keeper(const epx_group_t *group)
{
    return epx__group_control(
        group, epx__node_ranks(&group->nodes, group->nodes.own)[0]);
}

epx_status_t
epx__mask_open(epx_group_t *group)
{
    epx_status_t status = EPX_OK;

    if (keeper(group) == NULL) {
        return EPX_OK;
    }
    if (group->nodes.num_nodes > 1) {
        status = epx__far_open(group);
    }
    group->roll = status == EPX_OK ? epx__map_roll(keeper(group)) : NULL;
    return status;
}

void
epx__mask_close(epx_group_t *group)
{
    epx__far_close(group);
}

bool
epx__mask_holds(const epx_group_t *group, int32_t rank)
{
    for (int32_t i = 0; group->roll != NULL && i < group->num_ranks; i++) {
        uint16_t entry = epx__load_u16(&group->roll[i]);

        if (entry == 0 || entry == (uint32_t)rank + 1) {
            return entry != 0;
        }
    }
    return false;
}

epx_status_t
epx__mask_refuse(const epx_group_t *group)
{
    return epx__fail(EPX_ERR_MASKED,
                     "rank %d is masked: the other ranks go on without it",
                     group->rank);
}

void
epx__mask_ring(const epx_group_t *group)
{
    const int32_t *ranks = epx__node_ranks(&group->nodes, group->nodes.own);

    for (int32_t i = 0; i < epx__node_size(&group->nodes, group->nodes.own);
         i++) {
        epx__ring(&group->map, epx__group_control(group, ranks[i]));
    }
}

void
epx__mask_add(epx_group_t *group, int32_t rank)
{
    uint16_t *roll = epx__map_roll(keeper(group));

    for (int32_t i = 0; i < group->num_ranks; i++) {
        uint16_t entry = epx__load_u16(&roll[i]);

        if (entry == 0 && epx__claim_u16(&roll[i], (uint16_t)(rank + 1))) {
            epx__mask_ring(group);
            return;
        }
        /* Somebody else may have taken the place. */
        entry = epx__load_u16(&roll[i]);
        if (entry == (uint32_t)rank + 1 || entry == (uint32_t)group->rank + 1) {
            return;
        }
    }
}

epx_status_t
epx__mask_bad_entry(const epx_group_t *group, uint32_t at, int32_t entry)
{
    return epx__fail(EPX_ERR_PEER_DATA,
                     "entry %u of the roll of masked ranks is %d; it must be "
                     "another one of the %d ranks",
                     at, entry - 1, group->num_ranks);
}

bool
epx__mask_hear(epx_group_t *group)
{
    uint32_t epoch = epx__load_u32(&group->epoch);
    epx__error_t error;
    int32_t entry;

    if (epx__load_u32(&group->is_joined) == 0 || !epx__mask_has_grown(group)) {
        return false;
    }
    entry = epx__load_u16(&group->roll[epoch]);
    if (entry > group->num_ranks) {
        epx__error_save(&error, epx__mask_bad_entry(group, epoch, entry));
    } else if (epx__mask_holds(group, group->rank)) {
        epx__error_save(&error, epx__mask_refuse(group));
    } else {
        epx__error_save(
            &error,
            epx__fail(EPX_ERR_PEER_LOST,
                      "rank %d is masked by a peer: epx_group_mask goes on "
                      "without it",
                      entry - 1));
    }
    epx__group_adopt_epoch(group, epoch, &error);
    return epx__load_u32(&group->epoch) == epoch;
}

/* Whether nothing of the rank can come here any more. */
static bool
has_ended(const epx_group_t *group, int32_t rank)
{
    return epx__is_near(&group->nodes, rank)
               ? epx__watch_has_ended(group, rank)
               : group->remote.is_gone(group->remote.context, rank, 0);
}

void
epx__mask_reclaim(epx_group_t *group)
{
    /* Read first: all that it masks are seen below. */
    uint32_t epoch = epx__load_u32(&group->epoch);

    for (int32_t rank = 0; rank < group->num_ranks; rank++) {
        if (epx__is_masked(group, rank) && !epx__lost_has_left(group, rank) &&
            !has_ended(group, rank)) {
            return;
        }
    }
    epx__heap_reclaim(&group->heap, epoch);
}
