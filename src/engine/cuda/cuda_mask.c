/* SPDX-License-Identifier: MIT */
/* Going on without ranks (core/mask.h), on a card. */
#include "engine/cuda/cuda_engine.h"
#include "fabric/cuda/cuda_memory.h"

#include <stdlib.h>
#include <string.h>

static epx_status_t
show_masks(const epx_group_t *group, const uint64_t *masked)
{
    const int32_t *node_of = cuda_engine(group)->view.nodes.node_of;
    size_t bytes = (size_t)group->num_ranks * sizeof(*node_of);
    int32_t *image = malloc(bytes);
    epx_status_t status;

    if (image == NULL) {
        return epx__fail(EPX_ERR_NO_MEMORY, "no memory for %d ranks",
                         group->num_ranks);
    }
    for (int32_t r = 0; r < group->num_ranks; r++) {
        image[r] =
            epx__has_rank(masked, r) ? CUDA_MASKED : group->nodes.node_of[r];
    }
    status = epx__cuda_copy((void *)(uintptr_t)node_of, image, bytes);
    free(image);
    return status;
}

/* What this rank's arrivals at each peer come to is what they did before the
 * step that failed, part of which may have arrived. */
static epx_status_t
set_arrivals(const epx_group_t *group, const uint64_t *masked,
             const cuda_state_t *state)
{
    epx_status_t status = EPX_OK;

    for (int32_t r = 0; r < group->num_ranks; r++) {
        for (uint64_t s = 0; s < EPX__NUM_SLOTS && status == EPX_OK; s++) {
            uint64_t *arrival =
                epx__map_arrival(&group->map, group->peers[r].base, s,
                                 EPX__GATE_DONE, (uint32_t)group->rank);

            if (!epx__has_rank(masked, r) && epx__is_near(&group->nodes, r)) {
                status = epx__cuda_copy(arrival, &state->arrivals[s],
                                        sizeof(*arrival));
            }
        }
    }
    return status;
}

static epx_status_t
rest_entered(epx_group_t *group, const uint64_t *masked, uint64_t *last_step_p)
{
    const cuda_engine_t *engine = cuda_engine(group);
    cuda_state_t state = { 0 };
    epx_status_t status;

    /* The roll has grown: kernels that wait end.  Graphs are the caller's. */
    (void)epx__group_is_broken(group);
    status = epx__cuda_check(cuda_wait_for_last(engine),
                             "cannot wait for the group's kernels");
    if (status == EPX_OK) {
        status = epx__cuda_copy(&state, engine->view.state, sizeof(state));
    }
    if (status == EPX_OK) {
        status = show_masks(group, masked);
    }
    if (status == EPX_OK) {
        status = set_arrivals(group, masked, &state);
    }
    /* A step that failed is not counted, but may have been told of. */
    *last_step_p = state.step + 1;
    return status;
}

static epx_status_t
cuda_rest(epx_group_t *group, const uint64_t *masked, uint64_t *last_step_p)
{
    epx_status_t status = epx__cuda_device_enter(group->device_ordinal);

    if (status == EPX_OK) {
        status = rest_entered(group, masked, last_step_p);
        epx__cuda_device_leave();
    }
    if (status == EPX_OK) {
        cuda_proxy_rest(group, masked);
    }
    return status;
}

static epx_status_t
renew_entered(epx_group_t *group, uint64_t last_step)
{
    cuda_engine_t *engine = cuda_engine(group);
    cuda_report_t *report = engine->view.report;
    cuda_state_t state;
    epx_status_t status =
        epx__cuda_copy(&state, engine->view.state, sizeof(state));

    if (status != EPX_OK) {
        return status;
    }
    state.step = last_step;
    state.broken = 0;
    state.arrived = 0;
    state.taken = 0;
    status = epx__cuda_copy(engine->view.state, &state, sizeof(state));
    if (status == EPX_OK) {
        memset(report->missing, 0, sizeof(report->missing));
        epx__store_u32(&report->status, 0);
        engine->view.nodes.all_near = 0;
        cuda_stand_ins_retire(group);
    }
    return status;
}

static epx_status_t
cuda_renew(epx_group_t *group, const uint64_t *masked, uint64_t last_step)
{
    epx_status_t status = epx__cuda_device_enter(group->device_ordinal);

    if (status == EPX_OK) {
        status = renew_entered(group, last_step);
        epx__cuda_device_leave();
    }
    return status == EPX_OK ? cuda_proxy_renew(group, masked, last_step)
                            : status;
}

void
cuda_mask_open(epx_group_t *group)
{
    static const epx__renewal_t renewal = { cuda_rest, cuda_renew };

    group->renewal = &renewal;
}

/* ---- plans ---- */

epx_status_t
cuda_plan_check(const cuda_plan_t *plan)
{
    return cuda_plan_is_stale(plan) ? epx__plan_stale(&plan->base, plan->epoch)
                                    : EPX_OK;
}

epx_status_t
cuda_plan_revive(cuda_plan_t *plan)
{
    epx_status_t status = cuda_proxy_start(plan->base.group);

    if (status != EPX_OK) {
        return status;
    }
    cuda_rail_forget(plan);
    cuda_counts_clear(plan);
    plan->pending = EPX__PENDING_NONE;
    plan->num_routings = 0;
    plan->is_routed_in_graph = false;
    plan->epoch = epx__load_u32(&plan->base.group->epoch);
    return EPX_OK;
}

epx_status_t
cuda_drops(const cuda_op_t *op, int64_t num_tokens, uint8_t *dropped,
           bool tells, uint64_t generation)
{
    cuda_plan_t *plan = op->plan;
    cuda_drops_args_t args = {
        .view = cuda_engine(plan->base.group)->view,
        .plan = plan->view,
        .num_entries = num_tokens * (int64_t)plan->base.key.topk,
        .dropped = dropped,
        .tells = tells && plan->epoch > 0,
        .told = { plan->seat->record, generation },
    };

    if (dropped == NULL && args.tells == 0) {
        return EPX_OK;
    }
    return epx__cuda_check(cuda_drops_launch(&args, op->stream),
                           "cannot launch the end of a routing");
}
