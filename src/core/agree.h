/* SPDX-License-Identifier: MIT */
/* Whether ranks that met in a step mean the same: EPX_ERR_MISMATCH, with the
 * first field in which they differ, when they do not. */
#ifndef EPX_CORE_AGREE_H
#define EPX_CORE_AGREE_H

#include "core/control.h"
#include "core/status.h"

/* Of two ranks' dispatches or combines; `what` is "a dispatch" or the like. */
epx_status_t epx__agree_signatures(const char *what, int32_t first,
                                   const epx__signature_t *a, int32_t other,
                                   const epx__signature_t *b);

/* Of this rank's plan and a peer's. */
epx_status_t epx__agree_keys(int32_t rank, const epx__plan_key_t *own,
                             int32_t peer, const epx__plan_key_t *key);

/* The error of a peer that is not in this operation at all. */
epx_status_t epx__agree_not(int32_t peer, int32_t rank, const char *what);

#endif
