/* SPDX-License-Identifier: MIT */
#include "bench_rank.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

void
bench_rank_check(const struct bench_rank *self, epx_status_t status)
{
    if (status) {
        bench_rank_fail(self->run, self->rank, "%s", epx_last_error());
    }
}

/* Bytes of an array; an empty one still gets an address. */
static size_t
array_bytes(int64_t rows, size_t row_bytes)
{
    size_t bytes = (size_t)rows * row_bytes;
    return bytes ? bytes : 1;
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
    ptr = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (ptr == MAP_FAILED) {
        bench_rank_fail(self->run, self->rank, "cannot map %zu bytes: %s",
                        bytes, strerror(errno));
    }
    return ptr;
}

void
bench_rank_give_back(const struct bench_rank *self, void *ptr, int64_t rows,
                     size_t row_bytes)
{
    if (!ptr) {
        return;
    }
    if (self->run->options->buffers_outside) {
        munmap(ptr, array_bytes(rows, row_bytes));
    } else {
        bench_rank_check(self, epx_mem_free(self->group, ptr));
    }
}

static void
open_group(struct bench_rank *self, const epx_bootstrap_t *bootstrap)
{
    const struct bench_options *o = self->run->options;
    struct bench_shared *shared = self->run->shared;
    epx_group_info_t info = EPX_GROUP_INFO_INIT;
    epx_group_config_t config = EPX_GROUP_CONFIG_INIT;
    config.bootstrap = bootstrap;
    config.device = EPX_DEVICE_CPU;
    config.heap_bytes = self->run->shape.heap_bytes;
    config.num_workers = o->workers;
    config.max_experts = o->experts;
    bench_rank_check(self, epx_group_create(&config, &self->group));
    bench_rank_check(self, epx_group_query(self->group, &info));
    if (self->rank == 0) {
        snprintf(shared->engine, sizeof shared->engine, "%s", info.engine);
        snprintf(shared->fabric, sizeof shared->fabric, "%s", info.fabric);
    }
}

/* Each array with its rows and the bytes of one: the single list that opening
 * and closing walk. */
struct array {
    void **ptr_p;
    int64_t rows;
    size_t row_bytes;
};
#define NUM_ARRAYS 8

static void
list_arrays(struct bench_rank *self, struct array list[NUM_ARRAYS])
{
    const struct bench_shape *shape = &self->run->shape;
    size_t topk = (size_t)self->run->routing->topk;
    int64_t rows = shape->recv_rows;
    bool by_rank = self->run->options->layout == EPX_LAYOUT_RANK_MAJOR;
    const struct array arrays[NUM_ARRAYS] = {
        { &self->x, self->tokens, shape->x_bytes },
        { &self->out, self->tokens, shape->combine_bytes },
        { &self->scales, self->tokens, 4 * (size_t)shape->given_scales },
        { &self->recv_x, rows, shape->sent_bytes },
        { &self->recv_scales, rows, 4 * (size_t)shape->sent_scales },
        { &self->recv_idx, rows, by_rank ? topk * sizeof(int64_t) : 0 },
        { &self->recv_weights, rows,
          by_rank ? topk * sizeof(float) : sizeof(float) },
        { &self->outputs, rows, shape->combine_bytes },
    };
    memcpy(list, arrays, sizeof arrays);
}

void
bench_rank_open(struct bench_rank *self, const struct bench_run *run,
                int32_t rank, const epx_bootstrap_t *bootstrap)
{
    struct array arrays[NUM_ARRAYS];
    *self = (struct bench_rank){ .run = run,
                                 .rank = rank,
                                 .tokens =
                                     bench_routing_tokens(run->routing, rank) };
    size_t cells = array_bytes(self->tokens, (size_t)run->routing->topk);
    self->idx = malloc(cells * sizeof *self->idx);
    self->weights = malloc(cells * sizeof *self->weights);
    if (!self->idx || !self->weights) {
        bench_rank_fail(run, rank, "no memory for %lld tokens",
                        (long long)self->tokens);
    }
    open_group(self, bootstrap);
    list_arrays(self, arrays);
    for (int i = 0; i < NUM_ARRAYS; i++) {
        if (arrays[i].row_bytes) {
            *arrays[i].ptr_p =
                bench_rank_take(self, arrays[i].rows, arrays[i].row_bytes);
        }
    }
}

void
bench_rank_close(struct bench_rank *self)
{
    struct array arrays[NUM_ARRAYS];
    bench_rank_check(self, epx_plan_destroy(self->plan));
    list_arrays(self, arrays);
    for (int i = 0; i < NUM_ARRAYS; i++) {
        bench_rank_give_back(self, *arrays[i].ptr_p, arrays[i].rows,
                             arrays[i].row_bytes);
    }
    bench_rank_check(self, epx_group_destroy(self->group));
    free(self->idx);
    free(self->weights);
}

void
bench_rank_set_round(struct bench_rank *self, uint64_t round)
{
    const struct bench_shape *shape = &self->run->shape;
    uint32_t *scales = self->scales;
    self->round = round;
    if (!bench_routing_fill(self->run->routing, self->rank, round, self->idx,
                            self->weights)) {
        bench_rank_fail(self->run, self->rank, "no memory for the routing");
    }
    for (int64_t t = 0; t < self->tokens; t++) {
        bench_data_token(self->run, self->rank, round, t,
                         (char *)self->x + (size_t)t * shape->x_bytes,
                         scales ? scales + t * shape->given_scales : NULL);
    }
}

static void
fill_outputs(struct bench_rank *self, int64_t first, int64_t count)
{
    size_t bytes = self->run->shape.combine_bytes;
    for (int64_t row = first; row < first + count; row++) {
        bench_data_output(self->run, self->rank, self->round, row,
                          (char *)self->outputs + (size_t)row * bytes);
    }
}

void
bench_rank_set_outputs(struct bench_rank *self, const epx_plan_counts_t *counts)
{
    if (self->run->options->layout == EPX_LAYOUT_RANK_MAJOR) {
        fill_outputs(self, 0, counts->num_recv_rows);
        return;
    }
    for (int32_t e = 0; e < counts->num_local_experts; e++) {
        fill_outputs(self, counts->expert_offsets[e], counts->expert_rows[e]);
    }
}

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
    args.topk_idx = self->idx;
    if (o->mode == BENCH_LL || slots) {
        args.max_tokens_per_rank = routing->max_tokens;
    }
    if (o->mode == BENCH_LL && !slots) {
        args.recv_capacity = shape->recv_rows;
    }
    if (o->send_only) {
        args.send_only_row_bytes =
            (int64_t)shape->sent_bytes + 4 * (int64_t)shape->sent_scales;
    }
    return args;
}

epx_dispatch_args_t
bench_rank_dispatch_args(const struct bench_rank *self)
{
    const struct bench_options *o = self->run->options;
    epx_dispatch_args_t args = EPX_DISPATCH_ARGS_INIT;
    args.x = self->x;
    args.hidden = o->hidden;
    args.dtype = o->dtype;
    args.quantize = o->quantize;
    args.scales = self->scales;
    args.num_scales = self->run->shape.given_scales;
    args.topk_weights = self->weights;
    args.recv_x = self->recv_x;
    args.recv_rows = self->run->shape.recv_rows;
    args.recv_scales = self->recv_scales;
    args.recv_topk_idx = self->recv_idx;
    args.recv_topk_weights = self->recv_weights;
    args.flags = o->send_only ? EPX_SEND_ONLY : 0;
    return args;
}

epx_combine_args_t
bench_rank_combine_args(const struct bench_rank *self)
{
    const struct bench_options *o = self->run->options;
    epx_combine_args_t args = EPX_COMBINE_ARGS_INIT;
    args.x = self->outputs;
    args.num_rows = self->run->shape.recv_rows;
    args.hidden = o->hidden;
    args.dtype = self->run->shape.combine_dtype;
    if (o->layout != EPX_LAYOUT_RANK_MAJOR) {
        args.topk_weights = self->weights;
    }
    args.out = self->out;
    args.flags = o->send_only ? EPX_SEND_ONLY : 0;
    return args;
}
