/* SPDX-License-Identifier: MIT */
#include "engine/common/describe.h"

#include "core/atomic.h"
#include "engine/common/placement.h"

#include <inttypes.h>

void
epx__plan_describe(struct epx_plan *plan, epx_group_t *group,
                   const epx_plan_args_t *args)
{
    int32_t first =
        epx__first_expert(args->num_experts, group->num_ranks, group->rank);
    int32_t end =
        epx__first_expert(args->num_experts, group->num_ranks, group->rank + 1);

    *plan = (struct epx_plan){
        .group = group,
        .first_expert = first,
        .num_local_experts = end - first,
        .key = {
            .layout = args->layout,
            .num_experts = (uint32_t)args->num_experts,
            .topk = (uint32_t)args->topk,
            .idx_dtype = args->idx_dtype,
            .expert_alignment = (uint64_t)args->expert_alignment,
            .max_tokens_per_rank = (uint64_t)args->max_tokens_per_rank,
            .recv_capacity = (uint64_t)args->recv_capacity,
            .send_only_row_bytes = (uint64_t)args->send_only_row_bytes,
        },
    };
}

uint64_t
epx__rows_per_expert(const epx_plan_t *plan)
{
    return plan->key.layout == EPX_LAYOUT_EXPERT_SLOTS
               ? plan->key.max_tokens_per_rank *
                     (uint64_t)plan->group->num_ranks
               : 0;
}

uint64_t
epx__array_row_bytes(const epx_plan_t *plan, epx__array_t array,
                     uint64_t x_row_bytes)
{
    uint64_t topk = plan->key.topk;

    switch (array) {
    case EPX__ARRAY_X:
        return x_row_bytes;
    case EPX__ARRAY_TOPK_IDX:
        return topk * epx_dtype_size((epx_dtype_t)plan->key.idx_dtype);
    case EPX__ARRAY_TOPK_WEIGHTS:
        return (plan->key.layout == EPX_LAYOUT_RANK_MAJOR ? topk : 1) *
               sizeof(float);
    case EPX__ARRAY_SRC_TOKEN:
        return sizeof(int32_t);
    default:
        return 0;
    }
}

/* Beyond 63 bits no array can reach, which checking its extent then finds. */
static int64_t
saturating_product(int64_t a, int64_t b)
{
    int64_t product;

    return __builtin_mul_overflow(a, b, &product) ? INT64_MAX : product;
}

static void
complete_strides(const epx_plan_t *plan, int64_t num_scales,
                 epx_dispatch_args_t *args)
{
    int64_t per_expert = (int64_t)epx__rows_per_expert(plan);
    int64_t by_rows, by_scales;

    if (args->scale_stride == 0) {
        args->scale_stride = 1;
    }
    if (args->scale_token_stride == 0) {
        args->scale_token_stride = num_scales;
    }
    if (args->recv_scale_stride == 0) {
        args->recv_scale_stride = 1;
    }
    if (args->recv_scale_row_stride == 0) {
        args->recv_scale_row_stride = num_scales;
    }
    by_rows = saturating_product(per_expert, args->recv_scale_row_stride);
    by_scales = saturating_product(num_scales, args->recv_scale_stride);
    if (args->recv_scale_expert_stride == 0) {
        args->recv_scale_expert_stride =
            by_rows > by_scales ? by_rows : by_scales;
    }
}

void
epx__dispatch_describe(const epx_plan_t *plan, epx_dispatch_args_t *args,
                       epx__dispatch_shape_t *shape)
{
    bool quantizes = args->quantize != EPX_QUANTIZE_NONE;

    shape->row_bytes =
        args->hidden *
        (int64_t)(quantizes ? sizeof(uint8_t) : epx_dtype_size(args->dtype));
    shape->num_scales =
        quantizes ? epx__quantize_num_scales(args->quantize, args->hidden)
                  : args->num_scales;
    shape->has_weights =
        args->topk_weights != NULL || args->recv_topk_weights != NULL;
    shape->signature = (epx__signature_t){
        .plan_id = plan->key.plan_id,
        .kind = EPX__STEP_DISPATCH,
        .dtype = args->dtype,
        .quantize = args->quantize,
        .flags = args->flags,
        .num_scales = (uint32_t)shape->num_scales,
        .hidden = (uint64_t)args->hidden,
    };
    complete_strides(plan, shape->num_scales, args);
}

epx__signature_t
epx__combine_signature(const epx_plan_t *plan, const epx_combine_args_t *args)
{
    return (epx__signature_t){
        .plan_id = plan->key.plan_id,
        .kind = EPX__STEP_COMBINE,
        .dtype = args->dtype,
        .quantize = args->quantize,
        .flags = args->flags,
        .hidden = (uint64_t)args->hidden,
    };
}

uint32_t
epx__weights_bits(bool has_weights, bool takes_part)
{
    return has_weights  ? 1u << EPX__ARRAY_TOPK_WEIGHTS
           : takes_part ? 0
                        : EPX__ARRAYS_ANY;
}

uint64_t
epx__scale_extent(const epx_plan_t *plan, int32_t num_local, uint64_t num_rows,
                  const epx__post_t *post)
{
    uint64_t per_expert = epx__rows_per_expert(plan);
    uint64_t experts = per_expert > 0 ? (uint64_t)num_local : 1;
    uint64_t rows = per_expert > 0 ? per_expert : num_rows;
    uint64_t last = 0, part;

    if (experts == 0 || rows == 0) {
        return 0;
    }
    if (__builtin_mul_overflow(experts - 1, post->scale_expert_stride, &part) ||
        __builtin_add_overflow(last, part, &last) ||
        __builtin_mul_overflow(rows - 1, post->scale_row_stride, &part) ||
        __builtin_add_overflow(last, part, &last) ||
        __builtin_mul_overflow(post->signature.num_scales - 1,
                               post->scale_stride, &part) ||
        __builtin_add_overflow(last, part, &last) || last >= UINT64_MAX / 4) {
        return UINT64_MAX;
    }
    return (last + 1) * sizeof(uint32_t);
}

epx_status_t
epx__check_pointers(const epx__pointer_t *pointers, int num_pointers,
                    const char *count_name, int64_t count)
{
    for (int i = 0; i < num_pointers; i++) {
        if (count > 0 && pointers[i].needed && pointers[i].pointer == NULL) {
            return epx__fail(EPX_ERR_NULL, "%s is null, but %s is %" PRId64,
                             pointers[i].name, count_name, count);
        }
    }
    return EPX_OK;
}

epx_status_t
epx__check_pending(epx__pending_t pending)
{
    return pending == EPX__PENDING_NONE
               ? EPX_OK
               : epx__fail(EPX_ERR_STATE,
                           "the plan has a send-only %s open; epx_complete "
                           "must come before its next operation",
                           pending == EPX__PENDING_DISPATCH ? "dispatch"
                                                            : "combine");
}

epx_status_t
epx__plan_stale(const epx_plan_t *plan, uint32_t epoch)
{
    return epx__fail(EPX_ERR_STATE,
                     "ranks have been masked since the plan was made or "
                     "updated (epoch %u, now %u): %s",
                     epoch, epx__load_u32(&plan->group->epoch),
                     plan->key.max_tokens_per_rank > 0
                         ? "it needs new routing (epx_plan_update)"
                         : "make a new one");
}

epx_status_t
epx__window_full(void)
{
    return epx__fail(EPX_ERR_STATE,
                     "a send-only operation is still open %d operations after "
                     "its start; epx_complete must come before",
                     EPX__MAX_OPEN);
}
