/* SPDX-License-Identifier: MIT */
#include "bench_ucx.h"

#include "bench_link.h"
#include "bench_op.h"
#include "bench_ucx_library.h"

#include <sched.h>
#include <stdlib.h>
#include <string.h>

/* As EPX cuts what it sends over TCP, and on other transports; and how many are
 * under way. */
#define EAGER_BYTES ((size_t)256 << 10)
#define PIECE_BYTES ((size_t)1 << 20)
#define MAX_PENDING 16

/* In front of every message. */
struct header {
    uint32_t source;
    uint32_t is_end; /* all puts are there */
    uint64_t offset;
};

/* What a rank tells the others, in the shared memory of the gather. */
struct card {
    uint64_t to; /* where puts go */
    uint32_t address_bytes;
    uint32_t rkey_bytes;
    uint8_t bytes[BENCH_GATHER_BYTES - 16];
};

/* In one operation, between this rank and another; offsets are those in the
 * sender's and in the receiver's buffers. */
struct part {
    uint64_t send_bytes;
    uint64_t send_offset;
    uint64_t send_remote; /* the offset in the other's buffer */
    uint64_t recv_bytes;
    uint64_t recv_offset;
};

struct link {
    ucp_ep_h ep;
    ucp_rkey_h rkey;
    uint64_t to;
    struct part parts[2]; /* dispatch, combine */
};

struct bench_ucx {
    const struct bench_rank *rank;
    const struct bench_run *run;
    struct bench_ucx_library library;
    ucp_context_h context;
    ucp_worker_h worker;
    ucp_mem_h memory;
    struct link *links; /* [R] */
    char *from;
    char *to;
    uint64_t bytes;         /* of each */
    struct header *headers; /* of one transfer, which UCX may read late */
    size_t num_headers;
    int combine; /* which operation is under way */
    uint64_t received;
    uint32_t ends;
    int32_t pending;
    uint64_t exchanges;
};

__attribute__((noreturn)) static void
fail(const struct bench_ucx *self, const char *what, ucs_status_t status)
{
    bench_rank_fail(self->run, self->rank->rank, "UCX cannot %s: %s", what,
                    self->library.ucs_status_string(status));
}

static void
check(const struct bench_ucx *self, ucs_status_t status, const char *what)
{
    if (status != UCS_OK) {
        fail(self, what, status);
    }
}

static void
on_sent(void *request, ucs_status_t status, void *user_data)
{
    struct bench_ucx *self = user_data;
    check(self, status, "send");
    self->library.ucp_request_free(request);
    self->pending--;
}

static void
note(struct bench_ucx *self, void *request)
{
    if (UCS_PTR_IS_ERR(request)) {
        fail(self, "send", UCS_PTR_STATUS(request));
    }
    self->pending += request != NULL;
}

static void
on_received(void *request, ucs_status_t status, size_t length, void *user_data)
{
    struct bench_ucx *self = user_data;
    check(self, status, "receive");
    self->library.ucp_request_free(request);
    self->received += length;
}

static ucs_status_t
on_message(void *argument, const void *header_ptr, size_t header_bytes,
           void *data, size_t bytes, const ucp_am_recv_param_t *param)
{
    struct bench_ucx *self = argument;
    struct header header;
    if (header_bytes != sizeof header) {
        return UCS_OK;
    }
    memcpy(&header, header_ptr, sizeof header);
    self->ends += header.is_end;
    if (header.source >= (uint32_t)self->run->options->ranks || !bytes) {
        return UCS_OK;
    }
    char *to = self->to +
               self->links[header.source].parts[self->combine].recv_offset +
               header.offset;
    if (!(param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV)) {
        memcpy(to, data, bytes);
        self->received += bytes;
        return UCS_OK;
    }
    const ucp_request_param_t receive = { .op_attr_mask =
                                              UCP_OP_ATTR_FIELD_CALLBACK |
                                              UCP_OP_ATTR_FIELD_USER_DATA,
                                          .cb.recv_am = on_received,
                                          .user_data = self };
    void *request = self->library.ucp_am_recv_data_nbx(self->worker, data, to,
                                                       bytes, &receive);
    if (UCS_PTR_IS_ERR(request)) {
        fail(self, "receive", UCS_PTR_STATUS(request));
    }
    self->received += request ? 0 : bytes;
    return UCS_INPROGRESS;
}

static void
progress(struct bench_ucx *self)
{
    if (!self->library.ucp_worker_progress(self->worker) &&
        !self->run->shared->ranks.spin) {
        sched_yield();
    }
}

/* ---- transfers ---- */

static void
send_message(struct bench_ucx *self, struct link *link, uint64_t offset,
             const void *from, size_t bytes, enum bench_way way)
{
    struct header *header = &self->headers[self->num_headers++];
    const ucp_request_param_t param = {
        .op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK |
                        UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_FLAGS,
        .cb.send = on_sent,
        .user_data = self,
        .flags = way == BENCH_WAY_RENDEZVOUS ? UCP_AM_SEND_FLAG_RNDV
                                             : UCP_AM_SEND_FLAG_EAGER
    };
    *header = (struct header){ .source = (uint32_t)self->rank->rank,
                               .is_end = way == BENCH_WAY_PUT,
                               .offset = offset };
    note(self, self->library.ucp_am_send_nbx(
                   link->ep, 0, header, sizeof *header, from, bytes, &param));
}

static size_t
piece_bytes(enum bench_way way)
{
    return way == BENCH_WAY_EAGER ? EAGER_BYTES : PIECE_BYTES;
}

/* What lies from `offset` on, as much as goes into a piece. */
static void
send_piece(struct bench_ucx *self, struct link *link, uint64_t offset,
           enum bench_way way)
{
    const struct part *part = &link->parts[self->combine];
    uint64_t left = part->send_bytes - offset;
    size_t most = piece_bytes(way);
    size_t bytes = left < most ? left : most;
    const char *from = self->from + part->send_offset + offset;
    const ucp_request_param_t param = { .op_attr_mask =
                                            UCP_OP_ATTR_FIELD_CALLBACK |
                                            UCP_OP_ATTR_FIELD_USER_DATA,
                                        .cb.send = on_sent,
                                        .user_data = self };
    while (self->pending >= MAX_PENDING) {
        progress(self);
    }
    if (way != BENCH_WAY_PUT) {
        send_message(self, link, offset, from, bytes, way);
        return;
    }
    note(self, self->library.ucp_put_nbx(link->ep, from, bytes,
                                         link->to + part->send_remote + offset,
                                         link->rkey, &param));
}

/* Puts are there once they are flushed, and the other hears of it then. */
static void
end_puts(struct bench_ucx *self)
{
    const ucp_request_param_t param = { .op_attr_mask =
                                            UCP_OP_ATTR_FIELD_CALLBACK |
                                            UCP_OP_ATTR_FIELD_USER_DATA,
                                        .cb.send = on_sent,
                                        .user_data = self };
    for (int32_t r = 0; r < self->run->options->ranks; r++) {
        if (self->links[r].parts[self->combine].send_bytes) {
            note(self,
                 self->library.ucp_ep_flush_nbx(self->links[r].ep, &param));
        }
    }
    while (self->pending > 0) {
        progress(self);
    }
    for (int32_t r = 0; r < self->run->options->ranks; r++) {
        if (self->links[r].parts[self->combine].send_bytes) {
            send_message(self, &self->links[r], 0, NULL, 0, BENCH_WAY_PUT);
        }
    }
}

static void
send_all(struct bench_ucx *self, enum bench_way way)
{
    bool any = true;
    for (uint64_t at = 0; any; at += piece_bytes(way)) {
        any = false;
        for (int32_t r = 0; r < self->run->options->ranks; r++) {
            struct link *link = &self->links[r];
            if (at < link->parts[self->combine].send_bytes) {
                send_piece(self, link, at, way);
                any = true;
            }
        }
    }
    if (way == BENCH_WAY_PUT) {
        end_puts(self);
    }
}

static bool
has_all(const struct bench_ucx *self, enum bench_way way)
{
    uint64_t bytes = 0;
    uint32_t ends = 0;
    for (int32_t r = 0; r < self->run->options->ranks; r++) {
        uint64_t its = self->links[r].parts[self->combine].recv_bytes;
        bytes += its;
        ends += its > 0;
    }
    return way == BENCH_WAY_PUT ? self->ends == ends : self->received == bytes;
}

static struct bench_span
exchange(struct bench_ucx *self, int combine, enum bench_way way)
{
    struct bench_shared *shared = self->run->shared;
    struct bench_span span;
    self->combine = combine;
    self->received = 0;
    self->ends = 0;
    self->num_headers = 0;
    bench_barrier_wait(&shared->ranks, BENCH_NO_DEADLINE);
    span.start = bench_now_ns();
    send_all(self, way);
    while (self->pending > 0 || !has_all(self, way)) {
        progress(self);
    }
    span.end = bench_now_ns();
    /* What others wait for may need this rank to go on. */
    self->exchanges++;
    atomic_fetch_add(&shared->transferred, 1);
    while (atomic_load(&shared->transferred) <
           self->exchanges * (uint64_t)self->run->options->ranks) {
        progress(self);
    }
    return span;
}

void
bench_ucx_block(struct bench_ucx *self, int32_t block)
{
    if (!self) {
        return;
    }
    const struct bench_run *run = self->run;
    int32_t begin = bench_block_start(run, block);
    int32_t end = bench_block_start(run, block + 1);
    for (int i = 0; i < 2 * BENCH_NUM_WAYS; i++) {
        int combine = i / BENCH_NUM_WAYS;
        enum bench_way way = (enum bench_way)(i % BENCH_NUM_WAYS);
        const struct bench_series *series =
            &run->shared
                 ->transfers[combine ? BENCH_COMBINE : BENCH_DISPATCH][way];
        for (int32_t n = 0; n < run->options->warmup; n++) {
            exchange(self, combine, way);
        }
        for (int32_t n = begin; n < end; n++) {
            series->spans[(size_t)n * (size_t)series->parties +
                          (size_t)self->rank->rank] =
                exchange(self, combine, way);
        }
    }
}

/* ---- opening and closing ---- */

/* Rank r's rows for its rail on a host, and back. */
static void
add_rows(struct bench_ucx *self, int32_t r, int32_t rail, int combine,
         uint64_t bytes, uint64_t *sent, uint64_t *received)
{
    int32_t own = self->rank->rank;
    int32_t source = combine ? rail : r;
    int32_t sink = combine ? r : rail;
    uint64_t at = received[sink];
    received[sink] += bytes;
    if (source == own) {
        struct part *part = &self->links[sink].parts[combine];
        part->send_bytes = bytes;
        part->send_offset = *sent;
        part->send_remote = at;
        *sent += bytes;
    }
    if (sink == own) {
        struct part *part = &self->links[source].parts[combine];
        part->recv_bytes = bytes;
        part->recv_offset = at;
    }
}

/* Every rank works out the same of all. */
static void
plan_parts(struct bench_ucx *self, int combine)
{
    const struct bench_options *o = self->run->options;
    uint64_t *bytes = calloc((size_t)o->hosts, sizeof *bytes);
    uint64_t *received = calloc((size_t)o->ranks, sizeof *received);
    uint64_t sent = 0;
    for (int32_t r = 0; r < o->ranks; r++) {
        if (!bytes || !received ||
            !bench_link_rows(&self->run->shape, self->run->routing, r, combine,
                             bytes)) {
            bench_rank_fail(self->run, self->rank->rank,
                            "no memory for the routing");
        }
        for (int32_t h = 0; h < o->hosts; h++) {
            if (bytes[h]) {
                add_rows(self, r, bench_link_rail(o, r, h), combine, bytes[h],
                         &sent, received);
            }
        }
    }
    for (int32_t r = 0; r < o->ranks; r++) {
        self->bytes = received[r] > self->bytes ? received[r] : self->bytes;
    }
    self->bytes = sent > self->bytes ? sent : self->bytes;
    free(received);
    free(bytes);
}

static void
open_worker(struct bench_ucx *self)
{
    const ucp_worker_params_t params = { .field_mask =
                                             UCP_WORKER_PARAM_FIELD_THREAD_MODE,
                                         .thread_mode =
                                             UCS_THREAD_MODE_SINGLE };
    const ucp_am_handler_param_t handler = { .field_mask =
                                                 UCP_AM_HANDLER_PARAM_FIELD_ID |
                                                 UCP_AM_HANDLER_PARAM_FIELD_CB |
                                                 UCP_AM_HANDLER_PARAM_FIELD_ARG,
                                             .cb = on_message,
                                             .arg = self };
    const ucp_mem_map_params_t map = { .field_mask =
                                           UCP_MEM_MAP_PARAM_FIELD_ADDRESS |
                                           UCP_MEM_MAP_PARAM_FIELD_LENGTH,
                                       .address = self->to,
                                       .length = self->bytes };
    check(
        self,
        self->library.ucp_worker_create(self->context, &params, &self->worker),
        "make a worker");
    check(self,
          self->library.ucp_worker_set_am_recv_handler(self->worker, &handler),
          "take messages");
    check(self, self->library.ucp_mem_map(self->context, &map, &self->memory),
          "register memory");
}

/* This rank's card goes where others see it. */
static void
tell(struct bench_ucx *self)
{
    struct card *card =
        (struct card *)(void *)(self->run->shared->gather +
                                (size_t)self->rank->rank * BENCH_GATHER_BYTES);
    ucp_address_t *address = NULL;
    void *rkey = NULL;
    size_t address_bytes = 0;
    size_t rkey_bytes = 0;
    check(self,
          self->library.ucp_worker_get_address(self->worker, &address,
                                               &address_bytes),
          "tell its address");
    check(self,
          self->library.ucp_rkey_pack(self->context, self->memory, &rkey,
                                      &rkey_bytes),
          "tell its memory");
    if (address_bytes + rkey_bytes > sizeof card->bytes) {
        bench_rank_fail(self->run, self->rank->rank,
                        "UCX's address has %zu bytes; allowed: %zu",
                        address_bytes, sizeof card->bytes - rkey_bytes);
    }
    card->to = (uint64_t)(uintptr_t)self->to;
    card->address_bytes = (uint32_t)address_bytes;
    card->rkey_bytes = (uint32_t)rkey_bytes;
    memcpy(card->bytes, address, address_bytes);
    memcpy(card->bytes + address_bytes, rkey, rkey_bytes);
    self->library.ucp_rkey_buffer_release(rkey);
    self->library.ucp_worker_release_address(self->worker, address);
}

static void
connect_to(struct bench_ucx *self, int32_t peer)
{
    const struct card *card =
        (const struct card *)(const void *)(self->run->shared->gather +
                                            (size_t)peer * BENCH_GATHER_BYTES);
    const ucp_ep_params_t params = {
        .field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS |
                      UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE,
        .address = (const ucp_address_t *)(const void *)card->bytes,
        .err_mode = UCP_ERR_HANDLING_MODE_PEER
    };
    struct link *link = &self->links[peer];
    link->to = card->to;
    check(self, self->library.ucp_ep_create(self->worker, &params, &link->ep),
          "reach a peer");
    check(self,
          self->library.ucp_ep_rkey_unpack(
              link->ep, card->bytes + card->address_bytes, &link->rkey),
          "reach a peer's memory");
}

struct bench_ucx *
bench_ucx_open(const struct bench_rank *rank)
{
    const struct bench_run *run = rank->run;
    const struct bench_options *o = run->options;
    char device[IF_NAMESIZE];
    struct bench_error error = { "no memory for UCX's links" };
    struct bench_ucx *self = o->vs_ucx ? calloc(1, sizeof *self) : NULL;
    if (!o->vs_ucx) {
        return NULL;
    }
    if (!self ||
        !(self->links = calloc((size_t)o->ranks, sizeof(struct link))) ||
        !bench_ucx_load(&self->library, &error) ||
        !bench_link_device(o, device, &error) ||
        !bench_ucx_context(&self->library, device, &self->context, &error)) {
        bench_rank_fail(run, rank->rank, "%s", error.text);
    }
    self->rank = rank;
    self->run = run;
    self->bytes = 64;
    plan_parts(self, 0);
    plan_parts(self, 1);
    self->from = malloc(self->bytes);
    self->to = malloc(self->bytes);
    self->headers = calloc(self->bytes / EAGER_BYTES + 2 * (size_t)o->ranks,
                           sizeof *self->headers);
    if (!self->from || !self->to || !self->headers) {
        bench_rank_fail(run, rank->rank, "no memory for %llu bytes",
                        2 * (unsigned long long)self->bytes);
    }
    memset(self->from, 1, self->bytes);
    memset(self->to, 2, self->bytes);
    open_worker(self);
    tell(self);
    bench_barrier_wait(&run->shared->ranks, BENCH_NO_DEADLINE);
    for (int32_t r = 0; r < o->ranks; r++) {
        const struct part *parts = self->links[r].parts;
        if (parts[0].send_bytes || parts[1].send_bytes) {
            connect_to(self, r);
        }
    }
    bench_barrier_wait(&run->shared->ranks, BENCH_NO_DEADLINE);
    return self;
}

void
bench_ucx_close(struct bench_ucx *self)
{
    const ucp_request_param_t param = { .op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS,
                                        .flags = UCP_EP_CLOSE_FLAG_FORCE };
    if (!self) {
        return;
    }
    bench_barrier_wait(&self->run->shared->ranks, BENCH_NO_DEADLINE);
    for (int32_t r = 0; r < self->run->options->ranks; r++) {
        struct link *link = &self->links[r];
        if (!link->ep) {
            continue;
        }
        self->library.ucp_rkey_destroy(link->rkey);
        void *request = self->library.ucp_ep_close_nbx(link->ep, &param);
        if (UCS_PTR_IS_PTR(request)) {
            self->library.ucp_request_free(request);
        }
    }
    (void)self->library.ucp_mem_unmap(self->context, self->memory);
    self->library.ucp_worker_destroy(self->worker);
    self->library.ucp_cleanup(self->context);
    free(self->headers);
    free(self->links);
    free(self->from);
    free(self->to);
    free(self);
}
