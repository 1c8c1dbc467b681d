/* SPDX-License-Identifier: MIT */
#include "engine/cpu/cpu_rail.h"

epx_status_t
cpu_rail_dispatch_open(cpu_plan_t *plan, epx__post_t *post)
{
    epx_group_t *group = plan->base.group;
    cpu_lane_t **lane_p = &plan->dispatch.lanes[EPX__LANE_OUT];
    cpu_parcel_kind_t kind = cpu_rail_kind(plan, group->rank);
    uint64_t room = 0;
    epx_status_t status;

    /* Through receive slots, only what is sent takes memory of the lane. */
    for (int32_t f = 0; f < plan->num_forwards && !plan->dispatch.uses_slots;
         f++) {
        uint64_t bytes = cpu_parcel_room(&kind, plan->forwards[f].num_tokens);

        room = bytes > room ? bytes : room;
    }
    status = cpu_lane_take(group, EPX__LANE_OUT, room, lane_p);
    if (status == EPX_OK) {
        cpu_lane_announce(*lane_p, post);
    }
    return status;
}

typedef struct job {
    const cpu_plan_t *plan;
    const cpu_forward_t *forward;
    cpu_parcel_kind_t kind;
    cpu_parcel_t parcel;
    const char *chunk;
    cpu_row_format_t format;
    cpu_share_t share;
} job_t;

static void
forward_work(void *context, int32_t worker)
{
    job_t *job = context;
    const cpu_plan_t *plan = job->plan;
    const cpu_target_t *targets = cpu_engine(plan->base.group)->targets;
    const char *weights = job->chunk + job->parcel.weights;
    const char *scales = job->chunk + job->parcel.scales;
    const char *rows = job->chunk + job->parcel.rows;
    size_t num_scales = (size_t)job->kind.num_scales;
    size_t topk = (size_t)job->kind.topk;
    cpu_route_t routes[EPX_MAX_TOPK];
    int64_t begin, end;

    while (cpu_share_next(&job->share, worker, &begin, &end)) {
        for (int64_t i = begin; i < end; i++) {
            const float *of_token =
                job->kind.has_weights
                    ? (const float *)(const void *)weights + (size_t)i * topk
                    : NULL;
            cpu_token_t token = cpu_forward_token(
                plan, job->forward, job->parcel.begin + i, of_token, routes);

            cpu_put_token(
                plan, &job->format, targets, &token,
                (cpu_source_row_t){ rows + i * job->kind.row_bytes,
                                    (const uint32_t *)(const void *)scales +
                                        (size_t)i * num_scales });
        }
    }
    epx__kernels_fence();
}

static void
forward_chunk(cpu_plan_t *plan, const cpu_forward_t *forward,
              const cpu_parcel_t *parcel, const char *chunk)
{
    epx_group_t *group = plan->base.group;
    cpu_engine_t *engine = cpu_engine(group);
    int32_t num_workers = cpu_workers_for(
        cpu_bytes_of(plan, parcel->count, plan->dispatch.shape.row_bytes),
        cpu_workers(group, plan->dispatch.args.num_workers));
    job_t job = {
        .plan = plan,
        .forward = forward,
        .kind = cpu_rail_kind(plan, forward->rank),
        .parcel = *parcel,
        .chunk = chunk,
        .format = cpu_row_format(plan),
        .share = cpu_share_of(group, parcel->count, num_workers),
    };
    cpu_store_timer_t timer;

    timer = cpu_store_start(
        &engine->dispatch_stores,
        (uint64_t)parcel->count * (uint64_t)job.kind.row_bytes, &job.share);
    job.format.streams = timer.streams;
    epx__pool_run(engine->pool, num_workers, forward_work, &job);
    cpu_store_stop(&timer);
}

epx_status_t
cpu_rail_forward(cpu_plan_t *plan)
{
    cpu_lane_t *lane = plan->dispatch.lanes[EPX__LANE_OUT];
    epx_status_t status =
        cpu_rail_receive(plan, lane, "a dispatch between nodes", forward_chunk);

    plan->rails_know = true;
    return status;
}
