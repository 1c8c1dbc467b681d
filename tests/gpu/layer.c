/* SPDX-License-Identifier: MIT */
#include "gpu/layer.h"

#include "conformance/late.h"
#include "conformance/rng.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    ROW_BYTES = LAYER_HIDDEN * sizeof(uint16_t),
    CELLS = LAYER_TOKENS * LAYER_TOPK,
    ALIGNMENT = 8, /* in EXPERT_MAJOR */
    WORKERS = 4,
    SPOILT = 0x5a,
};

/* ---- what must come out ---- */

static void *
take(size_t bytes)
{
    void *memory = calloc(1, bytes ? bytes : 1);

    if (!memory) {
        perror("no memory for the layer");
        abort();
    }
    return memory;
}

/* Distinct experts, some missing; every batch has its favourites. */
static void
draw_part(layer_part_t *part, int32_t batch, int32_t rank)
{
    rng_t rng = rng_of((uint64_t)batch, (uint64_t)rank, 91);

    for (int32_t t = 0; t < LAYER_TOKENS; t++) {
        int64_t step = rng_int(&rng, 1, 4);
        int64_t first = rng_one_in(&rng, 3)
                            ? (batch * 5) % LAYER_EXPERTS
                            : rng_int(&rng, 0, LAYER_EXPERTS - 1);

        for (int32_t k = 0; k < LAYER_TOPK; k++) {
            part->idx[t * LAYER_TOPK + k] =
                rng_one_in(&rng, 10) ? -1 : (first + k * step) % LAYER_EXPERTS;
        }
    }
    rng_fill(&rng, EPX_F32, part->weights, CELLS, false);
    rng_fill(&rng, EPX_BF16, part->x, LAYER_TOKENS * LAYER_HIDDEN, false);
}

static epx_plan_args_t
plan_args(const layer_t *layer, const void *topk_idx)
{
    epx_plan_args_t args = EPX_PLAN_ARGS_INIT;

    args.layout = layer->layout;
    args.num_experts = LAYER_EXPERTS;
    args.topk = LAYER_TOPK;
    args.idx_dtype = EPX_I64;
    args.num_tokens = LAYER_TOKENS;
    args.topk_idx = topk_idx;
    args.max_tokens_per_rank = LAYER_TOKENS;
    args.recv_capacity = layer->recv_capacity;
    args.expert_alignment =
        layer->layout == EPX_LAYOUT_EXPERT_MAJOR ? ALIGNMENT : 0;
    return args;
}

/* How many nodes the ranks play, in turn. */
static int32_t
num_nodes(void)
{
    const char *text = getenv("EPX_TEST_NODES");

    return text ? (int32_t)strtol(text, NULL, 10) : 1;
}

static oracle_t *
route(const layer_t *layer, const layer_batch_t *batch)
{
    epx_plan_args_t args[LAYER_MAX_RANKS];
    int32_t node_of[LAYER_MAX_RANKS];
    oracle_t *oracle;

    for (int32_t r = 0; r < layer->num_ranks; r++) {
        node_of[r] = r % num_nodes();
        args[r] = plan_args(layer, batch->parts[r].idx);
    }
    oracle = oracle_create(layer->num_ranks, args);
    oracle_set_nodes(oracle, node_of);
    return oracle;
}

/* The fixed capacity is what the largest batch needs. */
static void
choose_capacity(layer_t *layer)
{
    for (int32_t b = 0; b < layer->num_batches; b++) {
        oracle_t *oracle = route(layer, &layer->batches[b]);
        int64_t rows = oracle_most_rows(oracle);

        for (int32_t r = 0;
             layer->layout == EPX_LAYOUT_EXPERT_SLOTS && r < layer->num_ranks;
             r++) {
            int64_t its = oracle_counts(oracle, r).num_rows;

            rows = its > rows ? its : rows;
        }
        layer->recv_rows = rows > layer->recv_rows ? rows : layer->recv_rows;
        oracle_destroy(oracle);
    }
    if (layer->layout != EPX_LAYOUT_EXPERT_SLOTS) {
        layer->recv_capacity = layer->recv_rows;
    }
    layer->recv_bytes = (size_t)layer->recv_rows * ROW_BYTES;
}

static epx_dispatch_args_t
dispatch_args(const layer_t *layer, const void *x, void *recv_x)
{
    epx_dispatch_args_t args = EPX_DISPATCH_ARGS_INIT;

    args.x = x;
    args.hidden = LAYER_HIDDEN;
    args.dtype = EPX_BF16;
    args.recv_x = recv_x;
    args.recv_rows = layer->recv_rows;
    return args;
}

static epx_combine_args_t
combine_args(const layer_t *layer, const void *x, const float *weights,
             void *out)
{
    epx_combine_args_t args = EPX_COMBINE_ARGS_INIT;

    args.x = x;
    args.num_rows = layer->recv_rows;
    args.hidden = LAYER_HIDDEN;
    args.dtype = EPX_BF16;
    args.topk_weights = layer->layout == EPX_LAYOUT_RANK_MAJOR ? NULL : weights;
    args.out = out;
    return args;
}

static void
work_out(const layer_t *layer, layer_batch_t *batch)
{
    epx_dispatch_args_t sent[LAYER_MAX_RANKS];
    epx_combine_args_t summed[LAYER_MAX_RANKS];
    oracle_arrays_t inputs = { sent, LAYER_TOPK };
    oracle_outputs_t outputs = { summed, 1 };

    batch->oracle = route(layer, batch);
    for (int32_t r = 0; r < layer->num_ranks; r++) {
        layer_part_t *part = &batch->parts[r];

        part->recv_x = take(layer->recv_bytes);
        sent[r] = dispatch_args(layer, part->x, part->recv_x);
        summed[r] = combine_args(layer, part->recv_x, part->weights, part->out);
    }
    for (int32_t r = 0; r < layer->num_ranks; r++) {
        oracle_dispatch(batch->oracle, r, oracle_token_of_arrays, &inputs,
                        &sent[r]);
    }
    for (int32_t r = 0; r < layer->num_ranks; r++) {
        oracle_combine(batch->oracle, r, oracle_output_of_arrays, &outputs,
                       &summed[r]);
    }
}

layer_t *
layer_make(epx_layout_t layout, int32_t num_ranks, int32_t num_batches)
{
    layer_t *layer = take(sizeof(*layer));

    layer->layout = layout;
    layer->num_ranks = num_ranks;
    layer->num_batches = num_batches;
    layer->batches = take((size_t)num_batches * sizeof(*layer->batches));
    for (int32_t b = 0; b < num_batches; b++) {
        for (int32_t r = 0; r < num_ranks; r++) {
            draw_part(&layer->batches[b].parts[r], b, r);
        }
    }
    choose_capacity(layer);
    for (int32_t b = 0; b < num_batches; b++) {
        work_out(layer, &layer->batches[b]);
    }
    return layer;
}

void
layer_free(layer_t *layer)
{
    for (int32_t b = 0; b < layer->num_batches; b++) {
        for (int32_t r = 0; r < layer->num_ranks; r++) {
            free(layer->batches[b].parts[r].recv_x);
        }
        oracle_destroy(layer->batches[b].oracle);
    }
    free(layer->batches);
    free(layer);
}

/* ---- running ---- */

void
layer_need_card(void)
{
    const char *obstacle = memory_obstacle(EPX_DEVICE_CUDA);

    if (obstacle) {
        printf("SKIPPED: %s\n", obstacle);
        exit(LAYER_EXIT_SKIP);
    }
}

int
layer_run(const layer_t *layer, world_kind_t kind, const char *what,
          world_fn *fn)
{
    char text[LAYER_MAX_RANKS * WORLD_TEXT];
    void *context = (void *)(uintptr_t)layer;

    if (world_run(kind, layer->num_ranks, true, LATE_SHARED_BYTES, fn, context,
                  NULL, text, sizeof(text))) {
        return 0;
    }
    printf("FAILED: %s, layout %d\n%s", what, (int)layer->layout, text);
    return 1;
}

int
layer_run_each(world_kind_t kind, int32_t num_ranks, int32_t num_batches,
               const char *what, world_fn *fn)
{
    int failures = 0;

    for (int layout = EPX_LAYOUT_RANK_MAJOR; layout <= EPX_LAYOUT_EXPERT_SLOTS;
         layout++) {
        layer_t *layer =
            layer_make((epx_layout_t)layout, num_ranks, num_batches);

        failures += layer_run(layer, kind, what, fn);
        layer_free(layer);
    }
    return failures;
}

bool
layer_cuda_failed(layer_rank_t *rank, cudaError_t error, const char *call)
{
    if (error != cudaSuccess) {
        world_fail(rank->self, "%s: %s", call, cudaGetErrorString(error));
    }
    return error != cudaSuccess;
}

bool
layer_open_group(layer_rank_t *rank, uint64_t timeout_s)
{
    epx_group_config_t config = EPX_GROUP_CONFIG_INIT;
    epx_network_config_t network = EPX_NETWORK_CONFIG_INIT;
    uint64_t bytes = rank->layer->recv_bytes;
    epx_status_t status;

    config.bootstrap = rank->self->bootstrap;
    config.device = EPX_DEVICE_CUDA;
    config.device_ordinal = rank->memory->ordinal;
    config.heap_bytes = UINT64_C(32) << 20;
    config.num_workers = WORKERS;
    if (num_nodes() > 1) {
        config.node = 1 + rank->self->rank % num_nodes();
        config.network = &network;
        network.device = "lo";
    }
    config.timeout_ns = timeout_s * UINT64_C(1000000000);
    status = epx_group_create(&config, &rank->group);
    if (num_nodes() > 1 && status == EPX_ERR_UNSUPPORTED) {
        printf("SKIPPED: %s\n", epx_last_error());
        exit(LAYER_EXIT_SKIP);
    }
    return !world_failed(rank->self, status, "epx_group_create") &&
           !world_failed(rank->self,
                         epx_mem_alloc(rank->group, bytes, &rank->recv_x),
                         "epx_mem_alloc") &&
           !world_failed(rank->self,
                         epx_mem_alloc(rank->group, bytes, &rank->expert_x),
                         "epx_mem_alloc");
}

void
layer_close_group(layer_rank_t *rank)
{
    world_failed(rank->self, epx_plan_destroy(rank->plan), "epx_plan_destroy");
    world_failed(rank->self, epx_group_destroy(rank->group),
                 "epx_group_destroy");
    rank->plan = NULL;
    rank->group = NULL;
}

bool
layer_rank_open(layer_rank_t *rank, world_rank_t *self, const layer_t *layer,
                uint64_t timeout_s)
{
    memory_t *memory = memory_open(self, EPX_DEVICE_CUDA);

    *rank = (layer_rank_t){ .self = self, .layer = layer, .memory = memory };
    if (!world_all_well(self)) {
        return false;
    }
    rank->stream = memory->streams[0];
    rank->idx = memory->ops->alloc(memory, CELLS * sizeof(int64_t));
    rank->weights = memory->ops->alloc(memory, CELLS * sizeof(float));
    rank->x = memory->ops->alloc(memory, LAYER_TOKENS * ROW_BYTES);
    rank->out = memory->ops->alloc(memory, LAYER_TOKENS * ROW_BYTES);
    return layer_open_group(rank, timeout_s);
}

void
layer_rank_close(layer_rank_t *rank)
{
    layer_close_group(rank);
    world_barrier(rank->self); /* the card is shared: see memory_close */
    memory_close(rank->memory);
}

bool
layer_set(layer_rank_t *rank, int32_t batch)
{
    const layer_part_t *part =
        &rank->layer->batches[batch].parts[rank->self->rank];
    memory_t *memory = rank->memory;

    return memory->ops->upload(memory, rank->idx, part->idx,
                               sizeof(part->idx)) &&
           memory->ops->upload(memory, rank->weights, part->weights,
                               sizeof(part->weights)) &&
           memory->ops->upload(memory, rank->x, part->x, sizeof(part->x));
}

bool
layer_spoil(layer_rank_t *rank)
{
    size_t bytes = rank->layer->recv_bytes;
    uint8_t *spoilt = take(bytes);
    bool ok;

    memset(spoilt, SPOILT, bytes);
    ok = rank->memory->ops->upload(rank->memory, rank->recv_x, spoilt, bytes);
    free(spoilt);
    return ok;
}

bool
layer_is_spoilt(layer_rank_t *rank)
{
    size_t bytes = rank->layer->recv_bytes;
    uint8_t *found = take(bytes);
    bool ok =
        rank->memory->ops->download(rank->memory, found, rank->recv_x, bytes);

    for (size_t i = 0; ok && i < bytes; i++) {
        if (found[i] != SPOILT) {
            world_fail(rank->self,
                       "byte %zu of recv_x was written: 0x%02x, not 0x%02x", i,
                       found[i], SPOILT);
            ok = false;
        }
    }
    free(found);
    return ok;
}

/* ---- the calls ---- */

epx_plan_args_t
layer_plan_args(const layer_rank_t *rank)
{
    return plan_args(rank->layer, rank->idx);
}

epx_status_t
layer_plan(layer_rank_t *rank, const epx_plan_args_t *args)
{
    return epx_plan_create(rank->group, args, rank->stream, &rank->plan);
}

epx_status_t
layer_update(layer_rank_t *rank, cudaStream_t stream)
{
    return epx_plan_update(rank->plan, LAYER_TOKENS, rank->idx, stream);
}

epx_status_t
layer_dispatch(layer_rank_t *rank, cudaStream_t stream)
{
    epx_dispatch_args_t args =
        dispatch_args(rank->layer, rank->x, rank->recv_x);

    args.flags = rank->flags;
    args.wait_ns = rank->wait_ns;
    if ((args.flags & EPX_NEW_ROUTING) != 0) {
        args.num_tokens = LAYER_TOKENS;
        args.topk_idx = rank->idx;
    }
    return epx_dispatch(rank->plan, &args, stream);
}

epx_status_t
layer_combine(layer_rank_t *rank, cudaStream_t stream)
{
    epx_combine_args_t args =
        combine_args(rank->layer, rank->expert_x, rank->weights, rank->out);

    args.flags = rank->flags & EPX_SEND_ONLY;
    args.wait_ns = rank->wait_ns;
    return epx_combine(rank->plan, &args, stream);
}

bool
layer_experts(layer_rank_t *rank, cudaStream_t stream)
{
    return !layer_cuda_failed(rank,
                              cudaMemcpyAsync(rank->expert_x, rank->recv_x,
                                              rank->layer->recv_bytes,
                                              cudaMemcpyDeviceToDevice, stream),
                              "cudaMemcpyAsync, the experts");
}

bool
layer_pass(layer_rank_t *rank, cudaStream_t stream)
{
    world_rank_t *self = rank->self;

    return !world_failed(self, layer_update(rank, stream), "epx_plan_update") &&
           !world_failed(self, layer_dispatch(rank, stream), "epx_dispatch") &&
           layer_experts(rank, stream) &&
           !world_failed(self, layer_combine(rank, stream), "epx_combine");
}

bool
layer_synchronize(layer_rank_t *rank, cudaStream_t stream)
{
    return rank->memory->ops->synchronize(rank->memory, stream) &&
           !world_failed(rank->self, epx_group_status(rank->group),
                         "epx_group_status");
}

/* ---- the results ---- */

static bool
check_rows(layer_rank_t *rank, const oracle_row_t *rows, int64_t count,
           const uint8_t *want, const uint8_t *got, const char *what)
{
    for (int64_t i = 0; i < count; i++) {
        size_t at = (size_t)rows[i].row * ROW_BYTES;

        if (memcmp(want + at, got + at, ROW_BYTES) != 0) {
            world_fail(rank->self,
                       "%s: row %lld of recv_x, token %lld of rank %d, differs",
                       what, (long long)rows[i].row, (long long)rows[i].token,
                       rows[i].src_rank);
            return false;
        }
    }
    return true;
}

bool
layer_check(layer_rank_t *rank, int32_t batch, const void *recv_x,
            const void *out, const char *what)
{
    const layer_batch_t *its = &rank->layer->batches[batch];
    const layer_part_t *part = &its->parts[rank->self->rank];
    uint8_t *rows = take(rank->layer->recv_bytes);
    uint16_t *sums = take(sizeof(part->out));
    memory_t *memory = rank->memory;
    int64_t count;
    const oracle_row_t *wanted =
        oracle_rows(its->oracle, rank->self->rank, &count);
    bool ok =
        memory->ops->download(memory, rows, recv_x, rank->layer->recv_bytes) &&
        memory->ops->download(memory, sums, out, sizeof(part->out)) &&
        check_rows(rank, wanted, count, (const uint8_t *)part->recv_x, rows,
                   what);

    for (int64_t i = 0; ok && i < LAYER_TOKENS * LAYER_HIDDEN; i++) {
        if (sums[i] != part->out[i]) {
            world_fail(rank->self,
                       "%s: out, token %lld, element %lld: expected 0x%04x, "
                       "got 0x%04x",
                       what, (long long)(i / LAYER_HIDDEN),
                       (long long)(i % LAYER_HIDDEN), part->out[i], sums[i]);
            ok = false;
        }
    }
    free(rows);
    free(sums);
    return ok;
}

void
layer_try(layer_rank_t *rank, const char *what)
{
    epx_plan_args_t args = layer_plan_args(rank);

    if (!world_failed(rank->self, layer_plan(rank, &args), "epx_plan_create") &&
        layer_pass(rank, rank->stream) &&
        layer_synchronize(rank, rank->stream)) {
        layer_check(rank, 0, rank->recv_x, rank->out, what);
    }
}
