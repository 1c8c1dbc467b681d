/* SPDX-License-Identifier: MIT */
/*
 * Combine in one hop:
 *     1. post where this rank keeps its experts' outputs        (start)
 *     2. wait for everybody's post
 *     3. for each token of this rank, pull its rows, sum, round, write once
 *     4. signal DONE, wait for everybody's: then x may change   (finish)
 */
#include "engine/cpu/cpu.h"

#include <inttypes.h>
#include <string.h>

/* Elements of recv_topk_weights in one row. */
static uint64_t
weights_per_row(const cpu_plan_t *plan)
{
    return cpu_is_rank_major(plan) ? plan->base.key.topk : 1;
}

typedef struct job {
    const cpu_plan_t *plan;
    void (*reduce)(const epx__reduce_t *reduce);
    uint64_t row_bytes;
    bool streams;
    epx__share_t tokens;
} job_t;

static const char *
row_at(const job_t *job, int32_t rank, epx__array_t array, int64_t row,
       uint64_t row_bytes)
{
    const epx_group_t *group = job->plan->base.group;

    return group->peers[rank].base +
           cpu_engine(group)->posts[rank].offset[array] +
           (uint64_t)row * row_bytes;
}

/* The biases of a token. */
static int
gather_biases(const job_t *job, int64_t t, const void **rows, float *weights)
{
    const epx_combine_args_t *args = &job->plan->combine.args;
    int count = 0;

    for (int b = 0; b < EPX_MAX_BIAS; b++) {
        if (args->bias[b] != NULL) {
            rows[count] =
                (const char *)args->bias[b] + (uint64_t)t * job->row_bytes;
            weights[count] = 1.0f;
            count++;
        }
    }
    return count;
}

/* The rows of a token over ranks, ascending. */
static int
gather_rank_rows(const job_t *job, int64_t t, const void **rows)
{
    const cpu_plan_t *plan = job->plan;
    int32_t topk = (int32_t)plan->base.key.topk;
    const cpu_route_t *routes = plan->routes + t * topk;
    int count = 0;

    for (; count < topk && routes[count].rank >= 0; count++) {
        int32_t rank = routes[count].rank;

        rows[count] = row_at(job, rank, EPX__ARRAY_X,
                             plan->rank_base[rank] + routes[count].ordinal,
                             job->row_bytes);
    }
    return count;
}

/* The rows of a token over k, ascending, with their weights. */
static int
gather_expert_rows(const job_t *job, int64_t t, const void **rows,
                   float *weights)
{
    const cpu_plan_t *plan = job->plan;
    const float *topk_weights = plan->combine.args.topk_weights;
    int64_t topk = plan->base.key.topk;
    int count = 0;

    for (int64_t i = t * topk; i < (t + 1) * topk; i++) {
        int32_t expert = plan->experts[i];

        if (expert >= 0) {
            rows[count] = row_at(job, plan->expert_rank[expert], EPX__ARRAY_X,
                                 plan->expert_base[expert] + plan->ordinals[i],
                                 job->row_bytes);
            weights[count] = topk_weights == NULL ? 0 : topk_weights[i];
            count++;
        }
    }
    return count;
}

static void
combine_token(const job_t *job, int64_t t)
{
    const cpu_plan_t *plan = job->plan;
    const epx_combine_args_t *args = &plan->combine.args;
    const void *rows[EPX_MAX_BIAS + EPX_MAX_TOPK];
    float weights[EPX_MAX_BIAS + EPX_MAX_TOPK];
    int count = gather_biases(job, t, rows, weights);

    count += cpu_is_rank_major(plan)
                 ? gather_rank_rows(job, t, rows + count)
                 : gather_expert_rows(job, t, rows + count, weights + count);
    job->reduce(&(epx__reduce_t){
        .rows = rows,
        .weights = args->topk_weights == NULL ? NULL : weights,
        .num_rows = count,
        .out = (char *)args->out + (uint64_t)t * job->row_bytes,
        .count = (size_t)args->hidden,
        .streams = job->streams,
    });
}

/* out_topk_weights of one token. */
static void
combine_weights(const job_t *job, int64_t t)
{
    const cpu_plan_t *plan = job->plan;
    int32_t topk = (int32_t)plan->base.key.topk;
    float *out = plan->combine.args.out_topk_weights + t * topk;
    uint64_t row_bytes = weights_per_row(plan) * sizeof(float);

    memset(out, 0, (size_t)topk * sizeof(*out));
    for (int32_t i = 0; i < topk; i++) {
        int32_t expert = plan->experts[t * topk + i];

        if (!cpu_is_rank_major(plan)) {
            if (expert >= 0) {
                memcpy(&out[i],
                       row_at(job, plan->expert_rank[expert],
                              EPX__ARRAY_TOPK_WEIGHTS,
                              plan->expert_base[expert] +
                                  plan->ordinals[t * topk + i],
                              row_bytes),
                       sizeof(float));
            }
            continue;
        }
        cpu_route_t route = plan->routes[t * topk + i];
        const float *row;

        if (route.rank < 0) {
            break;
        }
        row = (const float *)(const void *)row_at(
            job, route.rank, EPX__ARRAY_TOPK_WEIGHTS,
            plan->rank_base[route.rank] + route.ordinal, row_bytes);
        for (int32_t k = 0; k < topk; k++) {
            out[k] += row[k];
        }
    }
}

static void
combine_work(void *context, int32_t worker)
{
    job_t *job = context;
    const epx_combine_args_t *args = &job->plan->combine.args;
    int64_t begin, end;

    (void)worker;
    while (epx__share_next(&job->tokens, &begin, &end)) {
        for (int64_t t = begin; t < end; t++) {
            combine_token(job, t);
            if (args->out_topk_weights != NULL) {
                combine_weights(job, t);
            }
        }
    }
    epx__kernels_fence();
}

static void
pull_rows(const cpu_plan_t *plan)
{
    epx_group_t *group = plan->base.group;
    cpu_engine_t *engine = cpu_engine(group);
    const epx_combine_args_t *args = &plan->combine.args;
    int32_t num_workers = cpu_workers(group, args->num_workers);
    const epx__kernels_t *kernels = engine->kernels;
    job_t job = {
        .plan = plan,
        .reduce = args->dtype == EPX_F32   ? kernels->reduce_f32
                  : args->dtype == EPX_F16 ? kernels->reduce_f16
                                           : kernels->reduce_bf16,
        .row_bytes = (uint64_t)args->hidden * epx_dtype_size(args->dtype),
        .tokens = { .num_items = plan->num_tokens,
                    .grain = cpu_grain(plan->num_tokens, num_workers) },
    };
    uint64_t bytes = (uint64_t)plan->num_tokens * job.row_bytes;
    cpu_store_timer_t timer = cpu_store_start(&engine->combine_stores, bytes);

    job.streams = timer.streams && (uintptr_t)args->out % EPX_ROW_ALIGN == 0;
    epx__pool_run(engine->pool, num_workers, combine_work, &job);
    cpu_store_stop(&timer);
}

/* Where peers keep their outputs: checked before a byte is read. */
static epx_status_t
check_posts(const cpu_plan_t *plan)
{
    const epx_group_t *group = plan->base.group;
    const epx__post_t *posts = cpu_engine(group)->posts;
    uint64_t row_bytes = (uint64_t)plan->combine.args.hidden *
                         epx_dtype_size(plan->combine.args.dtype);

    for (int32_t r = 0; r < group->num_ranks; r++) {
        uint64_t rows = (uint64_t)plan->rank_rows[r];
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
                weights_per_row(plan) * sizeof(float), sizeof(float));
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
    uint64_t row_bytes = (uint64_t)args->hidden * epx_dtype_size(args->dtype);
    epx_status_t status =
        open_input(plan, "x", args->x, row_bytes, EPX__ARRAY_X);

    if (status == EPX_OK && plan->combine.has_weights) {
        status = open_input(plan, "recv_topk_weights", args->recv_topk_weights,
                            weights_per_row(plan) * sizeof(float),
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
    status = cpu_step_begin(group, &plan->base, EPX__STEP_COMBINE, &op->step);
    if (status != EPX_OK) {
        cpu_arrays_close(group, op->arrays);
        return status;
    }
    plan->pending = EPX__PENDING_COMBINE;
    post = (epx__post_t){
        .step = op->step,
        .signature = op->signature,
        .num_rows = (uint64_t)args->num_rows,
    };
    for (int i = 0; i < EPX__NUM_ARRAYS; i++) {
        post.offset[i] = cpu_array_offset(group, &op->arrays[i]);
    }
    cpu_post_all(group, op->step, &post);
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
        pull_rows(plan);
        epx__signal_near(group, op->step, EPX__GATE_DONE);
        status = epx__wait_near(group, op->step, EPX__GATE_DONE,
                                "the end of a combine");
    }
    cpu_arrays_close(group, op->arrays);
    cpu_step_end(group, op->step);
    plan->pending = EPX__PENDING_NONE;
    return status;
}
