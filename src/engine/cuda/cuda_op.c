/* SPDX-License-Identifier: MIT */
/* What every operation does on its way to a stream. */
#include "engine/cuda/cuda_engine.h"

static bool
is_capturing(cudaStream_t stream)
{
    enum cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;

    if (cudaStreamIsCapturing(stream, &status) != cudaSuccess) {
        (void)cudaGetLastError(); /* the legacy stream, beside a capture */
        return false;
    }
    return status != cudaStreamCaptureStatusNone;
}

epx_status_t
cuda_capture_refused(void)
{
    return epx__fail(EPX_ERR_STATE,
                     "only a plan with recv_capacity, or of "
                     "EPX_LAYOUT_EXPERT_SLOTS, can be captured in a graph: the "
                     "others need their counts on the host");
}

cudaError_t
cuda_plan_record(cuda_plan_t *plan)
{
    if (!plan->was_queued) {
        return cudaSuccess;
    }
    /* The event would become part of the graph. */
    return is_capturing(plan->stream)
               ? cudaErrorStreamCaptureUnsupported
               : cudaEventRecord(plan->seat->done, plan->stream);
}

/* Put the stream behind the group's last operation. */
static cudaError_t
follow(cuda_engine_t *engine, cudaStream_t stream)
{
    cuda_plan_t *last = engine->last_plan;
    cudaError_t error = cudaSuccess;

    if (last != NULL && last->stream == stream) {
        return cudaSuccess;
    }
    if (last != NULL) {
        error = cuda_plan_record(last);
        engine->last_done = last->seat->done;
    }
    return error == cudaSuccess && engine->last_done != NULL
               ? cudaStreamWaitEvent(stream, engine->last_done, 0)
               : error;
}

epx_status_t
cuda_op_begin(cuda_plan_t *plan, epx_stream_t stream, cuda_op_t *op)
{
    epx_group_t *group = plan->base.group;
    epx_status_t status = cuda_check(group);

    if (status == EPX_OK) {
        status = epx__group_check(group);
    }
    if (status == EPX_OK) {
        status = epx__cuda_device_enter(group->device_ordinal);
    }
    if (status != EPX_OK) {
        return status;
    }
    (void)pthread_mutex_lock(&group->op_lock);
    *op = (cuda_op_t){ plan, stream, is_capturing(stream) };
    if (!op->is_captured) {
        status = epx__cuda_check(follow(cuda_engine(group), op->stream),
                                 "cannot order two streams");
    }
    return status == EPX_OK ? EPX_OK : cuda_op_end(op, status, false);
}

epx_status_t
cuda_op_end(cuda_op_t *op, epx_status_t status, bool launched)
{
    cuda_plan_t *plan = op->plan;
    epx_group_t *group = plan->base.group;

    cuda_stand_ins_settle(op, launched);
    if (launched && !op->is_captured) {
        plan->was_queued = true;
        plan->stream = op->stream;
        cuda_engine(group)->last_plan = plan;
    }
    if (launched && !op->is_captured && status != EPX_OK) {
        /* The peers will miss it: this rank is out of step. */
        (void)epx__group_break(group, status);
    }
    (void)pthread_mutex_unlock(&group->op_lock);
    epx__cuda_device_leave();
    return status;
}

epx_status_t
cuda_op_check_free(const cuda_op_t *op)
{
    const cuda_plan_t *plan = op->plan;
    epx_status_t status = epx__check_pending(plan->pending);

    if (status == EPX_OK && plan->num_routings == 0) {
        status = epx__fail(EPX_ERR_STATE, "the plan has no routing: the call "
                                          "that should have given it failed");
    }
    return status == EPX_OK && op->is_captured && !cuda_plan_is_fixed(plan)
               ? cuda_capture_refused()
               : status;
}

epx_status_t
cuda_op_check(const cuda_op_t *op, int64_t *rows_p)
{
    cuda_plan_t *plan = op->plan;
    uint64_t fixed = epx__plan_fixed_rows(&plan->base);
    bool is_fixed = cuda_plan_is_fixed(plan);
    epx_status_t status = cuda_op_check_free(op);

    if (status != EPX_OK) {
        return status;
    }
    status = is_fixed ? cuda_refused(plan) : cuda_counts_wait(plan);
    *rows_p = is_fixed ? (int64_t)fixed : plan->num_rows;
    return status;
}

epx_status_t
cuda_step_take(const cuda_op_t *op, epx__pending_t pending)
{
    epx_group_t *group = op->plan->base.group;
    uint64_t step = group->last_step + 1;
    epx__open_step_t *oldest =
        &group->open_steps[epx__slot(step + EPX__MAX_OPEN)];

    if (oldest->step != 0 && oldest->step + EPX__MAX_OPEN == step) {
        return epx__window_full();
    }
    group->last_step = step;
    group->open_steps[epx__slot(step)] = (epx__open_step_t){
        .step = pending == EPX__PENDING_NONE ? 0 : step,
        .plan = &op->plan->base,
    };
    op->plan->pending = pending;
    op->plan->pending_call = step;
    return EPX_OK;
}
