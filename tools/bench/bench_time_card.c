/* SPDX-License-Identifier: MIT */
/*
 * Times on a card.
 *
 * What moves rows runs back to back, and marks in the stream tell when one
 * operation ends and the next one starts.  Since no operation ends on a rank
 * before its peers have done their part, ranks never drift apart by more than
 * that exchange.  So the spans of a rank tile the time without gaps, and their
 * mean over the ranks is free of the order in which hosts happened to launch.
 *
 * A plan is timed on the host, from the call until the counts are there.
 */
#include "bench_op.h"

/* Timed iterations, and as many that warm up, that are in a stream at once.  A
 * stream takes some hundred calls ahead before it makes its caller wait, which
 * may be the one that a peer's kernel waits for. */
#define PIECE 32

_Static_assert(PIECE *BENCH_MAX_SEQUENCE < BENCH_MAX_MARKS,
               "a mark more than ops");
_Static_assert(2 * BENCH_HALVES_IN_A_ROW * BENCH_MAX_SEQUENCE <=
                   BENCH_MAX_MARKS,
               "two marks for each op");

/* What is timed together; a graph holds all of it. */
static int32_t
calls_together(const struct bench_options *o)
{
    return o->graph ? 1 : o->in_a_row;
}

static void
start_op(struct bench_rank *self, enum bench_op op)
{
    epx_plan_counts_t unused = EPX_PLAN_COUNTS_INIT;
    for (int32_t n = 0; n < calls_together(self->run->options); n++) {
        bench_rank_check(self, bench_op_start(self, op, &unused));
    }
}

static bool
has_halves_in_graph(const struct bench_options *o)
{
    return o->graph && o->send_only;
}

/* Iterations that are in a stream at once. */
static int32_t
piece_of(const struct bench_options *o)
{
    if (has_halves_in_graph(o)) {
        return BENCH_HALVES_IN_A_ROW;
    }
    int32_t piece = PIECE / calls_together(o);
    return piece > 1 ? piece : 1;
}

/* Operation i began at mark i * stride, and ended at the next mark. */
static void
note_piece(const struct bench_rank *self, const struct bench_sequence *sequence,
           int32_t first, int32_t count, int32_t stride)
{
    struct bench_card *card = self->card;
    for (int32_t i = 0; i < count * sequence->count; i++) {
        int64_t ns = card->ops->between_ns(card, i * stride, i * stride + 1);
        struct bench_span span = { 0, ns / self->run->options->in_a_row };
        bench_op_note(self, sequence->ops[i % sequence->count],
                      first + i / sequence->count, span);
    }
}

/* As time_piece does, by BENCH_HALVES; one replay warms up for the next. */
static void
time_halves(struct bench_rank *self, const struct bench_sequence *sequence,
            int32_t first, int32_t count)
{
    bench_barrier_wait(&self->run->shared->ranks, BENCH_NO_DEADLINE);
    self->card->ops->replay(self->card, BENCH_HALVES);
    self->card->ops->replay(self->card, BENCH_HALVES);
    bench_rank_synchronize(self);
    note_piece(self, sequence, first, count, 2);
}

/* Iterations `first` to first + count - 1, after those that warm up. */
static void
time_piece(struct bench_rank *self, const struct bench_sequence *sequence,
           int32_t first, int32_t count)
{
    struct bench_card *card = self->card;
    int32_t warmup = self->run->options->warmup;
    int32_t piece = piece_of(self->run->options);
    int32_t warm = (warmup < piece ? warmup : piece) * sequence->count;
    int32_t last = count * sequence->count;
    bench_barrier_wait(&self->run->shared->ranks, BENCH_NO_DEADLINE);
    for (int32_t i = -warm; i < last; i++) {
        if (i >= 0) {
            card->ops->mark(card, i);
        }
        start_op(self, sequence->ops[(i + warm) % sequence->count]);
    }
    card->ops->mark(card, last);
    bench_rank_synchronize(self);
    note_piece(self, sequence, first, count, 1);
}

static void
time_sequence(struct bench_rank *self, const struct bench_sequence *sequence,
              int32_t block)
{
    int32_t end = bench_block_start(self->run, block + 1);
    int32_t first = bench_block_start(self->run, block);
    while (first < end) {
        int32_t piece = piece_of(self->run->options);
        int32_t count = end - first < piece ? end - first : piece;
        if (self->rank == 0) {
            bench_progress_show(&self->progress, self->run, "timed", first,
                                self->run->options->iters);
        }
        if (has_halves_in_graph(self->run->options) &&
            bench_op_moves(sequence->ops[0])) {
            time_halves(self, sequence, first, count);
        } else {
            time_piece(self, sequence, first, count);
        }
        first += count;
    }
}

/* From the call until the counts are there. */
static void
time_plan(struct bench_rank *self, int32_t iter)
{
    epx_plan_counts_t counts = EPX_PLAN_COUNTS_INIT;
    struct bench_span span;
    bench_barrier_wait(&self->run->shared->ranks, BENCH_NO_DEADLINE);
    span.start = bench_now_ns();
    epx_status_t status = bench_op_start(self, BENCH_PLAN, &counts);
    span.end = bench_now_ns();
    bench_rank_check(self, status);
    bench_op_note(self, BENCH_PLAN, iter, span);
    bench_rank_synchronize(self);
    bench_op_drop_plan(self);
}

/* What that takes of the stream, where marks would delay the host. */
static void
time_plan_on_device(struct bench_rank *self, int32_t iter)
{
    struct bench_card *card = self->card;
    epx_plan_counts_t counts = EPX_PLAN_COUNTS_INIT;
    bench_barrier_wait(&self->run->shared->ranks, BENCH_NO_DEADLINE);
    card->ops->mark(card, 0);
    bench_rank_check(self, bench_op_plan(self));
    card->ops->mark(card, 1);
    bench_rank_check(self, epx_plan_counts(self->plan, &counts));
    bench_rank_synchronize(self);
    struct bench_span span = { 0, card->ops->between_ns(card, 0, 1) };
    bench_op_note(self, BENCH_PLAN_DEVICE, iter, span);
    bench_op_drop_plan(self);
}

static void
time_plans(struct bench_rank *self, int32_t block)
{
    int32_t first = bench_block_start(self->run, block);
    int32_t end = bench_block_start(self->run, block + 1);
    for (int32_t i = first - self->run->options->warmup; i < end; i++) {
        time_plan(self, i < first ? BENCH_UNTIMED : i);
    }
    for (int32_t i = first - self->run->options->warmup; i < end; i++) {
        time_plan_on_device(self, i < first ? BENCH_UNTIMED : i);
    }
}

/* The others leave the cards alone meanwhile. */
static void
time_copies(struct bench_rank *self, int32_t block)
{
    const struct bench_shared *shared = self->run->shared;
    struct bench_card *card = self->card;
    bench_barrier_wait(&self->run->shared->ranks, BENCH_NO_DEADLINE);
    for (int32_t i = -1; self->rank == 0 && i < BENCH_COPIES_PER_BLOCK; i++) {
        struct bench_span span = { 0, card->ops->copy_ns(card) };
        if (i >= 0) {
            shared->card_copies.spans[block * BENCH_COPIES_PER_BLOCK + i] =
                span;
        }
    }
    bench_barrier_wait(&self->run->shared->ranks, BENCH_NO_DEADLINE);
}

void
bench_time_card(struct bench_rank *self)
{
    const struct bench_sequence layer = { { BENCH_LAYER }, 1 };
    const struct bench_sequence signals = { { BENCH_SIGNALS }, 1 };
    const struct bench_sequence nccl = {
        { BENCH_NCCL_DISPATCH, BENCH_NCCL_COMBINE }, 2
    };
    struct bench_sequence moves = bench_op_sequence(self->run->options);
    epx_plan_counts_t counts = EPX_PLAN_COUNTS_INIT;
    for (int32_t block = 0; block < self->run->blocks; block++) {
        time_plans(self, block);
        bench_rank_check(self, bench_op_start(self, BENCH_PLAN, &counts));
        time_sequence(self, &moves, block);
        if (self->run->options->graph) {
            time_sequence(self, &layer, block);
        }
        if (self->run->options->signals) {
            time_sequence(self, &signals, block);
        }
        if (self->nccl) {
            time_sequence(self, &nccl, block);
        }
        bench_op_drop_plan(self);
        time_copies(self, block);
    }
}
