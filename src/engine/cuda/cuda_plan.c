/* SPDX-License-Identifier: MIT */
/* Plans on the host: their memory, and their routing. */
#include "engine/cuda/cuda_engine.h"

#include <inttypes.h>
#include <stdlib.h>

/* Carves arrays out of a plan's block: run once to measure, once to place. */
typedef struct carve {
    char *base; /* NULL while measuring */
    uint64_t used;
} carve_t;

static void *
carve(carve_t *c, uint64_t count, uint64_t element_bytes)
{
    uint64_t at = c->used;

    /* The api layer bounds every factor: no sum here passes 2^45. */
    c->used += epx__round_up(count * element_bytes, EPX__LINE);
    return c->base == NULL ? NULL : c->base + at;
}

static uint64_t
num_keys(const cuda_plan_t *plan)
{
    return (uint64_t)plan->base.group->num_ranks + plan->base.key.num_experts;
}

/* With several nodes. */
static void
carve_nodes(cuda_plan_t *plan, carve_t *c)
{
    uint64_t nodes = (uint64_t)plan->base.group->nodes.num_nodes;
    uint64_t tokens = (uint64_t)plan->token_capacity;
    uint64_t entries = tokens * plan->base.key.topk;
    cuda_plan_view_t *view = &plan->view;

    view->token_capacity = plan->token_capacity;
    view->sends = carve(c, entries, sizeof(*view->sends));
    view->pulls = carve(c, entries, sizeof(*view->pulls));
    view->pull_ks = carve(c, entries, sizeof(*view->pull_ks));
    view->node_tokens = carve(c, nodes * tokens, sizeof(*view->node_tokens));
    view->node_ordinals =
        carve(c, nodes * tokens, sizeof(*view->node_ordinals));
    view->node_counts = carve(c, nodes, sizeof(*view->node_counts));
}

/* O(T (K + N) + (R + E) * workers). */
static void
carve_arrays(cuda_plan_t *plan, carve_t *c)
{
    const epx_group_t *group = plan->base.group;
    uint64_t local = (uint64_t)plan->base.num_local_experts;
    uint64_t workers = (uint64_t)group->num_workers;
    uint64_t entries = (uint64_t)plan->token_capacity * plan->base.key.topk;
    cuda_plan_view_t *view = &plan->view;

    view->routing = carve(c, 1, sizeof(*view->routing));
    view->routes = carve(c, entries, sizeof(*view->routes));
    view->experts = carve(c, entries, sizeof(*view->experts));
    view->rank_rows =
        carve(c, (uint64_t)group->num_ranks, sizeof(*view->rank_rows));
    view->slots = carve(c, (uint64_t)group->num_ranks, sizeof(*view->slots));
    view->expert_rows = carve(c, local, sizeof(*view->expert_rows));
    view->expert_offsets = carve(c, local + 1, sizeof(*view->expert_offsets));
    view->sends = view->routes;
    if (cuda_spans_nodes(group)) {
        carve_nodes(plan, c);
    }
    plan->notes = carve(c, 2 * entries, sizeof(*plan->notes));
    plan->block_totals =
        carve(c, workers * (num_keys(plan) + 1), sizeof(*plan->block_totals));
}

/* As many warps as have room to count in; 0: not even one. */
static int
plan_warps(const cuda_plan_t *plan)
{
    size_t most = cuda_engine(plan->base.group)->max_shared;
    cuda_plan_args_t args = { .num_warps = CUDA_PLAN_WARPS };

    args.view.num_ranks = plan->base.group->num_ranks;
    args.plan.key = plan->base.key;
    while (args.num_warps > 0 && cuda_plan_shared_bytes(&args) > most) {
        args.num_warps--;
    }
    return args.num_warps;
}

static epx_status_t
check_shape(const cuda_plan_t *plan)
{
    if (epx__plan_fixed_rows(&plan->base) > UINT32_MAX) {
        return epx__fail(EPX_ERR_SHAPE,
                         "the plan fixes %" PRIu64
                         " rows; a CUDA device can number %" PRIu32,
                         epx__plan_fixed_rows(&plan->base), UINT32_MAX);
    }
    if (plan_warps(plan) == 0) {
        return epx__fail(EPX_ERR_UNSUPPORTED,
                         "%u experts on %d ranks do not fit the %zu bytes of "
                         "shared memory of a CUDA block",
                         plan->base.key.num_experts,
                         plan->base.group->num_ranks,
                         cuda_engine(plan->base.group)->max_shared);
    }
    return EPX_OK;
}

static epx_status_t
open_block(cuda_plan_t *plan)
{
    epx_group_t *group = plan->base.group;
    carve_t measure = { 0 }, place = { 0 };
    void *block;
    epx_status_t status;

    carve_arrays(plan, &measure);
    status = cuda_heap_alloc(group, measure.used, "a plan", &block);
    if (status == EPX_OK) {
        plan->block = block;
        place.base = block;
        carve_arrays(plan, &place);
    }
    return status;
}

static epx_status_t
open_locked(epx_group_t *group, const epx_plan_args_t *args,
            cuda_plan_t **plan_p)
{
    cuda_engine_t *engine = cuda_engine(group);
    cuda_plan_t *plan = calloc(1, sizeof(*plan));
    epx_status_t status;

    if (plan == NULL) {
        return epx__fail(EPX_ERR_NO_MEMORY, "no memory for a plan");
    }
    epx__plan_describe(&plan->base, group, args);
    plan->token_capacity = args->max_tokens_per_rank > 0
                               ? args->max_tokens_per_rank
                               : args->num_tokens;
    plan->epoch = epx__load_u32(&group->epoch);
    plan->first_epoch = plan->epoch;
    plan->view.key = plan->base.key;
    plan->view.num_local = plan->base.num_local_experts;
    cuda_plans_reclaim(group, false);
    status = cuda_proxy_start(group);
    if (status == EPX_OK) {
        status = check_shape(plan);
    }
    if (status == EPX_OK) {
        status = cuda_seats_reserve(group);
    }
    if (status == EPX_OK) {
        status = cuda_counts_open(plan);
    }
    if (status == EPX_OK) {
        status = open_block(plan);
    }
    if (status == EPX_OK) {
        status = cuda_slots_open(plan);
        if (status != EPX_OK) {
            (void)epx__heap_free(&group->heap, plan->block);
        }
    }
    if (status != EPX_OK) {
        cuda_counts_close(plan);
        free(plan);
        return status;
    }
    plan->seat = engine->seats;
    engine->seats = plan->seat->next;
    engine->num_plans++;
    cuda_counts_clear(plan);
    *plan_p = plan;
    return EPX_OK;
}

epx_status_t
cuda_plan_open(epx_group_t *group, const epx_plan_args_t *args,
               epx_plan_t **plan_p)
{
    cuda_plan_t *plan = NULL;
    epx_status_t status = epx__cuda_device_enter(group->device_ordinal);

    if (status != EPX_OK) {
        return status;
    }
    (void)pthread_mutex_lock(&group->op_lock);
    status = open_locked(group, args, &plan);
    (void)pthread_mutex_unlock(&group->op_lock);
    epx__cuda_device_leave();
    if (status == EPX_OK) {
        *plan_p = &plan->base;
    }
    return status;
}

/* Its last operation has run: give everything back. */
static void
plan_free(cuda_plan_t *plan)
{
    epx_group_t *group = plan->base.group;
    cuda_engine_t *engine = cuda_engine(group);

    cuda_rail_close(plan);
    cuda_counts_close(plan);
    epx__group_heap_free(group, plan->block);
    if (plan->first_epoch != epx__load_u32(&group->epoch)) {
        epx__group_heap_free_old(group, plan->slot_block);
    } else {
        epx__group_heap_free(group, plan->slot_block);
    }
    engine->num_plans--;
    cuda_stand_ins_leave(plan);
    plan->seat->next = engine->seats;
    engine->seats = plan->seat;
    free(plan);
}

void
cuda_plans_reclaim(epx_group_t *group, bool wait)
{
    cuda_plan_t **link = &cuda_engine(group)->retired;

    while (*link != NULL) {
        cuda_plan_t *plan = *link;

        if (plan->needs_record) {
            plan->needs_record = cuda_plan_record(plan) != cudaSuccess;
        }
        if (plan->was_queued && !plan->needs_record && wait) {
            /* Kernels end by themselves, by their deadlines. */
            (void)cudaEventSynchronize(plan->seat->done);
        }
        if (plan->needs_record ||
            (plan->was_queued &&
             cudaEventQuery(plan->seat->done) != cudaSuccess) ||
            cuda_rail_is_busy(plan)) {
            (void)cudaGetLastError();
            link = &plan->next;
            continue;
        }
        /* What its kernels found decides whether its memory can be reused. */
        (void)cuda_check(group);
        *link = plan->next;
        plan_free(plan);
    }
}

epx_status_t
cuda_plan_close(epx_plan_t *base)
{
    cuda_plan_t *plan = cuda_plan(base);
    epx_group_t *group = base->group;
    cuda_engine_t *engine = cuda_engine(group);
    epx_status_t status;

    (void)cuda_check(group);
    status = epx__cuda_device_enter(group->device_ordinal);
    if (status != EPX_OK) {
        return status;
    }
    (void)pthread_mutex_lock(&group->op_lock);
    if (plan->pending != EPX__PENDING_NONE && !cuda_plan_is_stale(plan) &&
        !epx__group_is_broken(group)) {
        status = epx__fail(EPX_ERR_STATE,
                           "a plan with a send-only operation open cannot be "
                           "destroyed before epx_complete");
    } else {
        plan->needs_record = cuda_plan_record(plan) != cudaSuccess;
        (void)cudaGetLastError();
        if (engine->last_plan == plan) {
            engine->last_plan = NULL;
            engine->last_done = plan->was_queued ? plan->seat->done : NULL;
        }
        plan->next = engine->retired;
        engine->retired = plan;
        cuda_plans_reclaim(group, false);
    }
    (void)pthread_mutex_unlock(&group->op_lock);
    epx__cuda_device_leave();
    return status;
}

/* Blocks that the routing keeps busy: a few rounds of every warp. */
static int
route_blocks(const cuda_plan_t *plan, int64_t num_tokens, int num_warps)
{
    int64_t entries = num_tokens * (int64_t)plan->base.key.topk;
    int64_t blocks = entries / ((int64_t)num_warps * 32 * 4) + 1;
    int64_t most = plan->base.group->num_workers;

    return (int)(blocks < most ? blocks : most);
}

uint64_t
cuda_plan_renew(cuda_plan_t *plan, const cuda_op_t *op, int64_t num_tokens)
{
    plan->num_tokens = num_tokens;
    plan->is_routed_in_graph = op->is_captured;
    if (op->is_captured) {
        plan->num_routings += plan->num_routings == 0;
        return 0;
    }
    return ++plan->num_routings;
}

epx_status_t
cuda_plan_route(epx_plan_t *base, int64_t num_tokens, const void *topk_idx,
                epx_stream_t stream)
{
    return cuda_plan_route_timed(base, num_tokens, topk_idx, NULL, stream);
}

epx_status_t
cuda_plan_route_timed(epx_plan_t *base, int64_t num_tokens,
                      const void *topk_idx, int64_t *wait_ns,
                      epx_stream_t stream)
{
    cuda_plan_t *plan = cuda_plan(base);
    cuda_plan_args_t args = {
        .view = cuda_engine(base->group)->view,
        .plan = plan->view,
        .topk_idx = topk_idx,
        .num_tokens = num_tokens,
        .notes = plan->notes,
        .block_totals = plan->block_totals,
        .slots_offset = cuda_heap_offset(plan, plan->slot_block),
        .slot_bytes = plan->slots.slot_bytes,
        .told.record = plan->seat->record,
        .num_warps = plan_warps(plan),
        .wait_ns = wait_ns,
    };
    cuda_op_t op;
    epx_status_t status = cuda_op_begin(plan, stream, &op);
    bool launched = false;

    if (status != EPX_OK) {
        return status;
    }
    if (plan->pending != EPX__PENDING_NONE && !cuda_plan_is_stale(plan)) {
        status = epx__fail(EPX_ERR_STATE,
                           "the plan has a send-only operation open; "
                           "epx_complete must come before new routing");
    } else if (op.is_captured && !cuda_plan_is_fixed(plan)) {
        status = cuda_capture_refused();
    } else {
        status = cuda_step_take(&op, EPX__PENDING_NONE);
    }
    if (status == EPX_OK && cuda_plan_is_stale(plan)) {
        status = cuda_plan_revive(plan);
    }
    if (status == EPX_OK) {
        launched = true;
        args.is_new = plan->num_routings == 0;
        args.told.generation = cuda_plan_renew(plan, &op, num_tokens);
        status = epx__cuda_check(
            cuda_plan_launch(&args,
                             route_blocks(plan, num_tokens, args.num_warps),
                             op.stream),
            "cannot launch a plan's kernel");
    }
    if (status == EPX_OK && cuda_spans_nodes(base->group)) {
        status = cuda_rail_route(&op, &args);
    }
    if (status == EPX_OK) {
        status = cuda_drops(&op, num_tokens, NULL, true, args.told.generation);
    }
    return cuda_op_end(&op, status, launched);
}
