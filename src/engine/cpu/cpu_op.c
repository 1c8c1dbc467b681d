/* SPDX-License-Identifier: MIT */
/* Checks that dispatch and combine share. */
#include "engine/cpu/cpu.h"

#include <inttypes.h>

epx_status_t
cpu_op_check(cpu_plan_t *plan)
{
    epx_status_t status = epx__group_check(plan->base.group);

    if (status != EPX_OK) {
        return status;
    }
    if (plan->pending != EPX__PENDING_NONE) {
        return epx__fail(EPX_ERR_STATE,
                         "the plan has a send-only %s open; epx_complete must "
                         "come before its next operation",
                         plan->pending == EPX__PENDING_DISPATCH ? "dispatch"
                                                                : "combine");
    }
    /* Without routing, or with one that failed, resolving says why. */
    if (plan->state == CPU_PLAN_EMPTY || plan->state == CPU_PLAN_FAILED) {
        return cpu_plan_resolve(plan);
    }
    return EPX_OK;
}

epx_status_t
cpu_check_pointers(const cpu_pointer_t *pointers, int num_pointers,
                   const char *count_name, int64_t count)
{
    for (int i = 0; i < num_pointers; i++) {
        if (count > 0 && pointers[i].needed && pointers[i].pointer == NULL) {
            return epx__fail(EPX_ERR_NULL, "%s is null, but %s is %" PRId64,
                             pointers[i].name, count_name, count);
        }
    }
    return EPX_OK;
}
