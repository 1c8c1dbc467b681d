/* SPDX-License-Identifier: MIT */
/*
 * Who waits on the host hears of a failure by itself (core/group.h).  Where the
 * waits are those of a device, a thread of the host listens in their place: it
 * sleeps until a peer rings, and takes over what that has told, which ends the
 * kernels that wait.
 */
#ifndef EPX_CORE_LISTENER_H
#define EPX_CORE_LISTENER_H

#include "core/group.h"

/* All segments are there.  On failure, too, epx__listener_close must follow. */
epx_status_t epx__listener_open(epx_group_t *group);

/* group->listener may be NULL. */
void epx__listener_close(epx_group_t *group);

#endif
