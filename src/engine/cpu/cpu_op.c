/* SPDX-License-Identifier: MIT */
/* Checks that dispatch and combine share. */
#include "engine/cpu/cpu.h"

epx_status_t
cpu_op_check(cpu_plan_t *plan)
{
    epx_status_t status = epx__group_check(plan->base.group);

    if (status == EPX_OK) {
        status = cpu_plan_check(plan);
    }
    if (status == EPX_OK) {
        status = epx__check_pending(plan->pending);
    }
    if (status != EPX_OK) {
        return status;
    }
    /* Without routing, or with one that failed, resolving says why. */
    if (plan->state == CPU_PLAN_EMPTY || plan->state == CPU_PLAN_FAILED) {
        return cpu_plan_resolve(plan);
    }
    return EPX_OK;
}
