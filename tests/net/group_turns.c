/* SPDX-License-Identifier: MIT */
/* Operations that fail on some rank, or on all, while what they sent to other
 * nodes' receive slots is on its way: those that follow are not disturbed. */
#include "conformance/world.h"
#include "net/sim.h"

#include <stdio.h>
#include <stdlib.h>

enum {
    RANKS = 3,
    TOPK = RANKS - 1, /* every other rank's expert */
    TOKENS = 4,
    ROWS = TOPK * TOKENS,
    ROUNDS = 3, /* a slot's halves come round */
};

/* With the second, slots go by themselves: beyond a bundle, and a box. */
static const int64_t hiddens[] = { 8, 8192 };

typedef struct turns {
    world_rank_t *self;
    epx_plan_t *plan;
    int64_t hidden;
    int64_t topk_idx[TOKENS * TOPK];
    float weights[TOKENS * TOPK];
    float *x;    /* [TOKENS, hidden] */
    float *recv; /* [ROWS, hidden] */
    float *out;  /* [TOKENS, hidden] */
} turns_t;

static float
value_of(int round, int32_t rank, int token)
{
    return (float)(1000 * round + 100 * rank + token + 1);
}

static void
fill(turns_t *s, int round)
{
    for (int64_t i = 0; i < TOKENS * s->hidden; i++) {
        s->x[i] = value_of(round, s->self->rank, (int)(i / s->hidden));
    }
    for (int64_t i = 0; i < ROWS * s->hidden; i++) {
        s->recv[i] = -1;
    }
}

static epx_dispatch_args_t
dispatch_args(turns_t *s)
{
    epx_dispatch_args_t args = EPX_DISPATCH_ARGS_INIT;

    args.x = s->x;
    args.hidden = s->hidden;
    args.dtype = EPX_F32;
    args.recv_x = s->recv;
    args.recv_rows = ROWS;
    args.flags = EPX_SEND_ONLY;
    return args;
}

static epx_combine_args_t
combine_args(turns_t *s)
{
    epx_combine_args_t args = EPX_COMBINE_ARGS_INIT;

    args.x = s->recv;
    args.num_rows = ROWS;
    args.hidden = s->hidden;
    args.dtype = EPX_F32;
    args.topk_weights = s->weights;
    args.out = s->out;
    return args;
}

/* New routing, and the send-only half of a dispatch; true: that has failed. */
static bool
send(turns_t *s, const epx_dispatch_args_t *args)
{
    return world_failed(s->self,
                        epx_plan_update(s->plan, TOKENS, s->topk_idx, NULL),
                        "new routing") ||
           world_failed(s->self, epx_dispatch(s->plan, args, NULL),
                        "a dispatch");
}

static void
check_rows(turns_t *s, int round)
{
    int32_t sources[TOPK], count = 0;

    for (int32_t r = 0; r < RANKS; r++) {
        if (r != s->self->rank) {
            sources[count++] = r;
        }
    }
    for (int64_t i = 0; i < ROWS * s->hidden; i++) {
        int row = (int)(i / s->hidden);
        float want = value_of(round, sources[row / TOKENS], row % TOKENS);

        if (s->recv[i] != want) {
            world_fail(s->self, "round %d: row %d is %g, not %g", round, row,
                       (double)s->recv[i], (double)want);
            return;
        }
    }
}

static void
check_sums(turns_t *s, int round)
{
    for (int64_t i = 0; i < TOKENS * s->hidden; i++) {
        int token = (int)(i / s->hidden);
        float want = 3 * value_of(round, s->self->rank, token);

        if (s->out[i] != want) {
            world_fail(s->self, "round %d: the sum of token %d is %g, not %g",
                       round, token, (double)s->out[i], (double)want);
            return;
        }
    }
}

static void
run_rounds(turns_t *s, int *round)
{
    for (int i = 0; i < ROUNDS; i++) {
        epx_dispatch_args_t dispatch = dispatch_args(s);
        epx_combine_args_t combine = combine_args(s);

        fill(s, ++*round);
        if (send(s, &dispatch) ||
            world_failed(s->self, epx_complete(s->plan, NULL), "its end")) {
            return;
        }
        check_rows(s, *round);
        if (world_failed(s->self, epx_combine(s->plan, &combine, NULL),
                         "a combine")) {
            return;
        }
        check_sums(s, *round);
    }
}

/* The hook of rank 0 finds that its array is too short. */
static void
be_too_small(turns_t *s)
{
    epx_dispatch_args_t args = dispatch_args(s);
    bool is_small = s->self->rank == 0;

    args.recv_rows -= is_small;
    fill(s, 0);
    (void)send(s, &args);
    world_expect(s->self, "a short array", epx_complete(s->plan, NULL),
                 is_small ? EPX_ERR_TOO_SMALL : EPX_OK, "recv_rows");
}

static void
disagree_in_dispatch(turns_t *s)
{
    epx_dispatch_args_t args = dispatch_args(s);

    args.hidden = s->self->rank == 1 ? s->hidden / 2 : s->hidden;
    (void)send(s, &args);
    world_expect(s->self, "another hidden", epx_complete(s->plan, NULL),
                 EPX_ERR_MISMATCH, "hidden");
}

static void
disagree_in_combine(turns_t *s)
{
    epx_combine_args_t args = combine_args(s);

    args.hidden = s->self->rank == 1 ? s->hidden / 2 : s->hidden;
    world_expect(s->self, "another hidden", epx_combine(s->plan, &args, NULL),
                 EPX_ERR_MISMATCH, "hidden");
}

static void
run_plan(turns_t *s, epx_group_t *group)
{
    epx_plan_args_t args = EPX_PLAN_ARGS_INIT;
    int round = 0;

    args.layout = EPX_LAYOUT_EXPERT_MAJOR;
    args.num_experts = RANKS;
    args.topk = TOPK;
    args.max_tokens_per_rank = TOKENS;
    args.send_only_row_bytes = s->hidden * (int64_t)sizeof(float);
    if (world_failed(s->self, epx_plan_create(group, &args, NULL, &s->plan),
                     "a plan")) {
        return;
    }
    run_rounds(s, &round);
    be_too_small(s);
    run_rounds(s, &round);
    disagree_in_dispatch(s);
    run_rounds(s, &round);
    disagree_in_combine(s);
    run_rounds(s, &round);
    be_too_small(s);
    disagree_in_combine(s);
    be_too_small(s); /* the last that the plan does */
    (void)world_failed(s->self, epx_plan_destroy(s->plan), "its end");
}

static void
run_rank(world_rank_t *self, void *context)
{
    epx_group_config_t config = EPX_GROUP_CONFIG_INIT;
    epx_network_config_t network = EPX_NETWORK_CONFIG_INIT;
    turns_t *s = calloc(1, sizeof(*s));
    size_t row;
    epx_group_t *group;

    s->self = self;
    s->hidden = *(const int64_t *)context;
    for (int i = 0; i < TOKENS * TOPK; i++) {
        s->topk_idx[i] = (self->rank + 1 + i % TOPK) % RANKS;
        s->weights[i] = (float)(1 + i % TOPK);
    }
    row = (size_t)s->hidden * sizeof(float);
    s->x = malloc(TOKENS * row);
    s->recv = malloc(ROWS * row);
    s->out = malloc(TOKENS * row);
    network.device = "lo";
    config.bootstrap = self->bootstrap;
    config.network = &network;
    config.node = 1 + self->rank;
    config.heap_bytes = 16 << 20;
    config.num_workers = 1;
    if (!world_failed(self, epx_group_create(&config, &group), "group")) {
        run_plan(s, group);
        run_plan(s, group); /* in whose slots pieces may still come */
        (void)world_failed(self, epx_group_destroy(group), "the end");
    }
    free(s->x);
    free(s->recv);
    free(s->out);
    free(s);
}

static bool
run(uint64_t seed, int64_t hidden)
{
    const sim_faults_t faults = { .max_delay_ns = 200000,
                                  .slow_per_mille = 300,
                                  .landing_ns = 2000000,
                                  .repeated_per_mille = 50 };
    char text[RANKS * WORLD_TEXT];
    sim_t *sim = sim_create(RANKS, seed, &faults);
    bool is_well;

    sim_use(sim);
    is_well = world_run(WORLD_THREAD, RANKS, true, 1, run_rank, &hidden, NULL,
                        text, sizeof(text));
    sim_use(NULL);
    sim_destroy(sim);
    if (!is_well) {
        fprintf(stderr, "seed %d, hidden %d:\n%s", (int)seed, (int)hidden,
                text);
    }
    return is_well;
}

int
main(void)
{
    bool is_well = true;

    for (uint64_t seed = 1; seed <= 12; seed++) {
        is_well = run(seed, hiddens[seed % 2]) && is_well;
    }
    return is_well ? 0 : 1;
}
