/* SPDX-License-Identifier: MIT */
/* Calls on a plan of fixed capacity return while their stream cannot run yet,
 * and a plan's calls may go through several streams that events order. */
#include "gpu/layer.h"
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { RANKS = 3, BATCHES = 4, PASSES = 5, GATE_MS = 60000 };

/* What the streams wait for. */
static atomic_bool gate_is_open;
static atomic_bool gate_gave_up;

static void
wait_at_gate(void *unused)
{
    (void)unused;
    for (int32_t ms = 0; !atomic_load(&gate_is_open); ms++) {
        struct timespec nap = { 0, 1000000 };

        if (ms >= GATE_MS) {
            atomic_store(&gate_gave_up, true);
            return;
        }
        nanosleep(&nap, NULL);
    }
}

/* All calls of all ranks are made before any stream may run. */
static bool
calls_return(layer_rank_t *rank)
{
    world_rank_t *self = rank->self;
    bool ok = !layer_cuda_failed(
        rank, cudaLaunchHostFunc(rank->stream, wait_at_gate, NULL),
        "cudaLaunchHostFunc");

    ok = ok && layer_pass(rank, rank->stream);
    if (cudaStreamQuery(rank->stream) != cudaErrorNotReady) {
        world_fail(self, "the stream does not wait");
    }
    world_barrier(self);
    atomic_store(&gate_is_open, true);
    ok = layer_synchronize(rank, rank->stream) && ok;
    if (atomic_load(&gate_gave_up)) {
        world_fail(self, "a call waited for its stream");
    }
    return ok && layer_check(rank, 0, rank->recv_x, rank->out,
                             "behind a stream that had to wait");
}

/* What follows in stream `to` comes after all that is in stream `from`. */
static bool
order(layer_rank_t *rank, cudaEvent_t event, cudaStream_t from, cudaStream_t to)
{
    return !layer_cuda_failed(rank, cudaEventRecord(event, from),
                              "cudaEventRecord") &&
           !layer_cuda_failed(rank, cudaStreamWaitEvent(to, event, 0),
                              "cudaStreamWaitEvent");
}

static bool
pass_over_two(layer_rank_t *rank, cudaEvent_t event)
{
    world_rank_t *self = rank->self;
    cudaStream_t first = rank->memory->streams[0];
    cudaStream_t second = rank->memory->streams[1];

    return !world_failed(self, layer_update(rank, first), "epx_plan_update") &&
           !world_failed(self, layer_dispatch(rank, first), "epx_dispatch") &&
           layer_experts(rank, first) && order(rank, event, first, second) &&
           !world_failed(self, layer_combine(rank, second), "epx_combine") &&
           order(rank, event, second, first);
}

static void
use_two_streams(layer_rank_t *rank, cudaEvent_t event)
{
    bool ok = true;

    for (int32_t b = 0; ok && b < BATCHES; b++) {
        ok = layer_set(rank, b);
        for (int32_t i = 0; ok && i < PASSES; i++) {
            ok = pass_over_two(rank, event);
        }
        ok = ok && layer_synchronize(rank, rank->memory->streams[1]) &&
             layer_check(rank, b, rank->recv_x, rank->out, "over two streams");
    }
}

static void
streams_rank(world_rank_t *self, void *layer)
{
    layer_rank_t rank;
    cudaEvent_t event = NULL;
    epx_plan_args_t args;

    if (layer_rank_open(&rank, self, layer, 40) && layer_set(&rank, 0)) {
        args = layer_plan_args(&rank);
        layer_cuda_failed(
            &rank, cudaEventCreateWithFlags(&event, cudaEventDisableTiming),
            "cudaEventCreateWithFlags");
        world_failed(self, layer_plan(&rank, &args), "epx_plan_create");
        layer_synchronize(&rank, rank.stream);
    }
    if (world_all_well(self)) {
        calls_return(&rank);
    }
    if (world_all_well(self)) {
        use_two_streams(&rank, event);
    }
    world_barrier(self);
    if (event) {
        layer_cuda_failed(&rank, cudaEventDestroy(event), "cudaEventDestroy");
    }
    layer_rank_close(&rank);
}

int
main(void)
{
    int failures = 0;

    layer_need_card();
    for (int layout = EPX_LAYOUT_RANK_MAJOR; layout <= EPX_LAYOUT_EXPERT_SLOTS;
         layout++) {
        layer_t *layer = layer_make((epx_layout_t)layout, RANKS, BATCHES);

        atomic_store(&gate_is_open, false);
        atomic_store(&gate_gave_up, false);
        failures += layer_run(layer, WORLD_THREAD, "streams", streams_rank);
        layer_free(layer);
    }
    return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
