/* SPDX-License-Identifier: MIT */
/* Errors that only the card can find: every rank hears of them, nothing is
 * written, and the group goes on with the next plan. */
#include "gpu/layer.h"
#include <stdio.h>
#include <stdlib.h>

enum { RANKS = 3, CULPRIT = 1 };

/* A plan that cannot be. */
typedef struct fault {
    const char *name;
    epx_status_t status;
    bool exact;            /* the plan has no fixed capacity */
    bool counts_first;     /* the counts are asked for before the dispatch */
    int64_t expert;        /* of the culprit's last entry; 0 as it was */
    bool twice;            /* its last token has an expert twice */
    uint32_t flags;        /* the routing comes with such a dispatch, later */
    bool has_slots;        /* receive slots, with EPX_SEND_ONLY */
    int64_t recv_capacity; /* 0 as it was */
} fault_t;

static const fault_t faults[] = {
    { .name = "an expert beyond the last, exact counts",
      .status = EPX_ERR_EXPERT,
      .exact = true,
      .counts_first = true,
      .expert = LAYER_EXPERTS },
    { .name = "an expert below -1, exact counts",
      .status = EPX_ERR_EXPERT,
      .exact = true,
      .counts_first = true,
      .expert = -2 },
    { .name = "an expert twice, exact counts",
      .status = EPX_ERR_EXPERT,
      .exact = true,
      .counts_first = true,
      .twice = true },
    { .name = "an expert beyond the last",
      .status = EPX_ERR_EXPERT,
      .expert = INT64_C(1) << 40 },
    { .name = "an expert twice", .status = EPX_ERR_EXPERT, .twice = true },
    { .name = "too small a capacity",
      .status = EPX_ERR_CAPACITY,
      .recv_capacity = 1 },
    { .name = "too small a capacity, counts first",
      .status = EPX_ERR_CAPACITY,
      .counts_first = true,
      .recv_capacity = 1 },
    { .name = "an expert twice, with the dispatch",
      .status = EPX_ERR_EXPERT,
      .twice = true,
      .flags = EPX_NEW_ROUTING },
    { .name = "an expert below -1, with the dispatch that is sent only",
      .status = EPX_ERR_EXPERT,
      .expert = -2,
      .flags = EPX_NEW_ROUTING | EPX_SEND_ONLY },
    { .name = "an expert beyond the last, with the dispatch to slots",
      .status = EPX_ERR_EXPERT,
      .expert = LAYER_EXPERTS,
      .flags = EPX_NEW_ROUTING | EPX_SEND_ONLY,
      .has_slots = true },
};

/* The inputs of batch 0, those of the culprit with the fault. */
static bool
set_inputs(layer_rank_t *rank, const fault_t *fault)
{
    enum { LAST = LAYER_TOKENS * LAYER_TOPK - 1 };
    const layer_part_t *part = &rank->layer->batches->parts[rank->self->rank];
    int64_t last[2] = { part->idx[LAST - 1], part->idx[LAST] };
    int64_t *where = (int64_t *)rank->idx + LAST - 1;
    memory_t *memory = rank->memory;

    if (!layer_set(rank, 0)) {
        return false;
    }
    if (rank->self->rank != CULPRIT) {
        return true;
    }
    if (fault->expert) {
        last[1] = fault->expert;
    } else if (fault->twice) {
        last[0] = 3;
        last[1] = 3;
    }
    return memory->ops->upload(memory, where, last, sizeof(last));
}

static epx_status_t
dispatch(layer_rank_t *rank, const fault_t *fault)
{
    epx_status_t status;

    rank->flags = fault->flags;
    status = layer_dispatch(rank, rank->stream);
    rank->flags = 0;
    if (status == EPX_OK && (fault->flags & EPX_SEND_ONLY) != 0) {
        status = epx_complete(rank->plan, rank->stream);
    }
    return status;
}

/* The first error, from the plan on: calls return before the card has looked,
 * so that a later one may have to tell. */
static epx_status_t
first_error(layer_rank_t *rank, const fault_t *fault)
{
    epx_plan_args_t args = layer_plan_args(rank);
    epx_plan_counts_t counts = EPX_PLAN_COUNTS_INIT;
    epx_status_t status;

    if (fault->flags != 0) {
        args.num_tokens = 0;
        args.topk_idx = NULL;
    }
    if (fault->has_slots) {
        args.send_only_row_bytes = LAYER_HIDDEN * 2;
    }
    if (fault->recv_capacity) {
        args.recv_capacity = fault->recv_capacity;
    }
    if (fault->exact) {
        args.recv_capacity = 0;
    }
    status = layer_plan(rank, &args);
    if (status == EPX_OK && fault->counts_first) {
        status = epx_plan_counts(rank->plan, &counts);
    }
    if (status == EPX_OK) {
        status = dispatch(rank, fault);
    }
    if (status == EPX_OK) {
        rank->memory->ops->synchronize(rank->memory, rank->stream);
        status = epx_plan_counts(rank->plan, &counts);
    }
    return status == EPX_OK ? layer_dispatch(rank, rank->stream) : status;
}

static bool
expect_refusal(layer_rank_t *rank, const fault_t *fault)
{
    world_rank_t *self = rank->self;
    epx_status_t status;

    if (!set_inputs(rank, fault) || !layer_spoil(rank)) {
        return false;
    }
    world_barrier(self); /* peers write to what was spoilt */
    status = first_error(rank, fault);
    if (status != fault->status) {
        world_fail(self, "%s: status %d (%s), not %d: %s", fault->name,
                   (int)status, epx_status_string(status), (int)fault->status,
                   epx_last_error());
    }
    rank->memory->ops->synchronize(rank->memory, rank->stream);
    world_barrier(self);
    return layer_is_spoilt(rank) &&
           !world_failed(self, epx_group_status(rank->group),
                         "epx_group_status");
}

static bool
expect_success(layer_rank_t *rank, const fault_t *fault)
{
    epx_plan_args_t args = layer_plan_args(rank);

    return layer_set(rank, 0) &&
           !world_failed(rank->self, layer_plan(rank, &args),
                         "epx_plan_create, the good plan") &&
           layer_pass(rank, rank->stream) &&
           layer_synchronize(rank, rank->stream) &&
           layer_check(rank, 0, rank->recv_x, rank->out, fault->name);
}

static bool
drop_plan(layer_rank_t *rank)
{
    bool failed = world_failed(rank->self, epx_plan_destroy(rank->plan),
                               "epx_plan_destroy");

    rank->plan = NULL;
    return !failed;
}

static void
errors_rank(world_rank_t *self, void *layer)
{
    bool slots = ((const layer_t *)layer)->layout == EPX_LAYOUT_EXPERT_SLOTS;
    layer_rank_t rank;
    bool ok = layer_rank_open(&rank, self, layer, 10);

    ok = world_all_well(self) && ok;
    for (size_t i = 0; ok && i < sizeof(faults) / sizeof(faults[0]); i++) {
        if (slots ? faults[i].recv_capacity || faults[i].exact
                  : faults[i].has_slots) {
            /* Slots have a capacity that is always enough and always fixed,
             * and what is sent only goes to receive slots there alone. */
            continue;
        }
        expect_refusal(&rank, &faults[i]);
        drop_plan(&rank);
        ok = world_all_well(self) && expect_success(&rank, &faults[i]);
        drop_plan(&rank);
        ok = world_all_well(self);
    }
    layer_rank_close(&rank);
}

int
main(void)
{
    layer_need_card();
    return layer_run_each(WORLD_THREAD, RANKS, 1, "errors", errors_rank)
               ? EXIT_FAILURE
               : EXIT_SUCCESS;
}
