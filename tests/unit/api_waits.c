/* SPDX-License-Identifier: MIT */
/* wait_ns: how long an operation has waited for each rank. */
#include "api_world.h"
#include "conformance/late.h"

enum { RANKS = 3, HIDDEN = 8, ROWS = RANKS * API_TOKENS };

typedef struct waiter {
    epx_group_t *group;
    epx_plan_t *plan;
    uint16_t x[API_TOKENS * HIDDEN];
    uint16_t recv[ROWS * HIDDEN];
    uint16_t out[API_TOKENS * HIDDEN];
} waiter_t;

static epx_status_t
dispatch(waiter_t *w, uint32_t flags, int64_t *wait_ns)
{
    epx_dispatch_args_t args = EPX_DISPATCH_ARGS_INIT;

    args.x = w->x;
    args.hidden = HIDDEN;
    args.dtype = EPX_F16;
    args.recv_x = w->recv;
    args.recv_rows = ROWS;
    args.flags = flags;
    args.wait_ns = wait_ns;
    return epx_dispatch(w->plan, &args, NULL);
}

static epx_status_t
combine(waiter_t *w, uint32_t flags, int64_t *wait_ns)
{
    epx_combine_args_t args = EPX_COMBINE_ARGS_INIT;

    args.x = w->recv;
    args.num_rows = ROWS;
    args.hidden = HIDDEN;
    args.dtype = EPX_F16;
    args.out = w->out;
    args.flags = flags;
    args.wait_ns = wait_ns;
    return epx_combine(w->plan, &args, NULL);
}

static bool
run_call(world_rank_t *self, const late_call_t *call, int64_t late_ms,
         int64_t *wait_ns)
{
    waiter_t *w = call->context;
    /* To ask for it is each rank's own choice. */
    int64_t *asked = self->rank == LATE_RANK ? NULL : wait_ns;
    epx_status_t status;

    for (int r = 0; r < RANKS; r++) {
        wait_ns[r] = LATE_BEFORE;
    }
    late_nap(self, late_ms);
    status = call->is_combine ? combine(w, call->flags, asked)
                              : dispatch(w, call->flags, asked);
    if (call->flags == EPX_SEND_ONLY && status == EPX_OK) {
        if (wait_ns[LATE_RANK] != LATE_BEFORE) {
            world_fail(self, "%s: the send has waited", call->name);
        }
        status = epx_complete(w->plan, NULL);
    }
    return !world_failed(self, status, call->name);
}

static void
waits_rank(world_rank_t *self, void *context)
{
    static _Thread_local waiter_t waiter;
    const late_call_t calls[] = {
        { "a dispatch", run_call, &waiter, 0, false },
        { "a send-only dispatch", run_call, &waiter, EPX_SEND_ONLY, false },
        { "a combine", run_call, &waiter, 0, true },
        { "a send-only combine", run_call, &waiter, EPX_SEND_ONLY, true },
    };
    epx_group_config_t config = EPX_GROUP_CONFIG_INIT;
    epx_plan_args_t args = api_plan_args(EPX_LAYOUT_RANK_MAJOR);

    (void)context;
    config.bootstrap = self->bootstrap;
    config.heap_bytes = 1 << 20;
    args.send_only_row_bytes = HIDDEN * 2;
    if (world_failed(self, epx_group_create(&config, &waiter.group), "group") ||
        world_failed(self,
                     epx_plan_create(waiter.group, &args, NULL, &waiter.plan),
                     "epx_plan_create")) {
        return;
    }
    for (size_t i = 0; i < sizeof(calls) / sizeof(*calls); i++) {
        late_check(self, &calls[i]);
    }
    world_failed(self, epx_plan_destroy(waiter.plan), "epx_plan_destroy");
    world_failed(self, epx_group_destroy(waiter.group), "epx_group_destroy");
}

int
main(void)
{
    const api_world_t world = {
        .num_ranks = RANKS,
        .shared_bytes = LATE_SHARED_BYTES,
        .fn = waits_rank,
    };

    return api_world_main(&world);
}
