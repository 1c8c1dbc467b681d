/* SPDX-License-Identifier: MIT */
/* Arrays of an operation: in the heap, or staged there. */
#include "engine/cpu/cpu.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

bool
cpu_array_is_outside(epx_group_t *group, const void *user)
{
    uint64_t left;

    return user != NULL && !epx__heap_find(&group->heap, user, &left);
}

epx_status_t
cpu_array_open(epx_group_t *group, const char *name, void *user, uint64_t bytes,
               cpu_array_t *array)
{
    uint64_t left;
    void *staging;
    epx_status_t status;

    *array = (cpu_array_t){ 0 };
    if (user == NULL || bytes == 0) {
        return EPX_OK;
    }
    if (epx__heap_find(&group->heap, user, &left)) {
        if (left < bytes) {
            return epx__fail(EPX_ERR_TOO_SMALL,
                             "%s needs %" PRIu64
                             " bytes, but its EPX memory ends after %" PRIu64,
                             name, bytes, left);
        }
        *array = (cpu_array_t){ user, user, false };
        return EPX_OK;
    }
    status = epx__heap_alloc(&group->heap, bytes, name, &staging);
    if (status == EPX_OK) {
        *array = (cpu_array_t){ user, staging, true };
    }
    return status;
}

void
cpu_arrays_close(epx_group_t *group, cpu_array_t *arrays)
{
    for (int i = 0; i < EPX__NUM_ARRAYS; i++) {
        if (arrays[i].staged) {
            epx__group_heap_free(group, arrays[i].heap);
        }
        arrays[i] = (cpu_array_t){ 0 };
    }
}

void
cpu_arrays_give_up(epx_group_t *group, cpu_array_t *arrays)
{
    for (int i = 0; i < EPX__NUM_ARRAYS; i++) {
        if (arrays[i].staged) {
            epx__group_heap_free_old(group, arrays[i].heap);
        }
        arrays[i] = (cpu_array_t){ 0 };
    }
}

uint64_t
cpu_array_offset(const epx_group_t *group, const cpu_array_t *array)
{
    return array->heap == NULL
               ? 0
               : (uint64_t)(array->heap - epx__group_segment(group));
}

int32_t
cpu_num_runs(const cpu_plan_t *plan)
{
    return plan->base.key.layout == EPX_LAYOUT_EXPERT_SLOTS
               ? plan->base.num_local_experts
               : 1;
}

cpu_run_t
cpu_run(const cpu_plan_t *plan, int32_t i)
{
    if (plan->base.key.layout == EPX_LAYOUT_EXPERT_SLOTS) {
        return (cpu_run_t){ plan->expert_offsets[i], plan->expert_rows[i] };
    }
    return (cpu_run_t){ 0, plan->rank_rows[plan->base.group->rank] };
}

void
cpu_copy_runs(const cpu_plan_t *plan, void *to, const void *from,
              uint64_t row_bytes)
{
    for (int32_t i = 0; i < cpu_num_runs(plan); i++) {
        cpu_run_t run = cpu_run(plan, i);
        uint64_t at = (uint64_t)run.begin * row_bytes;

        memcpy((char *)to + at, (const char *)from + at,
               (uint64_t)run.count * row_bytes);
    }
}

epx_status_t
cpu_scratch_reserve(const epx_group_t *group, size_t bytes)
{
    cpu_engine_t *engine = cpu_engine(group);
    int32_t num_workers = group->num_workers;
    size_t rounded = epx__round_up(bytes, EPX__LINE);
    char *scratch;

    if (rounded <= engine->scratch_bytes) {
        return EPX_OK;
    }
    scratch = aligned_alloc(EPX__LINE, rounded * (size_t)num_workers);
    if (scratch == NULL) {
        return epx__fail(EPX_ERR_NO_MEMORY,
                         "no memory for %zu bytes of scratch for each of %d "
                         "workers",
                         rounded, num_workers);
    }
    free(engine->scratch);
    engine->scratch = scratch;
    engine->scratch_bytes = rounded;
    return EPX_OK;
}
