/* SPDX-License-Identifier: MIT */
/*
 * Whether the peers in other processes of this host still live.  A thread of
 * each such rank raises its own beat and looks at its peers': one that dies is
 * noticed by its pidfd, one that is stopped by its silence.  Either ends the
 * group.
 *
 * Silence is counted in this rank's own beats: when the whole machine stands
 * still nobody is thought lost.
 */
#ifndef EPX_CORE_WATCH_H
#define EPX_CORE_WATCH_H

#include "core/group.h"

/* A peer that is another process of this host. */
typedef struct epx__watch_peer {
    int32_t rank;
    int32_t pid; /* 0: not known here (another pid namespace) */
} epx__watch_peer_t;

/*
 * This rank's own segment is there, and beats from now on.  Peers whose
 * processes end are noticed; their beats and goodbyes as well once
 * group->is_joined is set.  A pid is that of the peer if the peer is heard of
 * once more after this; else it may have passed to a stranger.  On failure,
 * too, epx__watch_close must follow.
 */
epx_status_t epx__watch_open(epx_group_t *group, const epx__watch_peer_t *peers,
                             int32_t num_peers);

/* Whether a peer is lost, in an earlier epoch as well; and whether its process
 * has ended, so that it writes no more.  From any thread; group->watch may be
 * NULL. */
bool epx__watch_has_lost(const epx_group_t *group, int32_t rank);
bool epx__watch_has_ended(const epx_group_t *group, int32_t rank);

/* group->watch may be NULL. */
void epx__watch_close(epx_group_t *group);

#endif
