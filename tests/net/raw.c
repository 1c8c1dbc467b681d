/* SPDX-License-Identifier: MIT */
#include "raw.h"

#include "net/ucx/ucx_settings.h"

#include <string.h>

struct raw {
    rank_t *rank;
    const epx__ucx_library_t *ucx;
    ucp_context_h context;
    ucp_worker_h worker;
    ucp_ep_h ep;
    char header[88];
    char *from;
    char *to;
    uint64_t received;
    size_t place; /* in the buffers, whose whole length is used */
    int pending;
};

enum { MAX_BYTES = 64 << 20, ADDRESS_BYTES = 2048 };

static size_t
next_place(raw_t *raw, size_t bytes)
{
    size_t place = raw->place + bytes <= MAX_BYTES ? raw->place : 0;

    raw->place = place + bytes;
    return place;
}

static void
on_received(void *request, ucs_status_t status, size_t length, void *user_data)
{
    raw_t *raw = user_data;

    (void)length;
    CHECK(status == UCS_OK, "raw receive");
    raw->ucx->ucp_request_free(request);
    raw->received++;
}

static ucs_status_t
on_message(void *argument, const void *header, size_t header_bytes, void *data,
           size_t bytes, const ucp_am_recv_param_t *param)
{
    raw_t *raw = argument;
    const ucp_request_param_t receive = {
        .op_attr_mask =
            UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA,
        .cb.recv_am = on_received,
        .user_data = raw,
    };

    char *to = raw->to + next_place(raw, bytes);

    memcpy(raw->header, header, header_bytes);
    if ((param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) != 0) {
        void *request = raw->ucx->ucp_am_recv_data_nbx(raw->worker, data, to,
                                                       bytes, &receive);

        raw->received += request == NULL;
        return UCS_INPROGRESS;
    }
    memcpy(to, data, bytes);
    raw->received++;
    return UCS_OK;
}

static void
on_sent(void *request, ucs_status_t status, void *user_data)
{
    raw_t *raw = user_data;

    CHECK(status == UCS_OK, "raw send");
    raw->ucx->ucp_request_free(request);
    raw->pending--;
}

static void
raw_send(raw_t *raw, size_t bytes, uint32_t flags)
{
    const ucp_request_param_t param = {
        .op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK |
                        UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_FLAGS,
        .cb.send = on_sent,
        .user_data = raw,
        .flags = flags,
    };
    void *request = raw->ucx->ucp_am_send_nbx(
        raw->ep, 0, raw->header, sizeof(raw->header),
        raw->from + next_place(raw, bytes), bytes, &param);

    CHECK(!UCS_PTR_IS_ERR(request), "raw send");
    raw->pending += request != NULL;
}

static void
raw_wait(raw_t *raw, uint64_t received)
{
    while (raw->received < received) {
        (void)raw->ucx->ucp_worker_progress(raw->worker);
    }
}

raw_t *
raw_open(rank_t *rank)
{
    raw_t *raw = calloc(1, sizeof(*raw));
    epx__net_config_t config = { .device = rank->world->device };
    ucp_params_t params = { .field_mask = UCP_PARAM_FIELD_FEATURES,
                            .features = UCP_FEATURE_AM };
    ucp_worker_params_t worker = { .field_mask =
                                       UCP_WORKER_PARAM_FIELD_THREAD_MODE,
                                   .thread_mode = UCS_THREAD_MODE_SINGLE };
    ucp_am_handler_param_t handler = { .field_mask =
                                           UCP_AM_HANDLER_PARAM_FIELD_ID |
                                           UCP_AM_HANDLER_PARAM_FIELD_CB |
                                           UCP_AM_HANDLER_PARAM_FIELD_ARG,
                                       .cb = on_message,
                                       .arg = raw };
    ucp_ep_params_t ep = { .field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS |
                                         UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE,
                           .err_mode = UCP_ERR_HANDLING_MODE_PEER };
    char own[ADDRESS_BYTES] = { 0 };
    char all[2][ADDRESS_BYTES];
    ucp_config_t *settings;
    ucp_address_t *address;
    size_t bytes;

    raw->rank = rank;
    raw->from = malloc(MAX_BYTES);
    raw->to = malloc(MAX_BYTES);
    memset(raw->from, 1, MAX_BYTES);
    memset(raw->to, 2, MAX_BYTES);
    CHECK_OK(epx__ucx_library(&raw->ucx));
    CHECK_OK(epx__ucx_settings(raw->ucx, &config, &settings));
    CHECK(raw->ucx->ucp_init_version(UCP_API_MAJOR, UCP_API_MINOR, &params,
                                     settings, &raw->context) == UCS_OK,
          "raw");
    raw->ucx->ucp_config_release(settings);
    CHECK(raw->ucx->ucp_worker_create(raw->context, &worker, &raw->worker) ==
              UCS_OK,
          "raw");
    CHECK(raw->ucx->ucp_worker_set_am_recv_handler(raw->worker, &handler) ==
              UCS_OK,
          "raw");
    CHECK(raw->ucx->ucp_worker_get_address(raw->worker, &address, &bytes) ==
                  UCS_OK &&
              bytes <= sizeof(own),
          "raw");
    memcpy(own, address, bytes);
    raw->ucx->ucp_worker_release_address(raw->worker, address);
    CHECK_OK(rank->allgather(rank->allgather_context, own, all, sizeof(own),
                             rank_deadline(rank)));
    ep.address = (void *)all[1 - rank->rank];
    CHECK(raw->ucx->ucp_ep_create(raw->worker, &ep, &raw->ep) == UCS_OK, "raw");
    return raw;
}

void
raw_close(raw_t *raw)
{
    const ucp_request_param_t param = { .op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS,
                                        .flags = UCP_EP_CLOSE_FLAG_FORCE };

    rank_barrier(raw->rank);
    (void)raw->ucx->ucp_ep_close_nbx(raw->ep, &param);
    for (int i = 0; i < 1000; i++) {
        (void)raw->ucx->ucp_worker_progress(raw->worker);
    }
    raw->ucx->ucp_worker_destroy(raw->worker);
    raw->ucx->ucp_cleanup(raw->context);
    free(raw->from);
    free(raw->to);
    free(raw);
}

double
raw_latency(raw_t *raw, size_t bytes, int trips, bool rendezvous)
{
    uint64_t base = raw->received;
    uint32_t flags =
        rendezvous ? UCP_AM_SEND_FLAG_RNDV : UCP_AM_SEND_FLAG_EAGER;
    int64_t start = epx__now_ns();

    for (int i = 0; i < trips; i++) {
        if (raw->rank->rank == 0) {
            raw_send(raw, bytes, flags);
        }
        raw_wait(raw, base + (uint64_t)i + 1);
        if (raw->rank->rank == 1) {
            raw_send(raw, bytes, flags);
        }
    }
    while (raw->pending > 0) {
        (void)raw->ucx->ucp_worker_progress(raw->worker);
    }
    return (double)(epx__now_ns() - start) * 1e-9 / trips / 2;
}

double
raw_bandwidth(raw_t *raw, size_t bytes, int messages, int under_way,
              bool rendezvous)
{
    uint64_t base = raw->received;
    uint32_t flags =
        rendezvous ? UCP_AM_SEND_FLAG_RNDV : UCP_AM_SEND_FLAG_EAGER;
    int64_t start;

    rank_barrier(raw->rank);
    start = epx__now_ns();
    if (raw->rank->rank == 0) {
        for (int i = 0; i < messages; i++) {
            while (raw->pending >= under_way) {
                (void)raw->ucx->ucp_worker_progress(raw->worker);
            }
            raw_send(raw, bytes, flags);
        }
        raw_wait(raw, base + 1); /* the answer to all */
    } else {
        raw_wait(raw, base + (uint64_t)messages);
        raw_send(raw, 1, 0);
    }
    while (raw->pending > 0) {
        (void)raw->ucx->ucp_worker_progress(raw->worker);
    }
    return (double)bytes * messages / ((double)(epx__now_ns() - start) * 1e-9);
}
