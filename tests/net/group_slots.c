/* SPDX-License-Identifier: MIT */
/* A plan whose receive slots cannot all be lent to the ranks of other nodes
 * leaves nothing behind. */
#include "conformance/world.h"
#include "net/sim.h"

#include <inttypes.h>
#include <stdio.h>

enum { RANKS = 3, TOKENS = 64, ROW_BYTES = 4096 };

static uint64_t
free_bytes(world_rank_t *self, const epx_group_t *group)
{
    epx_group_info_t info = EPX_GROUP_INFO_INIT;

    (void)world_failed(self, epx_group_query(group, &info), "a query");
    return info.heap_free_bytes;
}

static void
check_nothing_left(world_rank_t *self, sim_t *sim, const epx_group_t *group,
                   uint64_t before, const char *when)
{
    uint64_t after = free_bytes(self, group);
    int num_shares = sim_num_shares(sim, self->rank);

    if (after != before || num_shares != 1) {
        world_fail(self,
                   "%s: %" PRIu64 " bytes are free, before %" PRIu64
                   "; %d pieces of memory are lent, not 1",
                   when, after, before, num_shares);
    }
}

static void
run_rank(world_rank_t *self, void *context)
{
    epx_group_config_t config = EPX_GROUP_CONFIG_INIT;
    epx_network_config_t network = EPX_NETWORK_CONFIG_INIT;
    epx_plan_args_t args = EPX_PLAN_ARGS_INIT;
    sim_t *sim = context;
    epx_group_t *group;
    epx_plan_t *plan;
    uint64_t before;

    network.device = "lo";
    network.wire = "rma";
    config.bootstrap = self->bootstrap;
    config.network = &network;
    config.node = 1 + self->rank;
    config.heap_bytes = 8 << 20;
    config.num_workers = 1;
    args.layout = EPX_LAYOUT_EXPERT_SLOTS;
    args.num_experts = RANKS;
    args.topk = 1;
    args.max_tokens_per_rank = TOKENS;
    args.send_only_row_bytes = ROW_BYTES;
    if (world_failed(self, epx_group_create(&config, &group), "group")) {
        return;
    }
    before = free_bytes(self, group);
    world_expect(self, "a plan", epx_plan_create(group, &args, NULL, &plan),
                 EPX_ERR_SYSTEM, "cannot be shared");
    check_nothing_left(self, sim, group, before, "after it failed");
    if (!world_failed(self, epx_plan_create(group, &args, NULL, &plan),
                      "another plan")) {
        (void)world_failed(self, epx_plan_destroy(plan), "its end");
    }
    check_nothing_left(self, sim, group, before, "after another");
    (void)world_failed(self, epx_group_destroy(group), "the end");
}

/* The first piece of memory that a rank lends is its boxes', the next two are
 * the halves of the first peer's slots. */
static bool
run(uint64_t unshared_at)
{
    const sim_faults_t faults = { .unshared_at = unshared_at };
    char text[RANKS * WORLD_TEXT];
    sim_t *sim = sim_create(RANKS, unshared_at, &faults);
    bool is_well;

    sim_use(sim);
    is_well = world_run(WORLD_THREAD, RANKS, true, 1, run_rank, sim, NULL, text,
                        sizeof(text));
    sim_use(NULL);
    sim_destroy(sim);
    if (!is_well) {
        fprintf(stderr, "without piece %" PRIu64 ":\n%s", unshared_at, text);
    }
    return is_well;
}

int
main(void)
{
    bool is_well = true;

    for (uint64_t at = 2; at <= 5; at++) {
        is_well = run(at) && is_well;
    }
    return is_well ? 0 : 1;
}
