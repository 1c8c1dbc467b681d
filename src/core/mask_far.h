/* SPDX-License-Identifier: MIT */
/*
 * What ranks of other nodes say when ranks are masked (core/mask.h).  The net
 * brings it, from its own thread and at any time; the agreement reads it.
 */
#ifndef EPX_CORE_MASK_FAR_H
#define EPX_CORE_MASK_FAR_H

#include "core/group.h"

typedef struct epx__far epx__far_t;

/* Set group->far. */
epx_status_t epx__far_open(epx_group_t *group);
void epx__far_close(epx_group_t *group);

/* ---- from the net ---- */

/* A rank's pledge: the ranks that it masks go on this node's roll, too.  False:
 * there can be no such pledge. */
bool epx__far_hear(epx_group_t *group, int32_t rank,
                   const epx__pledge_t *pledge);
/* A rank's group has failed in that epoch. */
void epx__far_fail(epx_group_t *group, int32_t rank, uint32_t epoch,
                   const epx__error_t *error, bool has_aborted);

/* ---- for the agreement: with op_lock held ---- */

/* Whether a rank has pledged itself to just these masks, and come to the stage;
 * *last_step_p is then what it says. */
bool epx__far_has_come(epx_group_t *group, int32_t rank, const uint64_t *masked,
                       epx__stage_t stage, uint64_t *last_step_p);
bool epx__far_has_aborted(const epx_group_t *group, int32_t rank);
/* Give the pledge to the net for all ranks of other nodes; false: some have not
 * taken in the last one, and it is to be called again. */
bool epx__far_tell(epx_group_t *group, const epx__pledge_t *pledge);
/* This epoch has begun: take over a failure that it has had already. */
void epx__far_adopt(epx_group_t *group, uint32_t epoch);

#endif
