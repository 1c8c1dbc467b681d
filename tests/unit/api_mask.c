/* SPDX-License-Identifier: MIT */
/* Going on without a rank: what the calls refuse, who is told what, and what
 * becomes of plans, memory and operations that were open. */
#include "api_world.h"

#include <stdlib.h>
#include <time.h>

enum { RANKS = 4, HIDDEN = 8, ROWS = RANKS * API_TOKENS, GONE = 2 };

/* Over how many the ranks are spread. */
static int32_t num_nodes = 1;

typedef struct member {
    world_rank_t *self;
    epx_group_t *group;
    epx_plan_t *plan;
    uint16_t x[API_TOKENS * HIDDEN];
    uint16_t recv[ROWS * HIDDEN];
} member_t;

static epx_status_t
dispatch(member_t *m, uint32_t flags)
{
    epx_dispatch_args_t args = EPX_DISPATCH_ARGS_INIT;

    args.x = m->x;
    args.hidden = HIDDEN;
    args.dtype = EPX_F16;
    args.recv_x = m->recv;
    args.recv_rows = ROWS;
    args.flags = flags;
    args.num_tokens = API_TOKENS;
    args.topk_idx = api_topk_idx;
    return epx_dispatch(m->plan, &args, NULL);
}

static uint64_t
heap_free_bytes(const member_t *m)
{
    epx_group_info_t info = EPX_GROUP_INFO_INIT;

    (void)epx_group_query(m->group, &info);
    return info.heap_free_bytes;
}

/* Arguments, before anybody is masked. */
static void
refuse(member_t *m)
{
    const int32_t outside[] = { RANKS }, own[] = { m->self->rank };
    const int32_t many[RANKS] = { 0 };
    int32_t masked[RANKS] = { 7, 7, 7, 7 };

    world_expect(m->self, "null", epx_group_mask(NULL, NULL, 0), EPX_ERR_NULL,
                 "group");
    world_expect(m->self, "no ranks", epx_group_mask(m->group, NULL, 1),
                 EPX_ERR_NULL, "num_ranks is 1");
    world_expect(m->self, "all", epx_group_mask(m->group, many, RANKS),
                 EPX_ERR_INVALID, "num_ranks is 4");
    world_expect(m->self, "outside", epx_group_mask(m->group, outside, 1),
                 EPX_ERR_INVALID, "ranks[0] is 4");
    world_expect(m->self, "itself", epx_group_mask(m->group, own, 1),
                 EPX_ERR_INVALID, "but for this rank");
    world_expect(m->self, "nobody", epx_group_mask(m->group, NULL, 0), EPX_OK,
                 "");
    world_expect(m->self, "null", epx_group_masked(m->group, NULL),
                 EPX_ERR_NULL, "masked_p");
    world_expect(m->self, "query", epx_group_masked(m->group, masked), EPX_OK,
                 "");
    for (int32_t r = 0; r < RANKS; r++) {
        if (masked[r] != 0) {
            world_fail(m->self, "the mask of rank %d is %d", r, masked[r]);
        }
    }
}

/* The one that is masked: its wait ends, and all that it calls tells so. */
static void
be_masked(member_t *m)
{
    const int32_t other = 1;
    void *memory;

    epx_plan_counts_t counts = EPX_PLAN_COUNTS_INIT;

    world_expect(m->self, "complete", epx_complete(m->plan, NULL), EPX_OK, "");
    world_expect(m->self, "update",
                 epx_plan_update(m->plan, API_TOKENS, api_topk_idx, NULL),
                 EPX_OK, "");
    world_barrier(m->self);
    world_expect(m->self, "a wait", epx_plan_counts(m->plan, &counts),
                 EPX_ERR_MASKED, "go on without");
    world_expect(m->self, "again", dispatch(m, 0), EPX_ERR_MASKED,
                 "go on without");
    world_expect(m->self, "status", epx_group_status(m->group), EPX_ERR_MASKED,
                 "rank 2");
    world_expect(m->self, "memory", epx_mem_alloc(m->group, 64, &memory),
                 EPX_ERR_MASKED, "rank 2");
    world_expect(m->self, "mask", epx_group_mask(m->group, &other, 1),
                 EPX_ERR_MASKED, "rank 2");
}

static void
check_masked(const member_t *m, const char *want)
{
    int32_t masked[RANKS];
    char got[RANKS + 1] = "";

    world_failed(m->self, epx_group_masked(m->group, masked),
                 "epx_group_masked");
    for (int32_t r = 0; r < RANKS; r++) {
        got[r] = masked[r] != 0 ? 'x' : '.';
    }
    if (strcmp(got, want) != 0) {
        world_fail(m->self, "expected the masks %s, got %s", want, got);
    }
}

/* Those that remain, with an operation open; rank 0 names nobody, and learns
 * from the others that the group has failed. */
static void
go_on(member_t *m)
{
    const int32_t gone = GONE;
    const struct timespec nap = { 0, 1000000 };
    uint64_t before = heap_free_bytes(m);

    world_barrier(m->self);
    for (int i = 0; m->self->rank == 0 && i < 20000 &&
                    epx_group_status(m->group) == EPX_OK;
         i++) {
        (void)nanosleep(&nap, NULL);
    }
    if (m->self->rank == 0) {
        world_expect(m->self, "status", epx_group_status(m->group),
                     EPX_ERR_PEER_LOST, "rank 2 is masked");
    }
    world_expect(m->self, "mask",
                 epx_group_mask(m->group, &gone, m->self->rank != 0), EPX_OK,
                 "");
    check_masked(m, "..x.");
    world_expect(m->self, "status", epx_group_status(m->group), EPX_OK, "");
    world_expect(m->self, "complete", epx_complete(m->plan, NULL),
                 EPX_ERR_STATE, "epoch 0, now 1");
    world_expect(m->self, "dispatch", dispatch(m, 0), EPX_ERR_STATE,
                 "new routing");
    world_expect(
        m->self, "counts",
        epx_plan_counts(m->plan, &(epx_plan_counts_t)EPX_PLAN_COUNTS_INIT),
        EPX_ERR_STATE, "new routing");
    world_expect(m->self, "update",
                 epx_plan_update(m->plan, API_TOKENS, api_topk_idx, NULL),
                 EPX_OK, "");
    if (heap_free_bytes(m) < before) {
        world_fail(m->self, "of %llu bytes %llu are free",
                   (unsigned long long)before,
                   (unsigned long long)heap_free_bytes(m));
    }
    world_expect(m->self, "dispatch", dispatch(m, 0), EPX_OK, "");
}

/* Rank 3 aborts while rank 1 waits for it; nobody goes on from there. */
static void
end_by_abort(member_t *m)
{
    const int32_t other = 3;

    if (m->self->rank == other) {
        world_expect(m->self, "abort", epx_group_abort(m->group), EPX_OK, "");
    } else {
        world_expect(m->self, "a wait", dispatch(m, EPX_NEW_ROUTING),
                     EPX_ERR_ABORTED, "rank 3 aborted");
        world_expect(m->self, "mask", epx_group_mask(m->group, &other, 1),
                     EPX_ERR_ABORTED, "rank 3 aborted");
    }
    world_expect(m->self, "mask", epx_group_mask(m->group, NULL, 0),
                 EPX_ERR_ABORTED, "rank 3 aborted");
}

static void
mask_rank(world_rank_t *self, void *context)
{
    epx_group_config_t config = EPX_GROUP_CONFIG_INIT;
    epx_network_config_t network = EPX_NETWORK_CONFIG_INIT;
    epx_plan_args_t args = api_plan_args(EPX_LAYOUT_RANK_MAJOR);
    member_t *m = calloc(1, sizeof(*m));

    (void)context;
    config.bootstrap = self->bootstrap;
    network.device = "lo";
    if (num_nodes > 1) {
        config.network = &network;
        config.node = 1 + self->rank % num_nodes;
    }
    config.heap_bytes = 1 << 20;
    config.num_workers = 1;
    m->self = self;
    args.max_tokens_per_rank = API_TOKENS;
    args.recv_capacity = ROWS;
    args.send_only_row_bytes = (int64_t)HIDDEN * 2;
    if (world_failed(self, epx_group_create(&config, &m->group), "group") ||
        world_failed(self, epx_plan_create(m->group, &args, NULL, &m->plan),
                     "plan")) {
        return;
    }
    refuse(m);
    world_expect(m->self, "send", dispatch(m, EPX_SEND_ONLY), EPX_OK, "");
    world_barrier(self);
    if (self->rank == GONE) {
        be_masked(m);
    } else {
        go_on(m);
    }
    world_barrier(self); /* they may be one operation apart */
    /* One leaves without a word, and the last two go on. */
    if (self->rank == 1 || self->rank == 3) {
        world_expect(m->self, "a wait", dispatch(m, EPX_NEW_ROUTING),
                     EPX_ERR_PEER_LOST, "rank 0 ");
        world_expect(m->self, "mask", epx_group_mask(m->group, NULL, 0), EPX_OK,
                     "");
        check_masked(m, "x.x.");
        world_expect(m->self, "dispatch", dispatch(m, EPX_NEW_ROUTING), EPX_OK,
                     "");
        world_barrier(self);
        end_by_abort(m);
    }
    world_expect(m->self, "the plan's end", epx_plan_destroy(m->plan), EPX_OK,
                 "");
    world_expect(m->self, "the end", epx_group_destroy(m->group), EPX_OK, "");
    if (self->rank == 0 || self->rank == 2) {
        world_barrier(self);
    }
    free(m);
}

int
main(int argc, char **argv)
{
    num_nodes = argc > 1 ? atoi(argv[1]) : 1;
    return api_world_main(&(api_world_t){
        .num_ranks = RANKS, .own_bootstrap = true, .fn = mask_rank });
}
