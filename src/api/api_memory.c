/* SPDX-License-Identifier: MIT */
#include "core/group.h"
#include "engine/engine.h"

epx_status_t
epx_mem_alloc(epx_group_t *group, uint64_t bytes, void **ptr_p)
{
    epx_status_t status;

    if (group == NULL || ptr_p == NULL) {
        return epx__fail(EPX_ERR_NULL, "%s is null",
                         group == NULL ? "group" : "ptr_p");
    }
    if (group->engine->check != NULL) {
        (void)group->engine->check(group);
    }
    /* Peers may still write to what operations of a broken group had. */
    status = epx__group_check(group);
    if (status != EPX_OK) {
        return status;
    }
    status = epx__heap_alloc(&group->heap, bytes, "epx_mem_alloc", ptr_p);
    if (status == EPX_ERR_HEAP_EXHAUSTED && group->engine->reclaim != NULL) {
        group->engine->reclaim(group);
        status = epx__group_check(group);
        if (status == EPX_OK) {
            status =
                epx__heap_alloc(&group->heap, bytes, "epx_mem_alloc", ptr_p);
        }
    }
    return status;
}

epx_status_t
epx_mem_free(epx_group_t *group, void *ptr)
{
    if (ptr == NULL) {
        return EPX_OK;
    }
    if (group == NULL) {
        return epx__fail(EPX_ERR_NULL, "group is null");
    }
    return epx__heap_free(&group->heap, ptr);
}
