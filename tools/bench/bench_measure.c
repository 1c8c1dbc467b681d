/* SPDX-License-Identifier: MIT */
#include "bench_measure.h"

#include "bench_check.h"
#include "bench_copy.h"
#include "bench_rank.h"

/* The iteration whose times are kept nowhere. */
#define UNTIMED (-1)

static epx_status_t
plan_until_counted(struct bench_rank *self, epx_plan_counts_t *counts)
{
    epx_plan_args_t args = bench_rank_plan_args(self);
    epx_status_t status =
        self->plan ? epx_plan_update(self->plan, self->tokens, self->idx, NULL)
                   : epx_plan_create(self->group, &args, NULL, &self->plan);
    return status ? status : epx_plan_counts(self->plan, counts);
}

/* In LL each dispatch has new routing, so the update is part of it. */
static epx_status_t
dispatch(struct bench_rank *self)
{
    epx_dispatch_args_t args = bench_rank_dispatch_args(self);
    if (self->run->options->mode == BENCH_LL) {
        epx_status_t status =
            epx_plan_update(self->plan, self->tokens, self->idx, NULL);
        if (status) {
            return status;
        }
    }
    return epx_dispatch(self->plan, &args, NULL);
}

static epx_status_t
run_op(struct bench_rank *self, enum bench_op op, epx_plan_counts_t *counts)
{
    epx_combine_args_t combine = bench_rank_combine_args(self);
    switch (op) {
    case BENCH_PLAN:
        return plan_until_counted(self, counts);
    case BENCH_DISPATCH:
    case BENCH_DISPATCH_SEND:
        return dispatch(self);
    case BENCH_COMBINE:
    case BENCH_COMBINE_SEND:
        return epx_combine(self->plan, &combine, NULL);
    default:
        return epx_complete(self->plan, NULL);
    }
}

/* Every rank enters an operation when all are ready for it. */
static void
time_op(struct bench_rank *self, enum bench_op op, int32_t iter,
        epx_plan_counts_t *counts)
{
    struct bench_shared *shared = self->run->shared;
    struct bench_span span;
    bench_barrier_wait(&shared->ranks, BENCH_NO_DEADLINE);
    span.start = bench_now_ns();
    epx_status_t status = run_op(self, op, counts);
    span.end = bench_now_ns();
    bench_rank_check(self, status);
    if (iter != UNTIMED) {
        const struct bench_series *series = &shared->ops[op];
        series->spans[(size_t)iter * (size_t)series->parties +
                      (size_t)self->rank] = span;
    }
}

/* A training step has a plan of its own; LL keeps one and updates it. */
static void
drop_plan(struct bench_rank *self)
{
    if (self->run->options->mode == BENCH_HT) {
        bench_rank_check(self, epx_plan_destroy(self->plan));
        self->plan = NULL;
    }
}

static void
iterate(struct bench_rank *self, int32_t iter)
{
    epx_plan_counts_t counts = EPX_PLAN_COUNTS_INIT;
    for (int op = 0; op < BENCH_NUM_OPS; op++) {
        if (bench_op_active((enum bench_op)op, self->run->options)) {
            time_op(self, (enum bench_op)op, iter, &counts);
        }
    }
    drop_plan(self);
}

/* One iteration on the inputs of a round, compared with the reference. */
static void
check_round(struct bench_rank *self, uint64_t round, const char *what)
{
    struct bench_check *check = bench_check_open(self, round);
    epx_plan_counts_t expected = bench_check_counts(check);
    epx_plan_counts_t counts = EPX_PLAN_COUNTS_INIT;
    bench_rank_set_round(self, round);
    bench_rank_set_outputs(self, &expected);
    for (int op = 0; op < BENCH_NUM_OPS; op++) {
        if (bench_op_active((enum bench_op)op, self->run->options)) {
            time_op(self, (enum bench_op)op, UNTIMED, &counts);
        }
        if (op == BENCH_PLAN) {
            bench_check_plan(check, &counts, what);
        }
    }
    bench_check_results(check, what);
    drop_plan(self);
    bench_check_close(check);
}

static void
check_all(struct bench_rank *self)
{
    int32_t iters = self->run->options->iters;
    char what[32];
    for (int32_t i = 0; i < iters; i++) {
        if (self->rank == 0) {
            bench_progress_show(&self->progress, self->run, "checked", i,
                                iters);
        }
        snprintf(what, sizeof what, "checked iteration %d", i);
        check_round(self, (uint64_t)i + 1, what);
    }
}

/* Every block warms up anew, since the copies have taken the caches. */
static void
time_block(struct bench_rank *self, int32_t block)
{
    const struct bench_options *o = self->run->options;
    int64_t blocks = self->run->blocks;
    int32_t first = (int32_t)(block * (int64_t)o->iters / blocks);
    int32_t end = (int32_t)((block + 1) * (int64_t)o->iters / blocks);
    for (int32_t i = 0; i < o->warmup; i++) {
        iterate(self, UNTIMED);
    }
    for (int32_t i = first; i < end; i++) {
        if (self->rank == 0) {
            bench_progress_show(&self->progress, self->run, "timed", i,
                                o->iters);
        }
        iterate(self, i);
    }
}

static void
time_all(struct bench_rank *self)
{
    struct bench_copier *copier = bench_copy_open(self);
    epx_plan_counts_t counts = EPX_PLAN_COUNTS_INIT;
    bench_rank_set_round(self, 0);
    bench_rank_check(self, plan_until_counted(self, &counts));
    bench_rank_set_outputs(self, &counts);
    drop_plan(self);
    for (int32_t block = 0; block < self->run->blocks; block++) {
        time_block(self, block);
        bench_copy_block(copier, block);
    }
    bench_copy_close(copier);
}

/* What the timed iterations, all on one input, have left behind. */
static void
check_timed(struct bench_rank *self)
{
    struct bench_check *check = bench_check_open(self, self->round);
    bench_check_results(check, "last timed iteration");
    bench_check_close(check);
}

void
bench_measure_rank(const struct bench_run *run, int32_t rank,
                   const epx_bootstrap_t *bootstrap)
{
    struct bench_rank self;
    bench_rank_open(&self, run, rank, bootstrap);
    if (run->options->check) {
        check_all(&self);
    }
    time_all(&self);
    if (run->options->check) {
        check_timed(&self);
    }
    bench_progress_clear(&self.progress);
    bench_rank_close(&self);
}
