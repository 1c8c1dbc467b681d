/* SPDX-License-Identifier: MIT */
#include "core/agree.h"

#include <inttypes.h>
#include <stdbool.h>
#include <stddef.h>

epx_status_t
epx__agree_not(int32_t peer, int32_t rank, const char *what)
{
    return epx__fail(EPX_ERR_MISMATCH,
                     "rank %d is in another operation while rank %d is in %s: "
                     "collective calls must be made in the same order on every "
                     "rank",
                     peer, rank, what);
}

epx_status_t
epx__agree_keys(int32_t rank, const epx__plan_key_t *own, int32_t peer,
                const epx__plan_key_t *key)
{
    const struct {
        const char *name;
        uint64_t theirs, ours;
    } fields[] = {
        { "the plan's number", key->plan_id, own->plan_id },
        { "layout", key->layout, own->layout },
        { "num_experts", key->num_experts, own->num_experts },
        { "topk", key->topk, own->topk },
        { "idx_dtype", key->idx_dtype, own->idx_dtype },
        { "expert_alignment", key->expert_alignment, own->expert_alignment },
        { "max_tokens_per_rank", key->max_tokens_per_rank,
          own->max_tokens_per_rank },
        { "recv_capacity", key->recv_capacity, own->recv_capacity },
        { "send_only_row_bytes", key->send_only_row_bytes,
          own->send_only_row_bytes },
    };

    for (size_t i = 0; i < sizeof(fields) / sizeof(*fields); i++) {
        if (fields[i].theirs != fields[i].ours) {
            return epx__fail(EPX_ERR_MISMATCH,
                             "the ranks disagree on a plan: %s is %" PRIu64
                             " on rank %d and %" PRIu64 " on rank %d",
                             fields[i].name, fields[i].theirs, peer,
                             fields[i].ours, rank);
        }
    }
    return EPX_OK;
}

static epx_status_t
mismatch(const char *what, const char *field, int32_t first, uint64_t firsts,
         int32_t other, uint64_t others)
{
    return epx__fail(EPX_ERR_MISMATCH,
                     "the ranks disagree in %s: %s is %" PRIu64
                     " on rank %d and %" PRIu64 " on rank %d",
                     what, field, firsts, first, others, other);
}

epx_status_t
epx__agree_signatures(const char *what, int32_t first,
                      const epx__signature_t *a, int32_t other,
                      const epx__signature_t *b)
{
    bool comparable = ((a->arrays | b->arrays) & EPX__ARRAYS_ANY) == 0;
    const struct {
        const char *name;
        uint64_t a, b;
    } fields[] = {
        { "the plan's number", a->plan_id, b->plan_id },
        { "the operation (2 dispatch, 3 combine)", a->kind, b->kind },
        { "hidden", a->hidden, b->hidden },
        { "dtype", a->dtype, b->dtype },
        { "quantize", a->quantize, b->quantize },
        { "num_scales", a->num_scales, b->num_scales },
        { "the set of optional arrays (8 with topk_weights)",
          comparable ? a->arrays : 0, comparable ? b->arrays : 0 },
        { "flags", a->flags, b->flags },
    };

    for (size_t i = 0; i < sizeof(fields) / sizeof(*fields); i++) {
        if (fields[i].a != fields[i].b) {
            return mismatch(what, fields[i].name, first, fields[i].a, other,
                            fields[i].b);
        }
    }
    return EPX_OK;
}
