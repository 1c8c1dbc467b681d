/* SPDX-License-Identifier: MIT */
/* A send-only dispatch into receive slots waits for nobody: its kernels have
 * run before a rank that is late has begun its own. */
#include "gpu/layer.h"
#include <stdlib.h>

enum { RANKS = 3, LATE = 1, ROUNDS = 3 };

/* In EXPERT_SLOTS the routing comes with it.  The late rank sends once the
 * others' streams have run. */
static void
send_first(layer_rank_t *rank)
{
    bool is_late = rank->self->rank == LATE;

    rank->flags = EPX_SEND_ONLY;
    if (rank->layer->layout == EPX_LAYOUT_EXPERT_SLOTS) {
        rank->flags |= EPX_NEW_ROUTING;
    }
    for (int step = 0; step < 2; step++) {
        if ((step == 1) == is_late) {
            world_failed(rank->self, layer_dispatch(rank, rank->stream),
                         "epx_dispatch");
            layer_synchronize(rank, rank->stream);
        }
        world_barrier(rank->self);
    }
    rank->flags = 0;
}

static void
sends_rank(world_rank_t *self, void *layer)
{
    layer_rank_t rank;
    bool opened =
        layer_rank_open(&rank, self, layer, 40) && layer_set(&rank, 0);

    if (opened) {
        epx_plan_args_t args = layer_plan_args(&rank);

        args.send_only_row_bytes = LAYER_HIDDEN * 2;
        opened =
            !world_failed(self, layer_plan(&rank, &args), "epx_plan_create") &&
            layer_synchronize(&rank, rank.stream);
    }
    for (int round = 0; round < ROUNDS && world_all_well(self); round++) {
        send_first(&rank);
        if (!world_failed(self, epx_complete(rank.plan, rank.stream),
                          "epx_complete") &&
            layer_experts(&rank, rank.stream) &&
            !world_failed(self, layer_combine(&rank, rank.stream),
                          "epx_combine") &&
            layer_synchronize(&rank, rank.stream)) {
            layer_check(&rank, 0, rank.recv_x, rank.out, "what was sent first");
        }
    }
    world_barrier(self);
    layer_rank_close(&rank);
}

int
main(void)
{
    layer_need_card();
    return layer_run_each(WORLD_THREAD, RANKS, 1, "sends", sends_rank)
               ? EXIT_FAILURE
               : EXIT_SUCCESS;
}
