/* SPDX-License-Identifier: MIT */
/*
 * Ranks that are threads of one process: peers use a segment at its own
 * address, each of their cards having been allowed to.
 */
#include "fabric/cuda/cuda_device.h"
#include "fabric/cuda/cuda_driver.h"
#include "fabric/cuda/cuda_fabric.h"
#include "fabric/cuda/cuda_memory.h"
#include "fabric/segment_registry.h"

#include <stdlib.h>

typedef struct owned {
    epx__cuda_block_t block;
    int32_t ordinal;
} owned_t;

static const char *
thread_obstacle(const epx__fabric_place_t *a, const epx__fabric_place_t *b)
{
    return epx__fabric_same_process(a, b)
               ? epx__cuda_kind_obstacle(a, b, EPX__MEMORY_PROCESS)
               : "are in different processes";
}

/* By whichever rank lets go last. */
static void
release(epx__segment_t *segment)
{
    owned_t *owned = segment->context;

    if (epx__cuda_device_enter(owned->ordinal) == EPX_OK) {
        epx__cuda_block_close(&owned->block);
        epx__cuda_device_leave();
    }
    free(owned);
}

/* Memory that other cards can be allowed to use one by one, or else what the
 * driver has. */
static epx_status_t
make_block(int32_t ordinal, uint64_t bytes, epx__cuda_block_t *block)
{
    CUdevice device;
    int has_vmm = 0;

    if (epx__cuda_driver()->device_get(&device, ordinal) == CUDA_SUCCESS) {
        (void)epx__cuda_driver()->device_get_attribute(
            &has_vmm, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED,
            device);
    }
    return has_vmm != 0
               ? epx__cuda_block_create(ordinal, CU_MEM_HANDLE_TYPE_NONE, bytes,
                                        NULL, block)
               : epx__cuda_block_malloc(bytes, NULL, block);
}

static epx_status_t
open_entered(const epx_group_t *group, epx__reach_t *reach, uint64_t bytes,
             epx__fabric_card_t *card)
{
    epx__segment_t own = { .bytes = bytes, .release = release };
    owned_t *owned = calloc(1, sizeof(*owned));
    epx_status_t status;

    if (owned == NULL) {
        return epx__fail(EPX_ERR_NO_MEMORY, "no memory for a segment");
    }
    owned->ordinal = group->device_ordinal;
    own.context = owned;
    status = make_block(group->device_ordinal, bytes, &owned->block);
    own.base = owned->block.base;
    if (status == EPX_OK) {
        status = epx__cuda_segment_init(group, own.base, bytes,
                                        owned->block.bytes, card);
    }
    if (status == EPX_OK) {
        status = epx__segments_open(group, reach, &own);
    }
    if (status != EPX_OK) {
        epx__cuda_block_close(&owned->block);
        free(owned);
    }
    return status;
}

static epx_status_t
thread_open(const epx_group_t *group, epx__reach_t *reach, uint64_t bytes,
            epx__fabric_card_t *card)
{
    epx_status_t status = epx__cuda_device_enter(group->device_ordinal);

    if (status == EPX_OK) {
        status = open_entered(group, reach, bytes, card);
        epx__cuda_device_leave();
    }
    return status;
}

/* Let this rank's card use a peer's segment. */
static epx_status_t
allow(const epx_group_t *group, const epx__reach_t *reach, int32_t rank,
      const epx__fabric_card_t *cards)
{
    epx__segment_holds_t *holds = reach->state;
    owned_t *owned = holds[rank]->context;
    epx_status_t status;

    if (owned->ordinal == group->device_ordinal) {
        return EPX_OK;
    }
    status = epx__cuda_check_reach(group, rank, cards);
    return status == EPX_OK
               ? epx__cuda_block_allow(group->device_ordinal, &owned->block)
               : status;
}

static epx_status_t
thread_connect(epx_group_t *group, epx__reach_t *reach,
               const epx__fabric_card_t *cards, int64_t deadline_ns)
{
    epx_status_t status = epx__segments_connect(group, reach, cards);

    (void)deadline_ns;
    if (status == EPX_OK) {
        status = epx__cuda_device_enter(group->device_ordinal);
    }
    if (status != EPX_OK) {
        return status;
    }
    for (int32_t rank = 0; status == EPX_OK && rank < group->num_ranks;
         rank++) {
        if (!epx__is_near(&group->nodes, rank)) {
            continue;
        }
        status = allow(group, reach, rank, cards);
        if (status == EPX_OK) {
            status = epx__cuda_segment_check(group, reach, rank, &cards[rank]);
        }
    }
    epx__cuda_device_leave();
    return status;
}

const epx__fabric_ops_t epx__fabric_cuda_thread = {
    .name = "cuda_thread",
    .obstacle = thread_obstacle,
    .open = thread_open,
    .connect = thread_connect,
    .close = epx__segments_close,
};
