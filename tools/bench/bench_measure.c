/* SPDX-License-Identifier: MIT */
#include "bench_measure.h"

#include "bench_check.h"
#include "bench_copy.h"
#include "bench_link.h"
#include "bench_nccl.h"
#include "bench_op.h"
#include "bench_ucx.h"

/* Every rank enters an operation when all are ready for it. */
static void
time_op(struct bench_rank *self, enum bench_op op, int32_t iter,
        epx_plan_counts_t *counts)
{
    struct bench_span span;
    bench_barrier_wait(&self->run->shared->ranks, BENCH_NO_DEADLINE);
    span.start = bench_now_ns();
    epx_status_t status = bench_op_start(self, op, counts);
    span.end = bench_now_ns();
    bench_rank_check(self, status);
    bench_op_note(self, op, iter, span);
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
    bench_op_drop_plan(self);
}

void
bench_measure_check(struct bench_rank *self, uint64_t round, const char *what)
{
    struct bench_check *check = bench_check_open(self, round);
    epx_plan_counts_t expected = bench_check_counts(check);
    epx_plan_counts_t counts = EPX_PLAN_COUNTS_INIT;
    bench_rank_set_round(self, round);
    bench_rank_set_outputs(self, &expected);
    for (int i = 0; i < BENCH_NUM_OPS; i++) {
        enum bench_op op = (enum bench_op)i;
        if (!bench_op_active(op, self->run->options) ||
            op == BENCH_PLAN_DEVICE || op == BENCH_SIGNALS) {
            continue;
        }
        if (op == BENCH_LAYER) { /* does all of it again */
            bench_check_results(check, what);
        }
        time_op(self, op, BENCH_UNTIMED, &counts);
        bench_rank_synchronize(self);
        if (op == BENCH_PLAN) {
            bench_check_plan(check, &counts, what);
        }
    }
    bench_check_results(check, what);
    bench_op_drop_plan(self);
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
        bench_measure_check(self, (uint64_t)i + 1, what);
    }
}

/* Every block warms up anew, since the copies have taken the caches. */
static void
time_block(struct bench_rank *self, int32_t block)
{
    const struct bench_options *o = self->run->options;
    int32_t end = bench_block_start(self->run, block + 1);
    for (int32_t i = 0; i < o->warmup; i++) {
        iterate(self, BENCH_UNTIMED);
    }
    for (int32_t i = bench_block_start(self->run, block); i < end; i++) {
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
    struct bench_ucx *ucx = bench_ucx_open(self);
    for (int32_t block = 0; block < self->run->blocks; block++) {
        time_block(self, block);
        bench_copy_block(copier, block);
        bench_ucx_block(ucx, block);
    }
    bench_ucx_close(ucx);
    bench_copy_close(copier);
}

/* One more iteration, in which the interfaces are looked at: all of them where
 * hosts have networks of their own, else the one that they share. */
static void
count_wire(struct bench_rank *self)
{
    const struct bench_options *o = self->run->options;
    struct bench_shared *shared = self->run->shared;
    bool counts =
        self->rank == 0 || (o->netns && bench_host_of(o, self->rank - 1) !=
                                            bench_host_of(o, self->rank));
    epx_plan_counts_t plan_counts = EPX_PLAN_COUNTS_INIT;
    char device[IF_NAMESIZE];
    struct bench_error error;
    if (!bench_link_device(o, device, &error)) {
        bench_rank_fail(self->run, self->rank, "%s", error.text);
    }
    for (int i = 0; i < BENCH_NUM_OPS; i++) {
        enum bench_op op = (enum bench_op)i;
        /* On a card the plan is timed in two ways. */
        if (!bench_op_active(op, o) || op == BENCH_PLAN_DEVICE) {
            continue;
        }
        bench_barrier_wait(&shared->ranks, BENCH_NO_DEADLINE);
        uint64_t before = counts ? bench_link_sent(device) : 0;
        time_op(self, op, BENCH_UNTIMED, &plan_counts);
        bench_barrier_wait(&shared->ranks, BENCH_NO_DEADLINE);
        if (counts) {
            atomic_fetch_add(&shared->wire_bytes[op],
                             bench_link_sent(device) - before);
        }
    }
    bench_op_drop_plan(self);
}

/* The inputs of the first round; a plan that is kept is made for it. */
static void
set_first_round(struct bench_rank *self)
{
    epx_plan_counts_t counts = EPX_PLAN_COUNTS_INIT;
    bench_rank_set_round(self, 0);
    bench_rank_check(self, bench_op_start(self, BENCH_PLAN, &counts));
    bench_rank_synchronize(self);
    bench_rank_set_outputs(self, &counts);
    bench_op_drop_plan(self);
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
    self.nccl = bench_nccl_open(&self);
    if (run->options->graph) {
        set_first_round(&self);
        bench_op_capture(&self);
    }
    if (run->options->check) {
        check_all(&self);
    }
    set_first_round(&self);
    if (self.card) {
        bench_time_card(&self);
    } else {
        time_all(&self);
    }
    if (run->options->check) {
        check_timed(&self);
    }
    if (run->options->hosts > 1) {
        count_wire(&self);
    }
    bench_progress_clear(&self.progress);
    bench_nccl_close(self.nccl);
    bench_rank_close(&self);
}
