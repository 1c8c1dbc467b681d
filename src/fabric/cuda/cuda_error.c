/* SPDX-License-Identifier: MIT */
#include "fabric/cuda/cuda_error.h"

#include "fabric/cuda/cuda_driver.h"

epx_status_t
epx__cuda_fail(cudaError_t error, const char *what)
{
    (void)cudaGetLastError();
    return epx__fail(error == cudaErrorMemoryAllocation ? EPX_ERR_NO_MEMORY
                                                        : EPX_ERR_SYSTEM,
                     "%s: %s (%s)", what, cudaGetErrorString(error),
                     cudaGetErrorName(error));
}

epx_status_t
epx__cuda_driver_fail(CUresult result, const char *what)
{
    const char *text = NULL;

    if (epx__cuda_driver()->get_error_string == NULL ||
        epx__cuda_driver()->get_error_string(result, &text) != CUDA_SUCCESS) {
        text = "unknown error";
    }
    return epx__fail(result == CUDA_ERROR_OUT_OF_MEMORY ? EPX_ERR_NO_MEMORY
                                                        : EPX_ERR_SYSTEM,
                     "%s: %s (error %d)", what, text, (int)result);
}
