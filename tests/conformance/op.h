/* SPDX-License-Identifier: MIT */
/* One dispatch or combine on one rank: its arrays, its calls, its verdict. */
#ifndef TESTS_CONFORMANCE_OP_H
#define TESTS_CONFORMANCE_OP_H

#include "conformance/guard.h"
#include "conformance/rng.h"
#include "conformance/shape.h"
#include "oracle/oracle.h"

/* The routing of all ranks in one batch. */
typedef struct batch {
    const plan_shape_t *plan;
    int32_t index;
    epx_plan_args_t args[WORLD_MAX_RANKS]; /* topk_idx is malloc'ed */
    oracle_t *oracle;
} batch_t;

enum { OP_MAX_ARRAYS = 12, OP_MAX_GATHERED = 3 * WORLD_MAX_RANKS };

typedef struct op {
    const op_shape_t *shape;
    const batch_t *batch;
    int32_t rank;
    int32_t num_ranks;
    memory_t *memory;
    epx_group_t *group;
    int32_t num_workers; /* the most that this rank may ask for */
    rng_t rng;           /* for what this rank decides alone */
    epx_dispatch_args_t dispatch;
    epx_combine_args_t combine;
    /* This rank's arrays, and the inputs of all ranks. */
    guarded_t arrays[OP_MAX_ARRAYS];
    epx_dtype_t types[OP_MAX_ARRAYS]; /* how to compare them */
    int32_t num_arrays;
    guarded_t *waits; /* one of them, or NULL; nobody knows its contents */
    void *gathered[OP_MAX_GATHERED];
    int32_t num_gathered;
} op_t;

/* Makes the arrays and works out what they must hold in the end. */
epx_status_t op_prepare(op_t *op);

/* Makes the call. */
epx_status_t op_start(op_t *op, epx_plan_t *plan, epx_stream_t stream);

/* Once it is complete: checks that the inputs are as they were, then spoils
 * them, as their owner may.  False, with the reason in text. */
bool op_spoil_inputs(op_t *op, char *text, size_t text_bytes);

/* False, with the first difference in text. */
bool op_check(op_t *op, char *text, size_t text_bytes);

epx_status_t op_free(op_t *op);

/* ---- for the two kinds of op ---- */

epx_status_t op_prepare_dispatch(op_t *op);
epx_status_t op_prepare_combine(op_t *op);

/* An array of this rank, in EPX memory or outside as chance has it; NULL when
 * there is no memory. */
guarded_t *op_array(op_t *op, const char *name, epx_dtype_t dtype,
                    int64_t count, bool is_input);

/* wait_ns, now and then. */
epx_status_t op_make_waits(op_t *op, int64_t **wait_ns_p);

/* count random elements, the same on every rank for the same key. */
void *op_gather(op_t *op, epx_dtype_t dtype, int64_t count, uint64_t key,
                bool special);

static inline int64_t
op_tokens(const op_t *op, int32_t rank)
{
    return op->batch->args[rank].num_tokens;
}

/* Weights beside one received row. */
static inline int32_t
op_row_weights(const op_t *op)
{
    return op->batch->plan->layout == EPX_LAYOUT_RANK_MAJOR
               ? op->batch->plan->topk
               : 1;
}

#endif
