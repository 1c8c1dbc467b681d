/* SPDX-License-Identifier: MIT */
/* Sizes that follow from the options and the routing. */
#ifndef EPX_BENCH_SHAPE_H
#define EPX_BENCH_SHAPE_H

#include "bench_routing.h"

/* What is timed. */
enum bench_op {
    BENCH_PLAN,
    BENCH_PLAN_DEVICE, /* what a plan takes of a card's stream */
    BENCH_DISPATCH,
    BENCH_DISPATCH_SEND,
    BENCH_DISPATCH_HOOK,
    BENCH_COMBINE,
    BENCH_COMBINE_SEND,
    BENCH_COMBINE_HOOK,
    BENCH_LAYER,   /* update, dispatch and combine in one graph */
    BENCH_SIGNALS, /* a kernel that only signals, twice, as operations do */
    BENCH_NUM_OPS,
    /* No operations of EPX, but what NCCL does in the place of two. */
    BENCH_NCCL_DISPATCH = BENCH_NUM_OPS,
    BENCH_NCCL_COMBINE,
    BENCH_NUM_SERIES,
    /* No operation that is timed, but a graph: all halves of two, again and
     * again, with marks between them. */
    BENCH_HALVES = BENCH_NUM_SERIES,
    BENCH_NUM_GRAPHS,
};

const char *bench_op_name(enum bench_op op);

/* Whether these options time the operation. */
bool bench_op_active(enum bench_op op, const struct bench_options *options);

/* Whether an operation moves rows, all by itself or as one half of two. */
bool bench_op_moves(enum bench_op op);

/* Whether it is the second of the two. */
bool bench_op_is_hook(enum bench_op op);

struct bench_shape {
    epx_dtype_t sent_dtype;    /* of received rows */
    epx_dtype_t combine_dtype; /* fp8 rows come back as bf16 */
    int32_t given_scales;      /* per row, an input of dispatch */
    int32_t sent_scales;       /* per row, received */
    size_t x_bytes;            /* one row of each */
    size_t sent_bytes;
    size_t combine_bytes;
    int64_t recv_rows; /* that a rank's receive buffers hold */
    uint64_t heap_bytes;
};

bool bench_shape_make(struct bench_shape *shape,
                      const struct bench_routing *routing,
                      struct bench_error *error);

/* Bytes that a row has on its way, its scales among them. */
uint64_t bench_shape_row_bytes(const struct bench_shape *shape, bool combine);

/* Rows of the first round's dispatch that a rank sends to each rank, itself
 * too, and receives from it, to[R] and from[R]; in the expert layouts one for
 * each expert.  False when memory has run out. */
bool bench_shape_rows(const struct bench_routing *routing, int32_t rank,
                      int64_t *to, int64_t *from);

/* Bytes that one operation must read and write over all ranks, 0 for those
 * that move no rows.  False when memory has run out. */
bool bench_shape_bytes(const struct bench_shape *shape,
                       const struct bench_routing *routing,
                       uint64_t bytes[BENCH_NUM_OPS]);

#endif
