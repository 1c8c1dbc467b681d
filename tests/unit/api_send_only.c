/* SPDX-License-Identifier: MIT */
/* What never waits for a peer: new routing for a plan, a send-only dispatch
 * with receive slots, a send-only combine. */
#include "api_world.h"

enum { RANKS = 3, HIDDEN = 8, ROWS = RANKS * API_TOKENS };

typedef struct sender {
    world_rank_t *self;
    epx_group_t *group;
    epx_plan_t *plans[3]; /* two to dispatch on, one to combine on */
    uint16_t x[API_TOKENS * HIDDEN];
    uint16_t recv[2][ROWS * HIDDEN];
    uint16_t out[API_TOKENS * HIDDEN];
} sender_t;

static epx_plan_t *
make_plan(sender_t *s)
{
    epx_plan_args_t args = api_plan_args(EPX_LAYOUT_RANK_MAJOR);
    epx_plan_t *plan = NULL;

    args.send_only_row_bytes = HIDDEN * 2;
    world_failed(s->self, epx_plan_create(s->group, &args, NULL, &plan),
                 "epx_plan_create");
    return plan;
}

static void
send_dispatch(sender_t *s, int which)
{
    epx_dispatch_args_t args = EPX_DISPATCH_ARGS_INIT;

    args.x = s->x;
    args.hidden = HIDDEN;
    args.dtype = EPX_F16;
    args.recv_x = s->recv[which];
    args.recv_rows = ROWS;
    args.flags = EPX_SEND_ONLY;
    world_failed(
        s->self,
        epx_plan_update(s->plans[which], API_TOKENS, api_topk_idx, NULL),
        "epx_plan_update");
    world_failed(s->self, epx_dispatch(s->plans[which], &args, NULL),
                 "the send-only dispatch");
}

static void
send_combine(sender_t *s)
{
    epx_combine_args_t args = EPX_COMBINE_ARGS_INIT;

    args.x = s->recv[0];
    args.num_rows = ROWS;
    args.hidden = HIDDEN;
    args.dtype = EPX_F16;
    args.out = s->out;
    args.flags = EPX_SEND_ONLY;
    world_failed(s->self, epx_combine(s->plans[2], &args, NULL),
                 "the send-only combine");
}

/* Completes in the opposite order, and looks at what came. */
static void
complete_all(sender_t *s)
{
    for (int p = 2; p >= 0; p--) {
        world_failed(s->self, epx_complete(s->plans[p], NULL), "epx_complete");
    }
    for (int p = 0; p < 2 && s->self->rank == 0; p++) {
        /* Rank 0 holds experts 0 and 1: tokens 0, 1 and 2 of every rank. */
        if (s->recv[p][3 * HIDDEN] != 0x3c00 + 64) {
            world_fail(s->self, "plan %d: the first row of rank 1 is %#x", p,
                       s->recv[p][3 * HIDDEN]);
        }
    }
}

/* The ranks enter one after the other: rank r starts its sends only after those
 * of rank r - 1 have returned, so that any wait for a peer times out. */
static void
in_turns_rank(world_rank_t *self, void *context)
{
    static _Thread_local sender_t sender;
    sender_t *s = &sender;
    epx_group_config_t config = EPX_GROUP_CONFIG_INIT;

    (void)context;
    s->self = self;
    config.bootstrap = self->bootstrap;
    config.heap_bytes = 1 << 20;
    config.timeout_ns = UINT64_C(5000000000);
    for (int i = 0; i < API_TOKENS * HIDDEN; i++) {
        s->x[i] = (uint16_t)(0x3c00 + self->rank * 64 + i);
    }
    if (world_failed(self, epx_group_create(&config, &s->group), "group")) {
        return;
    }
    for (int p = 0; p < 3; p++) {
        s->plans[p] = make_plan(s);
    }
    for (int32_t turn = 0; turn < RANKS; turn++) {
        if (turn == self->rank) {
            send_dispatch(s, 0);
            send_dispatch(s, 1);
            send_combine(s);
        }
        world_barrier(self);
    }
    complete_all(s);
    for (int p = 0; p < 3; p++) {
        world_failed(self, epx_plan_destroy(s->plans[p]), "epx_plan_destroy");
    }
    world_failed(self, epx_group_destroy(s->group), "epx_group_destroy");
}

int
main(void)
{
    const api_world_t world = {
        .num_ranks = RANKS,
        .fn = in_turns_rank,
    };

    return api_world_main(&world);
}
