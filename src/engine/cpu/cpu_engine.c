/* SPDX-License-Identifier: MIT */
/* The CPU engine's table of functions, and its use of queues. */
#include "core/cores.h"
#include "core/queue.h"
#include "engine/cpu/cpu.h"
#include "engine/cpu/cpu_rows.h"
#include "engine/engine.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/utsname.h>
#include <unistd.h>

/* How long a wait spins before it sleeps: longer than a peer's wake-up where
 * every worker has a core, not at all where ranks share cores. */
#define SPIN_NS 100000

static const epx__fabric_ops_t *const cpu_fabrics[] = {
    &epx__fabric_thread,
    &epx__fabric_shm,
    NULL,
};

static epx_status_t
check_ordinal(int32_t ordinal)
{
    return ordinal == 0 ? EPX_OK
                        : epx__fail(EPX_ERR_UNSUPPORTED,
                                    "the ordinal of the device is %d; "
                                    "EPX_DEVICE_CPU has only 0",
                                    ordinal);
}

static epx_status_t
cpu_device_info(int32_t ordinal, epx_device_info_t *info)
{
    epx_status_t status = check_ordinal(ordinal);
    struct utsname system;

    if (status != EPX_OK) {
        return status;
    }
    info->num_devices = 1;
    info->num_workers = epx__cores_get().count;
    info->memory_bytes =
        (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
    info->reachable_devices = 1;
    info->fast_devices = 1;
    (void)snprintf(info->name, sizeof(info->name), "%s",
                   uname(&system) == 0 ? system.machine : "");
    for (int i = 0; cpu_fabrics[i] != NULL; i++) {
        info->fabrics[i] = cpu_fabrics[i]->name;
    }
    return EPX_OK;
}

static epx_status_t
cpu_place(const epx_group_config_t *config, epx__fabric_place_t *place)
{
    place->device.cores = epx__cores_get();
    place->device.num_workers = place->device.cores.count;
    place->device.wanted_workers = config->num_workers;
    return check_ordinal(config->device_ordinal);
}

/* Ranks of this host whose cores overlap share them. */
static epx_status_t
cpu_choose_workers(epx_group_t *group, const epx__fabric_place_t *places)
{
    const epx__fabric_device_t *own = &places[group->rank].device;
    int32_t wanted = own->wanted_workers;
    int32_t sharers = 1, share; /* this rank, and those that overlap */

    for (int32_t rank = 0; rank < group->num_ranks; rank++) {
        sharers += rank != group->rank &&
                   epx__fabric_same_host(&places[group->rank], &places[rank]) &&
                   epx__cores_overlap(&own->cores, &places[rank].device.cores);
    }
    share = own->num_workers / sharers;
    group->num_workers = wanted > 0 ? wanted : share > 1 ? share : 1;
    group->spin_ns =
        group->num_workers * sharers <= own->num_workers ? SPIN_NS : 0;
    return EPX_OK;
}

static void
cpu_close(epx_group_t *group)
{
    cpu_engine_t *engine = cpu_engine(group);

    if (engine == NULL) {
        return;
    }
    if (engine->pool != NULL) {
        epx__pool_close(engine->pool);
    }
    cpu_rails_close(engine->rails);
    free(engine->posts);
    free(engine->targets);
    free(engine->scratch);
    free(engine);
    group->engine_state = NULL;
}

static bool
meanwhile(void *group)
{
    return cpu_attend(group);
}

static epx_status_t
cpu_open(epx_group_t *group)
{
    size_t num_ranks = (size_t)group->num_ranks;
    cpu_engine_t *engine = calloc(1, sizeof(*engine));
    epx_status_t status;

    group->engine_state = engine;
    if (engine != NULL) {
        engine->kernels = epx__kernels_get();
        engine->posts = calloc(num_ranks, sizeof(*engine->posts));
        engine->targets = calloc(num_ranks, sizeof(*engine->targets));
    }
    if (engine == NULL || engine->posts == NULL || engine->targets == NULL) {
        status = epx__fail(EPX_ERR_NO_MEMORY, "no memory for the CPU engine");
    } else {
        status = epx__pool_open(group->num_workers, group->spin_ns, meanwhile,
                                group, &engine->pool);
        if (status == EPX_OK) {
            status = cpu_rails_open(group);
        }
    }
    if (status != EPX_OK) {
        cpu_close(group);
    }
    return status;
}

/* An operation with its arguments by value, run here or on a queue. */
typedef struct task {
    cpu_plan_t *plan;
    union {
        struct {
            int64_t num_tokens;
            const void *topk_idx;
        } route;
        epx_dispatch_args_t dispatch;
        epx_combine_args_t combine;
    } args;
} task_t;

_Static_assert(sizeof(task_t) <= EPX__TASK_BYTES, "raise EPX__TASK_BYTES");

static epx_status_t
run_route(void *payload)
{
    const task_t *task = payload;
    epx_group_t *group = task->plan->base.group;
    epx_status_t status = cpu_plan_route(
        task->plan, task->args.route.num_tokens, task->args.route.topk_idx);

    (void)cpu_attend(group); /* the counts */
    return status;
}

static epx_status_t
run_dispatch(void *payload)
{
    const task_t *task = payload;
    epx_dispatch_args_t args = task->args.dispatch;
    epx_group_t *group = task->plan->base.group;
    epx_status_t status = EPX_OK;

    if ((args.flags & EPX_NEW_ROUTING) != 0) {
        args.flags &= ~EPX_NEW_ROUTING;
        status = cpu_plan_route(task->plan, args.num_tokens, args.topk_idx);
    }
    if (status == EPX_OK) {
        group->wait_ns = args.wait_ns;
        status = cpu_dispatch_start(task->plan, &args);
    }
    return status != EPX_OK || (args.flags & EPX_SEND_ONLY) != 0
               ? status
               : cpu_dispatch_finish(task->plan);
}

static epx_status_t
run_combine(void *payload)
{
    const task_t *task = payload;
    epx_group_t *group = task->plan->base.group;
    epx_status_t status;

    group->wait_ns = task->args.combine.wait_ns;
    status = cpu_combine_start(task->plan, &task->args.combine);
    return status != EPX_OK || (task->args.combine.flags & EPX_SEND_ONLY) != 0
               ? status
               : cpu_combine_finish(task->plan);
}

static epx_status_t
run_complete(void *payload)
{
    cpu_plan_t *plan = ((const task_t *)payload)->plan;
    epx_status_t status = epx__group_check(plan->base.group);

    if (status == EPX_OK) {
        status = cpu_plan_check(plan);
    }
    if (status != EPX_OK) {
        return status;
    }
    switch (plan->pending) {
    case EPX__PENDING_DISPATCH:
        plan->base.group->wait_ns = plan->dispatch.args.wait_ns;
        return cpu_dispatch_finish(plan);
    case EPX__PENDING_COMBINE:
        plan->base.group->wait_ns = plan->combine.args.wait_ns;
        return cpu_combine_finish(plan);
    case EPX__PENDING_NONE:
        break;
    }
    return epx__fail(EPX_ERR_STATE, "epx_complete: the plan has no send-only "
                                    "operation open");
}

/* The caller sees to the network no more, where more may come if an operation
 * is open. */
static void
let_go(const epx_group_t *group)
{
    bool is_open = false;

    if (group->remote.help_end == NULL) {
        return;
    }
    for (int i = 0; i < EPX__NUM_SLOTS; i++) {
        const epx__open_step_t *open = &group->open_steps[i];

        is_open = is_open || (open->step != 0 && !open->is_counts);
    }
    if (is_open) {
        group->remote.help_end(group->remote.context);
    } else {
        group->remote.leave(group->remote.context);
    }
}

/* One operation of a group at a time. */
static epx_status_t
run_locked(const task_t *task, epx__task_fn_t fn)
{
    epx_group_t *group = task->plan->base.group;
    task_t copy = *task;
    epx_status_t status;

    (void)pthread_mutex_lock(&group->op_lock);
    status = fn(&copy);
    group->wait_ns = NULL;
    let_go(group);
    (void)pthread_mutex_unlock(&group->op_lock);
    return status;
}

static epx_status_t
queued_route(void *payload)
{
    return run_locked(payload, run_route);
}

static epx_status_t
queued_dispatch(void *payload)
{
    return run_locked(payload, run_dispatch);
}

static epx_status_t
queued_combine(void *payload)
{
    return run_locked(payload, run_combine);
}

static epx_status_t
queued_complete(void *payload)
{
    return run_locked(payload, run_complete);
}

static void
forget_queue(cpu_plan_t *plan)
{
    if (plan->queue != NULL) {
        epx__queue_release(plan->queue);
        plan->queue = NULL;
    }
}

static epx_status_t
submit(const task_t *task, epx__task_fn_t fn, epx_stream_t stream)
{
    cpu_plan_t *plan = task->plan;
    task_t copy = *task;
    epx_status_t status;

    if (stream == NULL) {
        return fn(&copy);
    }
    status = epx__queue_push(stream, fn, task, sizeof(*task), &plan->ticket);
    if (status == EPX_OK && plan->queue != stream) {
        forget_queue(plan);
        epx__queue_retain(stream);
        plan->queue = stream;
    }
    return status;
}

static epx_status_t
engine_plan_route(epx_plan_t *plan, int64_t num_tokens, const void *topk_idx,
                  epx_stream_t stream)
{
    task_t task = { .plan = cpu_plan(plan) };

    task.args.route.num_tokens = num_tokens;
    task.args.route.topk_idx = topk_idx;
    return submit(&task, queued_route, stream);
}

static epx_status_t
engine_dispatch(epx_plan_t *plan, const epx_dispatch_args_t *args,
                epx_stream_t stream)
{
    task_t task = { .plan = cpu_plan(plan), .args.dispatch = *args };

    return submit(&task, queued_dispatch, stream);
}

static epx_status_t
engine_combine(epx_plan_t *plan, const epx_combine_args_t *args,
               epx_stream_t stream)
{
    task_t task = { .plan = cpu_plan(plan), .args.combine = *args };

    return submit(&task, queued_combine, stream);
}

static epx_status_t
engine_complete(epx_plan_t *plan, epx_stream_t stream)
{
    task_t task = { .plan = cpu_plan(plan) };

    return submit(&task, queued_complete, stream);
}

static void
wait_for_queue(const cpu_plan_t *plan)
{
    if (plan->queue != NULL) {
        epx__queue_wait(plan->queue, plan->ticket);
    }
}

static epx_status_t
engine_plan_counts(epx_plan_t *base, epx_plan_counts_t *counts)
{
    cpu_plan_t *plan = cpu_plan(base);
    epx_group_t *group = base->group;
    epx_status_t status;

    wait_for_queue(plan);
    (void)pthread_mutex_lock(&group->op_lock);
    status = epx__group_check(group);
    if (status == EPX_OK) {
        status = cpu_plan_check(plan);
    }
    if (status == EPX_OK) {
        status = cpu_plan_resolve(plan);
    }
    (void)pthread_mutex_unlock(&group->op_lock);
    if (status == EPX_OK) {
        counts->num_rows = plan->num_rows;
        counts->num_recv_tokens = plan->recv_base[group->num_ranks];
        counts->num_recv_rows = plan->num_recv_rows;
        counts->first_expert = base->first_expert;
        counts->num_local_experts = base->num_local_experts;
        counts->rank_tokens = plan->recv_tokens;
        counts->expert_rows = plan->expert_rows;
        counts->expert_offsets = plan->expert_offsets;
        counts->num_dropped = plan->num_dropped;
    }
    return status;
}

static epx_status_t
engine_plan_close(epx_plan_t *base)
{
    cpu_plan_t *plan = cpu_plan(base);
    epx_group_t *group = base->group;
    epx_status_t status = EPX_OK;

    wait_for_queue(plan);
    (void)pthread_mutex_lock(&group->op_lock);
    if (plan->pending != EPX__PENDING_NONE && !cpu_plan_is_stale(plan) &&
        !epx__group_is_broken(group)) {
        status = epx__fail(EPX_ERR_STATE,
                           "a plan with a send-only operation open cannot be "
                           "destroyed before epx_complete");
    } else {
        cpu_step_forget_plan(group, base);
        forget_queue(plan);
        cpu_plan_free(plan);
    }
    (void)pthread_mutex_unlock(&group->op_lock);
    return status;
}

static const char *
cpu_isa(void)
{
    return epx__kernels_get()->isa;
}

static epx_status_t
cpu_check_stream(const epx_group_t *group, epx_stream_t stream)
{
    if (stream != NULL && epx__queue_group(stream) != group) {
        return epx__fail(EPX_ERR_WRONG_GROUP,
                         "the stream %p is a queue of group %p, the plan is of "
                         "group %p",
                         stream, (void *)epx__queue_group(stream),
                         (const void *)group);
    }
    return EPX_OK;
}

const epx__engine_ops_t epx__engine_cpu = {
    .abi = EPX__ENGINE_ABI,
    .name = "cpu",
    .device = EPX_DEVICE_CPU,
    .fabrics = cpu_fabrics,
    .spans_nodes = true,
    .isa = cpu_isa,
    .device_info = cpu_device_info,
    .place = cpu_place,
    .choose_workers = cpu_choose_workers,
    .check_stream = cpu_check_stream,
    .open = cpu_open,
    .close = cpu_close,
    .plan_open = cpu_plan_open,
    .plan_close = engine_plan_close,
    .plan_route = engine_plan_route,
    .plan_counts = engine_plan_counts,
    .dispatch = engine_dispatch,
    .combine = engine_combine,
    .complete = engine_complete,
};
