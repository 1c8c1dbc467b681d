/* SPDX-License-Identifier: MIT */
/* The window of open steps, and the exchange of posts. */
#include "core/agree.h"
#include "core/atomic.h"
#include "engine/cpu/cpu.h"

#include <inttypes.h>

static epx__open_step_t *
open_step(epx_group_t *group, uint64_t step)
{
    return &group->open_steps[epx__slot(step)];
}

/* Bring the step to its end if nobody else has to: counts can be waited for,
 * a send-only operation is the caller's to complete. */
static epx_status_t
close_old_step(epx_group_t *group, uint64_t step)
{
    epx__open_step_t *open = open_step(group, step);
    epx_status_t status;

    if (open->step != step) {
        return EPX_OK;
    }
    if (!open->is_counts) {
        return epx__window_full();
    }
    if (open->plan != NULL) {
        /* Counts that do not fit together are that plan's error, which its
         * next use reports. */
        (void)cpu_plan_resolve(cpu_plan(open->plan));
        return epx__group_check(group);
    }
    status = epx__wait_all(group, step, EPX__GATE_READY,
                           "the counts of a destroyed plan");
    cpu_step_end(group, step);
    return status;
}

epx_status_t
cpu_step_begin(epx_group_t *group, epx_plan_t *plan, epx__step_kind_t kind,
               uint64_t *step_p)
{
    uint64_t step = group->last_step + 1;

    if (step > EPX__MAX_OPEN) {
        epx_status_t status = close_old_step(group, step - EPX__MAX_OPEN);

        if (status != EPX_OK) {
            return status;
        }
    }
    group->last_step = step;
    if (group->remote.step_begin != NULL) {
        group->remote.step_begin(group->remote.context, step);
    }
    *open_step(group, step) =
        (epx__open_step_t){ step, plan, kind == EPX__STEP_COUNTS };
    *step_p = step;
    return EPX_OK;
}

void
cpu_step_end(epx_group_t *group, uint64_t step)
{
    if (open_step(group, step)->step == step) {
        open_step(group, step)->step = 0;
    }
}

void
cpu_step_forget_plan(epx_group_t *group, const epx_plan_t *plan)
{
    for (int i = 0; i < EPX__NUM_SLOTS; i++) {
        if (group->open_steps[i].plan == plan) {
            group->open_steps[i].plan = NULL;
        }
    }
}

void
cpu_post_all(epx_group_t *group, uint64_t step, const epx__post_t *post)
{
    *epx__map_post(&group->map, epx__group_segment(group), step,
                   (uint32_t)group->rank) = *post;
    for (int32_t i = 1; i <= group->num_ranks; i++) {
        epx__signal_with(group, (group->rank + i) % group->num_ranks, step,
                         EPX__GATE_READY, EPX__PAYLOAD_POST, sizeof(*post));
    }
}

/* All with the first that can tell which arrays it has: every rank holds all
 * posts and so comes to the same verdict. */
static epx_status_t
compare_posts(const epx_group_t *group, const char *what,
              const epx__post_t *posts)
{
    epx_status_t status = EPX_OK;
    int32_t first = 0;

    while (first < group->num_ranks - 1 &&
           (epx__is_masked(group, first) ||
            (posts[first].signature.arrays & EPX__ARRAYS_ANY) != 0)) {
        first++;
    }
    /* The last one may be masked. */
    first = epx__is_masked(group, first) ? group->rank : first;
    for (int32_t r = 0; r < group->num_ranks && status == EPX_OK; r++) {
        if (!epx__is_masked(group, r)) {
            status = epx__agree_signatures(what, first, &posts[first].signature,
                                           r, &posts[r].signature);
        }
    }
    return status;
}

epx_status_t
cpu_posts_wait(epx_group_t *group, uint64_t step, const char *what,
               const epx__signature_t *ours, epx__post_t *posts)
{
    epx_status_t status = epx__wait_all(group, step, EPX__GATE_READY, what);

    if (status != EPX_OK) {
        return status;
    }
    for (int32_t peer = 0; peer < group->num_ranks; peer++) {
        if (epx__is_masked(group, peer)) {
            posts[peer] = (epx__post_t){ .step = step };
            continue;
        }
        epx__copy_in(&posts[peer],
                     epx__map_post(&group->map, epx__group_segment(group), step,
                                   (uint32_t)peer),
                     sizeof(*posts));
        if (posts[peer].step != step) {
            return epx__agree_not(peer, group->rank, what);
        }
    }
    /* Ours as we made it, whatever has become of it in shared memory. */
    posts[group->rank].signature = *ours;
    return compare_posts(group, what, posts);
}

epx_status_t
cpu_check_extent(const epx_group_t *group, int32_t rank, const char *what,
                 uint64_t offset, uint64_t rows, uint64_t row_bytes,
                 uint64_t element_bytes)
{
    uint64_t segment = group->peers[rank].bytes;
    uint64_t bytes;

    if (__builtin_mul_overflow(rows, row_bytes, &bytes) ||
        offset < group->map.heap || offset > segment ||
        bytes > segment - offset || offset % element_bytes != 0) {
        return epx__fail(
            EPX_ERR_PEER_DATA,
            "rank %d posted %s at offset %" PRIu64 " for %" PRIu64
            " rows of %" PRIu64
            " bytes, not aligned or outside of its heap, which ends "
            "at %" PRIu64,
            rank, what, offset, rows, row_bytes, segment);
    }
    return EPX_OK;
}
