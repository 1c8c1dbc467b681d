/* SPDX-License-Identifier: MIT */
/* What follows from the arguments of a call alone, on any device. */
#ifndef EPX_ENGINE_COMMON_DESCRIBE_H
#define EPX_ENGINE_COMMON_DESCRIBE_H

#include "core/plan.h"

/* Fill in what every engine's plan starts with. */
void epx__plan_describe(struct epx_plan *plan, epx_group_t *group,
                        const epx_plan_args_t *args);

/* Rows from an expert to the next in EXPERT_SLOTS; 0 in the other layouts. */
uint64_t epx__rows_per_expert(const epx_plan_t *plan);

/* Bytes of one row of a receive array, also of combine's recv_topk_weights;
 * scales, which are strided, apart. */
uint64_t epx__array_row_bytes(const epx_plan_t *plan, epx__array_t array,
                              uint64_t x_row_bytes);

/* What a dispatch moves. */
typedef struct epx__dispatch_shape {
    int64_t row_bytes; /* of a row as it is sent */
    int64_t num_scales;
    bool has_weights;
    epx__signature_t signature; /* but for its arrays */
} epx__dispatch_shape_t;

/* Gives each stride that is 0 its default, by what epx_dispatch_args_t says. */
void epx__dispatch_describe(const epx_plan_t *plan, epx_dispatch_args_t *args,
                            epx__dispatch_shape_t *shape);

/* But for its arrays. */
epx__signature_t epx__combine_signature(const epx_plan_t *plan,
                                        const epx_combine_args_t *args);

/* In a signature: whether weights travel, or that this rank cannot tell, since
 * it neither sends nor receives a row, so that its pointers may be null. */
uint32_t epx__weights_bits(bool has_weights, bool takes_part);

/* Bytes from the first to the last of a rank's received scales, as its post has
 * their strides; UINT64_MAX, which nothing holds, when they pass 64 bits. */
uint64_t epx__scale_extent(const epx_plan_t *plan, int32_t num_local,
                           uint64_t num_rows, const epx__post_t *post);

/* The error of a plan of an earlier epoch, `epoch`. */
epx_status_t epx__plan_stale(const epx_plan_t *plan, uint32_t epoch);

/* EPX_ERR_STATE while a plan's send-only operation waits for epx_complete. */
epx_status_t epx__check_pending(epx__pending_t pending);

/* The error of the step that would be one too many after such an operation. */
epx_status_t epx__window_full(void);

/* A pointer that must not be null when it is needed and its count is not 0. */
typedef struct epx__pointer {
    const char *name;
    const void *pointer;
    bool needed;
} epx__pointer_t;

epx_status_t epx__check_pointers(const epx__pointer_t *pointers,
                                 int num_pointers, const char *count_name,
                                 int64_t count);

#endif
