/* SPDX-License-Identifier: MIT */
/* Arrays that peers must reach: in the heap, or stood in for there. */
#include "engine/cuda/cuda_engine.h"

#include <inttypes.h>
#include <stdlib.h>

/* The plan's stand-in, made or made larger. */
static epx_status_t
stand_in(cuda_plan_t *plan, cuda_stand_in_t which, const char *name,
         uint64_t bytes, char **heap_p)
{
    epx__heap_t *heap = &plan->base.group->heap;
    cuda_block_t *block = &plan->stand_ins[which];
    cuda_block_t grown = { NULL, bytes };
    epx_status_t status;

    if (block->base == NULL || block->bytes < bytes) {
        size_t count = (size_t)plan->num_outgrown + 1;
        cuda_block_t *outgrown =
            realloc(plan->outgrown, count * sizeof(*outgrown));

        if (outgrown == NULL) {
            return epx__fail(EPX_ERR_NO_MEMORY, "no memory to stage %s", name);
        }
        plan->outgrown = outgrown;
        status = epx__heap_alloc(heap, bytes, name, &grown.base);
        if (status == EPX_ERR_HEAP_EXHAUSTED) {
            cuda_plans_reclaim(plan->base.group, true);
            status = epx__heap_alloc(heap, bytes, name, &grown.base);
        }
        if (status != EPX_OK) {
            return status;
        }
        if (block->base != NULL) {
            plan->outgrown[plan->num_outgrown++] = *block;
        }
        *block = grown;
    }
    *heap_p = block->base;
    return EPX_OK;
}

epx_status_t
cuda_reachable(cuda_plan_t *plan, cuda_stand_in_t which, const char *name,
               const void *user, uint64_t bytes, uint64_t alignment,
               char **heap_p)
{
    uint64_t left;

    *heap_p = NULL;
    if (user == NULL || bytes == 0) {
        return EPX_OK;
    }
    if (!epx__heap_find(&plan->base.group->heap, user, &left)) {
        return stand_in(plan, which, name, bytes, heap_p);
    }
    if (left < bytes) {
        return epx__fail(EPX_ERR_TOO_SMALL,
                         "%s needs %" PRIu64
                         " bytes, but its EPX memory ends after %" PRIu64,
                         name, bytes, left);
    }
    if ((uintptr_t)user % alignment != 0) {
        return stand_in(plan, which, name, bytes, heap_p);
    }
    *heap_p = (char *)(uintptr_t)user;
    return EPX_OK;
}

void
cuda_stage_add(cuda_stage_args_t *stage, const void *user, char *heap,
               uint64_t row_bytes)
{
    uint64_t unit = 16;

    if (heap == NULL || heap == user) {
        return;
    }
    while ((uintptr_t)user % unit != 0 || row_bytes % unit != 0) {
        unit /= 2;
    }
    stage->arrays[stage->num_arrays++] = (cuda_staged_t){
        .user = (char *)(uintptr_t)user,
        .heap = heap,
        .row_bytes = row_bytes,
        .unit = unit,
    };
}

uint64_t
cuda_heap_offset(const cuda_plan_t *plan, const char *heap)
{
    return heap == NULL
               ? 0
               : (uint64_t)(heap - epx__group_segment(plan->base.group));
}

static void
give_back(const cuda_plan_t *plan, void *block)
{
    epx_group_t *group = plan->base.group;

    if (block != NULL && cuda_plan_is_stale(plan)) {
        epx__group_heap_free_old(group, block);
    } else if (block != NULL) {
        epx__group_heap_free(group, block);
    }
}

void
cuda_stand_ins_close(cuda_plan_t *plan)
{
    for (int i = 0; i < CUDA_NUM_STAND_INS; i++) {
        give_back(plan, plan->stand_ins[i].base);
        plan->stand_ins[i] = (cuda_block_t){ NULL, 0 };
    }
    for (int i = 0; i < plan->num_outgrown; i++) {
        give_back(plan, plan->outgrown[i].base);
    }
    free(plan->outgrown);
    plan->outgrown = NULL;
    plan->num_outgrown = 0;
}
