/* SPDX-License-Identifier: MIT */
/* wait_ns on a card: a rank whose kernels come late stands out. */
#include "conformance/late.h"
#include "gpu/layer.h"
#include <stdio.h>
#include <stdlib.h>

enum { RANKS = 3 };

static bool
run_call(world_rank_t *self, const late_call_t *call, int64_t late_ms,
         int64_t *wait_ns)
{
    layer_rank_t *rank = call->context;
    memory_t *memory = rank->memory;
    size_t bytes = RANKS * sizeof(*wait_ns);
    epx_status_t status;

    for (int r = 0; r < RANKS; r++) {
        wait_ns[r] = LATE_BEFORE;
    }
    rank->flags = call->flags;
    memory->ops->upload(memory, rank->wait_ns, wait_ns, bytes);
    late_nap(self, late_ms);
    status = call->is_combine ? layer_combine(rank, rank->stream)
                              : layer_dispatch(rank, rank->stream);
    if ((call->flags & EPX_SEND_ONLY) != 0 && status == EPX_OK) {
        status = epx_complete(rank->plan, rank->stream);
    }
    return !world_failed(self, status, call->name) &&
           layer_synchronize(rank, rank->stream) &&
           memory->ops->download(memory, wait_ns, rank->wait_ns, bytes);
}

/* Dispatches into slots of a plan that has them, when they are sent only. */
static void
check_calls(layer_rank_t *rank)
{
    const late_call_t calls[] = {
        { "a dispatch", run_call, rank, 0, false },
        { "a send-only dispatch", run_call, rank, EPX_SEND_ONLY, false },
        { "a dispatch with routing", run_call, rank, EPX_NEW_ROUTING, false },
        { "a combine", run_call, rank, 0, true },
        { "a send-only combine", run_call, rank, EPX_SEND_ONLY, true },
    };

    for (size_t i = 0; i < sizeof(calls) / sizeof(*calls); i++) {
        /* Elsewhere the routing goes ahead, and does the waiting. */
        if ((calls[i].flags & EPX_NEW_ROUTING) == 0 ||
            rank->layer->layout == EPX_LAYOUT_EXPERT_SLOTS) {
            late_check(rank->self, &calls[i]);
        }
    }
    rank->flags = 0;
}

static bool
make_plan(layer_rank_t *rank, int64_t send_only_row_bytes)
{
    epx_plan_args_t args = layer_plan_args(rank);

    args.send_only_row_bytes = send_only_row_bytes;
    return !world_failed(rank->self, layer_plan(rank, &args),
                         "epx_plan_create") &&
           layer_synchronize(rank, rank->stream);
}

static void
waits_rank(world_rank_t *self, void *layer)
{
    layer_rank_t rank;
    bool opened =
        layer_rank_open(&rank, self, layer, 40) && layer_set(&rank, 0);

    if (opened) {
        rank.wait_ns =
            rank.memory->ops->alloc(rank.memory, RANKS * sizeof(int64_t));
    }
    for (int with_slots = 0; with_slots < 2; with_slots++) {
        if (opened) {
            make_plan(&rank, with_slots ? LAYER_HIDDEN * 2 : 0);
        }
        if (world_all_well(self)) {
            check_calls(&rank);
            layer_pass(&rank, rank.stream);
            layer_synchronize(&rank, rank.stream);
            layer_check(&rank, 0, rank.recv_x, rank.out, "after the waits");
        }
        if (with_slots == 0 && rank.plan) {
            world_failed(self, epx_plan_destroy(rank.plan), "epx_plan_destroy");
            rank.plan = NULL;
        }
    }
    world_barrier(self);
    layer_rank_close(&rank);
}

int
main(void)
{
    layer_need_card();
    return layer_run_each(WORLD_THREAD, RANKS, 1, "waits", waits_rank)
               ? EXIT_FAILURE
               : EXIT_SUCCESS;
}
