/* SPDX-License-Identifier: MIT */
#include "core/lost.h"

#include "core/atomic.h"

#include <ctype.h>
#include <stdio.h>

epx__vitals_t *
epx__lost_vitals(const epx_group_t *group, int32_t rank)
{
    char *control = epx__group_control(group, rank);

    return control != NULL ? epx__map_vitals(control) : NULL;
}

/* Before all have joined, the segments are not all there. */
static bool
is_joined(const epx_group_t *group)
{
    return epx__load_u32(&group->is_joined) != 0;
}

/* The epoch of an alarm, and 1 + the rank that raised it. */
#define EPOCH_SHIFT 16
#define RANK_MASK   0xffffu

/* An alarm of an earlier epoch, from a rank that has been masked since and goes
 * on where it was stopped, must not hide a later one. */
static void
raise_alarm(epx__vitals_t *vitals, uint32_t epoch, int32_t rank)
{
    uint32_t alarm = epoch << EPOCH_SHIFT | ((uint32_t)rank + 1);
    uint32_t old = epx__load_u32(&vitals->alarm);

    /* Releases the verdict; acquired in epx__lost_hear(). */
    while (old >> EPOCH_SHIFT <= epoch &&
           !epx__swap_u32(&vitals->alarm, &old, alarm)) {
    }
}

void
epx__lost_tell(epx_group_t *group, uint32_t epoch, const epx__error_t *error)
{
    epx__vitals_t *own = epx__lost_vitals(group, group->rank);

    if (!is_joined(group)) {
        return;
    }
    if (own != NULL) {
        own->status = (int32_t)error->status;
        (void)snprintf(own->text, sizeof(own->text), "%.*s",
                       (int)sizeof(own->text) - 1, error->text);
    }
    for (int32_t rank = 0; rank < group->num_ranks; rank++) {
        epx__vitals_t *vitals = epx__lost_vitals(group, rank);

        if (vitals != NULL && rank != group->rank) {
            raise_alarm(vitals, epoch, group->rank);
            epx__ring(&group->map, epx__group_control(group, rank));
        }
    }
}

void
epx__lost_abort(epx_group_t *group)
{
    epx__vitals_t *own = epx__lost_vitals(group, group->rank);

    if (is_joined(group) && own != NULL) {
        epx__store_u32(&own->has_aborted, 1);
    }
}

bool
epx__lost_has_aborted(const epx_group_t *group, int32_t rank)
{
    const epx__vitals_t *vitals = epx__lost_vitals(group, rank);

    return vitals != NULL && epx__load_u32(&vitals->has_aborted) != 0;
}

/* Whether a peer may say so: a failure of a peer or of the group. */
static bool
is_verdict(int32_t status)
{
    switch ((epx_status_t)status) {
    case EPX_ERR_TIMEOUT:
    case EPX_ERR_PEER_LOST:
    case EPX_ERR_PEER_DATA:
    case EPX_ERR_ABORTED:
    case EPX_ERR_MISMATCH:
        return true;
    default:
        return false;
    }
}

epx__error_t
epx__lost_verdict(int32_t status, const char *text, size_t bytes)
{
    epx__error_t error = { .status = is_verdict(status) ? (epx_status_t)status
                                                        : EPX_ERR_PEER_DATA };

    if (bytes == 0 || text[0] == '\0') {
        (void)snprintf(error.text, sizeof(error.text),
                       "a peer says that the group has failed, but not why");
    }

    for (size_t i = 0;
         i < bytes && i + 1 < sizeof(error.text) && text[i] != '\0'; i++) {
        error.text[i] = '?';
        if (isprint((unsigned char)text[i]) != 0) {
            error.text[i] = text[i];
        }
    }
    return error;
}

/* A copy of the rank's verdict. */
static epx__error_t
read_verdict(const epx_group_t *group, int32_t rank)
{
    epx__vitals_t vitals;

    epx__copy_in(&vitals, epx__lost_vitals(group, rank), sizeof(vitals));
    return epx__lost_verdict(vitals.status, vitals.text, sizeof(vitals.text));
}

bool
epx__lost_hear(epx_group_t *group)
{
    const epx__vitals_t *own = epx__lost_vitals(group, group->rank);
    epx__error_t error;
    uint32_t epoch, alarm;

    if (!is_joined(group) || own == NULL) {
        return false;
    }
    epoch = epx__load_u32(&group->epoch);
    alarm = epx__load_u32(&own->alarm);
    if (alarm == 0 || alarm >> EPOCH_SHIFT < epoch) {
        return false;
    }
    alarm &= RANK_MASK;
    if (alarm != 0 && alarm <= (uint32_t)group->num_ranks &&
        epx__lost_vitals(group, (int32_t)(alarm - 1)) != NULL) {
        error = read_verdict(group, (int32_t)(alarm - 1));
    } else {
        error.status = EPX_ERR_PEER_DATA;
        (void)snprintf(error.text, sizeof(error.text),
                       "some peer told rank %d of a failure at rank %d, which "
                       "is none of its peers",
                       group->rank, (int32_t)alarm - 1);
    }
    epx__group_adopt_epoch(group, epoch, &error);
    return epx__load_u32(&group->epoch) == epoch;
}

void
epx__lost_leave(epx_group_t *group)
{
    epx__vitals_t *own = epx__lost_vitals(group, group->rank);

    if (!is_joined(group) || own == NULL) {
        return;
    }
    epx__store_u32(&own->has_left, 1);
    for (int32_t rank = 0; rank < group->num_ranks; rank++) {
        if (rank != group->rank && epx__lost_vitals(group, rank) != NULL) {
            epx__ring(&group->map, epx__group_control(group, rank));
        }
    }
}

bool
epx__lost_has_left(const epx_group_t *group, int32_t rank)
{
    const epx__vitals_t *vitals = epx__lost_vitals(group, rank);

    if (vitals != NULL) {
        return epx__load_u32(&vitals->has_left) != 0;
    }
    return epx__load_u32(&group->has_remote) != 0 &&
           group->peers[rank].base == NULL &&
           group->remote.has_left(group->remote.context, rank);
}
