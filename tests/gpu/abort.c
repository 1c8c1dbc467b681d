/* SPDX-License-Identifier: MIT */
/* Aborts while kernels wait for a rank that stays away: long before their
 * deadline they end on all ranks, which say why, and the card goes on. */
#include "gpu/layer.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { RANKS = 3, ABSENT = 2, LONG_TIMEOUT_S = 3600 };

static void
expect(world_rank_t *self, const char *call, epx_status_t got,
       epx_status_t want, const char *sentence)
{
    if (got != want || !strstr(epx_last_error(), sentence)) {
        world_fail(self,
                   "%s: expected status %d and a sentence with '%s', got %d "
                   "and '%s'",
                   call, (int)want, sentence, (int)got, epx_last_error());
    }
}

/* Kernels of all ranks but one wait for that one. */
static void
wait_in_vain(layer_rank_t *rank)
{
    world_rank_t *self = rank->self;
    epx_plan_args_t args = layer_plan_args(rank);
    epx_plan_counts_t counts = EPX_PLAN_COUNTS_INIT;

    if (!world_failed(self, layer_plan(rank, &args), "epx_plan_create") &&
        !world_failed(self, epx_plan_counts(rank->plan, &counts),
                      "epx_plan_counts") &&
        self->rank != ABSENT) {
        world_failed(self, layer_dispatch(rank, rank->stream), "epx_dispatch");
    }
}

/* By the rank that stays away, or by one whose own kernels wait. */
static void
abort_waits(layer_rank_t *rank, int32_t aborter)
{
    world_rank_t *self = rank->self;
    char sentence[64];

    (void)snprintf(sentence, sizeof(sentence), "rank %d aborted the group",
                   aborter);
    if (self->rank == aborter) {
        world_failed(self, epx_group_abort(rank->group), "epx_group_abort");
    }
    if (self->rank != ABSENT &&
        rank->memory->ops->synchronize(rank->memory, rank->stream)) {
        expect(self, "epx_group_status", epx_group_status(rank->group),
               EPX_ERR_ABORTED, sentence);
    }
    world_barrier(self);
    expect(self, "epx_combine", layer_combine(rank, rank->stream),
           EPX_ERR_ABORTED, sentence);
    expect(self, "the next call", layer_combine(rank, rank->stream),
           EPX_ERR_BROKEN, sentence);
}

static void
abort_rank(world_rank_t *self, void *layer)
{
    static const int32_t aborters[] = { ABSENT, 0 };
    layer_rank_t rank;
    bool ready = layer_rank_open(&rank, self, layer, LONG_TIMEOUT_S) &&
                 layer_set(&rank, 0);

    for (size_t i = 0; i < sizeof(aborters) / sizeof(*aborters); i++) {
        if (ready) {
            wait_in_vain(&rank);
        }
        if (world_all_well(self)) {
            abort_waits(&rank, aborters[i]);
        }
        world_barrier(self);
        layer_close_group(&rank);
        ready = world_all_well(self) && layer_open_group(&rank, LONG_TIMEOUT_S);
    }
    if (world_all_well(self)) {
        layer_try(&rank, "the last group");
    }
    layer_rank_close(&rank);
}

int
main(void)
{
    layer_need_card();
    return layer_run_each(WORLD_THREAD, RANKS, 1, "abort", abort_rank)
               ? EXIT_FAILURE
               : EXIT_SUCCESS;
}
