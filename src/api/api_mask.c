/* SPDX-License-Identifier: MIT */
/* Going on without a rank. */
#include "core/mask.h"
#include "engine/engine.h"

static epx_status_t
check_ranks(const epx_group_t *group, const int32_t *ranks, int32_t num_ranks)
{
    if (num_ranks < 0 || num_ranks >= group->num_ranks) {
        return epx__fail(EPX_ERR_INVALID,
                         "num_ranks is %d; allowed are 0 to %d, all ranks but "
                         "one",
                         num_ranks, group->num_ranks - 1);
    }
    if (num_ranks > 0 && ranks == NULL) {
        return epx__fail(EPX_ERR_NULL, "ranks is null, but num_ranks is %d",
                         num_ranks);
    }
    for (int32_t i = 0; i < num_ranks; i++) {
        if (ranks[i] < 0 || ranks[i] >= group->num_ranks ||
            ranks[i] == group->rank) {
            return epx__fail(EPX_ERR_INVALID,
                             "ranks[%d] is %d; allowed are 0 to %d, but for "
                             "this rank, %d",
                             i, ranks[i], group->num_ranks - 1, group->rank);
        }
    }
    return EPX_OK;
}

epx_status_t
epx_group_mask(epx_group_t *group, const int32_t *ranks, int32_t num_ranks)
{
    epx_status_t status;

    if (group == NULL) {
        return epx__fail(EPX_ERR_NULL, "group is null");
    }
    status = check_ranks(group, ranks, num_ranks);
    if (status != EPX_OK) {
        return status;
    }
    if (group->roll == NULL) {
        return epx__fail(EPX_ERR_UNSUPPORTED,
                         "ranks of a group whose hosts share no memory cannot "
                         "be masked; make a new group without them");
    }
    /* What kernels have found and no call has told of. */
    if (group->engine->check != NULL) {
        (void)group->engine->check(group);
    }
    (void)pthread_mutex_lock(&group->op_lock);
    status = epx__mask_agree(group, ranks, num_ranks);
    (void)pthread_mutex_unlock(&group->op_lock);
    return status;
}

epx_status_t
epx_group_masked(const epx_group_t *group, int32_t *masked_p)
{
    epx_group_t *shared = (epx_group_t *)(uintptr_t)group;

    if (group == NULL || masked_p == NULL) {
        return epx__fail(EPX_ERR_NULL, "%s is null",
                         group == NULL ? "group" : "masked_p");
    }
    /* All of one epoch. */
    (void)pthread_mutex_lock(&shared->state_lock);
    for (int32_t rank = 0; rank < group->num_ranks; rank++) {
        masked_p[rank] = epx__is_masked(group, rank) ? 1 : 0;
    }
    (void)pthread_mutex_unlock(&shared->state_lock);
    return EPX_OK;
}
