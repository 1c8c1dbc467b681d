/* SPDX-License-Identifier: MIT */
/* What the fabrics over cards' memory share, and which of them serve. */
#include "fabric/cuda/cuda_fabric.h"

#include "core/env.h"
#include "fabric/cuda/cuda_device.h"
#include "fabric/cuda/cuda_driver.h"
#include "fabric/cuda/cuda_error.h"
#include "fabric/cuda/cuda_memory.h"

#include <stdio.h>
#include <string.h>

#define VARIABLE    "EPX_CUDA_FABRIC"
#define MIN_COMPUTE 8 /* the first with bfloat16 */

/* Those of epx__cuda_fabrics, with the kind of memory that each needs. */
static const struct {
    uint32_t kind;
    const char *name;
    const char *word; /* of the variable; NULL: not to be asked for */
    const char *obstacle;
} kinds_known[] = {
    { EPX__MEMORY_PROCESS, "cuda_thread", NULL,
      "may not share memory as threads (" VARIABLE ")" },
    { EPX__MEMORY_POSIX_FD, "cuda_vmm", "vmm",
      "do not both have a driver that shares memory by descriptors" },
    { EPX__MEMORY_IPC, "cuda_ipc", "ipc",
      "do not both have a driver that shares memory by IPC handles" },
    { EPX__MEMORY_FABRIC, "cuda_fabric", "fabric",
      "do not both have a driver that shares memory by fabric handles" },
};

#define NUM_KINDS (sizeof(kinds_known) / sizeof(*kinds_known))

const epx__fabric_ops_t *const epx__cuda_fabrics[] = {
    &epx__fabric_cuda_thread,
    &epx__fabric_cuda_vmm,
    &epx__fabric_cuda_ipc,
    &epx__fabric_cuda_handle,
    NULL,
};

void
epx__cuda_fabric_names(uint32_t kinds, const char *names[8])
{
    size_t count = 0;

    for (size_t i = 0; i < NUM_KINDS; i++) {
        if ((kinds & kinds_known[i].kind) != 0) {
            names[count++] = kinds_known[i].name;
        }
    }
    names[count] = NULL;
}

const char *
epx__cuda_kind_obstacle(const epx__fabric_place_t *a,
                        const epx__fabric_place_t *b, uint32_t kind)
{
    size_t i = 0;

    if ((a->device.memory_kinds & b->device.memory_kinds & kind) != 0) {
        return NULL;
    }
    while (kinds_known[i].kind != kind) {
        i++;
    }
    return kinds_known[i].obstacle;
}

/* The kinds that the variable allows: all when it is not set. */
static epx_status_t
allowed_kinds(uint32_t *kinds_p)
{
    const char *word = epx__env_string(VARIABLE);

    *kinds_p = UINT32_MAX;
    if (word == NULL) {
        return EPX_OK;
    }
    for (size_t i = 0; i < NUM_KINDS; i++) {
        if (kinds_known[i].word != NULL &&
            strcmp(kinds_known[i].word, word) == 0) {
            *kinds_p = kinds_known[i].kind;
            return EPX_OK;
        }
    }
    return epx__fail(EPX_ERR_ENVIRONMENT,
                     VARIABLE " is \"%.40s\"; it must be vmm, ipc or fabric",
                     word);
}

/* Those that the driver offers for the card, which has been entered. */
static uint32_t
offered_kinds(int32_t ordinal)
{
    uint32_t kinds = EPX__MEMORY_PROCESS;
    CUdevice device;

    if (epx__cuda_driver()->device_get(&device, ordinal) != CUDA_SUCCESS) {
        return kinds;
    }
    if (epx__cuda_attribute(
            device,
            CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED) &&
        epx__cuda_can_share(ordinal,
                            CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR)) {
        kinds |= EPX__MEMORY_POSIX_FD;
    }
    /* The documented sign that IPC handles of memory work, too. */
    if (epx__cuda_attribute(device, CU_DEVICE_ATTRIBUTE_IPC_EVENT_SUPPORTED)) {
        kinds |= EPX__MEMORY_IPC;
    }
    if (epx__cuda_attribute(device,
                            CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED) &&
        epx__cuda_can_share(ordinal, CU_MEM_HANDLE_TYPE_FABRIC)) {
        kinds |= EPX__MEMORY_FABRIC;
    }
    return kinds;
}

epx_status_t
epx__cuda_memory_kinds(int32_t ordinal, uint32_t *kinds_p)
{
    uint32_t allowed;
    epx_status_t status = allowed_kinds(&allowed);

    if (status == EPX_OK) {
        status = epx__cuda_device_enter(ordinal);
    }
    if (status != EPX_OK) {
        return status;
    }
    *kinds_p = offered_kinds(ordinal) & allowed;
    epx__cuda_device_leave();
    return *kinds_p != 0
               ? EPX_OK
               : epx__fail(EPX_ERR_UNSUPPORTED,
                           VARIABLE " is \"%s\", which the driver does not "
                                    "offer for card %d",
                           epx__env_string(VARIABLE), ordinal);
}

/* With MIG, of the part of the card that this process sees. */
static CUresult
get_uuid(int32_t ordinal, uint8_t bytes[16])
{
    const epx__cuda_driver_t *driver = epx__cuda_driver();
    CUdevice device;
    CUuuid uuid;
    CUresult result = driver->device_get(&device, ordinal);

    if (result == CUDA_SUCCESS) {
        result = driver->device_get_uuid(&uuid, device);
    }
    if (result == CUDA_SUCCESS) {
        memcpy(bytes, uuid.bytes, sizeof(uuid.bytes));
    }
    return result;
}

/* Which card, and its SMs. */
static CUresult
query_card(int32_t ordinal, epx__fabric_device_t *card, int *compute_p)
{
    const epx__cuda_driver_t *driver = epx__cuda_driver();
    CUdevice device;
    CUresult result = driver->device_get(&device, ordinal);

    if (result == CUDA_SUCCESS) {
        result = get_uuid(ordinal, card->uuid);
    }
    if (result == CUDA_SUCCESS) {
        result = driver->device_get_attribute(
            &card->num_workers, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
            device);
    }
    if (result == CUDA_SUCCESS) {
        result = driver->device_get_attribute(
            compute_p, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device);
    }
    return result;
}

epx_status_t
epx__cuda_place(const epx_group_config_t *config, epx__fabric_place_t *place)
{
    int32_t ordinal = config->device_ordinal;
    epx_status_t status = epx__cuda_device_check(ordinal, NULL);
    CUresult result;
    int compute = 0;

    if (status != EPX_OK) {
        return status;
    }
    result = query_card(ordinal, &place->device, &compute);
    if (result != CUDA_SUCCESS) {
        return epx__cuda_driver_fail(result, "cannot ask for the card");
    }
    if (compute < MIN_COMPUTE) {
        return epx__fail(EPX_ERR_UNSUPPORTED,
                         "card %d has compute capability %d.x; EPX needs %d.0",
                         ordinal, compute, MIN_COMPUTE);
    }
    place->device.wanted_workers = config->num_workers;
    return epx__cuda_memory_kinds(ordinal, &place->device.memory_kinds);
}

/* ---- segments ---- */

epx_status_t
epx__cuda_segment_init(const epx_group_t *group, char *base, uint64_t bytes,
                       uint64_t mapped_bytes, epx__fabric_card_t *card)
{
    epx__segment_header_t header =
        epx__fabric_header(group, group->rank, bytes);
    epx_status_t status = epx__cuda_copy(base, NULL, group->map.heap);
    if (status == EPX_OK) {
        status = epx__cuda_copy(base, &header, sizeof(header));
    }
    /* Without it peers do not recognise the card, which they need not. */
    (void)get_uuid(group->device_ordinal, card->uuid);
    epx__cuda_pci(group->device_ordinal, card->pci);
    card->segment_bytes = bytes;
    card->mapped_bytes = mapped_bytes;
    return status;
}

epx_status_t
epx__cuda_segment_check(const epx_group_t *group, const epx__reach_t *reach,
                        int32_t rank, const epx__fabric_card_t *card)
{
    epx__segment_header_t header;
    epx_status_t status =
        epx__cuda_copy(&header, reach->peers[rank].base, sizeof(header));

    return status == EPX_OK ? epx__fabric_check_header(
                                  group, rank, card->segment_bytes, &header)
                            : status;
}

/* The ordinal of a card in this process, -1 if it is not seen. */
static int32_t
find_card(const uint8_t uuid[16])
{
    uint8_t found[16];

    for (int32_t i = 0; get_uuid(i, found) == CUDA_SUCCESS; i++) {
        if (memcmp(found, uuid, sizeof(found)) == 0) {
            return i;
        }
    }
    return -1;
}

/* False only when the driver says so; it may not know. */
static bool
may_reach(int32_t own, int32_t other)
{
    int reaches = 1;

    if (other >= 0 && other != own &&
        cudaDeviceCanAccessPeer(&reaches, own, other) != cudaSuccess) {
        (void)cudaGetLastError();
        return true;
    }
    return reaches != 0;
}

epx_status_t
epx__cuda_check_reach(const epx_group_t *group, int32_t rank,
                      const epx__fabric_card_t *cards)
{
    int32_t own = group->device_ordinal;
    int32_t other = find_card(cards[rank].uuid);

    return may_reach(own, other)
               ? EPX_OK
               : epx__fail(EPX_ERR_UNSUPPORTED,
                           "card %d of rank %d (%.15s) cannot reach the memory "
                           "of card %d of rank %d (%.15s): the driver knows "
                           "neither NVLink nor PCIe peer access between them",
                           own, group->rank, cards[group->rank].pci, other,
                           rank, cards[rank].pci);
}
