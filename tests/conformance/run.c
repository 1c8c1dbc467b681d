/* SPDX-License-Identifier: MIT */
#include "conformance/run.h"
#include "conformance/op.h"
#include "conformance/rng.h"
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* Where peers do get lost, it is not worth waiting for; elsewhere none is, on a
 * machine that has much else to do. */
#define LOST_AFTER_NS UINT64_C(300000000)

/* One plan of the shape on this rank. */
typedef struct plan_run {
    const plan_shape_t *shape;
    epx_plan_t *plan;
    batch_t batches[MAX_BATCHES];
    op_t ops[MAX_BATCHES][MAX_OPS];
    guarded_t own_idx[MAX_BATCHES]; /* what this rank's calls read */
} plan_run_t;

typedef struct run {
    world_rank_t *self;
    const shape_t *shape;
    memory_t *memory;
    bool destroys_together; /* peers still need the group when one is done */
    bool is_masked;         /* the others go on without this rank */
    rng_t rng;              /* for what this rank decides alone */
    epx_group_t *group;
    int32_t num_workers;
    epx_stream_t stream; /* of what was last started */
    plan_run_t plans[MAX_PLANS];
} run_t;

/* ---- streams ---- */

static void
synchronize(run_t *run)
{
    if (run->group) {
        run->memory->ops->synchronize(run->memory, run->stream);
        if (!run->is_masked) {
            world_failed(run->self, epx_group_status(run->group),
                         "epx_group_status");
        }
    }
}

/* Whether what was last started is known to be complete.  Where calls return
 * before it is, wait for it now and then. */
static bool
is_complete(run_t *run)
{
    if (!run->memory->is_async) {
        return !run->stream;
    }
    if (!rng_one_in(&run->rng, 4)) {
        return false;
    }
    synchronize(run);
    return true;
}

/* Collective calls must come in one order: what runs on one stream is finished
 * before the next one is used. */
static epx_stream_t
pick_stream(run_t *run)
{
    const memory_t *memory = run->memory;
    epx_stream_t next = run->stream;

    if (rng_one_in(&run->rng, run->shape->async ? 8 : 3)) {
        next = memory->streams[rng_int(&run->rng, 0, memory->num_streams - 1)];
    }
    if (next != run->stream) {
        synchronize(run);
        run->stream = next;
    }
    return next;
}

static void
dawdle(run_t *run)
{
    if (run->shape->jitter && rng_one_in(&run->rng, 3)) {
        struct timespec nap = { 0, rng_int(&run->rng, 0, 2000000) };

        nanosleep(&nap, NULL);
    }
}

/* ---- setting up ---- */

/* How many of the shape's nodes have a rank. */
static int32_t
count_nodes(const shape_t *shape)
{
    uint64_t seen = 0;

    for (int32_t r = 0; r < shape->num_ranks; r++) {
        seen |= UINT64_C(1) << shape_node(shape, r);
    }
    return __builtin_popcountll(seen);
}

/* The group is what was asked for. */
static void
check_group(run_t *run, const epx_group_config_t *config)
{
    epx_group_info_t info = EPX_GROUP_INFO_INIT;
    world_rank_t *self = run->self;
    const char *engine = config->device == EPX_DEVICE_CUDA ? "cuda" : "cpu";

    world_failed(self, epx_group_query(run->group, &info), "epx_group_query");
    run->num_workers = info.num_workers;
    run->destroys_together = strcmp(info.fabric, "cuda_ipc") == 0;
    if (strcmp(info.engine, engine) != 0) {
        world_fail(self, "the group uses engine %s instead of %s", info.engine,
                   engine);
    }
    if (self->num_ranks > 1 && run->shape->num_nodes == 1 &&
        config->device == EPX_DEVICE_CPU &&
        strcmp(info.fabric, world_name(self->kind)) != 0) {
        world_fail(self, "the group uses fabric %s instead of %s", info.fabric,
                   world_name(self->kind));
    }
    if (info.num_nodes != count_nodes(run->shape)) {
        world_fail(self, "the group has %d nodes instead of %d", info.num_nodes,
                   count_nodes(run->shape));
    }
    if (epx_group_mask(run->group, NULL, 0) != EPX_OK) {
        world_fail(self, "epx_group_mask without ranks: %s", epx_last_error());
    }
    if (config->num_workers && info.num_workers != config->num_workers) {
        world_fail(self, "asked for %d workers, got %d", config->num_workers,
                   info.num_workers);
    }
}

static bool
open_group(run_t *run)
{
    epx_group_config_t config = EPX_GROUP_CONFIG_INIT;
    epx_network_config_t network = EPX_NETWORK_CONFIG_INIT;
    memory_t *memory = run->memory;

    config.bootstrap = run->self->bootstrap;
    if (run->shape->num_nodes > 1) {
        config.node = 1 + shape_node(run->shape, run->self->rank);
        config.network = &network;
        network.device = "lo";
        /* Ranks may differ. */
        if (getenv("EPX_TEST_GPUDIRECT") != NULL) {
            network.gpudirect = run->self->rank % 2;
        }
    }
    config.device = memory->device;
    config.device_ordinal = memory->ordinal;
    config.heap_bytes = UINT64_C(128) << 20;
    config.num_workers =
        (int32_t)rng_int(&run->rng, memory->min_workers,
                         memory->max_workers < run->shape->max_workers
                             ? memory->max_workers
                             : run->shape->max_workers);
    config.timeout_ns = run->shape->timeout_s * UINT64_C(1000000000);
    config.lost_after_ns =
        world_may_lose ? LOST_AFTER_NS : config.timeout_ns / 2;
    if (world_failed(run->self, epx_group_create(&config, &run->group),
                     "epx_group_create")) {
        return false;
    }
    check_group(run, &config);
    if (!memory->ops->open_streams(memory, run->group)) {
        return false;
    }
    run->stream = memory->streams[0];
    return true;
}

static oracle_t *
make_oracle(const run_t *run, const batch_t *batch)
{
    bool masked[WORLD_MAX_RANKS];
    int32_t node_of[WORLD_MAX_RANKS];
    oracle_t *oracle;

    for (int32_t r = 0; r < run->shape->num_ranks; r++) {
        node_of[r] = shape_node(run->shape, r);
        masked[r] = batch->index >= shape_mask_batch(run->shape) &&
                    shape_masks(run->shape, r);
    }
    oracle = oracle_create_masked(run->shape->num_ranks, batch->args, masked);
    oracle_set_nodes(oracle, node_of);
    return oracle;
}

static void
gather_batch(const run_t *run, plan_run_t *pr, int32_t index)
{
    const plan_shape_t *shape = pr->shape;
    batch_t *batch = &pr->batches[index];

    batch->plan = shape;
    batch->index = index;
    for (int32_t r = 0; r < run->shape->num_ranks; r++) {
        epx_plan_args_t *args = &batch->args[r];

        *args = (epx_plan_args_t)EPX_PLAN_ARGS_INIT;
        args->layout = shape->layout;
        args->num_experts = shape->num_experts;
        args->topk = shape->topk;
        args->idx_dtype = shape->idx_dtype;
        args->num_tokens = shape->tokens[index][r];
        args->max_tokens_per_rank = shape->max_tokens_per_rank;
        args->expert_alignment = shape->expert_alignment;
        args->send_only_row_bytes = shape->send_only_row_bytes;
        args->topk_idx = shape_topk_idx(shape, run->shape->num_ranks, index, r);
    }
    batch->oracle = make_oracle(run, batch);
}

/* Routing first, then the capacity that it needs, then the oracle again with
 * that. */
static void
gather_plan(const run_t *run, plan_run_t *pr)
{
    int64_t most = 1;

    for (int32_t b = 0; b < pr->shape->num_batches; b++) {
        gather_batch(run, pr, b);
        if (oracle_most_rows(pr->batches[b].oracle) > most) {
            most = oracle_most_rows(pr->batches[b].oracle);
        }
    }
    if (pr->shape->capacity == CAPACITY_EXACT) {
        return;
    }
    if (pr->shape->capacity == CAPACITY_LOOSE) {
        most += pr->shape->extra_capacity;
    }
    for (int32_t b = 0; b < pr->shape->num_batches; b++) {
        batch_t *batch = &pr->batches[b];

        for (int32_t r = 0; r < run->shape->num_ranks; r++) {
            batch->args[r].recv_capacity = most;
        }
        oracle_destroy(batch->oracle);
        batch->oracle = make_oracle(run, batch);
    }
}

/* ---- a batch ---- */

/* A copy of this rank's routing for its calls. */
static bool
own_routing(run_t *run, plan_run_t *pr, int32_t b)
{
    const epx_plan_args_t *args = &pr->batches[b].args[run->self->rank];
    size_t size = epx_dtype_size(args->idx_dtype);
    size_t bytes = (size_t)(args->num_tokens * args->topk) * size;
    guarded_t *g = &pr->own_idx[b];
    epx_status_t status =
        guarded_make(g, "topk_idx", run->memory, NULL, bytes,
                     rng_one_in(&run->rng, 2) ? size : 0, true);

    if (status == EPX_OK) {
        status = guarded_fill(g, args->topk_idx, bytes);
    }
    return !world_failed(run->self, status, "placing topk_idx");
}

/* The plan's routing for this batch, in memory that is spoilt once the call may
 * no longer look at it. */
static bool
route(run_t *run, plan_run_t *pr, int32_t b)
{
    world_rank_t *self = run->self;
    epx_plan_args_t args = pr->batches[b].args[self->rank];
    epx_stream_t stream = pick_stream(run);
    epx_status_t status;

    if (!own_routing(run, pr, b)) {
        return false;
    }
    args.topk_idx = args.num_tokens > 0 ? guarded_data(&pr->own_idx[b]) : NULL;
    dawdle(run);
    if (b == 0) {
        status = epx_plan_create(run->group, &args, stream, &pr->plan);
    } else {
        status =
            epx_plan_update(pr->plan, args.num_tokens, args.topk_idx, stream);
    }
    if (world_failed(self, status,
                     b == 0 ? "epx_plan_create" : "epx_plan_update")) {
        return false;
    }
    return !is_complete(run) ||
           !world_failed(self, guarded_spoil(&pr->own_idx[b]),
                         "spoiling topk_idx");
}

static void
same_list(world_rank_t *self, const char *name, const int64_t *want,
          const int64_t *got, int32_t count)
{
    for (int32_t i = 0; i < count; i++) {
        if (want[i] != got[i]) {
            world_fail(self, "epx_plan_counts: %s[%d]: expected %lld, got %lld",
                       name, i, (long long)want[i], (long long)got[i]);
        }
    }
}

/* All counts, against the oracle's.  False when they cannot be had; wrong ones
 * are noted, and the run goes on so that the other ranks need not wait. */
static bool
check_counts(run_t *run, plan_run_t *pr, int32_t b)
{
    world_rank_t *self = run->self;
    epx_plan_counts_t want = oracle_counts(pr->batches[b].oracle, self->rank);
    epx_plan_counts_t got = EPX_PLAN_COUNTS_INIT;

    if (world_failed(self, epx_plan_counts(pr->plan, &got),
                     "epx_plan_counts")) {
        return false;
    }
    const int64_t wants[] = { want.num_rows,          want.num_recv_tokens,
                              want.num_recv_rows,     want.first_expert,
                              want.num_local_experts, want.num_dropped };
    const int64_t gots[] = { got.num_rows,          got.num_recv_tokens,
                             got.num_recv_rows,     got.first_expert,
                             got.num_local_experts, got.num_dropped };

    same_list(self,
              "{num_rows, num_recv_tokens, num_recv_rows, first_expert, "
              "num_local_experts, num_dropped}",
              wants, gots, 6);
    same_list(self, "rank_tokens", want.rank_tokens, got.rank_tokens,
              run->shape->num_ranks);
    same_list(self, "expert_rows", want.expert_rows, got.expert_rows,
              want.num_local_experts);
    same_list(self, "expert_offsets", want.expert_offsets, got.expert_offsets,
              want.num_local_experts + 1);
    return true;
}

static bool
prepare_op(run_t *run, plan_run_t *pr, int32_t b, int32_t i)
{
    op_t *op = &pr->ops[b][i];
    epx_status_t status;

    op->shape = &pr->shape->ops[b][i];
    op->batch = &pr->batches[b];
    op->rank = run->self->rank;
    op->num_ranks = run->shape->num_ranks;
    op->memory = run->memory;
    op->group = run->group;
    op->num_workers = run->num_workers;
    op->rng = rng_of(op->shape->seed, (uint64_t)op->rank, 5);
    status = op_prepare(op);
    if (status != EPX_OK && epx_group_status(run->group) != EPX_OK) {
        status = epx_group_status(run->group); /* which gives no memory */
    }
    return !world_failed(run->self, status, "preparing an operation");
}

typedef struct completion {
    memory_t *memory;
    epx_plan_t *plan;
    epx_stream_t stream;
    epx_status_t status;
    char text[256];
} completion_t;

static void *
complete_main(void *arg)
{
    completion_t *completion = arg;

    completion->status = epx_complete(completion->plan, completion->stream);
    strncat(completion->text, epx_last_error(), sizeof(completion->text) - 1);
    completion->memory->ops->synchronize(completion->memory,
                                         completion->stream);
    return NULL;
}

/* The receive hook from a thread of its own; on a stream that is not the CPU's,
 * whose threads do that anyway. */
static bool
complete_elsewhere(run_t *run, plan_run_t *pr)
{
    memory_t *memory = run->memory;
    int32_t which = memory->is_async ? memory->num_streams - 1 : 0;
    completion_t completion = { .memory = memory,
                                .plan = pr->plan,
                                .stream = memory->streams[which] };
    pthread_t thread;

    synchronize(run);
    if (pthread_create(&thread, NULL, complete_main, &completion)) {
        world_fail(run->self, "pthread_create failed");
        return false;
    }
    pthread_join(thread, NULL);
    if (completion.status != EPX_OK && !world_excuses(completion.status)) {
        world_fail(run->self, "epx_complete in another thread: status %d: %s",
                   (int)completion.status, completion.text);
    }
    return completion.status == EPX_OK;
}

static bool
complete(run_t *run, plan_run_t *pr)
{
    dawdle(run);
    if (rng_one_in(&run->rng, 6)) {
        return complete_elsewhere(run, pr);
    }
    return !world_failed(run->self, epx_complete(pr->plan, pick_stream(run)),
                         "epx_complete");
}

static bool
has_op(const plan_run_t *pr, int32_t b, int32_t i)
{
    return b < pr->shape->num_batches && i < pr->shape->num_ops[b];
}

/* An operation that is complete is done with its inputs. */
static void
spoil_inputs(run_t *run, plan_run_t *pr, int32_t b, int32_t i)
{
    char text[512];

    if (is_complete(run) &&
        !op_spoil_inputs(&pr->ops[b][i], text, sizeof(text))) {
        world_fail(run->self, "batch %d, operation %d changed an input: %s", b,
                   i, text);
    }
}

/* The i-th operation of every plan: those that only send are completed when all
 * have been started, in either order. */
static bool
run_ops(run_t *run, int32_t b, int32_t i)
{
    int32_t num_plans = run->shape->num_plans;
    bool backwards = run->plans[0].shape->ops[b % MAX_BATCHES][i].seed & 1;

    for (int32_t p = 0; p < num_plans; p++) {
        plan_run_t *pr = &run->plans[p];

        if (!has_op(pr, b, i)) {
            continue;
        }
        dawdle(run);
        if (world_failed(run->self,
                         op_start(&pr->ops[b][i], pr->plan, pick_stream(run)),
                         pr->ops[b][i].shape->is_combine ? "epx_combine"
                                                         : "epx_dispatch")) {
            return false;
        }
        if (!pr->ops[b][i].shape->send_only) {
            pr->ops[b][i].is_over = !run->stream;
            spoil_inputs(run, pr, b, i);
        }
    }
    for (int32_t n = 0; n < num_plans; n++) {
        plan_run_t *pr = &run->plans[backwards ? num_plans - 1 - n : n];

        if (!has_op(pr, b, i) || !pr->ops[b][i].shape->send_only) {
            continue;
        }
        if (!complete(run, pr)) {
            return false;
        }
        pr->ops[b][i].is_over = !run->stream;
        spoil_inputs(run, pr, b, i);
    }
    return true;
}

/* The operations of a batch; if one has failed, those that were over before. */
static void
check_ops(run_t *run, int32_t b, bool all)
{
    char text[512];

    for (int32_t p = 0; p < run->shape->num_plans; p++) {
        for (int32_t i = 0; has_op(&run->plans[p], b, i); i++) {
            op_t *op = &run->plans[p].ops[b][i];

            if ((all || op->is_over) && !op_check(op, text, sizeof(text))) {
                world_fail(
                    run->self, "plan %d, batch %d, operation %d (%s): %s", p, b,
                    i, op->shape->is_combine ? "combine" : "dispatch", text);
            }
            world_failed(run->self, op_free(op), "epx_mem_free");
        }
    }
}

static bool
run_batch(run_t *run, int32_t b)
{
    for (int32_t p = 0; p < run->shape->num_plans; p++) {
        plan_run_t *pr = &run->plans[p];

        if (b >= pr->shape->num_batches) {
            continue;
        }
        if (!route(run, pr, b) ||
            (rng_one_in(&run->rng, 2) && !check_counts(run, pr, b))) {
            return false;
        }
    }
    for (int32_t i = 0; i < MAX_OPS; i++) {
        for (int32_t p = 0; p < run->shape->num_plans; p++) {
            if (has_op(&run->plans[p], b, i) &&
                !prepare_op(run, &run->plans[p], b, i)) {
                return false;
            }
        }
        if (!run_ops(run, b, i)) {
            return false;
        }
    }
    for (int32_t p = 0; p < run->shape->num_plans; p++) {
        if (b < run->plans[p].shape->num_batches &&
            (!run->shape->async || rng_one_in(&run->rng, 2)) &&
            !check_counts(run, &run->plans[p], b)) {
            return false;
        }
    }
    if (!run->shape->async) {
        synchronize(run);
        check_ops(run, b, epx_group_status(run->group) == EPX_OK);
    }
    return true;
}

/* ---- masks ---- */

/* The others go on without this rank: every call tells so. */
static void
be_masked(run_t *run)
{
    const struct timespec nap = { 0, 1000000 };
    world_rank_t *self = run->self;
    epx_status_t status = EPX_OK;

    run->is_masked = true;
    for (int i = 0; i < 20000 && status != EPX_ERR_MASKED; i++) {
        nanosleep(&nap, NULL);
        status = epx_group_status(run->group);
    }
    if (status != EPX_ERR_MASKED) {
        world_fail(self, "masked, epx_group_status is %d", (int)status);
    }
    status = epx_group_mask(run->group, NULL, 0);
    if (status != EPX_ERR_MASKED) {
        world_fail(self, "masked, epx_group_mask is %d: %s", (int)status,
                   epx_last_error());
    }
    for (int32_t p = 0; p < run->shape->num_plans; p++) {
        plan_run_t *pr = &run->plans[p];

        if (pr->plan && pr->shape->max_tokens_per_rank) {
            status = epx_plan_update(pr->plan, 0, NULL, NULL);
            if (status != EPX_ERR_MASKED) {
                world_fail(self, "masked, epx_plan_update is %d: %s",
                           (int)status, epx_last_error());
            }
        }
    }
}

/* All that remain name those to be masked. */
static bool
go_on_without(run_t *run)
{
    const shape_t *shape = run->shape;
    world_rank_t *self = run->self;
    int32_t named[WORLD_MAX_RANKS], masked[WORLD_MAX_RANKS];
    int32_t num_named = 0;

    for (int32_t r = 0; r < shape->num_ranks; r++) {
        if (shape_masks(shape, r)) {
            named[num_named++] = r;
        }
    }
    if (world_failed(self, epx_group_mask(run->group, named, num_named),
                     "epx_group_mask") ||
        world_failed(self, epx_group_masked(run->group, masked),
                     "epx_group_masked")) {
        return false;
    }
    for (int32_t r = 0; r < shape->num_ranks; r++) {
        if (masked[r] != (shape_masks(shape, r) ? 1 : 0)) {
            world_fail(self, "rank %d: expected mask %d, got %d", r,
                       shape_masks(shape, r) ? 1 : 0, masked[r]);
        }
    }
    return !self->failed;
}

/* Every rank comes here, also one that has failed. */
static bool
mask(run_t *run, bool ok)
{
    synchronize(run);
    if (!world_all_well(run->self) || !ok) {
        return false;
    }
    if (shape_masks(run->shape, run->self->rank)) {
        be_masked(run);
        return true;
    }
    return go_on_without(run);
}

/* ---- tearing down ---- */

static void
close_plan(run_t *run, plan_run_t *pr)
{
    world_failed(run->self, epx_plan_destroy(pr->plan), "epx_plan_destroy");
    for (int32_t b = 0; b < pr->shape->num_batches; b++) {
        oracle_destroy(pr->batches[b].oracle);
        guarded_free(&pr->own_idx[b]);
        for (int32_t r = 0; r < run->shape->num_ranks; r++) {
            free((void *)(uintptr_t)pr->batches[b].args[r].topk_idx);
        }
        for (int32_t i = 0; i < pr->shape->num_ops[b]; i++) {
            op_free(&pr->ops[b][i]);
        }
    }
}

void
run_shape(world_rank_t *self, const shape_t *shape, memory_t *memory)
{
    run_t *run = calloc(1, sizeof(*run));
    int32_t most_batches = 0;
    bool ok;

    if (!run) {
        world_fail(self, "no memory");
        return;
    }
    run->self = self;
    run->shape = shape;
    run->memory = memory;
    run->rng = rng_of(shape->seed, (uint64_t)self->rank, 6);
    ok = open_group(run);
    for (int32_t p = 0; p < shape->num_plans; p++) {
        run->plans[p].shape = &shape->plans[p];
        gather_plan(run, &run->plans[p]);
        if (run->plans[p].shape->num_batches > most_batches) {
            most_batches = run->plans[p].shape->num_batches;
        }
    }
    for (int32_t b = 0; b < most_batches; b++) {
        if (shape->has_masks && b == shape_mask_batch(shape)) {
            ok = mask(run, ok);
        }
        if (run->is_masked) {
            most_batches = b;
        } else if (ok) {
            ok = run_batch(run, b);
        }
    }
    synchronize(run);
    ok = ok && (run->is_masked || epx_group_status(run->group) == EPX_OK);
    for (int32_t b = 0; run->group && (!ok || shape->async) && b < most_batches;
         b++) {
        check_ops(run, b, ok);
    }
    for (int32_t p = 0; p < shape->num_plans; p++) {
        close_plan(run, &run->plans[p]);
    }
    memory->ops->close_streams(memory);
    if (run->destroys_together) {
        world_barrier(self);
    }
    world_failed(self, epx_group_destroy(run->group), "epx_group_destroy");
    free(run);
}

void
run_rank(world_rank_t *self, void *shape)
{
    const shape_t *its = shape;
    bool alone = its->device == EPX_DEVICE_CPU;
    memory_t *memory = memory_open(self, its->device);

    if (alone ? memory != NULL : world_all_well(self)) {
        run_shape(self, its, memory);
    }
    if (!alone) {
        world_barrier(self); /* the card is shared: see memory_close */
    }
    memory_close(memory);
}
