/* SPDX-License-Identifier: MIT */
#include "bench_op.h"

#include "bench_nccl.h"

epx_status_t
bench_op_plan(struct bench_rank *self)
{
    epx_plan_args_t args = bench_rank_plan_args(self);
    epx_stream_t stream = bench_rank_stream(self);
    return self->plan
               ? epx_plan_update(self->plan, self->tokens, args.topk_idx,
                                 stream)
               : epx_plan_create(self->group, &args, stream, &self->plan);
}

void
bench_op_drop_plan(struct bench_rank *self)
{
    if (!bench_options_fixed(self->run->options)) {
        bench_rank_check(self, epx_plan_destroy(self->plan));
        self->plan = NULL;
    }
}

void
bench_op_note(const struct bench_rank *self, enum bench_op op, int32_t iter,
              struct bench_span span)
{
    const struct bench_series *series = &self->run->shared->ops[op];
    if (iter != BENCH_UNTIMED) {
        series->spans[(size_t)iter * (size_t)series->parties +
                      (size_t)self->rank] = span;
    }
}

int32_t
bench_block_start(const struct bench_run *run, int32_t block)
{
    return (int32_t)(block * (int64_t)run->options->iters / run->blocks);
}

/* In LL each dispatch brings new routing. */
static epx_status_t
dispatch(struct bench_rank *self)
{
    epx_dispatch_args_t args = bench_rank_dispatch_args(self);
    if (self->run->options->mode == BENCH_LL) {
        args.flags |= EPX_NEW_ROUTING;
        args.num_tokens = self->tokens;
        args.topk_idx = bench_rank_plan_args(self).topk_idx;
    }
    return epx_dispatch(self->plan, &args, bench_rank_stream(self));
}

static epx_status_t
call(struct bench_rank *self, enum bench_op op)
{
    epx_combine_args_t combine = bench_rank_combine_args(self);
    switch (op) {
    case BENCH_DISPATCH:
    case BENCH_DISPATCH_SEND:
        return dispatch(self);
    case BENCH_COMBINE:
    case BENCH_COMBINE_SEND:
        return epx_combine(self->plan, &combine, bench_rank_stream(self));
    default:
        return epx_complete(self->plan, bench_rank_stream(self));
    }
}

epx_status_t
bench_op_start(struct bench_rank *self, enum bench_op op,
               epx_plan_counts_t *counts)
{
    if (op == BENCH_PLAN || op == BENCH_PLAN_DEVICE) {
        epx_status_t status = bench_op_plan(self);
        return status ? status : epx_plan_counts(self->plan, counts);
    }
    if (self->run->options->graph) {
        self->card->ops->replay(self->card, op);
        return EPX_OK;
    }
    if (op == BENCH_SIGNALS) {
        self->card->ops->signal(self->card);
        return EPX_OK;
    }
    if (op == BENCH_NCCL_DISPATCH || op == BENCH_NCCL_COMBINE) {
        bench_nccl_start(self->nccl, op);
        return EPX_OK;
    }
    return call(self, op);
}

struct bench_sequence
bench_op_sequence(const struct bench_options *options)
{
    struct bench_sequence sequence = { .count = 0 };
    for (int i = 0; i < BENCH_NUM_OPS; i++) {
        enum bench_op op = (enum bench_op)i;
        if (bench_op_moves(op) && bench_op_active(op, options)) {
            sequence.ops[sequence.count++] = op;
        }
    }
    return sequence;
}

/* All that moves rows, and before it the update where that is no part of the
 * dispatch already. */
static void
call_layer(struct bench_rank *self)
{
    if (self->run->options->mode != BENCH_LL) {
        bench_rank_check(self, bench_op_plan(self));
    }
    struct bench_sequence sequence = bench_op_sequence(self->run->options);
    for (int32_t i = 0; i < sequence.count; i++) {
        bench_rank_check(self, call(self, sequence.ops[i]));
    }
}

/* Halves cannot be repeated by themselves, so that their graph holds all of
 * them; a launch for each would take the host longer than the card. */
static void
capture_halves(struct bench_rank *self)
{
    struct bench_sequence sequence = bench_op_sequence(self->run->options);
    struct bench_card *card = self->card;
    uint64_t overlap_ns = (uint64_t)self->run->options->overlap_us * 1000;
    card->ops->capture(card);
    for (int32_t i = 0; i < BENCH_HALVES_IN_A_ROW * sequence.count; i++) {
        enum bench_op op = sequence.ops[i % sequence.count];
        if (overlap_ns > 0 && bench_op_is_hook(op)) {
            card->ops->rest(card, overlap_ns);
        }
        card->ops->mark(card, 2 * i);
        bench_rank_check(self, call(self, op));
        card->ops->mark(card, 2 * i + 1);
    }
    card->ops->captured(card, BENCH_HALVES);
}

/* One turn of what a graph holds. */
static void
call_captured(struct bench_rank *self, enum bench_op op)
{
    switch (op) {
    case BENCH_LAYER:
        call_layer(self);
        return;
    case BENCH_SIGNALS:
        self->card->ops->signal(self->card);
        return;
    case BENCH_NCCL_DISPATCH:
    case BENCH_NCCL_COMBINE:
        bench_nccl_start(self->nccl, op);
        return;
    default:
        bench_rank_check(self, call(self, op));
    }
}

void
bench_op_capture(struct bench_rank *self)
{
    struct bench_card *card = self->card;
    for (int i = 0; i < BENCH_NUM_SERIES; i++) {
        enum bench_op op = (enum bench_op)i;
        if (!self->run->options->graph ||
            !bench_op_active(op, self->run->options) || op == BENCH_PLAN ||
            op == BENCH_PLAN_DEVICE) {
            continue;
        }
        card->ops->capture(card);
        for (int32_t n = 0; n < self->run->options->in_a_row; n++) {
            call_captured(self, op);
        }
        card->ops->captured(card, op);
    }
    if (self->run->options->graph && self->run->options->send_only) {
        capture_halves(self);
    }
    bench_barrier_wait(&self->run->shared->ranks, BENCH_NO_DEADLINE);
}
