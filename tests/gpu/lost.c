/* SPDX-License-Identifier: MIT */
/* A process ends while kernels of the others wait for it: they end long before
 * their deadline, and the ranks say whom they have lost. */
#include "conformance/late.h"
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

static int
run(epx_layout_t layout)
{
    layer_t *layer = layer_make(layout, RANKS, 1);
    char text[LAYER_MAX_RANKS * WORLD_TEXT];
    bool ok = world_run(WORLD_SHM, RANKS, true, LATE_SHARED_BYTES, lost_rank,
                        layer, NULL, text, sizeof(text));

    if (!ok) {
        printf("FAILED: lost, layout %d\n%s", (int)layout, text);
    }
    layer_free(layer);
    return ok ? 0 : 1;
}

int
main(void)
{
    int failures = 0;

    layer_need_card();
    for (int layout = EPX_LAYOUT_RANK_MAJOR; layout <= EPX_LAYOUT_EXPERT_SLOTS;
         layout++) {
        failures += run((epx_layout_t)layout);
    }
    return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
