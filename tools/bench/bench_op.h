/* SPDX-License-Identifier: MIT */
/* The operations that are timed, as one rank makes them. */
#ifndef EPX_BENCH_OP_H
#define EPX_BENCH_OP_H

#include "bench_rank.h"

/* The iteration whose times are kept nowhere. */
#define BENCH_UNTIMED (-1)

/* Makes the calls of an operation, or replays its graph; PLAN fills in
 * *counts.  With a card it may not be complete when this returns. */
epx_status_t bench_op_start(struct bench_rank *self, enum bench_op op,
                            epx_plan_counts_t *counts);

/* With --graph: makes the graphs, once there is a plan.  Collective; nothing
 * runs. */
void bench_op_capture(struct bench_rank *self);

/* The plan, made or updated; its counts are asked for apart. */
epx_status_t bench_op_plan(struct bench_rank *self);

/* A training step has a plan of its own; others keep one and update it. */
void bench_op_drop_plan(struct bench_rank *self);

/* Notes how long this rank took. */
void bench_op_note(const struct bench_rank *self, enum bench_op op,
                   int32_t iter, struct bench_span span);

/* Operations that follow one another, again and again: those that move rows. */
#define BENCH_MAX_SEQUENCE 4
struct bench_sequence {
    enum bench_op ops[BENCH_MAX_SEQUENCE];
    int32_t count;
};
struct bench_sequence bench_op_sequence(const struct bench_options *options);

/* So many sequences are in the graph of BENCH_HALVES. */
#define BENCH_HALVES_IN_A_ROW 8

/* The iterations of a block: the first, and one beyond the last. */
int32_t bench_block_start(const struct bench_run *run, int32_t block);

/* The operations on a card, by its own clock but for the plan. */
void bench_time_card(struct bench_rank *self);

#endif
