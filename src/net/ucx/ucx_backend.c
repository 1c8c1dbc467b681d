/* SPDX-License-Identifier: MIT */
/*
 * The first wire: messages as UCX's active messages, and nothing else of it: no
 * remote address crosses the wire, and the peer that an endpoint belongs to is
 * known from the exchange of addresses.  Long payloads go by rendezvous, which
 * lands them in place.  The second wire is in ucx_puts.c.
 */
#include "net/ucx/ucx_backend.h"
#include "core/clock.h"
#include "net/ucx/ucx_settings.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MESSAGE_ID 0

/* Beyond it pays to ask the receiver first where the bytes belong. */
#define EAGER_BYTES ((uint64_t)256 << 10)

/* How long requests of closed endpoints may take to end. */
#define CLOSE_NS (5 * EPX__NS_PER_SEC)

void
epx__ucx_note_failure(ucx_peer_t *peer, ucs_status_t status)
{
    if (peer->ep != NULL && !peer->has_failed) {
        peer->has_failed = true;
        peer->failure = status;
        peer->ucx->has_failures = true;
    }
}

static void
on_failure(void *argument, ucp_ep_h ep, ucs_status_t status)
{
    (void)ep;
    epx__ucx_note_failure(argument, status);
}

/* --- Sending ----------------------------------------------------------- */

static void
end_bundle(ucx_t *ucx, int32_t rank, epx__net_message_t *first)
{
    while (first != NULL) {
        epx__net_message_t *next = first->next;

        epx__net_sent(ucx->net, rank, first);
        first = next;
    }
}

static void
end_send(ucx_peer_t *peer, epx__net_message_t *first, ucs_status_t status)
{
    if (status != UCS_OK) {
        epx__ucx_note_failure(peer, status);
    }
    end_bundle(peer->ucx, peer->rank, first);
}

static void
on_sent(void *request, ucs_status_t status, void *user_data)
{
    epx__net_message_t *message = user_data;
    ucx_peer_t *peer = message->backend_data;

    peer->ucx->num_requests--;
    peer->ucx->library->ucp_request_free(request);
    end_send(peer, message, status);
}

/* What follows the first header, as one list. */
static const struct iovec *
list_bundle(ucx_peer_t *peer, epx__net_message_t *first, uint32_t *count_p)
{
    struct iovec *list =
        peer->bundles[first->header.sequence % EPX__NET_WINDOW];
    uint32_t count = 0;

    for (epx__net_message_t *m = first; m != NULL; m = m->next) {
        if (m != first) {
            list[count++] = (struct iovec){ &m->header, sizeof(m->header) };
        }
        for (uint32_t i = 0; i < m->num_ranges; i++) {
            list[count++] = m->ranges[i];
        }
    }
    *count_p = count;
    return list;
}

static void
ucx_post(void *state, int32_t rank, epx__net_message_t *message)
{
    ucx_t *ucx = state;
    ucx_peer_t *peer = &ucx->peers[rank];
    uint64_t bytes = message->header.bytes; /* a bundle is short */
    const struct iovec *ranges = message->ranges;
    uint32_t num_ranges = message->num_ranges;
    bool is_list = num_ranges > 1 || message->next != NULL;
    ucp_request_param_t param = {
        .op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK |
                        UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_FLAGS |
                        UCP_OP_ATTR_FIELD_DATATYPE,
        .cb.send = on_sent,
        .user_data = message,
        .flags = UCP_AM_SEND_FLAG_REPLY |
                 (bytes > EAGER_BYTES ? UCP_AM_SEND_FLAG_RNDV
                                      : UCP_AM_SEND_FLAG_EAGER),
        .datatype = is_list ? ucp_dt_make_iov() : ucp_dt_make_contig(1),
    };
    const void *from;
    size_t count;
    void *request;

    if (peer->ep == NULL) {
        end_bundle(ucx, rank, message);
        return;
    }
    if (message->next != NULL) {
        ranges = list_bundle(peer, message, &num_ranges);
    }
    from =
        is_list ? (const void *)ranges : (bytes > 0 ? ranges->iov_base : NULL);
    count = is_list ? num_ranges : bytes;
    message->backend_data = peer;
    request = ucx->library->ucp_am_send_nbx(
        peer->ep, MESSAGE_ID, &message->header, sizeof(message->header), from,
        count, &param);
    if (UCS_PTR_IS_PTR(request)) {
        ucx->num_requests++;
    } else {
        end_send(peer, message, UCS_PTR_STATUS(request));
    }
}

/* --- Receiving --------------------------------------------------------- */

static void
on_received(void *request, ucs_status_t status, size_t length, void *user_data)
{
    const ucx_landing_t *landing = user_data;
    ucx_t *ucx = landing->peer->ucx;

    (void)length;
    ucx->num_requests--;
    ucx->library->ucp_request_free(request);
    epx__net_landed(ucx->net, landing->peer->rank, landing->landing,
                    status == UCS_OK);
}

/* Whose endpoint it is; -1: of none that this rank made.  The header only says
 * where to look first. */
static int32_t
find_peer(const ucx_t *ucx, const ucp_am_recv_param_t *param,
          const void *header, size_t header_bytes)
{
    uint32_t guess;

    if ((param->recv_attr & UCP_AM_RECV_ATTR_FIELD_REPLY_EP) == 0) {
        return -1;
    }
    if (header_bytes == sizeof(epx__net_header_t)) {
        memcpy(&guess,
               (const char *)header + offsetof(epx__net_header_t, source),
               sizeof(guess));
        if (guess < (uint32_t)ucx->num_ranks &&
            ucx->peers[guess].ep == param->reply_ep) {
            return (int32_t)guess;
        }
    }
    for (int32_t rank = 0; rank < ucx->num_ranks; rank++) {
        if (ucx->peers[rank].ep == param->reply_ep) {
            return rank;
        }
    }
    return -1;
}

static ucs_status_t
receive_long(ucx_peer_t *peer, void *data, void *to, size_t bytes,
             uint64_t number)
{
    ucx_t *ucx = peer->ucx;
    ucx_landing_t *landing = &peer->landings[number % EPX__NET_WINDOW];
    const ucp_request_param_t param = {
        .op_attr_mask =
            UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA,
        .cb.recv_am = on_received,
        .user_data = landing,
    };
    void *request;

    *landing = (ucx_landing_t){ peer, number };
    request = ucx->library->ucp_am_recv_data_nbx(ucx->worker, data, to, bytes,
                                                 &param);
    if (UCS_PTR_IS_PTR(request)) {
        ucx->num_requests++;
    } else {
        epx__net_landed(ucx->net, peer->rank, number,
                        UCS_PTR_STATUS(request) == UCS_OK);
        if (UCS_PTR_IS_ERR(request)) {
            epx__ucx_note_failure(peer, UCS_PTR_STATUS(request));
        }
    }
    return UCS_INPROGRESS; /* the data is UCX's to release */
}

static ucs_status_t
on_message(void *argument, const void *header, size_t header_bytes, void *data,
           size_t bytes, const ucp_am_recv_param_t *param)
{
    ucx_t *ucx = argument;
    int32_t rank = find_peer(ucx, param, header, header_bytes);
    uint64_t landing;
    void *to = NULL;

    if ((param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) == 0) {
        epx__net_came_whole(ucx->net, rank, header, header_bytes, data, bytes);
        return UCS_OK;
    }
    landing = epx__net_came(ucx->net, rank, header, header_bytes, bytes, &to);
    return landing == EPX__NET_DROP
               ? UCS_OK
               : receive_long(&ucx->peers[rank], data, to, bytes, landing);
}

static void
report_failures(ucx_t *ucx)
{
    ucx->has_failures = false;
    for (int32_t rank = 0; rank < ucx->num_ranks; rank++) {
        ucx_peer_t *peer = &ucx->peers[rank];

        if (peer->has_failed) {
            peer->has_failed = false;
            epx__net_link_lost(ucx->net, rank,
                               ucx->library->ucs_status_string(peer->failure));
        }
    }
}

static bool
ucx_poll(void *state, int64_t now_ns, bool may_sleep, int64_t *wake_ns_p)
{
    ucx_t *ucx = state;
    bool any = ucx->library->ucp_worker_progress(ucx->worker) != 0;

    (void)now_ns;
    (void)wake_ns_p;
    if (ucx->has_failures) {
        report_failures(ucx);
        return true;
    }
    return any ||
           (may_sleep && ucx->library->ucp_worker_arm(ucx->worker) != UCS_OK);
}

/* --- Opening and closing ----------------------------------------------- */

static void
on_closed(void *request, ucs_status_t status, void *user_data)
{
    ucx_t *ucx = user_data;

    (void)status;
    ucx->num_requests--;
    ucx->library->ucp_request_free(request);
}

static void
ucx_cancel_peer(void *state, int32_t rank)
{
    ucx_t *ucx = state;
    ucx_peer_t *peer = &ucx->peers[rank];
    const ucp_request_param_t param = {
        .op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS | UCP_OP_ATTR_FIELD_CALLBACK |
                        UCP_OP_ATTR_FIELD_USER_DATA,
        .flags = UCP_EP_CLOSE_FLAG_FORCE,
        .cb.send = on_closed,
        .user_data = ucx,
    };
    ucp_ep_h ep = peer->ep;

    peer->ep = NULL;
    if (ep != NULL &&
        UCS_PTR_IS_PTR(ucx->library->ucp_ep_close_nbx(ep, &param))) {
        ucx->num_requests++;
    }
}

static void
ucx_close(void *state)
{
    ucx_t *ucx = state;
    int64_t deadline = epx__now_ns() + CLOSE_NS;

    for (int32_t rank = 0; ucx->peers != NULL && rank < ucx->num_ranks;
         rank++) {
        ucx_cancel_peer(ucx, rank);
    }
    while (ucx->num_requests > 0 && epx__now_ns() < deadline) {
        (void)ucx->library->ucp_worker_progress(ucx->worker);
    }
    epx__ucx_release_reaches(ucx);
    if (ucx->worker != NULL) {
        ucx->library->ucp_worker_destroy(ucx->worker);
    }
    epx__ucx_release_shares(ucx);
    if (ucx->context != NULL) {
        ucx->library->ucp_cleanup(ucx->context);
    }
    free(ucx->peers);
    free(ucx);
}

static epx_status_t
failed(const ucx_t *ucx, const char *what, ucs_status_t status)
{
    return epx__fail(EPX_ERR_SYSTEM, "UCX cannot %s: %s", what,
                     ucx->library->ucs_status_string(status));
}

static epx_status_t
make_context(ucx_t *ucx, const epx__net_config_t *config)
{
    const ucp_params_t params = {
        .field_mask =
            UCP_PARAM_FIELD_FEATURES | UCP_PARAM_FIELD_ESTIMATED_NUM_EPS,
        .features = UCP_FEATURE_AM | UCP_FEATURE_WAKEUP |
                    (config->wire == EPX__NET_WIRE_RMA ? UCP_FEATURE_RMA : 0),
        .estimated_num_eps = (size_t)config->num_ranks,
    };
    ucp_config_t *settings = NULL;
    epx_status_t status = epx__ucx_settings(ucx->library, config, &settings);
    ucs_status_t made;

    if (status != EPX_OK) {
        return status;
    }
    made = ucx->library->ucp_init_version(UCP_API_MAJOR, UCP_API_MINOR, &params,
                                          settings, &ucx->context);
    ucx->library->ucp_config_release(settings);
    if (made == UCS_OK) {
        return EPX_OK;
    }
    return epx__fail(EPX_ERR_SYSTEM,
                     "UCX cannot use the device \"%.60s\" with the transports "
                     "\"%.60s\": %s",
                     config->device != NULL ? config->device : "(default)",
                     config->transports != NULL ? config->transports
                                                : "(default)",
                     ucx->library->ucs_status_string(made));
}

static epx_status_t
make_worker(ucx_t *ucx)
{
    const ucp_worker_params_t params = {
        .field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE,
        .thread_mode = UCS_THREAD_MODE_SERIALIZED,
    };
    const ucp_am_handler_param_t handler = {
        .field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID |
                      UCP_AM_HANDLER_PARAM_FIELD_CB |
                      UCP_AM_HANDLER_PARAM_FIELD_ARG,
        .id = MESSAGE_ID,
        .cb = on_message,
        .arg = ucx,
    };
    ucs_status_t status =
        ucx->library->ucp_worker_create(ucx->context, &params, &ucx->worker);

    if (status == UCS_OK) {
        status =
            ucx->library->ucp_worker_set_am_recv_handler(ucx->worker, &handler);
    }
    if (status == UCS_OK) {
        status = epx__ucx_expect_greetings(ucx);
    }
    return status == UCS_OK ? EPX_OK : failed(ucx, "make a worker", status);
}

static epx_status_t
tell_address(ucx_t *ucx, void *address, size_t *address_bytes_p, int *fd_p)
{
    ucp_address_t *own = NULL;
    size_t bytes = 0;
    ucs_status_t status =
        ucx->library->ucp_worker_get_address(ucx->worker, &own, &bytes);
    bool fits = bytes <= EPX__NET_ADDRESS_BYTES;

    if (status == UCS_OK) {
        if (fits) {
            memcpy(address, own, bytes);
            *address_bytes_p = bytes;
        }
        ucx->library->ucp_worker_release_address(ucx->worker, own);
        status = ucx->library->ucp_worker_get_efd(ucx->worker, fd_p);
    }
    if (status != UCS_OK) {
        return failed(ucx, "tell its address", status);
    }
    return fits ? EPX_OK
                : epx__fail(EPX_ERR_UNSUPPORTED,
                            "UCX's address has %zu bytes, at most %d are "
                            "exchanged: name fewer transports or devices",
                            bytes, EPX__NET_ADDRESS_BYTES);
}

static void
ucx_prepare(void)
{
    const epx__ucx_library_t *library;

    (void)epx__ucx_library(&library); /* ucx_open tells why not */
}

static epx_status_t
ucx_open(epx__net_t *net, const epx__net_config_t *config, void **state_p,
         void *address, size_t *address_bytes_p, int *fd_p)
{
    const epx__ucx_library_t *library;
    epx_status_t status = epx__ucx_library(&library);
    ucx_t *ucx;

    if (status != EPX_OK) {
        return status;
    }
    ucx = calloc(1, sizeof(*ucx));
    if (ucx == NULL) {
        return epx__fail(EPX_ERR_NO_MEMORY, "no memory for UCX");
    }
    *state_p = ucx; /* and so closed, whatever follows */
    ucx->library = library;
    ucx->net = net;
    ucx->num_ranks = config->num_ranks;
    ucx->peers = calloc((size_t)config->num_ranks, sizeof(*ucx->peers));
    if (ucx->peers == NULL) {
        return epx__fail(EPX_ERR_NO_MEMORY, "no memory for %d endpoints",
                         config->num_ranks);
    }
    for (int32_t rank = 0; rank < config->num_ranks; rank++) {
        ucx->peers[rank].ucx = ucx;
        ucx->peers[rank].rank = rank;
    }
    if (config->card_net.num_channels > 0 && config->gpudirect != 0 &&
        config->wire == EPX__NET_WIRE_RMA) {
        epx__ucx_expect_card();
    }
    status = make_context(ucx, config);
    if (status == EPX_OK) {
        status = make_worker(ucx);
    }
    return status == EPX_OK ? tell_address(ucx, address, address_bytes_p, fd_p)
                            : status;
}

static epx_status_t
ucx_connect(void *state, int32_t rank, const void *address,
            size_t address_bytes)
{
    ucx_t *ucx = state;
    const ucp_ep_params_t params = {
        .field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS |
                      UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE |
                      UCP_EP_PARAM_FIELD_ERR_HANDLER,
        .address = address,
        .err_mode = UCP_ERR_HANDLING_MODE_PEER,
        .err_handler = { .cb = on_failure, .arg = &ucx->peers[rank] },
    };
    ucs_status_t status;

    if (address_bytes == 0) {
        return epx__fail(EPX_ERR_PEER_DATA, "rank %d has no address", rank);
    }
    status =
        ucx->library->ucp_ep_create(ucx->worker, &params, &ucx->peers[rank].ep);
    return status == UCS_OK
               ? EPX_OK
               : epx__fail(EPX_ERR_SYSTEM, "UCX cannot reach rank %d: %s", rank,
                           ucx->library->ucs_status_string(status));
}

const epx__net_backend_t epx__net_ucx = {
    .name = "ucx",
    .piece_bytes = epx__ucx_piece_bytes,
    .prepare = ucx_prepare,
    .open = ucx_open,
    .connect = ucx_connect,
    .settle = epx__ucx_settle,
    .post = ucx_post,
    .poll = ucx_poll,
    .cancel_peer = ucx_cancel_peer,
    .close = ucx_close,
    .puts = &epx__ucx_puts,
};
