/* SPDX-License-Identifier: MIT */
/* Errors of the CUDA runtime and driver, as those of EPX. */
#ifndef EPX_FABRIC_CUDA_CUDA_ERROR_H
#define EPX_FABRIC_CUDA_CUDA_ERROR_H

#include "core/status.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

/*
 * A failure of the runtime, or of the driver: `what` is the start of the
 * sentence "WHAT: the error's own text".  EPX_ERR_NO_MEMORY when that is what
 * was missing, else EPX_ERR_SYSTEM.  The runtime forgets an error that can be
 * recovered from, so that the program's next look at it does not find ours.
 */
epx_status_t epx__cuda_fail(cudaError_t error, const char *what);
epx_status_t epx__cuda_driver_fail(CUresult result, const char *what);

/* EPX_OK, or what the above makes of it. */
static inline epx_status_t
epx__cuda_check(cudaError_t error, const char *what)
{
    return error == cudaSuccess ? EPX_OK : epx__cuda_fail(error, what);
}

#endif
