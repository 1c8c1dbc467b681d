/* SPDX-License-Identifier: MIT */
/* Writing one received row, wherever it lies: on a peer or on this rank. */
#ifndef EPX_ENGINE_CPU_ROWS_H
#define EPX_ENGINE_CPU_ROWS_H

#include "engine/cpu/cpu.h"

#include <string.h>

/* The receive arrays of one rank as this rank reaches them; NULL if not
 * wanted. */
typedef struct cpu_target {
    char *x;
    uint32_t *scales;
    int64_t scale_row_stride;
    int64_t scale_stride;
    int64_t scale_expert_stride;
    char *topk_idx;
    float *topk_weights;
    int32_t *src_token;
    int32_t first_expert; /* of that rank */
    bool can_stream;      /* x is aligned for it */
} cpu_target_t;

/* What all rows of one operation have in common. */
typedef struct cpu_row_format {
    const epx__kernels_t *kernels;
    int64_t row_bytes;
    int64_t num_scales;
    int64_t rows_per_expert; /* EXPERT_SLOTS; else 0 */
    int32_t topk;
    bool idx_is_64;
    bool streams;
} cpu_row_format_t;

static inline cpu_row_format_t
cpu_row_format(const cpu_plan_t *plan)
{
    const epx_group_t *group = plan->base.group;
    const epx__plan_key_t *key = &plan->base.key;
    bool is_slots = key->layout == EPX_LAYOUT_EXPERT_SLOTS;

    return (cpu_row_format_t){
        .kernels = cpu_engine(group)->kernels,
        .row_bytes = plan->dispatch.shape.row_bytes,
        .num_scales = plan->dispatch.shape.num_scales,
        .rows_per_expert =
            is_slots ? (int64_t)key->max_tokens_per_rank * group->num_ranks : 0,
        .topk = (int32_t)key->topk,
        .idx_is_64 = key->idx_dtype == EPX_I64,
    };
}

static inline uint32_t *
cpu_scale_at(const cpu_row_format_t *format, const cpu_target_t *target,
             int64_t row)
{
    int64_t per = format->rows_per_expert;
    int64_t expert = per == 0 ? 0 : row / per;

    return target->scales + expert * target->scale_expert_stride +
           (row - expert * per) * target->scale_row_stride;
}

static inline void
cpu_put_scales(const cpu_row_format_t *format, const cpu_target_t *target,
               int64_t row, const uint32_t *scales)
{
    uint32_t *at = cpu_scale_at(format, target, row);

    for (int64_t j = 0; j < format->num_scales; j++) {
        at[j * target->scale_stride] = scales[j];
    }
}

/* The payload and its scales. */
static inline void
cpu_put_row(const cpu_row_format_t *format, const cpu_target_t *target,
            int64_t row, const void *payload, const uint32_t *scales)
{
    char *to = target->x + row * format->row_bytes;

    if (format->streams && target->can_stream) {
        format->kernels->copy_stream(to, payload, (size_t)format->row_bytes);
    } else {
        memcpy(to, payload, (size_t)format->row_bytes);
    }
    if (format->num_scales > 0) {
        cpu_put_scales(format, target, row, scales);
    }
}

/* A RANK_MAJOR row's element k of topk_idx: local expert or -1. */
static inline void
cpu_put_idx(const cpu_row_format_t *format, const cpu_target_t *target,
            int64_t row, int32_t k, int32_t expert)
{
    int64_t at = row * format->topk + k;

    if (format->idx_is_64) {
        ((int64_t *)target->topk_idx)[at] = expert;
    } else {
        ((int32_t *)target->topk_idx)[at] = expert;
    }
}

/* This rank's own receive arrays. */
cpu_target_t cpu_target_own(const cpu_plan_t *plan);

#endif
