/* SPDX-License-Identifier: MIT */
/* Argument structs of any age: the ABI rule of epx.h in one place. */
#ifndef EPX_API_API_ARGS_H
#define EPX_API_API_ARGS_H

#include "core/plan.h"

#include <epx/epx.h>
#include <stddef.h>

/* The size that a struct had when `last` was its last field. */
#define EPX__BYTES_THROUGH(type, last) \
    (offsetof(type, last) + sizeof(((type *)0)->last))

/*
 * Copy a caller's struct into one of the present size.  `first_bytes` is the
 * size that the first release had: a smaller one is refused, what an older
 * caller lacks is zero, and what a newer caller has must be zero.
 */
epx_status_t epx__args_copy(void *to, size_t bytes, const void *from,
                            size_t first_bytes, const char *name);

/* Copy the present struct out to a caller who may know less of it; keeps the
 * caller's size. */
epx_status_t epx__args_return(void *to, const void *from, size_t bytes,
                              size_t first_bytes, const char *name);

/* api_plan.c: whether a plan can take in this routing. */
epx_status_t epx__check_update(const epx_plan_t *plan, int64_t num_tokens,
                               const void *topk_idx);

#endif
