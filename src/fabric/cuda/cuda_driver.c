/* SPDX-License-Identifier: MIT */
#include "fabric/cuda/cuda_driver.h"

#include "fabric/cuda/cuda_error.h"

#include <pthread.h>
#include <stdio.h>
#include <string.h>

static epx__cuda_driver_t driver;
static epx__error_t load_error; /* EPX_OK once all are there */
static pthread_once_t load_once = PTHREAD_ONCE_INIT;

static epx_status_t
find(const char *name, unsigned version, void *field)
{
    enum cudaDriverEntryPointQueryResult found;
    void *function = NULL;
    cudaError_t error = cudaGetDriverEntryPointByVersion(
        name, &function, version, cudaEnableDefault, &found);

    if (error != cudaSuccess) {
        char what[64];

        (void)snprintf(what, sizeof(what), "cannot find %s", name);
        return epx__cuda_fail(error, what);
    }
    if (found != cudaDriverEntryPointSuccess || function == NULL) {
        return epx__fail(EPX_ERR_UNSUPPORTED,
                         "the CUDA driver is too old: it has no %s", name);
    }
    memcpy(field, &function, sizeof(function)); /* to a function's pointer */
    return EPX_OK;
}

static void
load(void)
{
    epx_status_t status = EPX_OK;

#define FIND(field, name, version)                    \
    if (status == EPX_OK) {                           \
        status = find(#name, version, &driver.field); \
    }
    EPX__CUDA_DRIVER_MAP(FIND)
#undef FIND
    epx__error_save(&load_error, status);
}

epx_status_t
epx__cuda_driver_load(void)
{
    (void)pthread_once(&load_once, load);
    return load_error.status == EPX_OK ? EPX_OK
                                       : epx__error_restore(&load_error);
}

const epx__cuda_driver_t *
epx__cuda_driver(void)
{
    return &driver;
}

int
epx__cuda_attribute(CUdevice device, CUdevice_attribute attribute)
{
    int value = 0;

    return epx__cuda_driver()->device_get_attribute(&value, attribute,
                                                    device) == CUDA_SUCCESS
               ? value
               : 0;
}
