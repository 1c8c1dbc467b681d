/* SPDX-License-Identifier: MIT */
#include "fabric/cuda/cuda_device.h"

#include "fabric/cuda/cuda_driver.h"
#include "fabric/cuda/cuda_error.h"
#include "fabric/cuda/cuda_fabric.h"

#include <stdio.h>
#include <string.h>

/* Each card's primary context, retained by the first who enters it and then
 * kept: to release the last reference would destroy what the program has
 * there. */
static CUcontext contexts[EPX__CUDA_MAX_CARDS];
static pthread_mutex_t contexts_lock = PTHREAD_MUTEX_INITIALIZER;

/* Why no card can even be counted. */
static epx_status_t
counting_failed(cudaError_t error)
{
    int driver = 0;

    (void)cudaGetLastError();
    if (error == cudaErrorNoDevice) {
        return epx__fail(EPX_ERR_UNSUPPORTED,
                         "EPX_DEVICE_CUDA finds no card: CUDA sees none here "
                         "(CUDA_VISIBLE_DEVICES can hide them)");
    }
    if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
        return epx__fail(EPX_ERR_UNSUPPORTED,
                         "EPX_DEVICE_CUDA finds no card: there is no driver of "
                         "NVIDIA's on this machine (libcuda.so.1)");
    }
    if (error == cudaErrorInsufficientDriver) {
        return epx__fail(EPX_ERR_UNSUPPORTED,
                         "EPX_DEVICE_CUDA finds no card: the driver is for "
                         "CUDA %d.%d, too old for this build with CUDA %d.%d",
                         driver / 1000, driver % 1000 / 10,
                         CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
    }
    return epx__fail(EPX_ERR_UNSUPPORTED,
                     "EPX_DEVICE_CUDA finds no card: %s (%s)",
                     cudaGetErrorString(error), cudaGetErrorName(error));
}

epx_status_t
epx__cuda_device_check(int32_t ordinal, int32_t *count_p)
{
    int count = 0;
    cudaError_t error = cudaGetDeviceCount(&count);

    if (error == cudaSuccess && count == 0) {
        error = cudaErrorNoDevice;
    }
    if (error != cudaSuccess) {
        return counting_failed(error);
    }
    if (count > EPX__CUDA_MAX_CARDS) {
        count = EPX__CUDA_MAX_CARDS;
    }
    if (ordinal < 0 || ordinal >= count) {
        return epx__fail(EPX_ERR_UNSUPPORTED,
                         "the ordinal of the device is %d; of the cards that "
                         "CUDA sees, 0 to %d can be used",
                         ordinal, count - 1);
    }
    if (count_p != NULL) {
        *count_p = count;
    }
    return epx__cuda_driver_load();
}

static epx_status_t
context_of(int32_t ordinal, CUcontext *context_p)
{
    const epx__cuda_driver_t *driver = epx__cuda_driver();
    CUresult result = CUDA_SUCCESS;
    CUdevice device;

    (void)pthread_mutex_lock(&contexts_lock);
    *context_p = contexts[ordinal];
    if (*context_p == NULL) {
        result = driver->device_get(&device, ordinal);
        if (result == CUDA_SUCCESS) {
            result = driver->context_retain(context_p, device);
        }
        if (result == CUDA_SUCCESS) {
            __atomic_store_n(&contexts[ordinal], *context_p, __ATOMIC_RELEASE);
        }
    }
    (void)pthread_mutex_unlock(&contexts_lock);
    return result == CUDA_SUCCESS
               ? EPX_OK
               : epx__cuda_driver_fail(result, "cannot make a context on the "
                                               "card");
}

/* Inside, looking at an event does not spoil a capture that some thread has
 * begun; what the thread itself had chosen is kept for when it leaves. */
static _Thread_local int depth;
static _Thread_local enum cudaStreamCaptureMode capture_mode;

epx_status_t
epx__cuda_device_enter(int32_t ordinal)
{
    CUcontext context = NULL;
    epx_status_t status = EPX_OK;
    CUresult result;

    /* A card that has been entered before needs no further look. */
    if (ordinal >= 0 && ordinal < EPX__CUDA_MAX_CARDS) {
        context = __atomic_load_n(&contexts[ordinal], __ATOMIC_ACQUIRE);
    }
    if (context == NULL) {
        status = epx__cuda_device_check(ordinal, NULL);
        if (status == EPX_OK) {
            status = context_of(ordinal, &context);
        }
    }
    if (status != EPX_OK) {
        return status;
    }
    result = epx__cuda_driver()->context_push(context);
    if (result != CUDA_SUCCESS) {
        return epx__cuda_driver_fail(result, "cannot turn to the card");
    }
    if (depth++ == 0) {
        capture_mode = cudaStreamCaptureModeRelaxed;
        (void)cudaThreadExchangeStreamCaptureMode(&capture_mode);
    }
    return EPX_OK;
}

void
epx__cuda_device_leave(void)
{
    CUcontext context;

    if (--depth == 0) {
        (void)cudaThreadExchangeStreamCaptureMode(&capture_mode);
    }
    (void)epx__cuda_driver()->context_pop(&context);
}

/* The links between the cards that this process sees. */
static void
query_links(int32_t ordinal, int32_t count, epx_device_info_t *info)
{
    info->reachable_devices = UINT64_C(1) << ordinal;
    info->fast_devices = info->reachable_devices;
    for (int32_t other = 0; other < count; other++) {
        int reaches = 0, atomics = 0;

        if (other == ordinal ||
            cudaDeviceCanAccessPeer(&reaches, ordinal, other) != cudaSuccess ||
            reaches == 0) {
            continue;
        }
        info->reachable_devices |= UINT64_C(1) << other;
        if (cudaDeviceGetP2PAttribute(&atomics,
                                      cudaDevP2PAttrNativeAtomicSupported,
                                      ordinal, other) == cudaSuccess &&
            atomics != 0) {
            info->fast_devices |= UINT64_C(1) << other;
        }
    }
}

epx_status_t
epx__cuda_device_info(int32_t ordinal, epx_device_info_t *info)
{
    struct cudaDeviceProp properties;
    uint32_t kinds = 0;
    epx_status_t status = epx__cuda_device_check(ordinal, &info->num_devices);

    if (status == EPX_OK) {
        status = epx__cuda_check(cudaGetDeviceProperties(&properties, ordinal),
                                 "cudaGetDeviceProperties");
    }
    if (status == EPX_OK) {
        status = epx__cuda_memory_kinds(ordinal, &kinds);
    }
    if (status != EPX_OK) {
        return status;
    }
    info->num_workers = properties.multiProcessorCount;
    info->compute_major = properties.major;
    info->compute_minor = properties.minor;
    info->memory_bytes = properties.totalGlobalMem;
    (void)snprintf(info->name, sizeof(info->name), "%.*s",
                   (int)sizeof(info->name) - 1, properties.name);
    epx__cuda_pci(ordinal, info->pci);
    epx__cuda_fabric_names(kinds, info->fabrics);
    query_links(ordinal, info->num_devices, info);
    return EPX_OK;
}

void
epx__cuda_pci(int32_t ordinal, char text[16])
{
    if (cudaDeviceGetPCIBusId(text, 16, ordinal) != cudaSuccess) {
        (void)cudaGetLastError();
        (void)snprintf(text, 16, "card %d", (int)ordinal);
    }
}
