/* SPDX-License-Identifier: MIT */
/* The receiving side of a dispatch: its arrays, what peers may know of them,
 * and what this rank itself does to them. */
#include "engine/common/placement.h"
#include "engine/cpu/cpu.h"
#include "engine/cpu/cpu_rows.h"

#include <inttypes.h>
#include <string.h>

static const char *const array_names[EPX__NUM_ARRAYS] = {
    "recv_x",         "recv_scales", "recv_topk_idx", "recv_topk_weights",
    "recv_src_token",
};

static uint64_t
row_bytes(const cpu_plan_t *plan, epx__array_t array)
{
    return epx__array_row_bytes(&plan->base, array,
                                (uint64_t)plan->dispatch.shape.row_bytes);
}

/* What an array is accessed by; payload is copied as bytes. */
static uint64_t
element_bytes(const cpu_plan_t *plan, epx__array_t array)
{
    switch (array) {
    case EPX__ARRAY_X:
        return 1;
    case EPX__ARRAY_TOPK_IDX:
        return epx_dtype_size((epx_dtype_t)plan->base.key.idx_dtype);
    default:
        return sizeof(uint32_t);
    }
}

/* How recv_scales lies: as the caller wants it, or dense in a staging block. */
static void
set_scale_strides(const cpu_plan_t *plan, bool staged, epx__post_t *post)
{
    const epx_dispatch_args_t *args = &plan->dispatch.args;
    uint64_t num_scales = (uint64_t)plan->dispatch.shape.num_scales;
    uint64_t per_expert = (uint64_t)cpu_row_format(plan).rows_per_expert;

    post->scale_row_stride =
        staged ? num_scales : (uint64_t)args->recv_scale_row_stride;
    post->scale_stride = staged ? 1 : (uint64_t)args->recv_scale_stride;
    post->scale_expert_stride = staged
                                    ? per_expert * num_scales
                                    : (uint64_t)args->recv_scale_expert_stride;
}

/* Bytes of an array of that many rows; UINT64_MAX, which nothing holds, when
 * they pass 64 bits. */
static uint64_t
array_bytes(const cpu_plan_t *plan, epx__array_t array, uint64_t rows,
            const epx__post_t *post)
{
    uint64_t bytes;

    if (array == EPX__ARRAY_SCALES) {
        return epx__scale_extent(&plan->base, plan->base.num_local_experts,
                                 rows, post);
    }
    return __builtin_mul_overflow(rows, row_bytes(plan, array), &bytes)
               ? UINT64_MAX
               : bytes;
}

epx_status_t
cpu_receive_open(cpu_plan_t *plan, epx__post_t *post)
{
    epx_group_t *group = plan->base.group;
    cpu_dispatch_t *op = &plan->dispatch;
    void *user[EPX__NUM_ARRAYS] = {
        op->args.recv_x,
        op->shape.num_scales > 0 ? op->args.recv_scales : NULL,
        op->args.recv_topk_idx,
        op->args.recv_topk_weights,
        op->args.recv_src_token,
    };
    epx_status_t status = EPX_OK;

    *post = (epx__post_t){ .signature = op->shape.signature,
                           .num_rows = (uint64_t)op->args.recv_rows };
    for (int i = 0; i < EPX__NUM_ARRAYS && status == EPX_OK; i++) {
        epx__array_t array = (epx__array_t)i;
        bool staged = !op->uses_slots && cpu_array_is_outside(group, user[i]);
        /* Staging takes the rows that come, not those there is room for. */
        uint64_t rows = staged ? (uint64_t)plan->rank_rows[group->rank]
                               : (uint64_t)op->args.recv_rows;

        if (array == EPX__ARRAY_SCALES) {
            set_scale_strides(plan, staged, post);
        }
        if (op->uses_slots) {
            /* Only this rank writes them: anywhere will do. */
            op->arrays[i] = (cpu_array_t){ user[i], user[i], false };
        } else {
            status = cpu_array_open(group, array_names[i], user[i],
                                    array_bytes(plan, array, rows, post),
                                    &op->arrays[i]);
            post->offset[i] = cpu_array_offset(group, &op->arrays[i]);
        }
    }
    if (status != EPX_OK) {
        cpu_arrays_close(group, op->arrays);
    }
    return status;
}

cpu_target_t
cpu_target_own(const cpu_plan_t *plan)
{
    const cpu_array_t *arrays = plan->dispatch.arrays;
    epx__post_t strides;

    set_scale_strides(plan, arrays[EPX__ARRAY_SCALES].staged, &strides);
    return (cpu_target_t){
        .x = arrays[EPX__ARRAY_X].heap,
        .scales = (uint32_t *)(void *)arrays[EPX__ARRAY_SCALES].heap,
        .scale_row_stride = (int64_t)strides.scale_row_stride,
        .scale_stride = (int64_t)strides.scale_stride,
        .scale_expert_stride = (int64_t)strides.scale_expert_stride,
        .topk_idx = arrays[EPX__ARRAY_TOPK_IDX].heap,
        .topk_weights = (float *)(void *)arrays[EPX__ARRAY_TOPK_WEIGHTS].heap,
        .src_token = (int32_t *)(void *)arrays[EPX__ARRAY_SRC_TOKEN].heap,
        .first_expert = plan->base.first_expert,
    };
}

epx_status_t
cpu_target_open(const cpu_plan_t *plan, int32_t rank, const epx__post_t *post,
                cpu_target_t *target)
{
    const epx_group_t *group = plan->base.group;
    uint64_t rows = (uint64_t)plan->rank_rows[rank];
    int32_t num_experts = (int32_t)plan->base.key.num_experts;
    int32_t first = epx__first_expert(num_experts, group->num_ranks, rank);
    int32_t num_local =
        epx__first_expert(num_experts, group->num_ranks, rank + 1) - first;
    char *at[EPX__NUM_ARRAYS] = { 0 };

    if (post->num_rows < rows ||
        (rows > 0 && (post->offset[EPX__ARRAY_X] == 0 ||
                      (plan->dispatch.shape.num_scales > 0 &&
                       post->offset[EPX__ARRAY_SCALES] == 0)))) {
        return epx__fail(EPX_ERR_PEER_DATA,
                         "rank %d posted %" PRIu64 " rows of x at offset "
                         "%" PRIu64 ", scales at %" PRIu64
                         "; it is to receive %" PRIu64 " rows",
                         rank, post->num_rows, post->offset[EPX__ARRAY_X],
                         post->offset[EPX__ARRAY_SCALES], rows);
    }
    for (int i = 0; i < EPX__NUM_ARRAYS; i++) {
        bool is_scales = i == EPX__ARRAY_SCALES;
        epx_status_t status;

        /* What nobody sends is not looked at. */
        if (post->offset[i] != 0 && (i != EPX__ARRAY_TOPK_WEIGHTS ||
                                     plan->dispatch.shape.has_weights)) {
            status = cpu_check_extent(
                group, rank, array_names[i], post->offset[i],
                is_scales ? 1 : rows,
                is_scales
                    ? epx__scale_extent(&plan->base, num_local, rows, post)
                    : row_bytes(plan, (epx__array_t)i),
                element_bytes(plan, (epx__array_t)i));
            if (status != EPX_OK) {
                return status;
            }
            at[i] = group->peers[rank].base + post->offset[i];
        }
    }
    *target = (cpu_target_t){
        .x = at[EPX__ARRAY_X],
        .scales = (uint32_t *)(void *)at[EPX__ARRAY_SCALES],
        .scale_row_stride = (int64_t)post->scale_row_stride,
        .scale_stride = (int64_t)post->scale_stride,
        .scale_expert_stride = (int64_t)post->scale_expert_stride,
        .topk_idx = at[EPX__ARRAY_TOPK_IDX],
        .topk_weights = (float *)(void *)at[EPX__ARRAY_TOPK_WEIGHTS],
        .src_token = (int32_t *)(void *)at[EPX__ARRAY_SRC_TOKEN],
        .first_expert = first,
        .can_stream = (uintptr_t)at[EPX__ARRAY_X] % 16 == 0,
    };
    return EPX_OK;
}

/* Rows that pad an expert to the alignment: zero, and from no token. */
static void
clear_padding(const cpu_plan_t *plan)
{
    cpu_row_format_t format = cpu_row_format(plan);
    cpu_target_t own = cpu_target_own(plan);
    int32_t num_local = plan->base.num_local_experts;

    if (plan->base.key.layout != EPX_LAYOUT_EXPERT_MAJOR) {
        return;
    }
    for (int32_t e = 0; e < num_local; e++) {
        for (int64_t row = plan->expert_offsets[e] + plan->expert_rows[e];
             row < plan->expert_offsets[e + 1]; row++) {
            memset(own.x + row * format.row_bytes, 0, (size_t)format.row_bytes);
            for (int64_t j = 0; j < format.num_scales; j++) {
                cpu_scale_at(&format, &own, row)[j * own.scale_stride] = 0;
            }
            if (own.topk_weights != NULL) {
                own.topk_weights[row] = 0.0f;
            }
            if (own.src_token != NULL) {
                own.src_token[row] = -1;
            }
        }
    }
}

/* Staged scales are dense in the heap and strided in the caller's array. */
static void
copy_scales(const cpu_plan_t *plan)
{
    const cpu_array_t *array = &plan->dispatch.arrays[EPX__ARRAY_SCALES];
    cpu_row_format_t format = cpu_row_format(plan);
    cpu_target_t from = cpu_target_own(plan);
    cpu_target_t to = from;
    epx__post_t strides;

    set_scale_strides(plan, false, &strides);
    to.scales = array->user;
    to.scale_row_stride = (int64_t)strides.scale_row_stride;
    to.scale_stride = (int64_t)strides.scale_stride;
    to.scale_expert_stride = (int64_t)strides.scale_expert_stride;
    for (int32_t i = 0; i < cpu_num_runs(plan); i++) {
        cpu_run_t run = cpu_run(plan, i);

        for (int64_t row = run.begin; row < run.begin + run.count; row++) {
            const uint32_t *source = cpu_scale_at(&format, &from, row);

            cpu_put_scales(&format, &to, row, source);
        }
    }
}

void
cpu_receive_close(cpu_plan_t *plan)
{
    const cpu_array_t *arrays = plan->dispatch.arrays;

    clear_padding(plan);
    for (int i = 0; i < EPX__NUM_ARRAYS; i++) {
        if (!arrays[i].staged) {
            continue;
        }
        if (i == EPX__ARRAY_SCALES) {
            copy_scales(plan);
        } else {
            cpu_copy_runs(plan, arrays[i].user, arrays[i].heap,
                          row_bytes(plan, (epx__array_t)i));
        }
    }
}
