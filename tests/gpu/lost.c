/* SPDX-License-Identifier: MIT */
/* A process ends while kernels of the others wait for it: they end long before
 * their deadline, and the ranks say whom they have lost. */
#include "gpu/layer.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { RANKS = 3, VICTIM = 1, LAYERS = 2, LONG_TIMEOUT_S = 3600 };

static bool
pass(layer_rank_t *rank)
{
    return layer_pass(rank, rank->stream) &&
           layer_synchronize(rank, rank->stream) &&
           layer_check(rank, 0, rank->recv_x, rank->out, "a layer of all");
}

/* Whichever call hears of it first. */
static void
lose(layer_rank_t *rank)
{
    epx_status_t status = layer_update(rank, rank->stream);
    char name[32];

    if (status == EPX_OK) {
        status = layer_dispatch(rank, rank->stream);
    }
    if (rank->memory->ops->synchronize(rank->memory, rank->stream) &&
        status == EPX_OK) {
        status = epx_group_status(rank->group);
    }
    (void)snprintf(name, sizeof(name), "rank %d ", VICTIM);
    if (status != EPX_ERR_PEER_LOST ||
        strncmp(epx_last_error(), name, strlen(name)) != 0) {
        world_fail(rank->self,
                   "expected status %d and a sentence that begins with '%s', "
                   "got %d and '%s'",
                   (int)EPX_ERR_PEER_LOST, name, (int)status, epx_last_error());
    }
}

static void
lost_rank(world_rank_t *self, void *layer)
{
    layer_rank_t rank;
    bool ok = layer_rank_open(&rank, self, layer, LONG_TIMEOUT_S) &&
              layer_set(&rank, 0);

    if (ok) {
        epx_plan_args_t args = layer_plan_args(&rank);

        ok = !world_failed(self, layer_plan(&rank, &args), "epx_plan_create");
    }
    for (int i = 0; i < LAYERS && ok; i++) {
        ok = pass(&rank);
    }
    world_barrier(self); /* they have all looked at how those went */
    if (ok && self->rank == VICTIM) {
        _exit(EXIT_SUCCESS);
    }
    if (ok) {
        lose(&rank);
    }
    layer_close_group(&rank);
    memory_close(rank.memory);
}

int
main(void)
{
    layer_need_card();
    return layer_run_each(WORLD_SHM, RANKS, 1, "lost", lost_rank)
               ? EXIT_FAILURE
               : EXIT_SUCCESS;
}
