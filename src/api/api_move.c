/* SPDX-License-Identifier: MIT */
/* Dispatch, combine and complete: what can be checked without the counts. */
#include "api/api_args.h"
#include "core/plan.h"
#include "engine/common/placement.h"
#include "engine/engine.h"

#include <inttypes.h>

#define MAX_ROWS      (INT64_C(1) << 40)
#define MAX_ROW_BYTES (INT64_C(1) << 31)
#define MAX_STRIDE    (INT64_C(1) << 40)

static epx_status_t
check_flags(uint32_t flags, uint32_t allowed)
{
    return (flags & ~allowed) == 0
               ? EPX_OK
               : epx__fail(EPX_ERR_INVALID,
                           "args->flags is %#x; allowed are EPX_SEND_ONLY "
                           "(%#x) and, for a dispatch, EPX_NEW_ROUTING (%#x)",
                           flags, EPX_SEND_ONLY, EPX_NEW_ROUTING);
}

static epx_status_t
check_workers(const epx_group_t *group, int32_t num_workers)
{
    return num_workers >= 0 && num_workers <= group->num_workers
               ? EPX_OK
               : epx__fail(EPX_ERR_INVALID,
                           "args->num_workers is %d; allowed are 0 to the "
                           "group's, %d",
                           num_workers, group->num_workers);
}

static epx_status_t
check_row(const char *what, int64_t hidden, int64_t element_bytes)
{
    int64_t limit = MAX_ROW_BYTES / element_bytes;

    if (hidden < 1 || hidden > limit ||
        hidden * element_bytes % EPX_ROW_ALIGN != 0) {
        return epx__fail(EPX_ERR_SHAPE,
                         "args->hidden is %" PRId64 ", so that %s has %" PRId64
                         " bytes an element and no multiple of %d; hidden must "
                         "be a positive multiple of %" PRId64 " up to %" PRId64,
                         hidden, what, element_bytes, EPX_ROW_ALIGN,
                         EPX_ROW_ALIGN / element_bytes, limit);
    }
    return EPX_OK;
}

static epx_status_t
check_rows(const char *name, int64_t rows)
{
    return rows >= 0 && rows <= MAX_ROWS
               ? EPX_OK
               : epx__fail(EPX_ERR_SHAPE,
                           "args->%s is %" PRId64 "; allowed are 0 to %" PRId64,
                           name, rows, MAX_ROWS);
}

static epx_status_t
check_quantized(epx_quantize_t quantize, epx_dtype_t dtype)
{
    return quantize == EPX_QUANTIZE_NONE || dtype == EPX_BF16
               ? EPX_OK
               : epx__fail(EPX_ERR_DTYPE,
                           "args->quantize is %d with dtype %d; only EPX_BF16 "
                           "(%d) can be quantised",
                           quantize, dtype, EPX_BF16);
}

static epx_status_t
check_payload(const epx_dispatch_args_t *args)
{
    size_t bytes = epx_dtype_size(args->dtype);
    epx_status_t status;

    if (bytes == 0 || args->dtype == EPX_I32 || args->dtype == EPX_I64) {
        return epx__fail(EPX_ERR_DTYPE,
                         "args->dtype is %d; dispatch moves EPX_F32 (%d) to "
                         "EPX_BYTES (%d)",
                         args->dtype, EPX_F32, EPX_BYTES);
    }
    if (args->quantize < EPX_QUANTIZE_NONE ||
        args->quantize > EPX_QUANTIZE_F8E4M3_UE8M0) {
        return epx__fail(
            EPX_ERR_INVALID, "args->quantize is %d; a dispatch allows %d to %d",
            args->quantize, EPX_QUANTIZE_NONE, EPX_QUANTIZE_F8E4M3_UE8M0);
    }
    status = check_quantized(args->quantize, args->dtype);
    if (status != EPX_OK) {
        return status;
    }
    status = check_row("a row of x", args->hidden, (int64_t)bytes);
    return status == EPX_OK && args->quantize != EPX_QUANTIZE_NONE
               ? check_row("a quantised row", args->hidden, 1)
               : status;
}

static epx_status_t
check_scales(const epx_dispatch_args_t *args)
{
    const struct {
        const char *name;
        int64_t value;
    } strides[] = {
        { "scale_token_stride", args->scale_token_stride },
        { "scale_stride", args->scale_stride },
        { "recv_scale_row_stride", args->recv_scale_row_stride },
        { "recv_scale_stride", args->recv_scale_stride },
        { "recv_scale_expert_stride", args->recv_scale_expert_stride },
    };

    if (args->num_scales < 0) {
        return epx__fail(EPX_ERR_SHAPE,
                         "args->num_scales is %d; it must not be negative",
                         args->num_scales);
    }
    if (args->quantize != EPX_QUANTIZE_NONE && args->scales != NULL) {
        return epx__fail(EPX_ERR_INVALID,
                         "args->scales is given, but args->quantize is %d and "
                         "makes its own",
                         args->quantize);
    }
    if (args->quantize == EPX_QUANTIZE_NONE && args->scales != NULL &&
        args->num_scales == 0) {
        return epx__fail(EPX_ERR_SHAPE,
                         "args->scales is given, but args->num_scales is 0");
    }
    for (size_t i = 0; i < sizeof(strides) / sizeof(*strides); i++) {
        if (strides[i].value < 0 || strides[i].value > MAX_STRIDE) {
            return epx__fail(EPX_ERR_SHAPE,
                             "args->%s is %" PRId64
                             "; allowed are 0 to %" PRId64,
                             strides[i].name, strides[i].value, MAX_STRIDE);
        }
    }
    return EPX_OK;
}

/* An array that is read or written by elements. */
typedef struct array {
    const char *name;
    const void *pointer;
    size_t element_bytes;
} array_t;

static epx_status_t
check_alignment(const array_t *arrays, size_t num_arrays)
{
    for (size_t i = 0; i < num_arrays; i++) {
        if ((uintptr_t)arrays[i].pointer % arrays[i].element_bytes != 0) {
            return epx__fail(EPX_ERR_INVALID,
                             "args->%s is %p; it must be a multiple of its "
                             "element's %zu bytes",
                             arrays[i].name, arrays[i].pointer,
                             arrays[i].element_bytes);
        }
    }
    return EPX_OK;
}

static epx_status_t
check_dispatch_arrays(const epx_plan_t *plan, const epx_dispatch_args_t *args)
{
    size_t element = epx_dtype_size(args->dtype);
    size_t sent = args->quantize == EPX_QUANTIZE_NONE ? element : 1;
    const array_t arrays[] = {
        { "x", args->x, element },
        { "scales", args->scales, sizeof(uint32_t) },
        { "topk_weights", args->topk_weights, sizeof(float) },
        { "recv_x", args->recv_x, sent },
        { "recv_scales", args->recv_scales, sizeof(uint32_t) },
        { "recv_topk_idx", args->recv_topk_idx,
          epx_dtype_size((epx_dtype_t)plan->key.idx_dtype) },
        { "recv_topk_weights", args->recv_topk_weights, sizeof(float) },
        { "recv_src_token", args->recv_src_token, sizeof(int32_t) },
        { "recv_expert_counts", args->recv_expert_counts, sizeof(int32_t) },
        { "recv_expert_totals", args->recv_expert_totals, sizeof(int32_t) },
        { "wait_ns", args->wait_ns, sizeof(int64_t) },
    };

    return check_alignment(arrays, sizeof(arrays) / sizeof(*arrays));
}

static epx_status_t
check_new_routing(const epx_plan_t *plan, const epx_dispatch_args_t *args)
{
    if (epx__plan_fixed_rows(plan) == 0 && plan->num_local_experts > 0) {
        return epx__fail(EPX_ERR_STATE,
                         "args->flags has EPX_NEW_ROUTING, but the plan was "
                         "made without recv_capacity, so that it can only be "
                         "updated apart");
    }
    return epx__check_update(plan, args->num_tokens, args->topk_idx);
}

static epx_status_t
check_dispatch(const epx_plan_t *plan, const epx_dispatch_args_t *args)
{
    int64_t fixed = (int64_t)epx__plan_fixed_rows(plan);
    epx_status_t status = check_payload(args);

    if (status == EPX_OK) {
        status = check_scales(args);
    }
    if (status == EPX_OK) {
        status = check_dispatch_arrays(plan, args);
    }
    if (status == EPX_OK) {
        status = check_rows("recv_rows", args->recv_rows);
    }
    if (status == EPX_OK) {
        status = check_flags(args->flags, EPX_SEND_ONLY | EPX_NEW_ROUTING);
    }
    if (status == EPX_OK && (args->flags & EPX_NEW_ROUTING) != 0) {
        status = check_new_routing(plan, args);
    }
    if (status == EPX_OK) {
        status = check_workers(plan->group, args->num_workers);
    }
    if (status == EPX_OK && args->recv_rows < fixed) {
        status = epx__fail(EPX_ERR_TOO_SMALL,
                           "args->recv_rows is %" PRId64
                           ", but the plan fixes %" PRId64 " rows",
                           args->recv_rows, fixed);
    }
    if (status == EPX_OK && args->recv_topk_idx != NULL &&
        plan->key.layout != EPX_LAYOUT_RANK_MAJOR) {
        status = epx__fail(EPX_ERR_INVALID,
                           "args->recv_topk_idx is given with layout %u; only "
                           "EPX_LAYOUT_RANK_MAJOR (%d) has it",
                           plan->key.layout, EPX_LAYOUT_RANK_MAJOR);
    }
    return status;
}

epx_status_t
epx_dispatch(epx_plan_t *plan, const epx_dispatch_args_t *args,
             epx_stream_t stream)
{
    epx_dispatch_args_t full;
    epx_status_t status;

    if (plan == NULL) {
        return epx__fail(EPX_ERR_NULL, "plan is null");
    }
    status = epx__args_copy(&full, sizeof(full), args,
                            EPX__BYTES_THROUGH(epx_dispatch_args_t, dropped),
                            "args");
    if (status == EPX_OK) {
        status = check_dispatch(plan, &full);
    }
    if (status == EPX_OK) {
        status = plan->group->engine->check_stream(plan->group, stream);
    }
    return status == EPX_OK ? plan->group->engine->dispatch(plan, &full, stream)
                            : status;
}

static epx_status_t
check_combine_arrays(const epx_combine_args_t *args)
{
    size_t element = epx_dtype_size(args->dtype);
    const array_t arrays[] = {
        { "x", args->x, element },
        { "topk_weights", args->topk_weights, sizeof(float) },
        { "bias[0]", args->bias[0], element },
        { "bias[1]", args->bias[1], element },
        { "out", args->out, element },
        { "recv_topk_weights", args->recv_topk_weights, sizeof(float) },
        { "out_topk_weights", args->out_topk_weights, sizeof(float) },
        { "wait_ns", args->wait_ns, sizeof(int64_t) },
    };

    return check_alignment(arrays, sizeof(arrays) / sizeof(*arrays));
}

static epx_status_t
check_combine_quantize(const epx_combine_args_t *args)
{
    if (args->quantize != EPX_QUANTIZE_NONE &&
        args->quantize != EPX_QUANTIZE_LOGFMT10) {
        return epx__fail(
            EPX_ERR_INVALID, "args->quantize is %d; a combine allows %d and %d",
            args->quantize, EPX_QUANTIZE_NONE, EPX_QUANTIZE_LOGFMT10);
    }
    return check_quantized(args->quantize, args->dtype);
}

static epx_status_t
check_combine(const epx_plan_t *plan, const epx_combine_args_t *args)
{
    epx_status_t status;

    if (args->dtype != EPX_F32 && args->dtype != EPX_F16 &&
        args->dtype != EPX_BF16) {
        return epx__fail(EPX_ERR_DTYPE,
                         "args->dtype is %d; combine adds EPX_F32 (%d), "
                         "EPX_F16 (%d) and EPX_BF16 (%d)",
                         args->dtype, EPX_F32, EPX_F16, EPX_BF16);
    }
    if (args->topk_weights != NULL &&
        plan->key.layout == EPX_LAYOUT_RANK_MAJOR) {
        return epx__fail(EPX_ERR_INVALID,
                         "args->topk_weights is given with "
                         "EPX_LAYOUT_RANK_MAJOR (%d), whose sum is unweighted",
                         EPX_LAYOUT_RANK_MAJOR);
    }
    status = check_combine_quantize(args);
    if (status == EPX_OK) {
        status = check_row("a row", args->hidden,
                           (int64_t)epx_dtype_size(args->dtype));
    }
    if (status == EPX_OK) {
        status = check_combine_arrays(args);
    }
    if (status == EPX_OK) {
        status = check_rows("num_rows", args->num_rows);
    }
    if (status == EPX_OK) {
        status = check_flags(args->flags, EPX_SEND_ONLY);
    }
    return status == EPX_OK ? check_workers(plan->group, args->num_workers)
                            : status;
}

epx_status_t
epx_combine(epx_plan_t *plan, const epx_combine_args_t *args,
            epx_stream_t stream)
{
    epx_combine_args_t full;
    epx_status_t status;

    if (plan == NULL) {
        return epx__fail(EPX_ERR_NULL, "plan is null");
    }
    status =
        epx__args_copy(&full, sizeof(full), args,
                       EPX__BYTES_THROUGH(epx_combine_args_t, wait_ns), "args");
    if (status == EPX_OK) {
        status = check_combine(plan, &full);
    }
    if (status == EPX_OK) {
        status = plan->group->engine->check_stream(plan->group, stream);
    }
    return status == EPX_OK ? plan->group->engine->combine(plan, &full, stream)
                            : status;
}

epx_status_t
epx_complete(epx_plan_t *plan, epx_stream_t stream)
{
    epx_status_t status;

    if (plan == NULL) {
        return epx__fail(EPX_ERR_NULL, "plan is null");
    }
    status = plan->group->engine->check_stream(plan->group, stream);
    return status == EPX_OK ? plan->group->engine->complete(plan, stream)
                            : status;
}
