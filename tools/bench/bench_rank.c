/* SPDX-License-Identifier: MIT */
#include "bench_rank.h"

#include "bench_link.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define LOST_AFTER_NS UINT64_C(10000000000)

void
bench_rank_check(const struct bench_rank *self, epx_status_t status)
{
    if (status) {
        bench_rank_fail(self->run, self->rank, "%s", epx_last_error());
    }
}

epx_stream_t
bench_rank_stream(const struct bench_rank *self)
{
    return self->card ? self->card->stream : NULL;
}

void
bench_rank_synchronize(const struct bench_rank *self)
{
    if (self->card) {
        self->card->ops->synchronize(self->card);
        bench_rank_check(self, epx_group_status(self->group));
    }
}

/* ---- memory ---- */

/* Bytes of an array; an empty one still gets an address. */
static size_t
array_bytes(int64_t rows, size_t row_bytes)
{
    size_t bytes = (size_t)rows * row_bytes;
    return bytes ? bytes : 1;
}

static void *
map_host(const struct bench_rank *self, size_t bytes)
{
    void *ptr = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (ptr == MAP_FAILED) {
        bench_rank_fail(self->run, self->rank, "cannot map %zu bytes: %s",
                        bytes, strerror(errno));
    }
    return ptr;
}

void *
bench_rank_take(const struct bench_rank *self, int64_t rows, size_t row_bytes)
{
    size_t bytes = array_bytes(rows, row_bytes);
    void *ptr = NULL;
    if (!self->run->options->buffers_outside) {
        bench_rank_check(self, epx_mem_alloc(self->group, bytes, &ptr));
        return ptr;
    }
    return self->card ? self->card->ops->take(self->card, bytes)
                      : map_host(self, bytes);
}

void
bench_rank_give_back(const struct bench_rank *self, void *ptr, int64_t rows,
                     size_t row_bytes)
{
    if (!ptr) {
        return;
    }
    if (!self->run->options->buffers_outside) {
        bench_rank_check(self, epx_mem_free(self->group, ptr));
    } else if (self->card) {
        self->card->ops->give_back(self->card, ptr);
    } else {
        munmap(ptr, array_bytes(rows, row_bytes));
    }
}

/* The routing of a CPU group is the host's own; peers never touch it. */
static bool
always_outside(const struct bench_rank *self, int id)
{
    return !self->card && (id == BENCH_IDX || id == BENCH_WEIGHTS);
}

static void
take_array(struct bench_rank *self, int id)
{
    struct bench_array *array = &self->arrays[id];
    size_t bytes = array_bytes(array->rows, array->row_bytes);
    if (!array->row_bytes) {
        return;
    }
    if (self->card || always_outside(self, id)) {
        array->host = map_host(self, bytes);
    }
    if (always_outside(self, id)) {
        array->place = array->host;
        return;
    }
    array->place = bench_rank_take(self, array->rows, array->row_bytes);
    array->host = self->card ? array->host : array->place;
}

static void
give_array_back(struct bench_rank *self, int id)
{
    struct bench_array *array = &self->arrays[id];
    if (self->card || always_outside(self, id)) {
        munmap(array->host, array_bytes(array->rows, array->row_bytes));
    }
    if (!always_outside(self, id)) {
        bench_rank_give_back(self, array->place, array->rows, array->row_bytes);
    }
}

static void
list_arrays(struct bench_rank *self)
{
    const struct bench_shape *shape = &self->run->shape;
    size_t topk = (size_t)self->run->routing->topk;
    int64_t tokens = self->tokens;
    int64_t rows = shape->recv_rows;
    bool by_rank = self->run->options->layout == EPX_LAYOUT_RANK_MAJOR;
    const struct bench_array arrays[BENCH_NUM_ARRAYS] = {
        [BENCH_IDX] = { .rows = tokens, .row_bytes = topk * sizeof(int64_t) },
        [BENCH_WEIGHTS] = { .rows = tokens, .row_bytes = topk * sizeof(float) },
        [BENCH_X] = { .rows = tokens, .row_bytes = shape->x_bytes },
        [BENCH_SCALES] = { .rows = tokens,
                           .row_bytes = 4 * (size_t)shape->given_scales },
        [BENCH_RECV_X] = { .rows = rows, .row_bytes = shape->sent_bytes },
        [BENCH_RECV_SCALES] = { .rows = rows,
                                .row_bytes = 4 * (size_t)shape->sent_scales },
        [BENCH_RECV_IDX] = { .rows = rows,
                             .row_bytes =
                                 by_rank ? topk * sizeof(int64_t) : 0 },
        [BENCH_RECV_WEIGHTS] = { .rows = rows,
                                 .row_bytes = by_rank ? topk * sizeof(float)
                                                      : sizeof(float) },
        [BENCH_OUTPUTS] = { .rows = rows, .row_bytes = shape->combine_bytes },
        [BENCH_OUT] = { .rows = tokens, .row_bytes = shape->combine_bytes },
    };
    memcpy(self->arrays, arrays, sizeof arrays);
}

/* ---- opening and closing ---- */

static void
open_group(struct bench_rank *self, const epx_bootstrap_t *bootstrap)
{
    const struct bench_options *o = self->run->options;
    struct bench_shared *shared = self->run->shared;
    epx_group_info_t info = EPX_GROUP_INFO_INIT;
    epx_group_config_t config = EPX_GROUP_CONFIG_INIT;
    epx_network_config_t network = EPX_NETWORK_CONFIG_INIT;
    char device[IF_NAMESIZE];
    struct bench_error error;
    config.bootstrap = bootstrap;
    if (o->hosts > 1) {
        if (!bench_link_device(o, device, &error)) {
            bench_rank_fail(self->run, self->rank, "%s", error.text);
        }
        config.node = 1 + bench_host_of(o, self->rank);
        config.network = &network;
        network.device = device;
        /* Peers keep the cores busy; the figures show it, and that is all. */
        config.lost_after_ns = LOST_AFTER_NS;
        if (self->rank == 0) {
            memcpy(shared->device, device, sizeof device);
        }
    }
    config.device = o->device;
    config.device_ordinal = self->card ? self->card->ordinal : 0;
    config.heap_bytes = self->run->shape.heap_bytes;
    config.num_workers = o->workers;
    config.max_experts = o->experts;
    bench_rank_check(self, epx_group_create(&config, &self->group));
    bench_rank_check(self, epx_group_query(self->group, &info));
    if (self->rank == 0) {
        snprintf(shared->engine, sizeof shared->engine, "%s", info.engine);
        snprintf(shared->fabric, sizeof shared->fabric, "%s", info.fabric);
        shared->num_cards = self->card ? self->card->num_cards : 0;
    }
}

void
bench_rank_open_group(struct bench_rank *self, const struct bench_run *run,
                      int32_t rank, const epx_bootstrap_t *bootstrap)
{
    *self = (struct bench_rank){ .run = run, .rank = rank };
    if (run->options->device == EPX_DEVICE_CUDA) {
        self->card = bench_card_cuda->open(run, rank);
    }
    open_group(self, bootstrap);
}

void
bench_rank_open_arrays(struct bench_rank *self)
{
    self->tokens = bench_routing_tokens(self->run->routing, self->rank);
    list_arrays(self);
    for (int id = 0; id < BENCH_NUM_ARRAYS; id++) {
        take_array(self, id);
    }
    /* Nobody takes memory of a card that already works. */
    bench_barrier_wait(&self->run->shared->ranks, BENCH_NO_DEADLINE);
}

void
bench_rank_open(struct bench_rank *self, const struct bench_run *run,
                int32_t rank, const epx_bootstrap_t *bootstrap)
{
    bench_rank_open_group(self, run, rank, bootstrap);
    bench_rank_open_arrays(self);
}

void
bench_rank_close_arrays(struct bench_rank *self)
{
    bench_rank_check(self, epx_plan_destroy(self->plan));
    self->plan = NULL;
    bench_barrier_wait(&self->run->shared->ranks, BENCH_NO_DEADLINE);
    for (int id = 0; id < BENCH_NUM_ARRAYS; id++) {
        if (self->arrays[id].row_bytes) {
            give_array_back(self, id);
        }
    }
}

void
bench_rank_close_group(struct bench_rank *self)
{
    bench_rank_check(self, epx_group_destroy(self->group));
    if (self->card) {
        self->card->ops->close(self->card);
    }
}

void
bench_rank_close(struct bench_rank *self)
{
    bench_rank_close_arrays(self);
    bench_rank_close_group(self);
}

/* ---- contents ---- */

/* Some of an array's rows, to where EPX has them. */
static void
send_rows(const struct bench_rank *self, int id, int64_t first, int64_t count)
{
    const struct bench_array *array = &self->arrays[id];
    size_t at = (size_t)first * array->row_bytes;
    if (self->card && array->place) {
        self->card->ops->upload(self->card, (char *)array->place + at,
                                (char *)array->host + at,
                                (size_t)count * array->row_bytes);
    }
}

static void
fetch_rows(const struct bench_rank *self, int id, int64_t first, int64_t count)
{
    const struct bench_array *array = &self->arrays[id];
    size_t at = (size_t)first * array->row_bytes;
    if (self->card && array->place) {
        self->card->ops->download(self->card, (char *)array->host + at,
                                  (char *)array->place + at,
                                  (size_t)count * array->row_bytes);
    }
}

void
bench_rank_set_round(struct bench_rank *self, uint64_t round)
{
    const struct bench_shape *shape = &self->run->shape;
    uint32_t *scales = self->arrays[BENCH_SCALES].host;
    char *x = self->arrays[BENCH_X].host;
    self->round = round;
    if (!bench_routing_fill(self->run->routing, self->rank, round,
                            self->arrays[BENCH_IDX].host,
                            self->arrays[BENCH_WEIGHTS].host)) {
        bench_rank_fail(self->run, self->rank, "no memory for the routing");
    }
    for (int64_t t = 0; t < self->tokens; t++) {
        bench_data_token(self->run, self->rank, round, t,
                         x + (size_t)t * shape->x_bytes,
                         scales ? scales + t * shape->given_scales : NULL);
    }
    for (int id = BENCH_IDX; id <= BENCH_SCALES; id++) {
        send_rows(self, id, 0, self->tokens);
    }
}

/* Calls fn for every run of rows that arrive. */
static void
for_rows(const struct bench_rank *self, const epx_plan_counts_t *counts,
         void (*fn)(const struct bench_rank *self, int64_t first,
                    int64_t count))
{
    if (self->run->options->layout == EPX_LAYOUT_RANK_MAJOR) {
        fn(self, 0, counts->num_recv_rows);
        return;
    }
    for (int32_t e = 0; e < counts->num_local_experts; e++) {
        fn(self, counts->expert_offsets[e], counts->expert_rows[e]);
    }
}

static void
fill_outputs(const struct bench_rank *self, int64_t first, int64_t count)
{
    char *outputs = self->arrays[BENCH_OUTPUTS].host;
    size_t bytes = self->run->shape.combine_bytes;
    for (int64_t row = first; row < first + count; row++) {
        bench_data_output(self->run, self->rank, self->round, row,
                          outputs + (size_t)row * bytes);
    }
    send_rows(self, BENCH_OUTPUTS, first, count);
}

void
bench_rank_set_outputs(struct bench_rank *self, const epx_plan_counts_t *counts)
{
    for_rows(self, counts, fill_outputs);
}

static void
fetch_received(const struct bench_rank *self, int64_t first, int64_t count)
{
    for (int id = BENCH_RECV_X; id <= BENCH_RECV_WEIGHTS; id++) {
        fetch_rows(self, id, first, count);
    }
}

void
bench_rank_fetch(const struct bench_rank *self, const epx_plan_counts_t *counts)
{
    for_rows(self, counts, fetch_received);
    fetch_rows(self, BENCH_OUT, 0, self->tokens);
}

/* ---- arguments ---- */

epx_plan_args_t
bench_rank_plan_args(const struct bench_rank *self)
{
    const struct bench_options *o = self->run->options;
    const struct bench_routing *routing = self->run->routing;
    const struct bench_shape *shape = &self->run->shape;
    bool slots = o->layout == EPX_LAYOUT_EXPERT_SLOTS;
    epx_plan_args_t args = EPX_PLAN_ARGS_INIT;
    args.layout = o->layout;
    args.num_experts = o->experts;
    args.topk = routing->topk;
    args.idx_dtype = EPX_I64;
    args.num_tokens = self->tokens;
    args.topk_idx = self->arrays[BENCH_IDX].place;
    if (bench_options_fixed(o) || slots) {
        args.max_tokens_per_rank = routing->max_tokens;
    }
    if (bench_options_fixed(o) && !slots) {
        args.recv_capacity = shape->recv_rows;
    }
    /* Between hosts decode goes through receive slots if it is small. */
    if (o->send_only || (o->hosts > 1 && o->mode == BENCH_LL)) {
        args.send_only_row_bytes =
            (int64_t)shape->sent_bytes + 4 * (int64_t)shape->sent_scales;
    }
    return args;
}

static void *
pointer(const struct bench_rank *self, int id, bool on_host)
{
    return on_host ? self->arrays[id].host : self->arrays[id].place;
}

static epx_dispatch_args_t
dispatch_args(const struct bench_rank *self, bool on_host)
{
    const struct bench_options *o = self->run->options;
    epx_dispatch_args_t args = EPX_DISPATCH_ARGS_INIT;
    args.x = pointer(self, BENCH_X, on_host);
    args.hidden = o->hidden;
    args.dtype = o->dtype;
    args.quantize = o->quantize;
    args.scales = pointer(self, BENCH_SCALES, on_host);
    args.num_scales = self->run->shape.given_scales;
    args.topk_weights = pointer(self, BENCH_WEIGHTS, on_host);
    args.recv_x = pointer(self, BENCH_RECV_X, on_host);
    args.recv_rows = self->run->shape.recv_rows;
    args.recv_scales = pointer(self, BENCH_RECV_SCALES, on_host);
    args.recv_topk_idx = pointer(self, BENCH_RECV_IDX, on_host);
    args.recv_topk_weights = pointer(self, BENCH_RECV_WEIGHTS, on_host);
    args.flags = o->send_only ? EPX_SEND_ONLY : 0;
    return args;
}

static epx_combine_args_t
combine_args(const struct bench_rank *self, bool on_host)
{
    const struct bench_options *o = self->run->options;
    epx_combine_args_t args = EPX_COMBINE_ARGS_INIT;
    args.x = pointer(self, BENCH_OUTPUTS, on_host);
    args.num_rows = self->run->shape.recv_rows;
    args.hidden = o->hidden;
    args.dtype = self->run->shape.combine_dtype;
    args.quantize = o->logfmt ? EPX_QUANTIZE_LOGFMT10 : EPX_QUANTIZE_NONE;
    if (o->layout != EPX_LAYOUT_RANK_MAJOR) {
        args.topk_weights = pointer(self, BENCH_WEIGHTS, on_host);
    }
    args.out = pointer(self, BENCH_OUT, on_host);
    args.flags = o->send_only ? EPX_SEND_ONLY : 0;
    return args;
}

epx_dispatch_args_t
bench_rank_dispatch_args(const struct bench_rank *self)
{
    return dispatch_args(self, false);
}

epx_combine_args_t
bench_rank_combine_args(const struct bench_rank *self)
{
    return combine_args(self, false);
}

epx_dispatch_args_t
bench_rank_dispatch_args_on_host(const struct bench_rank *self)
{
    return dispatch_args(self, true);
}

epx_combine_args_t
bench_rank_combine_args_on_host(const struct bench_rank *self)
{
    return combine_args(self, true);
}
