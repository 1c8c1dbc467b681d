/* SPDX-License-Identifier: MIT */
/*
 * UCX connects lazily, in exchanges of its own.  An endpoint that is closed in
 * the midst of one, while its peer's request is on the way, is answered for by
 * another endpoint, and the peer's UCX aborts its process for that (1.13.1). So
 * all ranks greet each other while the net is opened, when none of them can
 * fail any more by itself: once everybody has heard everybody, no exchange is
 * under way.
 */
#include "net/ucx/ucx_backend.h"

#define GREETING_ID 1

static ucs_status_t
on_greeting(void *argument, const void *header, size_t header_bytes, void *data,
            size_t bytes, const ucp_am_recv_param_t *param)
{
    ucx_t *ucx = argument;
    bool is_known = (param->recv_attr & UCP_AM_RECV_ATTR_FIELD_REPLY_EP) != 0;

    (void)header, (void)header_bytes, (void)data, (void)bytes;
    for (int32_t rank = 0; rank < ucx->num_ranks && is_known; rank++) {
        if (ucx->peers[rank].ep == param->reply_ep) {
            ucx->peers[rank].has_greeted = true;
        }
    }
    return UCS_OK;
}

ucs_status_t
epx__ucx_expect_greetings(ucx_t *ucx)
{
    const ucp_am_handler_param_t handler = {
        .field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID |
                      UCP_AM_HANDLER_PARAM_FIELD_CB |
                      UCP_AM_HANDLER_PARAM_FIELD_ARG,
        .id = GREETING_ID,
        .cb = on_greeting,
        .arg = ucx,
    };

    return ucx->library->ucp_worker_set_am_recv_handler(ucx->worker, &handler);
}

static void
on_greeted(void *request, ucs_status_t status, void *user_data)
{
    ucx_peer_t *peer = user_data;

    peer->ucx->num_requests--;
    peer->ucx->library->ucp_request_free(request);
    if (status != UCS_OK) {
        epx__ucx_note_failure(peer, status);
    }
}

static void
greet(ucx_peer_t *peer)
{
    const ucp_request_param_t param = {
        .op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK |
                        UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_FLAGS,
        .cb.send = on_greeted,
        .user_data = peer,
        .flags = UCP_AM_SEND_FLAG_REPLY | UCP_AM_SEND_FLAG_EAGER,
    };
    ucs_status_ptr_t request = peer->ucx->library->ucp_am_send_nbx(
        peer->ep, GREETING_ID, NULL, 0, NULL, 0, &param);

    if (UCS_PTR_IS_PTR(request)) {
        peer->ucx->num_requests++;
    } else if (UCS_PTR_IS_ERR(request)) {
        epx__ucx_note_failure(peer, UCS_PTR_STATUS(request));
    }
}

bool
epx__ucx_settle(void *state)
{
    ucx_t *ucx = state;

    for (int32_t rank = 0; rank < ucx->num_ranks && !ucx->is_settling; rank++) {
        if (ucx->peers[rank].ep != NULL) {
            greet(&ucx->peers[rank]);
        }
    }
    ucx->is_settling = true;
    for (int32_t rank = 0; rank < ucx->num_ranks; rank++) {
        if (ucx->peers[rank].ep != NULL && !ucx->peers[rank].has_greeted) {
            return false;
        }
    }
    return ucx->num_requests == 0;
}
