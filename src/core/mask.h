/* SPDX-License-Identifier: MIT */
/*
 * Going on without a rank.
 *
 * The ranks that are masked stand on the roll, a list in the memory of the
 * node's lowest rank, which all its ranks map and which outlives its owner's
 * process.  A rank is added at the roll's end by a compare-and-swap, and never
 * leaves it, so all read the same ranks in the same order, whoever dies when.
 * The roll's length is the epoch, and its first e entries are who is masked in
 * epoch e.
 *
 *     adding     never oneself, nor after being found on the roll: so somebody
 *                of the node is always left
 *     joining    with no operation open, a rank writes the epoch that it has
 *                read into its vitals, with the last step that it may have
 *                signalled, and waits until every rank that is not masked has
 *                done so
 *     going on   then it begins the epoch: its steps start above the last that
 *                any of those has signalled, and its failure is forgotten
 *     growth     a roll that is longer than this rank's epoch fails its group,
 *                until it joins again or finds itself masked
 *
 * A rank in epoch e thus knows that no other that takes part is at work in an
 * earlier one.
 *
 * With several nodes each has a roll, of ranks of all nodes, and ranks tell
 * those of other nodes what stands on theirs (epx__pledge_t).
 *
 *     adding     whoever stands on the roll of another node, too, if that is
 *                told by a rank that does not stand on this one
 *     joining    is telling just which ranks are masked.  All that remain must
 *                have joined with the same ones
 *     staying    only a majority of those that took part before goes on: more
 *                than half, or half with the lowest of them
 *     getting    a rank that has seen all join makes its net ready for the
 *     ready      epoch, says so, and waits for those of other nodes
 *
 * A rank joins with ever more ranks masked, and any two majorities have a rank
 * in common.  So of two epochs that begin, wherever that is, one masks all that
 * the other does: there are no two views, also when the network is cut in two.
 * docs/failures.md tells more, tests/model checks it.
 *
 * What a masked rank still writes is in columns of the control
 * region that nobody reads, or in memory that was open to it: blocks of the
 * heap that the library gave out for that come back only when it is gone.
 */
#ifndef EPX_CORE_MASK_H
#define EPX_CORE_MASK_H

#include "core/atomic.h"
#include "core/group.h"

/* All segments are there: from now on ranks can be masked, if those of this
 * group can. */
epx_status_t epx__mask_open(epx_group_t *group);
void epx__mask_close(epx_group_t *group);

/*
 * Add `ranks` ([num_ranks], and others than this one) to the roll, and those
 * that are known to be lost; then wait until all that remain have joined, and
 * begin their epoch.  With op_lock held.
 */
epx_status_t epx__mask_agree(epx_group_t *group, const int32_t *ranks,
                             int32_t num_ranks);

/* Whether the roll has grown since this rank's epoch began: cheap. */
static inline bool
epx__mask_has_grown(const epx_group_t *group)
{
    return group->roll != NULL &&
           epx__load_u16(&group->roll[epx__load_u32(&group->epoch)]) != 0;
}

/* Fail the group if it has; returns whether. */
bool epx__mask_hear(epx_group_t *group);

/* Give back what was retired in earlier epochs, if no masked rank can still
 * write to it.  From any thread. */
void epx__mask_reclaim(epx_group_t *group);

/* Wake all ranks of this node. */
void epx__mask_ring(const epx_group_t *group);

/* What is wrong with an entry of the roll. */
epx_status_t epx__mask_bad_entry(const epx_group_t *group, uint32_t at,
                                 int32_t entry);

/* Add a rank to the roll of this node, unless it stands there, or this one
 * does.  From any thread. */
void epx__mask_add(epx_group_t *group, int32_t rank);

/* Whether a rank is on the roll; and what to tell this one when it is. */
bool epx__mask_holds(const epx_group_t *group, int32_t rank);
epx_status_t epx__mask_refuse(const epx_group_t *group);

#endif
