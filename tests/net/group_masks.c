/* SPDX-License-Identifier: MIT */
/*
 * A network that falls apart: the ranks of one part at most go on together, and
 * all others are told that they do not.
 */
#include "conformance/world.h"
#include "net/sim.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_RANKS = 6, TOKENS = 3, HIDDEN = 16, LOST_MS = 300 };

#define MS UINT64_C(1000000)

typedef struct scenario {
    const char *name;
    int32_t num_ranks;
    /* Of each pair of ranks that are parted, in turn. */
    const char *pairs;
    /* Of each rank what epx_group_mask gives: '.' it goes on, 'm' it is masked,
     * 'r' it is refused for want of a majority.  Or else. */
    const char *fates, *others;
    const char *refusal; /* in the sentence of those */
} scenario_t;

static const scenario_t scenarios[] = {
    { "two of five", 5, "030413142324", "...rr", "",
      "only 2 of 5 ranks remain" },
    { "half of four", 4, "02031213", "..rr", "", "without the lowest" },
    { "the lower two of five", 5, "020304121314", "rr...", "",
      "only 2 of 5 ranks remain" },
    { "three parts", 6, "0203040512131415242534350203", "rrrrrr", "",
      "of 6 ranks remain" },
    { "one link of three ranks", 3, "12", "..m", ".m.", "" },
    { "one rank of two", 2, "01", ".r", "", "without the lowest" },
};

typedef struct member {
    const scenario_t *scenario;
    sim_t *sim;
    world_rank_t *self;
    epx_group_t *group;
    epx_plan_t *plan;
    int64_t topk_idx[TOKENS];
    uint16_t x[TOKENS][HIDDEN];
    uint16_t recv[MOST_RANKS * TOKENS][HIDDEN];
    const char *fates; /* of all ranks, in memory that they share */
} member_t;

static epx_status_t
dispatch(member_t *m)
{
    epx_dispatch_args_t args = EPX_DISPATCH_ARGS_INIT;
    epx_plan_counts_t counts = EPX_PLAN_COUNTS_INIT;
    epx_status_t status;

    args.x = m->x;
    args.hidden = HIDDEN;
    args.dtype = EPX_F16;
    args.recv_x = m->recv;
    args.recv_rows = MOST_RANKS * TOKENS;
    args.flags = EPX_NEW_ROUTING;
    args.num_tokens = TOKENS;
    args.topk_idx = m->topk_idx;
    status = epx_dispatch(m->plan, &args, NULL);
    return status == EPX_OK ? epx_plan_counts(m->plan, &counts) : status;
}

/* Tokens of all ranks with this fate go to the next rank, if that shares it:
 * then they have come from the one before. */
static void
check_rows(const member_t *m, const char *what, bool all)
{
    const scenario_t *scenario = m->scenario;
    int32_t num_ranks = scenario->num_ranks;
    int32_t rank = m->self->rank;
    int32_t before = (rank + num_ranks - 1) % num_ranks;

    if (all || m->fates[before] == m->fates[rank]) {
        for (int32_t i = 0; i < TOKENS; i++) {
            uint16_t want = (uint16_t)(100 * before + i);

            if (m->recv[i][HIDDEN - 1] != want) {
                world_fail(m->self, "%s: %s: row %d is %d instead of %d",
                           scenario->name, what, i, m->recv[i][HIDDEN - 1],
                           want);
            }
        }
    }
}

static void
part(const member_t *m, bool is_parted)
{
    world_barrier(m->self);
    for (const char *p = m->scenario->pairs; m->self->rank == 0 && *p != '\0';
         p += 2) {
        sim_part(m->sim, p[0] - '0', p[1] - '0', is_parted);
    }
    world_barrier(m->self);
}

static void
check_masks(const member_t *m)
{
    int32_t masked[MOST_RANKS];

    world_expect(m->self, "masks", epx_group_masked(m->group, masked), EPX_OK,
                 "");
    for (int32_t r = 0; r < m->scenario->num_ranks; r++) {
        if (masked[r] != (m->fates[r] != '.')) {
            world_fail(m->self, "%s: the mask of rank %d is %d",
                       m->scenario->name, r, masked[r]);
        }
    }
}

/* Agree on who is masked; what comes of it. */
static char
agree(const member_t *m)
{
    epx_status_t status = epx_group_mask(m->group, NULL, 0);

    switch (status) {
    case EPX_OK:
        return '.';
    case EPX_ERR_MASKED:
        world_expect(m->self, "mask", status, EPX_ERR_MASKED, "go on without");
        return 'm';
    default:
        world_expect(m->self, "mask", status, EPX_ERR_PEER_LOST,
                     m->scenario->refusal);
        return 'r';
    }
}

/* The fates of all ranks are some that there may be. */
static void
share_fates(member_t *m, char own)
{
    char *fates = m->self->shared;

    fates[m->self->rank] = own;
    m->fates = fates;
    world_barrier(m->self);
    if (strcmp(fates, m->scenario->fates) != 0 &&
        strcmp(fates, m->scenario->others) != 0) {
        world_fail(m->self, "%s: expected the fates %s %s, got %s",
                   m->scenario->name, m->scenario->fates, m->scenario->others,
                   fates);
    }
}

static void
fall_apart(member_t *m)
{
    epx_status_t status;
    char fate;

    world_expect(m->self, "a dispatch", dispatch(m), EPX_OK, "");
    check_rows(m, "before", true);
    part(m, true);
    memset(m->recv, 0, sizeof(m->recv));
    status = dispatch(m);
    if (status != EPX_ERR_MASKED) { /* it may know already */
        world_expect(m->self, "a dispatch", status, EPX_ERR_PEER_LOST, "rank ");
    }
    fate = agree(m);
    share_fates(m, fate);
    if (fate == '.') {
        check_masks(m);
        world_expect(m->self, "going on", dispatch(m), EPX_OK, "");
        check_rows(m, "going on", false);
    }
    /* It makes no difference by now. */
    part(m, false);
    if (fate == '.') {
        memset(m->recv, 0, sizeof(m->recv));
        world_expect(m->self, "later", dispatch(m), EPX_OK, "");
        check_rows(m, "later", false);
    } else {
        world_expect(m->self, "later", dispatch(m),
                     fate == 'm' ? EPX_ERR_MASKED : EPX_ERR_BROKEN, "");
        if (agree(m) != fate) {
            world_fail(m->self, "%s: later it is told otherwise",
                       m->scenario->name);
        }
    }
    world_barrier(m->self);
}

static void
run_rank(world_rank_t *self, void *context)
{
    epx_group_config_t config = EPX_GROUP_CONFIG_INIT;
    epx_network_config_t network = EPX_NETWORK_CONFIG_INIT;
    epx_plan_args_t args = EPX_PLAN_ARGS_INIT;
    member_t *m = calloc(1, sizeof(*m));

    *m = *(const member_t *)context;
    m->self = self;
    for (int32_t i = 0; i < TOKENS; i++) {
        m->topk_idx[i] = (self->rank + 1) % self->num_ranks;
        m->x[i][HIDDEN - 1] = (uint16_t)(100 * self->rank + i);
    }
    network.device = "lo";
    config.bootstrap = self->bootstrap;
    config.network = &network;
    config.node = 1 + self->rank;
    config.heap_bytes = 1 << 20;
    config.num_workers = 1;
    config.timeout_ns = 20000 * MS;
    config.lost_after_ns = LOST_MS * MS;
    args.layout = EPX_LAYOUT_RANK_MAJOR;
    args.num_experts = self->num_ranks;
    args.topk = 1;
    args.idx_dtype = EPX_I64;
    args.num_tokens = TOKENS;
    args.topk_idx = m->topk_idx;
    args.max_tokens_per_rank = TOKENS;
    args.recv_capacity = MOST_RANKS * TOKENS;
    if (!world_failed(self, epx_group_create(&config, &m->group), "group") &&
        !world_failed(self, epx_plan_create(m->group, &args, NULL, &m->plan),
                      "plan")) {
        fall_apart(m);
        world_expect(m->self, "the plan's end", epx_plan_destroy(m->plan),
                     EPX_OK, "");
    }
    world_expect(m->self, "the end", epx_group_destroy(m->group), EPX_OK, "");
    free(m);
}

static bool
run(const scenario_t *scenario, uint64_t seed)
{
    const sim_faults_t faults = { .max_delay_ns = 200 * MS / 1000,
                                  .retransmit_ns = 3 * MS,
                                  .lost_per_mille = 10,
                                  .repeated_per_mille = 50,
                                  .slow_per_mille = 100 };
    char text[MOST_RANKS * WORLD_TEXT];
    member_t model = { .scenario = scenario };
    bool is_well;

    model.sim = sim_create(scenario->num_ranks, seed, &faults);
    sim_use(model.sim);
    is_well = world_run(WORLD_THREAD, scenario->num_ranks, true, MOST_RANKS + 1,
                        run_rank, &model, NULL, text, sizeof(text));
    sim_use(NULL);
    sim_destroy(model.sim);
    if (!is_well) {
        fprintf(stderr, "%s, seed %d:\n%s", scenario->name, (int)seed, text);
    }
    return is_well;
}

int
main(int argc, char **argv)
{
    uint64_t num_seeds = argc > 1 ? strtoull(argv[1], NULL, 10) : 2;
    bool is_well = true;

    for (size_t i = 0; i < sizeof(scenarios) / sizeof(*scenarios); i++) {
        for (uint64_t seed = 1; seed <= num_seeds; seed++) {
            is_well = run(&scenarios[i], seed) && is_well;
        }
    }
    return is_well ? 0 : 1;
}
