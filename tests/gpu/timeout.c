/* SPDX-License-Identifier: MIT */
/* A rank that stays away from a dispatch: the kernels of the others end, their
 * groups tell who was missing, and the card goes on. */
#include "gpu/layer.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { RANKS = 3, ABSENT = 2, SHORT_TIMEOUT_S = 1 };

static void
expect_sentence(world_rank_t *self, const char *call)
{
    if (!strstr(epx_last_error(), "rank 2")) {
        world_fail(self, "%s does not name rank 2: %s", call, epx_last_error());
    }
}

static void
expect_timeout(world_rank_t *self, epx_status_t status, const char *call)
{
    if (status != EPX_ERR_TIMEOUT) {
        world_fail(self, "%s gives %d (%s), not EPX_ERR_TIMEOUT", call,
                   (int)status, epx_status_string(status));
    }
}

/* Whichever call comes first tells; every later one fails too. */
static void
expect_broken(layer_rank_t *rank)
{
    world_rank_t *self = rank->self;
    epx_status_t status;

    if (self->rank == 0) {
        expect_timeout(self, layer_combine(rank, rank->stream), "epx_combine");
        expect_sentence(self, "epx_combine");
        expect_timeout(self, epx_group_status(rank->group), "epx_group_status");
        return;
    }
    expect_timeout(self, epx_group_status(rank->group), "epx_group_status");
    status = layer_combine(rank, rank->stream);
    if (status != EPX_ERR_TIMEOUT && status != EPX_ERR_BROKEN) {
        world_fail(self, "epx_combine gives %d (%s), not EPX_ERR_BROKEN",
                   (int)status, epx_status_string(status));
    }
    expect_sentence(self, "epx_combine");
}

static void
stay_away(layer_rank_t *rank)
{
    world_rank_t *self = rank->self;
    epx_plan_args_t args = layer_plan_args(rank);
    epx_plan_counts_t counts = EPX_PLAN_COUNTS_INIT;

    if (world_failed(self, layer_plan(rank, &args), "epx_plan_create") ||
        world_failed(self, epx_plan_counts(rank->plan, &counts),
                     "epx_plan_counts") ||
        self->rank == ABSENT) {
        return;
    }
    if (world_failed(self, layer_dispatch(rank, rank->stream),
                     "epx_dispatch") ||
        !rank->memory->ops->synchronize(rank->memory, rank->stream)) {
        return;
    }
    expect_broken(rank);
}

static void
go_on(layer_rank_t *rank)
{
    if (layer_open_group(rank, 40)) {
        layer_try(rank, "the second group");
    }
}

static void
timeout_rank(world_rank_t *self, void *layer)
{
    layer_rank_t rank;

    if (layer_rank_open(&rank, self, layer, SHORT_TIMEOUT_S) &&
        layer_set(&rank, 0)) {
        stay_away(&rank);
    }
    world_barrier(self);
    layer_close_group(&rank);
    if (world_all_well(self)) {
        go_on(&rank);
    }
    layer_rank_close(&rank);
}

int
main(void)
{
    layer_need_card();
    return layer_run_each(WORLD_THREAD, RANKS, 1, "timeout", timeout_rank)
               ? EXIT_FAILURE
               : EXIT_SUCCESS;
}
