/* SPDX-License-Identifier: MIT */
/*
 * Dispatch in one hop:
 *     1. post where this rank wants its rows, wait for everybody's post
 *     2. write each token's row straight to its final place on each rank
 *     3. signal DONE, wait for everybody's
 * Between nodes (cpu_rail.h): in 2 rows for other nodes are sent to the rails
 * there, and before 3 this rank writes what it takes in for its own node.
 * A send-only dispatch ends after the signal of 3 (or goes through receive
 * slots, cpu_slots.c); epx_complete does the rest.
 */
#include "core/mask.h"
#include "engine/common/placement.h"
#include "engine/cpu/cpu.h"
#include "engine/cpu/cpu_rail.h"

#include <inttypes.h>

/* See prefers_slots. */
#define DIRECT_BYTES (UINT64_C(1) << 17)

typedef struct job {
    cpu_plan_t *plan;
    cpu_engine_t *engine;
    cpu_row_format_t format;
    cpu_share_t tokens;
    bool is_cut_short; /* ranks are being masked */
} job_t;

cpu_source_row_t
cpu_source_row(const cpu_plan_t *plan, void *scratch, int64_t t)
{
    const cpu_dispatch_t *op = &plan->dispatch;
    const epx_dispatch_args_t *args = &op->args;
    const uint32_t *scales = args->scales;
    size_t in_bytes = (size_t)args->hidden * epx_dtype_size(args->dtype);
    const char *x = (const char *)args->x + (size_t)t * in_bytes;
    uint32_t *gathered = scratch;
    uint8_t *quantised = (uint8_t *)(gathered + op->shape.num_scales);

    if (args->quantize != EPX_QUANTIZE_NONE) {
        cpu_engine(plan->base.group)
            ->kernels->quantize(args->quantize,
                                (const uint16_t *)(const void *)x,
                                (size_t)args->hidden, quantised, gathered);
        return (cpu_source_row_t){ quantised, gathered };
    }
    if (scales == NULL || args->scale_stride == 1) {
        return (cpu_source_row_t){
            x, scales == NULL ? NULL : scales + t * args->scale_token_stride
        };
    }
    for (int64_t j = 0; j < op->shape.num_scales; j++) {
        gathered[j] =
            scales[t * args->scale_token_stride + j * args->scale_stride];
    }
    return (cpu_source_row_t){ x, gathered };
}

static void
send_work(void *context, int32_t worker)
{
    job_t *job = context;
    const cpu_plan_t *plan = job->plan;
    void *scratch = cpu_scratch(job->engine, worker);
    int64_t begin, end;

    while (cpu_share_next(&job->tokens, worker, &begin, &end)) {
        for (int64_t t = begin; t < end; t++) {
            cpu_token_t token =
                cpu_own_token(plan, plan->dispatch.args.topk_weights, t);

            /* A masked rank that goes on where it was stopped ends here. */
            if (epx__mask_has_grown(plan->base.group)) {
                __atomic_store_n(&job->is_cut_short, true, __ATOMIC_RELAXED);
                return;
            }
            cpu_put_token(plan, &job->format, job->engine->targets, &token,
                          cpu_source_row(plan, scratch, t));
        }
    }
    /* The pool's end of round, then the signal, release what was streamed only
     * if it is ordered here, on the thread that wrote it. */
    epx__kernels_fence();
}

static epx_status_t
send_rows(cpu_plan_t *plan)
{
    epx_group_t *group = plan->base.group;
    cpu_engine_t *engine = cpu_engine(group);
    uint64_t bytes = (uint64_t)plan->num_sent_rows *
                     (uint64_t)plan->dispatch.shape.row_bytes;
    int32_t num_workers = cpu_workers_for(
        bytes, cpu_workers(group, plan->dispatch.args.num_workers));
    job_t job = {
        .plan = plan,
        .engine = engine,
        .format = cpu_row_format(plan),
        .tokens = cpu_share_of(group, plan->num_tokens, num_workers),
    };
    cpu_store_timer_t timer =
        cpu_store_start(&engine->dispatch_stores, bytes, &job.tokens);

    job.format.streams = timer.streams;
    epx__pool_run(engine->pool, num_workers, send_work, &job);
    if (job.is_cut_short) {
        return epx__group_check(group);
    }
    cpu_store_stop(&timer);
    return EPX_OK;
}

/* Every post is in: see where rows go on each rank of this node. */
static epx_status_t
open_targets(cpu_plan_t *plan)
{
    epx_group_t *group = plan->base.group;
    cpu_engine_t *engine = cpu_engine(group);

    for (int32_t r = 0; r < group->num_ranks; r++) {
        epx_status_t status =
            epx__is_near(&group->nodes, r) && !epx__is_masked(group, r)
                ? cpu_target_open(plan, r, &engine->posts[r],
                                  &engine->targets[r])
                : EPX_OK;

        if (status != EPX_OK) {
            return epx__group_break(group, status);
        }
    }
    return EPX_OK;
}

static bool
spans_nodes(const cpu_plan_t *plan)
{
    return plan->base.group->nodes.num_nodes > 1;
}

/* Write what comes for this node from others; the posts may be of another
 * operation by now. */
static epx_status_t
receive_forwards(cpu_plan_t *plan)
{
    epx_group_t *group = plan->base.group;
    const cpu_dispatch_t *op = &plan->dispatch;
    epx_status_t status = EPX_OK;

    if ((op->args.flags & EPX_SEND_ONLY) != 0) {
        status = cpu_posts_wait(group, op->step, "a dispatch",
                                &op->shape.signature, cpu_engine(group)->posts);
        if (status == EPX_OK) {
            status = open_targets(plan);
        }
    }
    if (status == EPX_OK) {
        status = cpu_rail_forward(plan);
    }
    if (status == EPX_OK) {
        epx__signal_near(group, op->step, EPX__GATE_DONE);
    }
    return status;
}

static epx_status_t
send_direct(cpu_plan_t *plan, epx__post_t *post)
{
    epx_group_t *group = plan->base.group;
    cpu_dispatch_t *op = &plan->dispatch;
    epx_status_t status;

    post->step = op->step;
    cpu_post_all(group, op->step, post);
    status = cpu_posts_wait(group, op->step, "a dispatch", &op->shape.signature,
                            cpu_engine(group)->posts);
    if (status == EPX_OK) {
        status = open_targets(plan);
    }
    if (status == EPX_OK && spans_nodes(plan)) {
        status = cpu_rail_check(plan);
    }
    if (status == EPX_OK && spans_nodes(plan)) {
        status = cpu_rail_send(plan, op->lanes[EPX__LANE_OUT]);
        (void)cpu_attend(group); /* to the first, should nobody do so next */
    }
    if (status == EPX_OK) {
        status = send_rows(plan);
    }
    if (status == EPX_OK && !spans_nodes(plan)) {
        epx__signal_near(group, op->step, EPX__GATE_DONE);
    } else if (status == EPX_OK) {
        (void)cpu_attend(group); /* to what no worker has sent */
    }
    return status;
}

/* The rest of a dispatch that does not go through receive slots. */
static epx_status_t
receive_direct(cpu_plan_t *plan)
{
    epx_group_t *group = plan->base.group;
    const cpu_dispatch_t *op = &plan->dispatch;
    epx_status_t status = EPX_OK;

    if (spans_nodes(plan)) {
        status = receive_forwards(plan);
    }
    if (status == EPX_OK) {
        status = epx__wait_near(group, op->step, EPX__GATE_DONE, "a dispatch");
    }
    return status == EPX_OK ? cpu_rail_wait_sent(group, op->lanes) : status;
}

/* Whether a dispatch that need not goes through receive slots all the same:
 * between nodes, when so little is sent that a wait for the peers' posts would
 * take longer than sending a row once for each rank.  All ranks come to the
 * same answer. */
static bool
prefers_slots(const cpu_plan_t *plan)
{
    const cpu_dispatch_t *op = &plan->dispatch;
    const epx__plan_key_t *key = &plan->base.key;
    uint64_t row = (uint64_t)op->shape.row_bytes +
                   sizeof(uint32_t) * (uint64_t)op->shape.num_scales;

    return spans_nodes(plan) && row <= key->send_only_row_bytes &&
           row * key->max_tokens_per_rank <= DIRECT_BYTES;
}

/* Fill in what follows from the arguments alone. */
static void
describe(cpu_plan_t *plan, const epx_dispatch_args_t *args)
{
    cpu_dispatch_t *op = &plan->dispatch;

    op->args = *args;
    epx__dispatch_describe(&plan->base, &op->args, &op->shape);
    op->uses_slots =
        plan->base.key.send_only_row_bytes > 0 &&
        ((args->flags & EPX_SEND_ONLY) != 0 || prefers_slots(plan));
}

/* What this rank sends. */
static epx_status_t
check_sent(const cpu_plan_t *plan)
{
    const cpu_dispatch_t *op = &plan->dispatch;
    const epx_dispatch_args_t *args = &op->args;
    uint64_t bytes =
        (uint64_t)op->shape.row_bytes + 4 * (uint64_t)op->shape.num_scales;
    bool has_scales =
        op->shape.num_scales > 0 && args->quantize == EPX_QUANTIZE_NONE;
    const epx__pointer_t pointers[] = {
        { "x", args->x, true },
        { "scales", args->scales, has_scales },
        { "topk_weights", args->topk_weights, op->shape.has_weights },
    };

    if (op->uses_slots && bytes > plan->base.key.send_only_row_bytes) {
        return epx__fail(EPX_ERR_SHAPE,
                         "a row of %" PRIu64 " bytes with its scales exceeds "
                         "the plan's send_only_row_bytes of %" PRIu64,
                         bytes, plan->base.key.send_only_row_bytes);
    }
    return epx__check_pointers(pointers, 3, "num_tokens", plan->num_tokens);
}

/* What it receives: can only be checked once the counts are known. */
static epx_status_t
check_received(const cpu_plan_t *plan)
{
    const cpu_dispatch_t *op = &plan->dispatch;
    const epx_dispatch_args_t *args = &op->args;
    const epx__pointer_t pointers[] = {
        { "recv_x", args->recv_x, true },
        { "recv_scales", args->recv_scales, op->shape.num_scales > 0 },
        { "recv_topk_weights", args->recv_topk_weights, op->shape.has_weights },
    };

    if (args->recv_rows < plan->num_rows) {
        return epx__fail(EPX_ERR_TOO_SMALL,
                         "recv_rows is %" PRId64 ", but this rank's receive "
                         "buffers need %" PRId64 " rows",
                         args->recv_rows, plan->num_rows);
    }
    return epx__check_pointers(pointers, 3, "the number of received rows",
                               plan->rank_rows[plan->base.group->rank]);
}

static uint32_t
weights_bits(const cpu_plan_t *plan)
{
    const cpu_dispatch_t *op = &plan->dispatch;
    bool takes_part =
        plan->num_tokens > 0 ||
        (!op->uses_slots && plan->rank_rows[plan->base.group->rank] > 0);

    return epx__weights_bits(op->shape.has_weights, takes_part);
}

/* For a quantised row with its scales; or, in the hook, a row per expert. */
static epx_status_t
reserve_scratch(const cpu_plan_t *plan)
{
    size_t row = (size_t)plan->dispatch.shape.num_scales * sizeof(uint32_t) +
                 (size_t)plan->dispatch.args.hidden;
    size_t rows = (size_t)plan->base.num_local_experts * sizeof(int64_t);

    return cpu_scratch_reserve(plan->base.group, row > rows ? row : rows);
}

static void
close_dispatch(cpu_plan_t *plan)
{
    cpu_rail_give(plan->base.group, plan->dispatch.lanes);
    cpu_arrays_close(plan->base.group, plan->dispatch.arrays);
}

/* Everything that can fail on this rank alone, before anybody is told. */
static epx_status_t
prepare(cpu_plan_t *plan, const epx_dispatch_args_t *args, epx__post_t *post)
{
    cpu_dispatch_t *op = &plan->dispatch;
    epx_status_t status = cpu_op_check(plan);

    if (status != EPX_OK) {
        return status;
    }
    describe(plan, args);
    status = check_sent(plan);
    /* Through receive slots, only the hook needs this batch's counts. */
    if (status == EPX_OK && !(op->uses_slots && plan->knows_peer_slots)) {
        status = cpu_plan_resolve(plan);
    }
    if (status == EPX_OK && !op->uses_slots) {
        status = check_received(plan);
    }
    if (status == EPX_OK) {
        op->shape.signature.arrays = weights_bits(plan);
        status = reserve_scratch(plan);
    }
    if (status == EPX_OK) {
        status = cpu_receive_open(plan, post);
    }
    if (status == EPX_OK && spans_nodes(plan)) {
        status = cpu_rail_dispatch_open(plan, post);
        if (status != EPX_OK) {
            close_dispatch(plan);
        }
    }
    return status;
}

/* Returns the status that it ends with. */
static epx_status_t
end_dispatch(cpu_plan_t *plan, epx_status_t status)
{
    if (plan->dispatch.uses_slots && spans_nodes(plan)) {
        status = cpu_slots_end_turn(plan, status);
    }
    close_dispatch(plan);
    cpu_step_end(plan->base.group, plan->dispatch.step);
    plan->pending = EPX__PENDING_NONE;
    return status;
}

epx_status_t
cpu_dispatch_start(cpu_plan_t *plan, const epx_dispatch_args_t *args)
{
    epx_group_t *group = plan->base.group;
    epx__post_t post;
    epx_status_t status = prepare(plan, args, &post);

    if (status != EPX_OK) {
        return status;
    }
    status = cpu_step_begin(group, &plan->base, EPX__STEP_DISPATCH,
                            &plan->dispatch.step);
    if (status != EPX_OK) {
        close_dispatch(plan);
        return status;
    }
    plan->pending = EPX__PENDING_DISPATCH;
    status = plan->dispatch.uses_slots ? cpu_slots_send(plan, &post)
                                       : send_direct(plan, &post);
    return status == EPX_OK ? EPX_OK : end_dispatch(plan, status);
}

/* The hook of a dispatch through receive slots: counts, then rows. */
static epx_status_t
receive_slots(cpu_plan_t *plan)
{
    epx_group_t *group = plan->base.group;
    cpu_dispatch_t *op = &plan->dispatch;
    epx_status_t status =
        cpu_posts_wait(group, op->step, "a send-only dispatch",
                       &op->shape.signature, cpu_engine(group)->posts);

    if (status == EPX_OK) {
        status = cpu_plan_resolve(plan);
    }
    if (status == EPX_OK) {
        status = check_received(plan);
    }
    if (status == EPX_OK) {
        status = cpu_slots_receive(plan);
    }
    return status == EPX_OK ? cpu_rail_wait_sent(group, op->lanes) : status;
}

static void
give_dropped(const cpu_plan_t *plan)
{
    uint8_t *dropped = plan->dispatch.args.dropped;
    int64_t entries = plan->num_tokens * (int64_t)plan->base.key.topk;

    for (int64_t i = 0; dropped != NULL && i < entries; i++) {
        dropped[i] = plan->experts[i] == CPU_EXPERT_DROPPED;
    }
}

static void
give_counts(const cpu_plan_t *plan)
{
    int32_t *counts = plan->dispatch.args.recv_expert_counts;
    int32_t *totals = plan->dispatch.args.recv_expert_totals;

    for (int32_t e = 0; e < plan->base.num_local_experts; e++) {
        if (counts != NULL) {
            counts[e] = (int32_t)plan->expert_rows[e];
        }
        if (totals != NULL) {
            totals[e] =
                (int32_t)((uint32_t)totals[e] + (uint32_t)plan->expert_rows[e]);
        }
    }
}

epx_status_t
cpu_dispatch_finish(cpu_plan_t *plan)
{
    const cpu_dispatch_t *op = &plan->dispatch;
    epx_status_t status =
        op->uses_slots ? receive_slots(plan) : receive_direct(plan);

    if (status == EPX_OK) {
        cpu_receive_close(plan);
    }
    if (status == EPX_OK) {
        give_counts(plan);
        give_dropped(plan);
    }
    return end_dispatch(plan, status);
}
