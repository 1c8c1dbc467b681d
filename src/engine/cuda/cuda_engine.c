/* SPDX-License-Identifier: MIT */
/* The CUDA engine's table of functions, and what it sets up for a group. */
#include "engine/cuda/cuda_engine.h"
#include "core/env.h"
#include "engine/cuda/cuda_kept.h"
#include "engine/engine.h"
#include "fabric/cuda/cuda_fabric.h"
#include "fabric/cuda/cuda_memory.h"

#include <stdlib.h>
#include <string.h>

#define DEFAULT_WORKERS 24  /* SMs, where the card has as many for each rank */
#define SEATS_PER_CHUNK 512 /* more plans at once take more, which may wait */
/* Of a block's shared memory, for what kernels declare by themselves. */
#define STATIC_SHARED 5120

/* Seats are made many at a time, and kept. */
typedef struct cuda_chunk {
    struct cuda_chunk *next;
    char *records; /* of the driver: the device writes them */
    cuda_seat_t seats[SEATS_PER_CHUNK];
} cuda_chunk_t;

static void
chunk_free(cuda_chunk_t *chunk)
{
    for (int i = 0; i < SEATS_PER_CHUNK; i++) {
        if (chunk->seats[i].done != NULL) {
            (void)cudaEventDestroy(chunk->seats[i].done);
        }
    }
    cuda_kept_give(chunk->records);
    free(chunk);
}

epx_status_t
cuda_seats_reserve(epx_group_t *group)
{
    cuda_engine_t *engine = cuda_engine(group);
    cuda_chunk_t *chunk;
    cudaError_t error;

    if (engine->seats != NULL) {
        return EPX_OK;
    }
    chunk = calloc(1, sizeof(*chunk));
    if (chunk == NULL) {
        return epx__fail(EPX_ERR_NO_MEMORY, "no memory for plans");
    }
    error = cuda_kept_take(
        CUDA_KEPT_PINNED, SEATS_PER_CHUNK * engine->record_bytes,
        SEATS_PER_CHUNK * engine->record_bytes, (void **)&chunk->records);
    for (int i = 0; i < SEATS_PER_CHUNK && error == cudaSuccess; i++) {
        error = cudaEventCreateWithFlags(&chunk->seats[i].done,
                                         cudaEventDisableTiming);
    }
    if (error != cudaSuccess) {
        chunk_free(chunk);
        return epx__cuda_fail(error, "no memory for plans");
    }
    for (int i = 0; i < SEATS_PER_CHUNK; i++) {
        cuda_seat_t *seat = &chunk->seats[i];

        seat->record =
            (cuda_record_t *)(void *)(chunk->records +
                                      (size_t)i * engine->record_bytes);
        seat->next = engine->seats;
        engine->seats = seat;
    }
    chunk->next = engine->chunks;
    engine->chunks = chunk;
    return EPX_OK;
}

static void
close_entered(epx_group_t *group)
{
    cuda_engine_t *engine = cuda_engine(group);
    cuda_chunk_t *next;

    cuda_plans_reclaim(group, true);
    for (cuda_plan_t *plan = engine->retired; plan != NULL;) {
        /* The device or the group has failed: only memory that is not the
         * heap's is left to free. */
        cuda_plan_t *after = plan->next;

        cuda_rail_close(plan);
        cuda_counts_close(plan);
        free(plan);
        plan = after;
    }
    for (cuda_chunk_t *chunk = engine->chunks; chunk != NULL; chunk = next) {
        next = chunk->next;
        chunk_free(chunk);
    }
    cuda_proxy_close(group);
    cuda_stand_ins_close(engine);
    epx__group_set_halt(group, NULL);
    cuda_kept_give(engine->view.report);
    (void)epx__heap_free(&group->heap, engine->private_block);
    free(engine);
    group->engine_state = NULL;
}

static void
cuda_close(epx_group_t *group)
{
    if (epx__cuda_device_enter(group->device_ordinal) == EPX_OK) {
        close_entered(group);
        epx__cuda_device_leave();
    }
}

static void
cuda_leave(epx_group_t *group)
{
    if (epx__cuda_device_enter(group->device_ordinal) == EPX_OK) {
        /* What kernels have begun the proxy sees, and peers wait for. */
        cuda_plans_reclaim(group, true);
        epx__cuda_device_leave();
    }
    cuda_proxy_leave(group);
}

/* EPX_CUDA_COPY: bulk where the device has it, or plain. */
static epx_status_t
choose_mover(cuda_engine_t *engine, int compute_major)
{
    const char *wanted = epx__env_string("EPX_CUDA_COPY");
    bool has_bulk = compute_major >= 9;

    engine->mover = has_bulk ? CUDA_MOVER_BULK : CUDA_MOVER_PLAIN;
    if (wanted == NULL || (strcmp(wanted, "bulk") == 0 && has_bulk)) {
        return EPX_OK;
    }
    if (strcmp(wanted, "plain") == 0) {
        engine->mover = CUDA_MOVER_PLAIN;
        return EPX_OK;
    }
    return epx__fail(EPX_ERR_ENVIRONMENT,
                     "EPX_CUDA_COPY is \"%s\"; allowed are plain and, with "
                     "compute capability 9.0 and later, bulk; this card has "
                     "%d",
                     wanted, compute_major);
}

static epx_status_t
load_kernels(epx_group_t *group)
{
    cuda_engine_t *engine = cuda_engine(group);
    int shared = 0, major = 0;
    cudaError_t error =
        cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                               group->device_ordinal);

    if (error == cudaSuccess) {
        error = cudaDeviceGetAttribute(
            &major, cudaDevAttrComputeCapabilityMajor, group->device_ordinal);
    }
    engine->max_shared = (size_t)shared - STATIC_SHARED;
    if (error == cudaSuccess) {
        error = cuda_dispatch_starts_early(&engine->view.starts_early);
    }
    if (error == cudaSuccess) {
        error = cuda_plan_load(engine->max_shared);
    }
    if (error == cudaSuccess) {
        error = cuda_dispatch_load(engine->max_shared);
    }
    if (error == cudaSuccess) {
        error = cuda_combine_load(engine->max_shared);
    }
    if (error == cudaSuccess) {
        error = cuda_fused_load(engine->max_shared);
    }
    if (error == cudaSuccess) {
        error = cuda_unpack_load(engine->max_shared);
    }
    if (error == cudaSuccess) {
        error = cuda_stage_load(engine->max_shared);
    }
    if (error == cudaSuccess) {
        error = cuda_mask_load(engine->max_shared);
    }
    if (error == cudaSuccess && cuda_spans_nodes(group)) {
        error = cuda_rail_load(engine->max_shared);
    }
    if (error == cudaSuccess && cuda_spans_nodes(group)) {
        error = cuda_rail_combine_load(engine->max_shared);
    }
    return error == cudaSuccess
               ? choose_mover(engine, major)
               : epx__cuda_fail(error, "cannot load the CUDA kernels");
}

static bool
is_one_card(const epx_group_t *group)
{
    bool is_one = group->reach.fabric == &epx__fabric_cuda_thread;

    for (int32_t r = 0; r < group->num_ranks && is_one; r++) {
        struct cudaPointerAttributes is;

        if (!epx__is_near(&group->nodes, r)) {
            continue;
        }
        is_one = cudaPointerGetAttributes(&is, group->peers[r].base) ==
                     cudaSuccess &&
                 is.type == cudaMemoryTypeDevice &&
                 is.device == group->device_ordinal;
    }
    return is_one;
}

/* What kernels need to know of the group:
 *     cuda_state_t, char *segments[R], u64 segment_bytes[R], i32 node_of[R],
 *     i32 far_index[R] */
static epx_status_t
open_view(epx_group_t *group)
{
    cuda_engine_t *engine = cuda_engine(group);
    size_t num_ranks = (size_t)group->num_ranks;
    size_t segments = epx__round_up(sizeof(cuda_state_t), EPX__LINE);
    size_t sizes = segments + num_ranks * sizeof(char *);
    size_t nodes = sizes + num_ranks * sizeof(uint64_t);
    size_t far = nodes + num_ranks * sizeof(int32_t);
    size_t bytes = far + num_ranks * sizeof(int32_t);
    int32_t num_far = 0;
    char *image = calloc(1, bytes);
    epx_status_t status;

    if (image == NULL) {
        return epx__fail(EPX_ERR_NO_MEMORY, "no memory for the CUDA engine");
    }
    for (size_t r = 0; r < num_ranks; r++) {
        ((char **)(void *)(image + segments))[r] = group->peers[r].base;
        ((uint64_t *)(void *)(image + sizes))[r] = group->peers[r].bytes;
        ((int32_t *)(void *)(image + nodes))[r] = group->nodes.node_of[r];
        if (!epx__is_near(&group->nodes, (int32_t)r)) {
            ((char **)(void *)(image + segments))[r] = cuda_proxy_mail(group);
            ((int32_t *)(void *)(image + far))[r] = num_far++;
        }
    }
    status = epx__heap_alloc(&group->heap, bytes, "the CUDA engine",
                             &engine->private_block);
    if (status == EPX_OK) {
        char *base = engine->private_block;

        engine->view.rank = group->rank;
        engine->view.num_ranks = group->num_ranks;
        engine->view.timeout_ns = group->timeout_ns;
        engine->view.is_one_card = is_one_card(group);
        engine->view.map = group->map;
        engine->view.state = (cuda_state_t *)(void *)base;
        engine->view.segments = (char *const *)(void *)(base + segments);
        engine->view.segment_bytes = (uint64_t *)(void *)(base + sizes);
        engine->view.nodes.node_of = (const int32_t *)(void *)(base + nodes);
        engine->view.nodes.far_index = (const int32_t *)(void *)(base + far);
        status = epx__cuda_copy(base, image, bytes);
    }
    if (status == EPX_OK) {
        status = epx__cuda_check(cuda_kept_take(CUDA_KEPT_PINNED,
                                                sizeof(*engine->view.report),
                                                sizeof(*engine->view.report),
                                                (void **)&engine->view.report),
                                 "cannot set up the CUDA engine");
    }
    if (status == EPX_OK) {
        epx__group_set_halt(group, &engine->view.report->halt);
        cuda_mask_open(group);
    }
    free(image);
    return status;
}

void
cuda_enter_thread(int32_t ordinal)
{
    if (epx__cuda_device_enter(ordinal) != EPX_OK) {
        epx__log(EPX__LOG_WARN, "a thread cannot turn to the card: %s",
                 epx_last_error());
    }
}

static epx_status_t
open_entered(epx_group_t *group)
{
    cuda_engine_t *engine = cuda_engine(group);
    int32_t num_ranks = group->num_ranks;
    size_t most_local =
        (size_t)((group->max_experts + num_ranks - 1) / num_ranks);
    epx_status_t status;

    engine->record_bytes = epx__round_up(
        sizeof(cuda_record_t) +
            sizeof(uint64_t) * (3 + (size_t)num_ranks + most_local),
        EPX__LINE);
    status = load_kernels(group);
    if (status == EPX_OK) {
        status = cuda_proxy_open(group);
    }
    if (status == EPX_OK) {
        status = open_view(group);
    }
    return status == EPX_OK ? cuda_seats_reserve(group) : status;
}

static epx_status_t
cuda_open(epx_group_t *group)
{
    epx_status_t status = epx__cuda_device_enter(group->device_ordinal);

    if (status != EPX_OK) {
        return status;
    }
    group->engine_state = calloc(1, sizeof(cuda_engine_t));
    if (group->engine_state == NULL) {
        status = epx__fail(EPX_ERR_NO_MEMORY, "no memory for the CUDA engine");
    } else {
        status = open_entered(group);
        if (status != EPX_OK) {
            epx__error_t error;

            epx__error_save(&error, status);
            close_entered(group);
            (void)epx__error_restore(&error);
        }
    }
    epx__cuda_device_leave();
    return status;
}

static bool
shares_card(const epx__fabric_place_t *a, const epx__fabric_place_t *b)
{
    return epx__fabric_same_host(a, b) &&
           memcmp(a->device.uuid, b->device.uuid, sizeof(a->device.uuid)) == 0;
}

/* Ranks that share a card leave half of it to all else that runs there.  Blocks
 * that wait fill the SM that they are on; and what they wait for comes after a
 * peer's other kernels, of which some run in clusters that need several free
 * SMs side by side. */
static int32_t
share_of(const epx__fabric_place_t *place, int32_t sharers)
{
    int32_t num_sms = place->device.num_workers;
    int32_t share = sharers == 1 ? num_sms : num_sms / 2 / sharers;

    share = share < 1 ? 1 : share > DEFAULT_WORKERS ? DEFAULT_WORKERS : share;
    return place->device.wanted_workers > 0 ? place->device.wanted_workers
                                            : share;
}

/* Blocks that wait for those of another rank must not keep them off the card:
 * all of them have to be on it together. */
static epx_status_t
cuda_choose_workers(epx_group_t *group, const epx__fabric_place_t *places)
{
    const epx__fabric_place_t *own = &places[group->rank];
    int32_t sharers = 1, sum = 0; /* this rank, and those beside it */

    for (int32_t r = 0; r < group->num_ranks; r++) {
        sharers += r != group->rank && shares_card(own, &places[r]);
    }
    for (int32_t r = 0; r < group->num_ranks; r++) {
        sum += shares_card(own, &places[r]) ? share_of(&places[r], sharers) : 0;
    }
    group->num_workers = share_of(own, sharers);
    if (sum > own->device.num_workers) {
        return epx__fail(EPX_ERR_INVALID,
                         "config->num_workers is %d on rank %d; the %d ranks "
                         "that share its card take %d SMs in all, of which it "
                         "has %d",
                         group->num_workers, group->rank, sharers, sum,
                         own->device.num_workers);
    }
    return EPX_OK;
}

/* CUDA has no way to tell which device a stream belongs to without taking part
 * in a capture. */
static epx_status_t
cuda_check_stream(const epx_group_t *group, epx_stream_t stream)
{
    (void)group;
    return stream == cudaStreamPerThread
               ? epx__fail(EPX_ERR_UNSUPPORTED,
                           "the stream is cudaStreamPerThread, another stream "
                           "on each thread; give one of your own")
               : EPX_OK;
}

static const char *
cuda_isa(void)
{
    return "sm_80 and later";
}

static epx_status_t
cuda_complete(epx_plan_t *base, epx_stream_t stream)
{
    cuda_plan_t *plan = cuda_plan(base);
    epx_group_t *group = base->group;
    epx__open_step_t *open;
    cuda_op_t op;
    epx_status_t status = cuda_op_begin(plan, stream, &op);

    if (status != EPX_OK) {
        return status;
    }
    status = cuda_plan_check(plan);
    if (status != EPX_OK) {
        return cuda_op_end(&op, status, false);
    }
    if (plan->pending == EPX__PENDING_NONE) {
        status = epx__fail(EPX_ERR_STATE, "epx_complete: the plan has no "
                                          "send-only operation open");
        return cuda_op_end(&op, status, false);
    }
    status = plan->pending == EPX__PENDING_DISPATCH
                 ? cuda_dispatch_complete(&op)
                 : cuda_combine_complete(&op);
    open = &group->open_steps[epx__slot(plan->pending_call)];
    if (open->step == plan->pending_call) {
        open->step = 0;
    }
    plan->pending = EPX__PENDING_NONE;
    return cuda_op_end(&op, status, status != EPX_ERR_TOO_SMALL);
}

__attribute__((visibility("default")))
const epx__engine_ops_t epx__engine_cuda = {
    .abi = EPX__ENGINE_ABI,
    .name = "cuda",
    .device = EPX_DEVICE_CUDA,
    .fabrics = epx__cuda_fabrics,
    .spans_nodes = true,
    .isa = cuda_isa,
    .device_info = epx__cuda_device_info,
    .place = epx__cuda_place,
    .choose_workers = cuda_choose_workers,
    .check_stream = cuda_check_stream,
    .open = cuda_open,
    .close = cuda_close,
    .leave = cuda_leave,
    .check = cuda_check,
    .plan_open = cuda_plan_open,
    .plan_close = cuda_plan_close,
    .plan_route = cuda_plan_route,
    .plan_counts = cuda_plan_counts,
    .dispatch = cuda_dispatch,
    .combine = cuda_combine,
    .complete = cuda_complete,
    .reclaim = cuda_reclaim,
    .idle_bytes = cuda_idle_bytes,
};
