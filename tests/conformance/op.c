/* SPDX-License-Identifier: MIT */
#include "conformance/op.h"
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* What is in wait_ns to begin with. */
#define WAITED_BEFORE INT64_C(1000003)

guarded_t *
op_array(op_t *op, const char *name, epx_dtype_t dtype, int64_t count,
         bool is_input)
{
    size_t size = epx_dtype_size(dtype);
    /* No more alignment is asked for than the element type needs. */
    const size_t offsets[] = { 0, 0, 16, 64, size };
    /* One op's arrays are all in EPX memory, all outside, or mixed. */
    rng_t habit = rng_of(op->shape->seed, (uint64_t)op->rank, 77);
    int64_t style = rng_int(&habit, 0, 2);
    bool inside = style == 0 || (style == 2 && rng_one_in(&op->rng, 2));
    guarded_t *g = &op->arrays[op->num_arrays];

    if (guarded_make(g, name, op->memory, inside ? op->group : NULL,
                     (size_t)count * size, offsets[rng_int(&op->rng, 0, 4)],
                     is_input) != EPX_OK) {
        return NULL;
    }
    op->types[op->num_arrays++] = dtype;
    return g;
}

void *
op_gather(op_t *op, epx_dtype_t dtype, int64_t count, uint64_t key,
          bool special)
{
    rng_t rng = rng_of(op->shape->seed, key, 3);
    void *data = malloc((size_t)count * epx_dtype_size(dtype) + 1);

    if (!data || op->num_gathered == OP_MAX_GATHERED) {
        fprintf(stderr, "conformance: no memory for the inputs of all ranks\n");
        abort();
    }
    rng_fill(&rng, dtype, data, count, special);
    op->gathered[op->num_gathered++] = data;
    return data;
}

epx_status_t
op_make_waits(op_t *op, int64_t **wait_ns_p)
{
    int64_t before[WORLD_MAX_RANKS];
    guarded_t *g;

    if (!rng_one_in(&op->rng, 3)) {
        return EPX_OK;
    }
    g = op_array(op, "wait_ns", EPX_I64, op->num_ranks, false);
    if (!g) {
        return EPX_ERR_NO_MEMORY;
    }
    for (int32_t r = 0; r < op->num_ranks; r++) {
        before[r] = WAITED_BEFORE;
    }
    op->waits = g;
    *wait_ns_p = guarded_data(g);
    return guarded_fill(g, before, (size_t)op->num_ranks * sizeof(*before));
}

/* How long it was is open, but not that it was added. */
static bool
check_waits(op_t *op, char *text, size_t text_bytes)
{
    const int64_t *waits = guarded_expected(op->waits);

    if (!guarded_adopt(op->waits)) {
        snprintf(text, text_bytes, "wait_ns cannot be read back");
        return false;
    }
    for (int32_t r = 0; r < op->num_ranks; r++) {
        int64_t waited = waits[r] - WAITED_BEFORE;

        if (waited < 0 || (r == op->rank && waited != 0)) {
            snprintf(text, text_bytes,
                     "wait_ns: rank %d has waited %" PRId64 " ns for rank %d",
                     op->rank, waited, r);
            return false;
        }
    }
    return true;
}

epx_status_t
op_prepare(op_t *op)
{
    return op->shape->is_combine ? op_prepare_combine(op)
                                 : op_prepare_dispatch(op);
}

epx_status_t
op_start(op_t *op, epx_plan_t *plan, epx_stream_t stream)
{
    /* The structs need not outlive the call. */
    epx_dispatch_args_t dispatch = op->dispatch;
    epx_combine_args_t combine = op->combine;
    epx_status_t status = op->shape->is_combine
                              ? epx_combine(plan, &combine, stream)
                              : epx_dispatch(plan, &dispatch, stream);

    memset(&dispatch, 0xee, sizeof(dispatch));
    memset(&combine, 0xee, sizeof(combine));
    return status;
}

bool
op_spoil_inputs(op_t *op, char *text, size_t text_bytes)
{
    for (int32_t i = 0; i < op->num_arrays; i++) {
        guarded_t *g = &op->arrays[i];

        if (!g->is_input) {
            continue;
        }
        if (!guarded_check(g, EPX_BYTES, text, text_bytes)) {
            return false;
        }
        if (guarded_spoil(g) != EPX_OK) {
            snprintf(text, text_bytes, "%s cannot be written", g->name);
            return false;
        }
    }
    return true;
}

bool
op_check(op_t *op, char *text, size_t text_bytes)
{
    if (op->waits && !check_waits(op, text, text_bytes)) {
        return false;
    }
    for (int32_t i = 0; i < op->num_arrays; i++) {
        if (!guarded_check(&op->arrays[i], op->types[i], text, text_bytes)) {
            return false;
        }
    }
    return true;
}

epx_status_t
op_free(op_t *op)
{
    epx_status_t status = EPX_OK;

    for (int32_t i = 0; i < op->num_arrays; i++) {
        epx_status_t freed = guarded_free(&op->arrays[i]);

        status = status == EPX_OK ? freed : status;
    }
    for (int32_t i = 0; i < op->num_gathered; i++) {
        free(op->gathered[i]);
    }
    op->num_arrays = 0;
    op->waits = NULL;
    op->num_gathered = 0;
    return status;
}
