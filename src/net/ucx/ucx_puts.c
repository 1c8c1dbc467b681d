/* SPDX-License-Identifier: MIT */
/* The second wire: UCX's puts and flushes.  Neither its fences nor its atomics
 * are used, see ucx_library.h. */
#include "net/ucx/ucx_backend.h"

#include <stdlib.h>
#include <string.h>

struct ucx_share {
    ucp_mem_h memory;
    ucx_share_t *next;
};

struct ucx_reach {
    ucp_rkey_h key;
    ucx_reach_t *next;
};

/* --- Memory ------------------------------------------------------------ */

static ucs_status_t
pack_key(ucx_t *ucx, ucp_mem_h memory, epx__net_note_t *note)
{
    void *key = NULL;
    size_t bytes = 0;
    ucs_status_t status =
        ucx->library->ucp_rkey_pack(ucx->context, memory, &key, &bytes);

    if (status != UCS_OK) {
        return status;
    }
    if (bytes <= sizeof(note->key)) {
        memcpy(note->key, key, bytes);
        note->key_bytes = (uint32_t)bytes;
    } else {
        status = UCS_ERR_EXCEEDS_LIMIT;
    }
    ucx->library->ucp_rkey_buffer_release(key);
    return status;
}

/* Said, where UCX would have to find out. */
static ucs_memory_type_t
type_of(bool is_on_card)
{
    return is_on_card ? UCS_MEMORY_TYPE_CUDA : UCS_MEMORY_TYPE_HOST;
}

static epx_status_t
ucx_share(void *state, void *memory, uint64_t bytes, bool is_on_card,
          epx__net_note_t *note, void **share_p)
{
    ucx_t *ucx = state;
    const ucp_mem_map_params_t params = {
        .field_mask = UCP_MEM_MAP_PARAM_FIELD_ADDRESS |
                      UCP_MEM_MAP_PARAM_FIELD_LENGTH |
                      UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE,
        .address = memory,
        .length = bytes,
        .memory_type = type_of(is_on_card),
    };
    ucx_share_t *share = calloc(1, sizeof(*share));
    ucs_status_t status = UCS_ERR_NO_MEMORY;

    if (share != NULL) {
        status =
            ucx->library->ucp_mem_map(ucx->context, &params, &share->memory);
    }
    if (status == UCS_OK) {
        status = pack_key(ucx, share->memory, note);
        if (status != UCS_OK) {
            (void)ucx->library->ucp_mem_unmap(ucx->context, share->memory);
        }
    }
    if (status != UCS_OK) {
        free(share);
        return epx__fail(
            EPX_ERR_SYSTEM, "UCX cannot register %zu bytes for puts: %s",
            (size_t)bytes, ucx->library->ucs_status_string(status));
    }
    note->address = (uint64_t)(uintptr_t)memory;
    note->bytes = bytes;
    share->next = ucx->shares;
    ucx->shares = share;
    *share_p = share;
    return EPX_OK;
}

static void
ucx_unshare(void *state, void *argument)
{
    ucx_t *ucx = state;
    ucx_share_t *share = argument;
    ucx_share_t **at = &ucx->shares;

    while (*at != share) {
        at = &(*at)->next;
    }
    *at = share->next;
    (void)ucx->library->ucp_mem_unmap(ucx->context, share->memory);
    free(share);
}

void
epx__ucx_release_shares(ucx_t *ucx)
{
    while (ucx->shares != NULL) {
        ucx_unshare(ucx, ucx->shares);
    }
}

static void *
ucx_reach(void *state, int32_t rank, const epx__net_note_t *note, void *old)
{
    ucx_t *ucx = state;
    ucp_ep_h ep = ucx->peers[rank].ep;
    ucx_reach_t *reach = old;

    if (reach == NULL) {
        reach = calloc(1, sizeof(*reach));
        if (reach == NULL) {
            return NULL;
        }
        reach->next = ucx->reaches;
        ucx->reaches = reach;
    } else if (reach->key != NULL) {
        ucx->library->ucp_rkey_destroy(reach->key);
        reach->key = NULL;
    }
    if (ep == NULL || ucx->library->ucp_ep_rkey_unpack(ep, note->key,
                                                       &reach->key) != UCS_OK) {
        reach->key = NULL;
        return NULL;
    }
    return reach;
}

void
epx__ucx_release_reaches(ucx_t *ucx)
{
    while (ucx->reaches != NULL) {
        ucx_reach_t *reach = ucx->reaches;

        ucx->reaches = reach->next;
        if (reach->key != NULL) {
            ucx->library->ucp_rkey_destroy(reach->key);
        }
        free(reach);
    }
}

/* --- Puts -------------------------------------------------------------- */

static void
end_put(epx__net_put_t *put, ucs_status_t status)
{
    if (status != UCS_OK) {
        epx__ucx_note_failure(put->backend_data, status);
    }
    epx__net_put_ended(put, status == UCS_OK);
}

static void
on_put(void *request, ucs_status_t status, void *user_data)
{
    epx__net_put_t *put = user_data;
    ucx_peer_t *peer = put->backend_data;

    peer->ucx->num_requests--;
    peer->ucx->library->ucp_request_free(request);
    end_put(put, status);
}

static ucp_request_param_t
params_of(epx__net_put_t *put, bool is_on_card)
{
    return (ucp_request_param_t){
        .op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK |
                        UCP_OP_ATTR_FIELD_USER_DATA |
                        UCP_OP_ATTR_FIELD_MEMORY_TYPE,
        .cb.send = on_put,
        .user_data = put,
        .memory_type = type_of(is_on_card),
    };
}

static void
await_put(ucx_t *ucx, epx__net_put_t *put, ucs_status_ptr_t request)
{
    if (UCS_PTR_IS_PTR(request)) {
        ucx->num_requests++;
    } else {
        end_put(put, UCS_PTR_STATUS(request));
    }
}

static void
ucx_put(void *state, int32_t rank, void *reach, uint64_t address,
        const struct iovec *range, bool is_on_card, epx__net_put_t *put)
{
    ucx_t *ucx = state;
    ucx_peer_t *peer = &ucx->peers[rank];
    const ucp_request_param_t param = params_of(put, is_on_card);

    put->backend_data = peer;
    if (peer->ep == NULL) {
        end_put(put, UCS_ERR_CANCELED);
        return;
    }
    await_put(ucx, put,
              ucx->library->ucp_put_nbx(peer->ep, range->iov_base,
                                        range->iov_len, address,
                                        ((ucx_reach_t *)reach)->key, &param));
}

static void
ucx_flush(void *state, int32_t rank, epx__net_put_t *put)
{
    ucx_t *ucx = state;
    ucx_peer_t *peer = &ucx->peers[rank];
    const ucp_request_param_t param = params_of(put, false);

    put->backend_data = peer;
    if (peer->ep == NULL) {
        end_put(put, UCS_ERR_CANCELED);
        return;
    }
    await_put(ucx, put, ucx->library->ucp_ep_flush_nbx(peer->ep, &param));
}

const epx__net_puts_t epx__ucx_puts = {
    .are_native = epx__ucx_has_native_puts,
    .reaches_card = epx__ucx_reaches_card,
    .share = ucx_share,
    .unshare = ucx_unshare,
    .reach = ucx_reach,
    .put = ucx_put,
    .flush = ucx_flush,
};
