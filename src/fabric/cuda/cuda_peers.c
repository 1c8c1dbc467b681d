/* SPDX-License-Identifier: MIT */
/*
 * Ranks that are processes: each maps its peers' segments by a handle.  What
 * the handle is makes the fabrics:
 *     cuda_vmm     a file descriptor, handed over a Unix socket
 *     cuda_ipc     a CUDA IPC handle, in the card
 *     cuda_fabric  a fabric handle, in the card; also from other hosts
 * With the first and the last the memory stays for as long as anybody maps it;
 * IPC leaves to us that nobody works with it any more when its owner frees it.
 */
#include "fabric/cuda/cuda_device.h"
#include "fabric/cuda/cuda_fabric.h"
#include "fabric/cuda/cuda_memory.h"
#include "fabric/fd_exchange.h"

#include <cuda_runtime_api.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

typedef struct peers_state {
    epx__fd_exchange_t exchange; /* cuda_vmm */
    epx__cuda_block_t blocks[];  /* [R], this rank's own among them */
} peers_state_t;

_Static_assert(sizeof(cudaIpcMemHandle_t) <=
                   sizeof(((epx__fabric_card_t *)0)->handle),
               "a card holds an IPC handle");
_Static_assert(sizeof(CUmemFabricHandle) <=
                   sizeof(((epx__fabric_card_t *)0)->handle),
               "a card holds a fabric handle");

/* ---- what they share ---- */

static epx_status_t
new_state(const epx_group_t *group, epx__reach_t *reach,
          peers_state_t **state_p)
{
    peers_state_t *state = calloc(
        1, sizeof(*state) + (size_t)group->num_ranks * sizeof(*state->blocks));

    if (state == NULL) {
        return epx__fail(EPX_ERR_NO_MEMORY, "no memory for a segment");
    }
    state->exchange = (epx__fd_exchange_t)EPX__FD_EXCHANGE_NONE;
    reach->state = state;
    *state_p = state;
    return EPX_OK;
}

/* The own block has been made. */
static epx_status_t
show_segment(const epx_group_t *group, epx__reach_t *reach, uint64_t bytes,
             epx__fabric_card_t *card)
{
    const peers_state_t *state = reach->state;
    const epx__cuda_block_t *own = &state->blocks[group->rank];

    reach->peers[group->rank] = (epx__peer_t){ own->base, bytes };
    return epx__cuda_segment_init(group, own->base, bytes, own->bytes, card);
}

/* A peer's block has been opened, or has not. */
static epx_status_t
take_segment(const epx_group_t *group, epx__reach_t *reach, int32_t rank,
             const epx__fabric_card_t *card, epx_status_t opened)
{
    const peers_state_t *state = reach->state;

    if (opened != EPX_OK) {
        /* The driver does not know about ranks. */
        epx__error_t error;

        epx__error_save(&error, opened);
        return epx__fail(opened,
                         "rank %d cannot map the heap of rank %d on %.15s: "
                         "%.300s",
                         group->rank, rank, card->pci, error.text);
    }
    reach->peers[rank] =
        (epx__peer_t){ state->blocks[rank].base, card->segment_bytes };
    return epx__cuda_segment_check(group, reach, rank, card);
}

/* A peer's card may claim anything. */
static epx_status_t
check_sizes(int32_t rank, const epx__fabric_card_t *card)
{
    return card->mapped_bytes >= card->segment_bytes
               ? EPX_OK
               : epx__fail(EPX_ERR_PEER_DATA,
                           "rank %d maps less than its heap needs", rank);
}

static epx_status_t
check_all(const epx_group_t *group, const epx__fabric_card_t *cards)
{
    epx_status_t status = EPX_OK;

    for (int32_t rank = 0; status == EPX_OK && rank < group->num_ranks;
         rank++) {
        if (!epx__is_near(&group->nodes, rank)) {
            continue;
        }
        status = check_sizes(rank, &cards[rank]);
        if (status == EPX_OK) {
            status = epx__cuda_check_reach(group, rank, cards);
        }
    }
    return status;
}

static void
peers_close(const epx_group_t *group, epx__reach_t *reach)
{
    peers_state_t *state = reach->state;

    if (state == NULL) {
        return;
    }
    epx__fd_exchange_close(&state->exchange);
    if (epx__cuda_device_enter(group->device_ordinal) == EPX_OK) {
        for (int32_t rank = 0; rank < group->num_ranks; rank++) {
            epx__cuda_block_close(&state->blocks[rank]);
        }
        epx__cuda_device_leave();
    }
    free(state);
    reach->state = NULL;
}

/* The own block and, in *shareable, what peers open it by. */
typedef epx_status_t make_fn_t(const epx_group_t *group, uint64_t bytes,
                               void *shareable, epx__cuda_block_t *block);

static epx_status_t
peers_open(const epx_group_t *group, epx__reach_t *reach, uint64_t bytes,
           epx__fabric_card_t *card, make_fn_t *make, void *shareable)
{
    peers_state_t *state;
    epx_status_t status = new_state(group, reach, &state);

    if (status == EPX_OK) {
        status = epx__cuda_device_enter(group->device_ordinal);
    }
    if (status != EPX_OK) {
        return status;
    }
    status = make(group, bytes, shareable, &state->blocks[group->rank]);
    if (status == EPX_OK) {
        status = show_segment(group, reach, bytes, card);
    }
    epx__cuda_device_leave();
    return status;
}

/* Open a peer's block by its card. */
typedef epx_status_t open_fn_t(const epx_group_t *group,
                               const epx__fabric_card_t *card,
                               epx__cuda_block_t *block);

static epx_status_t
peers_connect(const epx_group_t *group, epx__reach_t *reach,
              const epx__fabric_card_t *cards, open_fn_t *open)
{
    peers_state_t *state = reach->state;
    epx_status_t status = epx__cuda_device_enter(group->device_ordinal);

    if (status != EPX_OK) {
        return status;
    }
    status = check_all(group, cards);
    for (int32_t i = 1; status == EPX_OK && i < group->num_ranks; i++) {
        int32_t rank = (group->rank + i) % group->num_ranks;

        if (!epx__is_near(&group->nodes, rank)) {
            continue;
        }
        status = open(group, &cards[rank], &state->blocks[rank]);
        status = take_segment(group, reach, rank, &cards[rank], status);
    }
    epx__cuda_device_leave();
    return status;
}

/* ---- cuda_vmm ---- */

static const char *
vmm_obstacle(const epx__fabric_place_t *a, const epx__fabric_place_t *b)
{
    const char *why = epx__fd_exchange_obstacle(a, b);

    return why != NULL ? why
                       : epx__cuda_kind_obstacle(a, b, EPX__MEMORY_POSIX_FD);
}

static epx_status_t
vmm_make(const epx_group_t *group, uint64_t bytes, void *shareable,
         epx__cuda_block_t *block)
{
    return epx__cuda_block_create(group->device_ordinal,
                                  CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
                                  bytes, shareable, block);
}

static epx_status_t
vmm_open(const epx_group_t *group, epx__reach_t *reach, uint64_t bytes,
         epx__fabric_card_t *card)
{
    int fd = -1;
    epx_status_t status = peers_open(group, reach, bytes, card, vmm_make, &fd);
    peers_state_t *state = reach->state;

    if (state != NULL && fd >= 0) {
        (void)fcntl(fd, F_SETFD, FD_CLOEXEC);
        state->exchange.fd = fd;
    }
    return status == EPX_OK
               ? epx__fd_exchange_open(&state->exchange, group, card)
               : status;
}

static epx_status_t
vmm_attach(const epx_group_t *group, epx__reach_t *reach, int fd, int32_t rank,
           const epx__fabric_card_t *card)
{
    peers_state_t *state = reach->state;
    epx_status_t status = epx__cuda_block_import(
        group->device_ordinal, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
        (void *)(uintptr_t)fd, card->mapped_bytes, &state->blocks[rank]);

    return take_segment(group, reach, rank, card, status);
}

static epx_status_t
vmm_connect(epx_group_t *group, epx__reach_t *reach,
            const epx__fabric_card_t *cards, int64_t deadline_ns)
{
    peers_state_t *state = reach->state;
    epx_status_t status = epx__cuda_device_enter(group->device_ordinal);

    if (status != EPX_OK) {
        return status;
    }
    status = check_all(group, cards);
    if (status == EPX_OK) {
        status = epx__fd_exchange_run(&state->exchange, group, reach, cards,
                                      deadline_ns, vmm_attach);
    }
    epx__cuda_device_leave();
    return status;
}

const epx__fabric_ops_t epx__fabric_cuda_vmm = {
    .name = "cuda_vmm",
    .obstacle = vmm_obstacle,
    .open = vmm_open,
    .connect = vmm_connect,
    .close = peers_close,
};

/* ---- cuda_ipc ---- */

static const char *
ipc_obstacle(const epx__fabric_place_t *a, const epx__fabric_place_t *b)
{
    if (!epx__fabric_same_host(a, b)) {
        return "are on different hosts";
    }
    /* A process cannot open a handle of its own. */
    if (epx__fabric_same_process(a, b)) {
        return "are in one process";
    }
    return epx__cuda_kind_obstacle(a, b, EPX__MEMORY_IPC);
}

static epx_status_t
ipc_make(const epx_group_t *group, uint64_t bytes, void *shareable,
         epx__cuda_block_t *block)
{
    (void)group;
    return epx__cuda_block_malloc(bytes, shareable, block);
}

static epx_status_t
ipc_open(const epx_group_t *group, epx__reach_t *reach, uint64_t bytes,
         epx__fabric_card_t *card)
{
    return peers_open(group, reach, bytes, card, ipc_make, card->handle);
}

static epx_status_t
ipc_open_peer(const epx_group_t *group, const epx__fabric_card_t *card,
              epx__cuda_block_t *block)
{
    (void)group;
    return epx__cuda_block_open_ipc(card->handle, card->mapped_bytes, block);
}

static epx_status_t
ipc_connect(epx_group_t *group, epx__reach_t *reach,
            const epx__fabric_card_t *cards, int64_t deadline_ns)
{
    (void)deadline_ns;
    return peers_connect(group, reach, cards, ipc_open_peer);
}

const epx__fabric_ops_t epx__fabric_cuda_ipc = {
    .name = "cuda_ipc",
    .obstacle = ipc_obstacle,
    .open = ipc_open,
    .connect = ipc_connect,
    .close = peers_close,
};

/* ---- cuda_fabric ---- */

static const char *
handle_obstacle(const epx__fabric_place_t *a, const epx__fabric_place_t *b)
{
    return epx__cuda_kind_obstacle(a, b, EPX__MEMORY_FABRIC);
}

static epx_status_t
handle_make(const epx_group_t *group, uint64_t bytes, void *shareable,
            epx__cuda_block_t *block)
{
    return epx__cuda_block_create(group->device_ordinal,
                                  CU_MEM_HANDLE_TYPE_FABRIC, bytes, shareable,
                                  block);
}

static epx_status_t
handle_open(const epx_group_t *group, epx__reach_t *reach, uint64_t bytes,
            epx__fabric_card_t *card)
{
    return peers_open(group, reach, bytes, card, handle_make, card->handle);
}

static epx_status_t
handle_open_peer(const epx_group_t *group, const epx__fabric_card_t *card,
                 epx__cuda_block_t *block)
{
    CUmemFabricHandle handle;

    memcpy(&handle, card->handle, sizeof(handle));
    return epx__cuda_block_import(group->device_ordinal,
                                  CU_MEM_HANDLE_TYPE_FABRIC, &handle,
                                  card->mapped_bytes, block);
}

static epx_status_t
handle_connect(epx_group_t *group, epx__reach_t *reach,
               const epx__fabric_card_t *cards, int64_t deadline_ns)
{
    (void)deadline_ns;
    return peers_connect(group, reach, cards, handle_open_peer);
}

const epx__fabric_ops_t epx__fabric_cuda_handle = {
    .name = "cuda_fabric",
    .obstacle = handle_obstacle,
    .open = handle_open,
    .connect = handle_connect,
    .close = peers_close,
};
