/* SPDX-License-Identifier: MIT */
/* The update of a plan, dispatch and combine in one CUDA graph on each rank,
 * replayed with routing that changes from replay to replay. */
#include "gpu/layer.h"
#include <stdio.h>
#include <stdlib.h>

enum { RANKS = 4, BATCHES = 16, IN_FLIGHT = 8 };

static int32_t num_replays = 1000; /* or argv[1] */

typedef struct graph_run {
    layer_rank_t rank;
    cudaGraphExec_t graph;
    /* All batches' inputs, and the results of the replays in flight. */
    void *idx[BATCHES];
    void *weights[BATCHES];
    void *x[BATCHES];
    void *recv_x[IN_FLIGHT];
    void *out[IN_FLIGHT];
} graph_run_t;

static void *
place(graph_run_t *run, const void *contents, size_t bytes)
{
    memory_t *memory = run->rank.memory;
    void *ptr = memory->ops->alloc(memory, bytes);

    if (!ptr) {
        world_fail(run->rank.self, "no memory for %zu bytes", bytes);
    } else if (contents) {
        memory->ops->upload(memory, ptr, contents, bytes);
    }
    return ptr;
}

static void
place_all(graph_run_t *run)
{
    const layer_t *layer = run->rank.layer;

    for (int32_t b = 0; b < BATCHES; b++) {
        const layer_part_t *part =
            &layer->batches[b].parts[run->rank.self->rank];

        run->idx[b] = place(run, part->idx, sizeof(part->idx));
        run->weights[b] = place(run, part->weights, sizeof(part->weights));
        run->x[b] = place(run, part->x, sizeof(part->x));
    }
    for (int32_t i = 0; i < IN_FLIGHT; i++) {
        run->recv_x[i] = place(run, NULL, layer->recv_bytes);
        run->out[i] = place(run, NULL, sizeof(layer->batches->parts->out));
    }
}

/* Other threads of this process may allocate while this one captures. */
static bool
capture(graph_run_t *run)
{
    layer_rank_t *rank = &run->rank;
    cudaGraph_t graph = NULL;
    bool ok;

    if (layer_cuda_failed(rank,
                          cudaStreamBeginCapture(
                              rank->stream, cudaStreamCaptureModeThreadLocal),
                          "cudaStreamBeginCapture")) {
        return false;
    }
    ok = layer_pass(rank, rank->stream);
    if (layer_cuda_failed(rank, cudaStreamEndCapture(rank->stream, &graph),
                          "cudaStreamEndCapture") ||
        !ok) {
        return false;
    }
    ok = !layer_cuda_failed(
             rank, cudaGraphInstantiateWithFlags(&run->graph, graph, 0),
             "cudaGraphInstantiateWithFlags") &&
         !layer_cuda_failed(rank, cudaGraphUpload(run->graph, rank->stream),
                            "cudaGraphUpload") &&
         layer_synchronize(rank, rank->stream);
    cudaGraphDestroy(graph);
    return ok;
}

static bool
copy(graph_run_t *run, void *to, const void *from, size_t bytes)
{
    return !layer_cuda_failed(&run->rank,
                              cudaMemcpyAsync(to, from, bytes,
                                              cudaMemcpyDeviceToDevice,
                                              run->rank.stream),
                              "cudaMemcpyAsync");
}

/* Every batch comes in every slot. */
static int32_t
batch_of(int32_t replay)
{
    return (replay * 7 + replay / BATCHES) % BATCHES;
}

/* New inputs, the graph, and its results set aside, all in stream order. */
static bool
replay(graph_run_t *run, int32_t number)
{
    layer_rank_t *rank = &run->rank;
    const layer_part_t *part = rank->layer->batches->parts;
    int32_t b = batch_of(number);
    int32_t slot = number % IN_FLIGHT;

    return copy(run, rank->idx, run->idx[b], sizeof(part->idx)) &&
           copy(run, rank->weights, run->weights[b], sizeof(part->weights)) &&
           copy(run, rank->x, run->x[b], sizeof(part->x)) &&
           !layer_cuda_failed(rank, cudaGraphLaunch(run->graph, rank->stream),
                              "cudaGraphLaunch") &&
           copy(run, run->recv_x[slot], rank->recv_x,
                rank->layer->recv_bytes) &&
           copy(run, run->out[slot], rank->out, sizeof(part->out));
}

static bool
replay_all(graph_run_t *run)
{
    layer_rank_t *rank = &run->rank;
    bool ok = true;

    for (int32_t first = 0; ok && first < num_replays; first += IN_FLIGHT) {
        for (int32_t i = first; ok && i < first + IN_FLIGHT; i++) {
            ok = replay(run, i);
        }
        ok = ok && layer_synchronize(rank, rank->stream);
        for (int32_t i = first; ok && i < first + IN_FLIGHT; i++) {
            char what[32];

            snprintf(what, sizeof(what), "replay %d", i);
            ok = layer_check(rank, batch_of(i), run->recv_x[i % IN_FLIGHT],
                             run->out[i % IN_FLIGHT], what);
        }
    }
    return ok;
}

static void
graph_rank(world_rank_t *self, void *layer)
{
    graph_run_t *run = calloc(1, sizeof(*run));
    epx_plan_args_t args;
    bool ok;

    if (!run) {
        perror("no memory");
        abort();
    }
    ok = layer_rank_open(&run->rank, self, layer, 40);
    if (ok) {
        place_all(run);
        args = layer_plan_args(&run->rank);
        ok = layer_set(&run->rank, 0) &&
             !world_failed(self, layer_plan(&run->rank, &args),
                           "epx_plan_create") &&
             layer_synchronize(&run->rank, run->rank.stream) && capture(run);
    }
    /* Instantiating a graph may wait for the card. */
    if (world_all_well(self) && ok) {
        replay_all(run);
    }
    world_barrier(self);
    if (run->graph) {
        layer_cuda_failed(&run->rank, cudaGraphExecDestroy(run->graph),
                          "cudaGraphExecDestroy");
    }
    layer_rank_close(&run->rank);
    free(run);
}

int
main(int argc, char **argv)
{
    int failures;

    layer_need_card();
    if (argc > 1) {
        num_replays = (int32_t)strtol(argv[1], NULL, 10);
    }
    failures =
        layer_run_each(WORLD_THREAD, RANKS, BATCHES, "graph", graph_rank);
    printf("%d replays in each of 3 layouts: %d failed\n", num_replays,
           failures);
    return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
