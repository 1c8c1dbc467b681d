/* SPDX-License-Identifier: MIT */
/*
 * A combine between nodes:
 *     1. each rank tells its rails the routing that they do not know yet, and
 *        the weights if there are any           (parcels of the lane OUT; or,
 *        with receive slots, a parcel into those, ahead of the posts)
 *     2. the rail sums, for each token, the rows on its node, and rounds; or
 *        packs, in LogFMT-10.  What is the sum of one row, this rank's, is sent
 *        from where that is
 *     3. and sends them back                    (parcels of the lane BACK)
 */
#include "engine/common/logfmt.h"
#include "engine/cpu/cpu_combine.h"
#include "engine/cpu/cpu_rail.h"

#include <string.h>

/* What comes back: a row and, if the weights are reduced, those. */
static cpu_parcel_kind_t
back_kind(const cpu_plan_t *plan)
{
    const epx_combine_args_t *args = &plan->combine.args;

    return (cpu_parcel_kind_t){
        .topk = (int32_t)plan->base.key.topk,
        .has_weights = plan->combine.has_weights,
        .row_bytes = cpu_is_logfmt(plan)
                         ? epx__logfmt_row_bytes(args->hidden)
                         : args->hidden * (int64_t)epx_dtype_size(args->dtype),
    };
}

static epx_status_t
open_lane(cpu_plan_t *plan, epx__lane_t which, uint64_t room, epx__post_t *post)
{
    cpu_lane_t **lane_p = &plan->combine.lanes[which];
    epx_status_t status = cpu_lane_take(plan->base.group, which, room, lane_p);

    if (status == EPX_OK) {
        cpu_lane_announce(*lane_p, post);
    }
    return status;
}

/* For what comes of the sources, whose weights, if any, are not known yet:
 * without them a region may be smaller, and yet its only chunk be larger. */
static uint64_t
out_room(const cpu_plan_t *plan)
{
    uint64_t room = 0;

    for (int32_t f = 0; f < plan->num_forwards; f++) {
        for (int i = 0; i < 2; i++) {
            cpu_parcel_kind_t kind = { .topk = (int32_t)plan->base.key.topk,
                                       .has_heads = !plan->rails_know,
                                       .has_weights = i != 0 };
            uint64_t bytes =
                cpu_parcel_room(&kind, plan->forwards[f].num_tokens);

            room = bytes > room ? bytes : room;
        }
    }
    return room;
}

/* All that there can be for a rail has to fit: so all ranks say the same. */
static bool
can_go_ahead(const cpu_plan_t *plan)
{
    const epx__plan_key_t *key = &plan->base.key;
    cpu_parcel_kind_t kind = { .topk = (int32_t)key->topk,
                               .has_heads = true,
                               .has_weights = true };
    int64_t most = (int64_t)key->max_tokens_per_rank;

    return cpu_parcels(&kind, most) == 1 &&
           cpu_slots_take_parcels(plan, cpu_parcel_room(&kind, most));
}

epx_status_t
cpu_rail_combine_send(cpu_plan_t *plan)
{
    if (!plan->combine.goes_ahead) {
        return EPX_OK;
    }
    cpu_slots_begin_turn(plan);
    return cpu_rail_send(plan, plan->combine.lanes[EPX__LANE_OUT]);
}

epx_status_t
cpu_rail_combine_open(cpu_plan_t *plan, epx__post_t *post)
{
    const epx_group_t *group = plan->base.group;
    cpu_parcel_kind_t back = back_kind(plan);
    uint64_t back_room = 0;
    epx_status_t status;

    for (int32_t n = 0; n < group->nodes.num_nodes; n++) {
        uint64_t bytes = cpu_parcel_room(&back, plan->sent_nodes[n]);

        back_room = bytes > back_room ? bytes : back_room;
    }
    plan->combine.goes_ahead = can_go_ahead(plan);
    post->lane_weights = plan->combine.args.topk_weights != NULL;
    status = open_lane(plan, EPX__LANE_OUT,
                       plan->combine.goes_ahead ? 0 : out_room(plan), post);
    return status == EPX_OK ? open_lane(plan, EPX__LANE_BACK, back_room, post)
                            : status;
}

/* ---- the rail's part ---- */

typedef struct job {
    const cpu_plan_t *plan;
    const cpu_forward_t *forward;
    cpu_parcel_kind_t kind;
    cpu_parcel_t parcel;
    cpu_reduce_fn_t *reduce;
    const float *topk_weights; /* of the region's tokens; NULL: none */
    char *to;
    struct iovec *rows; /* [parcel.count] where each token's is */
    cpu_share_t share;
} job_t;

/* Whether the token's only row, of this rank, can be sent in place of its sum.
 * That has no -0, and NaNs of one kind alone, but the owner's sum is the same
 * with either.  Rows of other ranks may change once those have failed, which
 * this rank cannot know while it sends. */
static bool
is_sum(const job_t *job, const cpu_token_t *token,
       const cpu_summands_t *summands)
{
    const cpu_plan_t *plan = job->plan;
    uint64_t bytes = (uint64_t)plan->rank_rows[plan->base.group->rank] *
                     (uint64_t)job->kind.row_bytes;

    return summands->count == 1 && token->weights == NULL &&
           !cpu_is_logfmt(plan) &&
           (uintptr_t)summands->rows[0] -
                   (uintptr_t)plan->combine.arrays[EPX__ARRAY_X].heap <
               bytes;
}

static void
sum_token(const job_t *job, int64_t i)
{
    const cpu_plan_t *plan = job->plan;
    int64_t at = job->parcel.begin + i;
    int64_t topk = job->kind.topk;
    cpu_route_t routes[EPX_MAX_TOPK];
    cpu_token_t token = cpu_forward_token(
        plan, job->forward, at,
        job->topk_weights == NULL ? NULL : job->topk_weights + at * topk,
        routes);
    cpu_summands_t summands;
    char *sum = job->to + job->parcel.rows + i * job->kind.row_bytes;

    summands.count = 0;
    cpu_add_near_rows(plan, &token, &summands);
    if (is_sum(job, &token, &summands)) {
        /* Nobody writes to what is sent. */
        sum = (char *)(uintptr_t)summands.rows[0];
    } else {
        job->reduce(&(epx__reduce_t){
            .rows = summands.rows,
            .kinds = summands.kinds,
            .weights = token.weights == NULL ? NULL : summands.weights,
            .num_rows = summands.count,
            .out = sum,
            .count = (size_t)plan->combine.args.hidden,
            .packs = cpu_is_logfmt(plan),
        });
    }
    job->rows[i] = (struct iovec){ sum, (size_t)job->kind.row_bytes };
    if (job->kind.has_weights) {
        float *out =
            (float *)(void *)(job->to + job->parcel.weights) + i * topk;

        memset(out, 0, (size_t)topk * sizeof(*out));
        cpu_add_near_weights(plan, &token, out);
    }
}

static void
sum_work(void *context, int32_t worker)
{
    job_t *job = context;
    int64_t begin, end;

    while (cpu_share_next(&job->share, worker, &begin, &end)) {
        for (int64_t i = begin; i < end; i++) {
            sum_token(job, i);
        }
    }
}

/* The weights that a source has sent, which come in few chunks: one, unless
 * they are many. */
static const float *
gather_weights(const cpu_plan_t *plan, int32_t f)
{
    const cpu_forward_t *forward = &plan->forwards[f];
    const cpu_lane_t *lane = plan->combine.lanes[EPX__LANE_OUT];
    cpu_parcel_kind_t kind = cpu_rail_kind(plan, forward->rank);
    size_t row = (size_t)kind.topk * sizeof(float);
    char *to;

    if (!kind.has_weights || forward->num_tokens == 0) {
        return NULL;
    }
    to = cpu_lane_out(plan->combine.lanes[EPX__LANE_BACK],
                      (uint64_t)forward->num_tokens * row);
    for (int c = 0; c < cpu_parcels(&kind, forward->num_tokens); c++) {
        cpu_parcel_t parcel = cpu_parcel(&kind, forward->num_tokens, c);

        memcpy(to + (size_t)parcel.begin * row,
               cpu_rail_chunk(plan, lane, f, c) + parcel.weights,
               (size_t)parcel.count * row);
    }
    return (const float *)(const void *)to;
}

/* Of a parcel's ranges: what is before the rows, and at most one for each. */
static uint64_t
ranges_bytes(const cpu_parcel_t *parcel)
{
    return ((uint64_t)parcel->count + 1) * sizeof(struct iovec);
}

/* Join those that follow each other in memory; returns how many are left. */
static uint32_t
join_ranges(cpu_lane_t *lane, struct iovec *ranges, int64_t count)
{
    uint32_t joined = 0;

    for (int64_t i = 0; i < count; i++) {
        lane->lends = lane->lends || !cpu_lane_owns(lane, ranges[i].iov_base);
        joined = cpu_range_add(ranges, joined, ranges[i]);
    }
    return joined;
}

static epx_status_t
send_sums(cpu_plan_t *plan, int32_t f, const float *topk_weights, int chunk)
{
    epx_group_t *group = plan->base.group;
    cpu_engine_t *engine = cpu_engine(group);
    cpu_lane_t *lane = plan->combine.lanes[EPX__LANE_BACK];
    const cpu_forward_t *forward = &plan->forwards[f];
    const epx__post_t *post = &engine->posts[forward->rank];
    int32_t num_workers = cpu_workers(group, plan->combine.args.num_workers);
    job_t job = {
        .plan = plan,
        .forward = forward,
        .kind = back_kind(plan),
        .reduce = cpu_reduce_fn(plan),
        .topk_weights = topk_weights,
    };
    struct iovec *ranges;
    int64_t num_ranges = 0;
    int32_t workers;

    if (chunk >= cpu_parcels(&job.kind, forward->num_tokens)) {
        return EPX_OK;
    }
    job.parcel = cpu_parcel(&job.kind, forward->num_tokens, chunk);
    job.to = cpu_lane_out(lane, job.parcel.bytes);
    ranges = cpu_lane_out(lane, ranges_bytes(&job.parcel));
    if (job.parcel.rows > 0) {
        ranges[num_ranges++] = (struct iovec){ job.to, job.parcel.rows };
    }
    job.rows = ranges + num_ranges;
    num_ranges += job.parcel.count;
    workers = cpu_workers_for(
        cpu_bytes_of(plan, job.parcel.count, job.kind.row_bytes), num_workers);
    job.share = cpu_share_of(group, job.parcel.count, workers);
    epx__pool_run(engine->pool, workers, sum_work, &job);
    return cpu_lane_send(group, lane, forward->rank,
                         cpu_post_turn(post, EPX__LANE_BACK, chunk), ranges,
                         join_ranges(lane, ranges, num_ranges), workers > 1);
}

/* Memory for the sums of all sources, and their weights side by side. */
static epx_status_t
reserve(const cpu_plan_t *plan)
{
    cpu_parcel_kind_t kind = back_kind(plan);
    uint64_t bytes = 0;
    epx_status_t status;

    for (int32_t f = 0; f < plan->num_forwards; f++) {
        uint64_t tokens = (uint64_t)plan->forwards[f].num_tokens;

        bytes += epx__round_up(tokens * plan->base.key.topk * sizeof(float),
                               EPX__LINE);
        for (int c = 0; c < cpu_parcels(&kind, (int64_t)tokens); c++) {
            cpu_parcel_t parcel = cpu_parcel(&kind, (int64_t)tokens, c);

            bytes += epx__round_up(parcel.bytes, EPX__LINE) +
                     epx__round_up(ranges_bytes(&parcel), EPX__LINE);
        }
    }
    status = cpu_lane_reserve(plan->combine.lanes[EPX__LANE_BACK], bytes);
    return status == EPX_OK ? EPX_OK
                            : epx__group_break(plan->base.group, status);
}

static epx_status_t
sum_for_others(cpu_plan_t *plan)
{
    int32_t num_forwards = plan->num_forwards;
    const float **weights = cpu_engine(plan->base.group)->rails->weights;
    epx_status_t status = reserve(plan);

    for (int32_t f = 0; f < num_forwards && status == EPX_OK; f++) {
        weights[f] = gather_weights(plan, f);
    }
    plan->rails_know = true;
    for (int c = 0; c < CPU_CHUNKS; c++) {
        for (int32_t f = 0; f < num_forwards && status == EPX_OK; f++) {
            status = send_sums(plan, f, weights[f], c);
        }
    }
    if (status == EPX_OK) {
        (void)cpu_attend(plan->base.group); /* to what none of them has sent */
    }
    return status;
}

/* ---- the owner's part ---- */

/* Whether node n sends a chunk. */
static bool
sends_chunk(const cpu_plan_t *plan, const cpu_parcel_kind_t *kind, int32_t n,
            int chunk)
{
    return n != plan->base.group->nodes.own &&
           chunk < cpu_parcels(kind, plan->sent_nodes[n]);
}

static epx_status_t
await_chunk(const cpu_plan_t *plan, const cpu_parcel_kind_t *kind, int chunk)
{
    epx_group_t *group = plan->base.group;
    const cpu_rails_t *rails = cpu_engine(group)->rails;
    const int32_t *sources = rails->sources[EPX__LANE_BACK];
    const cpu_lane_t *lane = plan->combine.lanes[EPX__LANE_BACK];
    cpu_turn_t turn = cpu_lane_turn(lane, chunk);
    epx_status_t status;

    memset(rails->wanted, 0, (size_t)group->num_ranks * sizeof(bool));
    for (int32_t n = 0; n < group->nodes.num_nodes; n++) {
        if (sends_chunk(plan, kind, n, chunk)) {
            rails->wanted[sources[n]] = true;
        }
    }
    status = cpu_turn_wait(group, turn, "a combine between nodes");
    for (int32_t n = 0; n < group->nodes.num_nodes && status == EPX_OK; n++) {
        if (sends_chunk(plan, kind, n, chunk)) {
            status = cpu_turn_check(
                group, turn, sources[n],
                cpu_parcel(kind, plan->sent_nodes[n], chunk).bytes);
        }
    }
    return status;
}

epx_status_t
cpu_rail_combine_await(const cpu_plan_t *plan, int chunk, int64_t *end_p)
{
    cpu_parcel_kind_t kind = back_kind(plan);
    int64_t end = plan->num_tokens;

    for (int32_t n = 0; n < plan->base.group->nodes.num_nodes; n++) {
        /* What comes next begins with this token. */
        if (sends_chunk(plan, &kind, n, chunk + 1)) {
            cpu_parcel_t next =
                cpu_parcel(&kind, plan->sent_nodes[n], chunk + 1);
            int64_t first =
                plan->node_tokens[n * plan->token_capacity + next.begin];

            end = first < end ? first : end;
        }
    }
    *end_p = end;
    return await_chunk(plan, &kind, chunk);
}

const char *
cpu_rail_partial(const cpu_plan_t *plan, int32_t node, int64_t t,
                 const float **weights_p)
{
    const cpu_lane_t *lane = plan->combine.lanes[EPX__LANE_BACK];
    cpu_parcel_kind_t kind = back_kind(plan);
    int64_t at = plan->node_ordinals[node * plan->token_capacity + t];
    cpu_parcel_t parcel;
    const char *chunk;
    int c = 0;

    if (at < 0) {
        return NULL;
    }
    parcel = cpu_parcel(&kind, plan->sent_nodes[node], c);
    while (at >= parcel.begin + parcel.count) {
        parcel = cpu_parcel(&kind, plan->sent_nodes[node], ++c);
    }
    chunk = cpu_lane_chunk(lane, node, c);
    *weights_p = (const float *)(const void *)(chunk + parcel.weights) +
                 (at - parcel.begin) * kind.topk;
    return chunk + parcel.rows + (at - parcel.begin) * kind.row_bytes;
}

epx_status_t
cpu_rail_combine(cpu_plan_t *plan)
{
    cpu_lane_t *out = plan->combine.lanes[EPX__LANE_OUT];
    epx_status_t status = cpu_rail_check(plan);

    if (status == EPX_OK && !plan->combine.goes_ahead) {
        status = cpu_rail_send(plan, out);
    }
    if (status == EPX_OK) {
        status = cpu_rail_receive(plan, out, "a combine between nodes", NULL);
    }
    return status == EPX_OK ? sum_for_others(plan) : status;
}
