/* SPDX-License-Identifier: MIT */
#include "core/plan.h"

#include "api/api_args.h"
#include "engine/engine.h"

#include <inttypes.h>

/* Beyond these, sizes in bytes could overflow 64 bits, or ordinals 32. */
#define MAX_TOKENS    INT64_C(0x7fffffff)
#define MAX_ROWS      (INT64_C(1) << 40)
#define MAX_ROW_BYTES (INT64_C(1) << 31)
#define MAX_ALIGNMENT (1 << 20)

static epx_status_t
bad_range(const char *name, int64_t value, int64_t min, int64_t max)
{
    return epx__fail(EPX_ERR_INVALID,
                     "args->%s is %" PRId64 "; allowed are %" PRId64
                     " to %" PRId64,
                     name, value, min, max);
}

static epx_status_t
check_ranges(const epx_group_t *group, const epx_plan_args_t *args)
{
    const struct {
        const char *name;
        int64_t value, min, max;
    } ranges[] = {
        { "layout", args->layout, EPX_LAYOUT_RANK_MAJOR,
          EPX_LAYOUT_EXPERT_SLOTS },
        { "num_experts", args->num_experts, 1, group->max_experts },
        { "topk", args->topk, 1, EPX_MAX_TOPK },
        { "num_tokens", args->num_tokens, 0, MAX_TOKENS },
        { "max_tokens_per_rank", args->max_tokens_per_rank, 0, MAX_TOKENS },
        { "recv_capacity", args->recv_capacity, 0, MAX_ROWS },
        { "expert_alignment", args->expert_alignment, 1, MAX_ALIGNMENT },
        { "send_only_row_bytes", args->send_only_row_bytes, 0, MAX_ROW_BYTES },
    };

    for (size_t i = 0; i < sizeof(ranges) / sizeof(*ranges); i++) {
        if (ranges[i].value < ranges[i].min ||
            ranges[i].value > ranges[i].max) {
            return bad_range(ranges[i].name, ranges[i].value, ranges[i].min,
                             ranges[i].max);
        }
    }
    return EPX_OK;
}

/* Which fields go together. */
static epx_status_t
check_combination(const epx_plan_args_t *args)
{
    bool is_slots = args->layout == EPX_LAYOUT_EXPERT_SLOTS;

    if (args->idx_dtype != EPX_I32 && args->idx_dtype != EPX_I64) {
        return epx__fail(EPX_ERR_DTYPE,
                         "args->idx_dtype is %d; allowed are EPX_I32 (%d) and "
                         "EPX_I64 (%d)",
                         args->idx_dtype, EPX_I32, EPX_I64);
    }
    if (args->max_tokens_per_rank == 0 &&
        (is_slots || args->send_only_row_bytes > 0)) {
        return epx__fail(
            EPX_ERR_SHAPE, "args->max_tokens_per_rank is 0; %s needs it",
            is_slots ? "EPX_LAYOUT_EXPERT_SLOTS" : "send_only_row_bytes");
    }
    if (args->max_tokens_per_rank > 0 &&
        args->num_tokens > args->max_tokens_per_rank) {
        return epx__fail(EPX_ERR_SHAPE,
                         "args->num_tokens is %" PRId64
                         ", more than max_tokens_per_rank, %" PRId64,
                         args->num_tokens, args->max_tokens_per_rank);
    }
    if (is_slots && args->recv_capacity > 0) {
        return epx__fail(EPX_ERR_SHAPE,
                         "args->recv_capacity is %" PRId64
                         "; EPX_LAYOUT_EXPERT_SLOTS fixes its rows by itself, "
                         "so it must be 0",
                         args->recv_capacity);
    }
    if (args->layout != EPX_LAYOUT_EXPERT_MAJOR && args->expert_alignment > 1) {
        return epx__fail(EPX_ERR_SHAPE,
                         "args->expert_alignment is %d; only "
                         "EPX_LAYOUT_EXPERT_MAJOR pads its experts",
                         args->expert_alignment);
    }
    return EPX_OK;
}

static epx_status_t
check_routing(int64_t num_tokens, const void *topk_idx, epx_dtype_t idx_dtype)
{
    if (num_tokens > 0 && topk_idx == NULL) {
        return epx__fail(EPX_ERR_NULL,
                         "topk_idx is null, but num_tokens is %" PRId64,
                         num_tokens);
    }
    if ((uintptr_t)topk_idx % epx_dtype_size(idx_dtype) != 0) {
        return epx__fail(EPX_ERR_INVALID,
                         "topk_idx is %p; it must be a multiple of its "
                         "element's %zu bytes",
                         topk_idx, epx_dtype_size(idx_dtype));
    }
    return EPX_OK;
}

static epx_status_t
check_plan_args(const epx_group_t *group, const epx_plan_args_t *args)
{
    int64_t widest = args->num_tokens > args->max_tokens_per_rank
                         ? args->num_tokens
                         : args->max_tokens_per_rank;
    epx_status_t status = check_ranges(group, args);

    if (status == EPX_OK) {
        status = check_combination(args);
    }
    if (status == EPX_OK) {
        status =
            check_routing(args->num_tokens, args->topk_idx, args->idx_dtype);
    }
    if (status == EPX_OK && widest * args->topk > MAX_TOKENS) {
        status = epx__fail(EPX_ERR_SHAPE,
                           "%" PRId64 " tokens with topk %d are %" PRId64
                           " entries; at most %" PRId64 " are possible",
                           widest, args->topk, widest * args->topk, MAX_TOKENS);
    }
    return status;
}

epx_status_t
epx_plan_create(epx_group_t *group, const epx_plan_args_t *args,
                epx_stream_t stream, epx_plan_t **plan_p)
{
    epx_plan_args_t full;
    epx_plan_t *plan;
    epx_status_t status;

    if (group == NULL || plan_p == NULL) {
        return epx__fail(EPX_ERR_NULL, "%s is null",
                         group == NULL ? "group" : "plan_p");
    }
    status = epx__args_copy(
        &full, sizeof(full), args,
        EPX__BYTES_THROUGH(epx_plan_args_t, send_only_row_bytes), "args");
    if (status != EPX_OK) {
        return status;
    }
    full.expert_alignment =
        full.expert_alignment == 0 ? 1 : full.expert_alignment;
    status = check_plan_args(group, &full);
    if (status == EPX_OK) {
        status = group->engine->check_stream(group, stream);
    }
    if (status == EPX_OK) {
        status = group->engine->plan_open(group, &full, &plan);
    }
    if (status != EPX_OK) {
        return status;
    }
    status =
        group->engine->plan_route(plan, full.num_tokens, full.topk_idx, stream);
    if (status != EPX_OK) {
        /* The routing's error is the one to report. */
        epx__error_t error;

        epx__error_save(&error, status);
        (void)group->engine->plan_close(plan);
        return epx__error_restore(&error);
    }
    epx__group_count(group, &group->num_plans, 1);
    *plan_p = plan;
    return EPX_OK;
}

epx_status_t
epx__check_update(const epx_plan_t *plan, int64_t num_tokens,
                  const void *topk_idx)
{
    int64_t limit = (int64_t)plan->key.max_tokens_per_rank;

    if (limit == 0) {
        return epx__fail(EPX_ERR_STATE, "the plan was made without "
                                        "max_tokens_per_rank, so it cannot be "
                                        "updated");
    }
    if (num_tokens < 0 || num_tokens > limit) {
        return epx__fail(EPX_ERR_SHAPE,
                         "num_tokens is %" PRId64
                         "; allowed are 0 to max_tokens_per_rank, %" PRId64,
                         num_tokens, limit);
    }
    return check_routing(num_tokens, topk_idx,
                         (epx_dtype_t)plan->key.idx_dtype);
}

epx_status_t
epx_plan_update(epx_plan_t *plan, int64_t num_tokens, const void *topk_idx,
                epx_stream_t stream)
{
    epx_status_t status;

    if (plan == NULL) {
        return epx__fail(EPX_ERR_NULL, "plan is null");
    }
    status = epx__check_update(plan, num_tokens, topk_idx);
    if (status == EPX_OK) {
        status = plan->group->engine->check_stream(plan->group, stream);
    }
    return status == EPX_OK ? plan->group->engine->plan_route(plan, num_tokens,
                                                              topk_idx, stream)
                            : status;
}

epx_status_t
epx_plan_counts(epx_plan_t *plan, epx_plan_counts_t *counts)
{
    epx_plan_counts_t now = EPX_PLAN_COUNTS_INIT;
    epx_status_t status;

    if (plan == NULL || counts == NULL) {
        return epx__fail(EPX_ERR_NULL, "%s is null",
                         plan == NULL ? "plan" : "counts");
    }
    status = plan->group->engine->plan_counts(plan, &now);
    return status == EPX_OK
               ? epx__args_return(
                     counts, &now, sizeof(now),
                     EPX__BYTES_THROUGH(epx_plan_counts_t, num_dropped),
                     "counts")
               : status;
}

epx_status_t
epx_plan_destroy(epx_plan_t *plan)
{
    epx_group_t *group;
    epx_status_t status;

    if (plan == NULL) {
        return EPX_OK;
    }
    group = plan->group;
    status = group->engine->plan_close(plan);
    if (status == EPX_OK) {
        epx__group_count(group, &group->num_plans, -1);
    }
    return status;
}
