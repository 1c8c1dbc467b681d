/* SPDX-License-Identifier: MIT */
/*
 * How the end of a group gets round.  Where ranks share memory, each rank has
 * vitals (core/control.h), in its segment or, where that is in the memory of a
 * card, in one of its own.  The rank whose group fails first leaves
 * its verdict in its own, raises the alarm in every peer's, and wakes whoever
 * sleeps there; they take over its error and tell it in turn, so that all ranks
 * end together and with one sentence.  A rank that destroys its group says that
 * it has left: whoever still waits for it need not go on.
 *
 * To ranks of other nodes the net takes the verdict.
 */
#ifndef EPX_CORE_LOST_H
#define EPX_CORE_LOST_H

#include "core/group.h"

/* The group has failed here, in this epoch and with this error: tell the peers
 * of this node. */
void epx__lost_tell(epx_group_t *group, uint32_t epoch,
                    const epx__error_t *error);

/* This rank has aborted the group: it begins no further epoch, nor do peers
 * that have not masked it. */
void epx__lost_abort(epx_group_t *group);
bool epx__lost_has_aborted(const epx_group_t *group, int32_t rank);

/* Take over the error of a peer whose group has failed, if one has told;
 * returns whether. */
bool epx__lost_hear(epx_group_t *group);

/* What a peer says of its failure: a verdict that there can be, and a sentence
 * whatever is there.  text is [bytes], and need not end. */
epx__error_t epx__lost_verdict(int32_t status, const char *text, size_t bytes);

/* This rank signals no more.  Before it lets go of anything. */
void epx__lost_leave(epx_group_t *group);

/* Whether a rank has left: an acquire of all that it has signalled. */
bool epx__lost_has_left(const epx_group_t *group, int32_t rank);

/* A rank's vitals; NULL where they cannot be reached. */
epx__vitals_t *epx__lost_vitals(const epx_group_t *group, int32_t rank);

#endif
