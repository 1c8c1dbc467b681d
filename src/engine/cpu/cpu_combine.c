/* SPDX-License-Identifier: MIT */
/*
 * Combine in one hop:
 *     1. post where this rank keeps its experts' outputs        (start)
 *     2. wait for everybody's post
 *     3. for each token of this rank, pull its rows, sum, round, write once
 *     4. signal DONE, wait for everybody's: then x may change   (finish)
 */
#include "engine/cpu/cpu_combine.h"
#include "engine/cpu/cpu_rail.h"

#include <inttypes.h>
#include <string.h>

typedef struct job {
    const cpu_plan_t *plan;
    cpu_reduce_fn_t *reduce;
    uint64_t row_bytes;
    bool streams;
    int64_t first; /* of the tokens */
    cpu_share_t tokens;
} job_t;

static const char *
row_at(const cpu_plan_t *plan, int32_t rank, epx__array_t array, int64_t row,
       uint64_t row_bytes)
{
    const epx_group_t *group = plan->base.group;

    return group->peers[rank].base +
           cpu_engine(group)->posts[rank].offset[array] +
           (uint64_t)row * row_bytes;
}

static uint64_t
row_bytes_of(const cpu_plan_t *plan)
{
    return (uint64_t)plan->combine.args.hidden *
           epx_dtype_size(plan->combine.args.dtype);
}

cpu_reduce_fn_t *
cpu_reduce_fn(const cpu_plan_t *plan)
{
    const epx__kernels_t *kernels = cpu_engine(plan->base.group)->kernels;

    if (cpu_is_logfmt(plan)) {
        return kernels->reduce_logfmt;
    }
    switch (plan->combine.args.dtype) {
    case EPX_F32:
        return kernels->reduce_f32;
    case EPX_F16:
        return kernels->reduce_f16;
    default:
        return kernels->reduce_bf16;
    }
}

static void
add_row(cpu_summands_t *summands, const void *row, float weight,
        epx__row_kind_t kind)
{
    summands->rows[summands->count] = row;
    summands->kinds[summands->count] = (uint8_t)kind;
    summands->weights[summands->count] = weight;
    summands->count++;
}

/* Rows are read where the experts left them; quantised, they count as what
 * would have come had they been sent. */
static epx__row_kind_t
near_kind(const cpu_plan_t *plan)
{
    return cpu_is_logfmt(plan) ? EPX__ROW_LOGFMT : EPX__ROW_PLAIN;
}

/* Over ranks, ascending. */
static void
add_rank_rows(const cpu_plan_t *plan, const cpu_token_t *token,
              cpu_summands_t *summands)
{
    epx__row_kind_t kind = near_kind(plan);
    int32_t topk = (int32_t)plan->base.key.topk;

    for (int32_t i = 0; i < topk && token->routes[i].rank >= 0; i++) {
        int32_t rank = token->routes[i].rank;

        if (epx__is_near(&plan->base.group->nodes, rank)) {
            add_row(summands,
                    row_at(plan, rank, EPX__ARRAY_X,
                           token->rank_base[rank] + token->routes[i].ordinal,
                           row_bytes_of(plan)),
                    1.0f, kind);
        }
    }
}

/* Over k, ascending, with their weights. */
static void
add_expert_rows(const cpu_plan_t *plan, const cpu_token_t *token,
                cpu_summands_t *summands)
{
    epx__row_kind_t kind = near_kind(plan);
    int32_t topk = (int32_t)plan->base.key.topk;

    for (int32_t k = 0; k < topk; k++) {
        int32_t expert = token->experts[k];
        int32_t rank = expert < 0 ? -1 : plan->expert_rank[expert];

        if (rank >= 0 && epx__is_near(&plan->base.group->nodes, rank)) {
            add_row(summands,
                    row_at(plan, rank, EPX__ARRAY_X,
                           token->expert_base[expert] + token->ordinals[k],
                           row_bytes_of(plan)),
                    token->weights == NULL ? 1.0f : token->weights[k], kind);
        }
    }
}

void
cpu_add_near_rows(const cpu_plan_t *plan, const cpu_token_t *token,
                  cpu_summands_t *summands)
{
    if (cpu_is_rank_major(plan)) {
        add_rank_rows(plan, token, summands);
    } else {
        add_expert_rows(plan, token, summands);
    }
}

/* The token's rows in the order of the sum: biases, then by node; what another
 * node sends is its own sum. */
static void
add_all_rows(const job_t *job, int64_t t, cpu_summands_t *summands)
{
    const cpu_plan_t *plan = job->plan;
    const epx_combine_args_t *args = &plan->combine.args;
    const epx__nodes_t *nodes = &plan->base.group->nodes;
    cpu_token_t token = cpu_own_token(plan, args->topk_weights, t);
    const float *weights;

    for (int b = 0; b < EPX_MAX_BIAS; b++) {
        if (args->bias[b] != NULL) {
            add_row(summands,
                    (const char *)args->bias[b] + (uint64_t)t * job->row_bytes,
                    1.0f, EPX__ROW_PLAIN);
        }
    }
    for (int32_t n = 0; n < nodes->num_nodes; n++) {
        const char *partial;

        if (n == nodes->own) {
            cpu_add_near_rows(plan, &token, summands);
            continue;
        }
        partial = cpu_rail_partial(plan, n, t, &weights);
        if (partial != NULL) {
            add_row(summands, partial, 1.0f,
                    cpu_is_logfmt(plan) ? EPX__ROW_PACKED : EPX__ROW_PLAIN);
        }
    }
}

static void
combine_token(const job_t *job, int64_t t)
{
    const epx_combine_args_t *args = &job->plan->combine.args;
    cpu_summands_t summands;

    summands.count = 0;
    add_all_rows(job, t, &summands);
    job->reduce(&(epx__reduce_t){
        .rows = summands.rows,
        .kinds = summands.kinds,
        .weights = args->topk_weights == NULL ? NULL : summands.weights,
        .num_rows = summands.count,
        .out = (char *)args->out + (uint64_t)t * job->row_bytes,
        .count = (size_t)args->hidden,
        .streams = job->streams,
    });
}

static const float *
weights_at(const cpu_plan_t *plan, int32_t rank, int64_t row)
{
    return (const float *)(const void *)row_at(
        plan, rank, EPX__ARRAY_TOPK_WEIGHTS, row,
        (uint64_t)cpu_weights_per_row(plan) * sizeof(float));
}

void
cpu_add_near_weights(const cpu_plan_t *plan, const cpu_token_t *token,
                     float *out)
{
    const epx__nodes_t *nodes = &plan->base.group->nodes;
    int32_t topk = (int32_t)plan->base.key.topk;

    for (int32_t i = 0; i < topk; i++) {
        const float *row;
        int32_t expert = token->experts[i];
        cpu_route_t route;

        if (!cpu_is_rank_major(plan)) {
            if (expert >= 0 && epx__is_near(nodes, plan->expert_rank[expert])) {
                out[i] = *weights_at(plan, plan->expert_rank[expert],
                                     token->expert_base[expert] +
                                         token->ordinals[i]);
            }
            continue;
        }
        route = token->routes[i];
        if (route.rank < 0) {
            break;
        }
        if (!epx__is_near(nodes, route.rank)) {
            continue;
        }
        row = weights_at(plan, route.rank,
                         token->rank_base[route.rank] + route.ordinal);
        for (int32_t k = 0; k < topk; k++) {
            out[k] += row[k];
        }
    }
}

/* Those of another node; in the layouts by expert each has its own places. */
static void
add_far_weights(const cpu_plan_t *plan, int32_t node, const int32_t *experts,
                const float *weights, float *out)
{
    const epx__nodes_t *nodes = &plan->base.group->nodes;
    int32_t topk = (int32_t)plan->base.key.topk;

    for (int32_t k = 0; k < topk; k++) {
        if (cpu_is_rank_major(plan)) {
            out[k] += weights[k];
        } else if (experts[k] >= 0 &&
                   nodes->node_of[plan->expert_rank[experts[k]]] == node) {
            out[k] = weights[k];
        }
    }
}

/* out_topk_weights of one token. */
static void
combine_weights(const job_t *job, int64_t t)
{
    const cpu_plan_t *plan = job->plan;
    const epx__nodes_t *nodes = &plan->base.group->nodes;
    int32_t topk = (int32_t)plan->base.key.topk;
    float *out = plan->combine.args.out_topk_weights + t * topk;
    cpu_token_t token = cpu_own_token(plan, NULL, t);
    const float *weights;

    memset(out, 0, (size_t)topk * sizeof(*out));
    for (int32_t n = 0; n < nodes->num_nodes; n++) {
        if (n == nodes->own) {
            cpu_add_near_weights(plan, &token, out);
        } else if (cpu_rail_partial(plan, n, t, &weights) != NULL) {
            add_far_weights(plan, n, token.experts, weights, out);
        }
    }
}

static void
combine_work(void *context, int32_t worker)
{
    job_t *job = context;
    const epx_combine_args_t *args = &job->plan->combine.args;
    int64_t begin, end;

    while (cpu_share_next(&job->tokens, worker, &begin, &end)) {
        for (int64_t t = job->first + begin; t < job->first + end; t++) {
            combine_token(job, t);
            if (args->out_topk_weights != NULL) {
                combine_weights(job, t);
            }
        }
    }
    epx__kernels_fence();
}

/* Of the tokens from `begin` on. */
static void
pull_rows(const cpu_plan_t *plan, int64_t begin, int64_t end)
{
    epx_group_t *group = plan->base.group;
    cpu_engine_t *engine = cpu_engine(group);
    const epx_combine_args_t *args = &plan->combine.args;
    int32_t num_workers = cpu_workers_for(
        cpu_bytes_of(plan, end - begin, (int64_t)row_bytes_of(plan)),
        cpu_workers(group, args->num_workers));
    job_t job = {
        .plan = plan,
        .reduce = cpu_reduce_fn(plan),
        .row_bytes = row_bytes_of(plan),
        .first = begin,
        .tokens = cpu_share_of(group, end - begin, num_workers),
    };
    uint64_t bytes = (uint64_t)(end - begin) * job.row_bytes;
    cpu_store_timer_t timer =
        cpu_store_start(&engine->combine_stores, bytes, &job.tokens);

    job.streams = timer.streams && (uintptr_t)args->out % EPX_ROW_ALIGN == 0;
    epx__pool_run(engine->pool, num_workers, combine_work, &job);
    cpu_store_stop(&timer);
}

/* All of this rank's tokens; between nodes as the sums of others come. */
static epx_status_t
pull_all(cpu_plan_t *plan)
{
    int64_t begin = 0;
    int64_t end;
    epx_status_t status;

    if (plan->base.group->nodes.num_nodes == 1) {
        pull_rows(plan, 0, plan->num_tokens);
        return EPX_OK;
    }
    status = cpu_rail_combine(plan);
    for (int c = 0; c < CPU_CHUNKS && status == EPX_OK; c++) {
        status = cpu_rail_combine_await(plan, c, &end);
        if (status == EPX_OK && end > begin) {
            pull_rows(plan, begin, end);
            begin = end;
        }
    }
    return status;
}

/* Where peers keep their outputs: checked before a byte is read. */
static epx_status_t
check_posts(const cpu_plan_t *plan)
{
    const epx_group_t *group = plan->base.group;
    const epx__post_t *posts = cpu_engine(group)->posts;
    uint64_t row_bytes = row_bytes_of(plan);

    for (int32_t r = 0; r < group->num_ranks; r++) {
        uint64_t rows =
            epx__is_near(&group->nodes, r) && !epx__is_masked(group, r)
                ? (uint64_t)plan->rank_rows[r]
                : 0;
        epx_status_t status = EPX_OK;

        if (rows > 0) {
            status = cpu_check_extent(
                group, r, "x", posts[r].offset[EPX__ARRAY_X], rows, row_bytes,
                epx_dtype_size(plan->combine.args.dtype));
        }
        if (status == EPX_OK && rows > 0 && plan->combine.has_weights) {
            status = cpu_check_extent(
                group, r, "recv_topk_weights",
                posts[r].offset[EPX__ARRAY_TOPK_WEIGHTS], rows,
                (uint64_t)cpu_weights_per_row(plan) * sizeof(float),
                sizeof(float));
        }
        if (status != EPX_OK) {
            return status;
        }
    }
    return EPX_OK;
}

/* Open an input array; what lies outside the heap is copied in. */
static epx_status_t
open_input(cpu_plan_t *plan, const char *name, const void *user,
           uint64_t row_bytes, epx__array_t index)
{
    cpu_array_t *array = &plan->combine.arrays[index];
    uint64_t rows = (uint64_t)plan->rank_rows[plan->base.group->rank];
    uint64_t bytes;
    epx_status_t status;

    if (__builtin_mul_overflow(rows, row_bytes, &bytes)) {
        return epx__fail(EPX_ERR_SHAPE,
                         "%s has %" PRIu64 " rows of %" PRIu64
                         " bytes, more than 2^64 bytes",
                         name, rows, row_bytes);
    }
    /* The array stays const: nothing writes through array->user. */
    status = cpu_array_open(plan->base.group, name, (void *)(uintptr_t)user,
                            bytes, array);
    if (status == EPX_OK && array->staged) {
        cpu_copy_runs(plan, array->heap, user, row_bytes);
    }
    return status;
}

static epx_status_t
open_inputs(cpu_plan_t *plan)
{
    const epx_combine_args_t *args = &plan->combine.args;
    epx_status_t status =
        open_input(plan, "x", args->x, row_bytes_of(plan), EPX__ARRAY_X);

    if (status == EPX_OK && plan->combine.has_weights) {
        status = open_input(plan, "recv_topk_weights", args->recv_topk_weights,
                            (uint64_t)cpu_weights_per_row(plan) * sizeof(float),
                            EPX__ARRAY_TOPK_WEIGHTS);
    }
    if (status != EPX_OK) {
        cpu_arrays_close(plan->base.group, plan->combine.arrays);
    }
    return status;
}

static epx_status_t
check_args(const cpu_plan_t *plan)
{
    const cpu_combine_t *op = &plan->combine;
    const epx_combine_args_t *args = &op->args;
    int64_t rows = plan->rank_rows[plan->base.group->rank];
    const epx__pointer_t outputs[] = {
        { "out", args->out, true },
        { "out_topk_weights", args->out_topk_weights, op->has_weights },
    };
    const epx__pointer_t inputs[] = {
        { "x", args->x, true },
        { "recv_topk_weights", args->recv_topk_weights, op->has_weights },
    };
    epx_status_t status;

    if (args->num_rows < rows) {
        return epx__fail(EPX_ERR_TOO_SMALL,
                         "num_rows is %" PRId64 ", but the plan placed %" PRId64
                         " rows on this rank",
                         args->num_rows, rows);
    }
    status = epx__check_pointers(outputs, 2, "num_tokens", plan->num_tokens);
    return status == EPX_OK
               ? epx__check_pointers(inputs, 2, "the number of received rows",
                                     rows)
               : status;
}

static void
describe(cpu_plan_t *plan, const epx_combine_args_t *args)
{
    cpu_combine_t *op = &plan->combine;
    bool takes_part =
        plan->num_tokens > 0 || plan->rank_rows[plan->base.group->rank] > 0;

    op->args = *args;
    op->has_weights =
        args->recv_topk_weights != NULL || args->out_topk_weights != NULL;
    op->signature = epx__combine_signature(&plan->base, args);
    op->signature.arrays = epx__weights_bits(op->has_weights, takes_part);
}

static void
close_combine(cpu_plan_t *plan)
{
    cpu_rail_give(plan->base.group, plan->combine.lanes);
    cpu_arrays_close(plan->base.group, plan->combine.arrays);
}

/* Returns the status that it ends with. */
static epx_status_t
end_combine(cpu_plan_t *plan, epx_status_t status)
{
    if (plan->combine.goes_ahead) {
        status = cpu_slots_end_turn(plan, status);
    }
    close_combine(plan);
    cpu_step_end(plan->base.group, plan->combine.step);
    plan->pending = EPX__PENDING_NONE;
    return status;
}

epx_status_t
cpu_combine_start(cpu_plan_t *plan, const epx_combine_args_t *args)
{
    epx_group_t *group = plan->base.group;
    cpu_combine_t *op = &plan->combine;
    epx__post_t post;
    epx_status_t status = cpu_op_check(plan);

    if (status == EPX_OK) {
        status = cpu_plan_resolve(plan);
    }
    if (status != EPX_OK) {
        return status;
    }
    describe(plan, args);
    status = check_args(plan);
    if (status == EPX_OK) {
        status = open_inputs(plan);
    }
    if (status != EPX_OK) {
        return status;
    }
    post = (epx__post_t){
        .signature = op->signature,
        .num_rows = (uint64_t)args->num_rows,
    };
    for (int i = 0; i < EPX__NUM_ARRAYS; i++) {
        post.offset[i] = cpu_array_offset(group, &op->arrays[i]);
    }
    if (group->nodes.num_nodes > 1) {
        status = cpu_rail_combine_open(plan, &post);
    }
    if (status == EPX_OK) {
        status =
            cpu_step_begin(group, &plan->base, EPX__STEP_COMBINE, &op->step);
    }
    if (status != EPX_OK) {
        close_combine(plan);
        return status;
    }
    plan->pending = EPX__PENDING_COMBINE;
    post.step = op->step;
    status = cpu_rail_combine_send(plan);
    if (status != EPX_OK) {
        return end_combine(plan, status);
    }
    cpu_post_all(group, op->step, &post);
    (void)cpu_attend(group); /* to the posts, and what goes with them */
    return EPX_OK;
}

epx_status_t
cpu_combine_finish(cpu_plan_t *plan)
{
    epx_group_t *group = plan->base.group;
    cpu_combine_t *op = &plan->combine;
    epx_status_t status = cpu_posts_wait(
        group, op->step, "a combine", &op->signature, cpu_engine(group)->posts);

    if (status == EPX_OK) {
        status = check_posts(plan);
        if (status != EPX_OK) {
            (void)epx__group_break(group, status);
        }
    }
    if (status == EPX_OK) {
        status = pull_all(plan);
    }
    if (status == EPX_OK) {
        status = epx__group_check_read(group);
    }
    if (status == EPX_OK) {
        epx__signal_near(group, op->step, EPX__GATE_DONE);
        status = epx__wait_near(group, op->step, EPX__GATE_DONE,
                                "the end of a combine");
    }
    if (status == EPX_OK && group->nodes.num_nodes > 1) {
        status = cpu_rail_wait_sent(group, op->lanes);
    }
    return end_combine(plan, status);
}
