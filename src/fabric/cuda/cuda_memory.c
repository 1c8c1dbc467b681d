/* SPDX-License-Identifier: MIT */
#include "fabric/cuda/cuda_memory.h"

#include "core/control.h"
#include "fabric/cuda/cuda_device.h"
#include "fabric/cuda/cuda_driver.h"
#include "fabric/cuda/cuda_error.h"

#include <inttypes.h>
#include <pthread.h>
#include <unistd.h>

/* cudaMalloc packs small allocations together, and a handle is of the whole
 * pack; what is a multiple of this has its own. */
#define MALLOC_UNIT (UINT64_C(2) << 20)

static epx_status_t
no_memory(uint64_t bytes)
{
    size_t left = 0, total = 0;

    if (cudaMemGetInfo(&left, &total) != cudaSuccess) {
        (void)cudaGetLastError();
    }
    return epx__fail(EPX_ERR_NO_MEMORY,
                     "the card cannot give a heap of %" PRIu64
                     " bytes: %zu of its %zu are free",
                     bytes, left, total);
}

/* ---- by virtual memory management ---- */

static CUmemAllocationProp
properties_of(int32_t ordinal, CUmemAllocationHandleType type)
{
    CUmemAllocationProp properties = {
        .type = CU_MEM_ALLOCATION_TYPE_PINNED,
        .requestedHandleTypes = type,
        .location = { .type = CU_MEM_LOCATION_TYPE_DEVICE, .id = ordinal },
    };

    return properties;
}

static CUresult
set_access(int32_t ordinal, const epx__cuda_block_t *block)
{
    CUmemAccessDesc access = {
        .location = { .type = CU_MEM_LOCATION_TYPE_DEVICE, .id = ordinal },
        .flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
    };

    return epx__cuda_driver()->mem_set_access((CUdeviceptr)block->base,
                                              block->bytes, &access, 1);
}

static void
unmap(epx__cuda_block_t *block)
{
    const epx__cuda_driver_t *driver = epx__cuda_driver();

    (void)driver->mem_unmap((CUdeviceptr)block->base, block->bytes);
    (void)driver->address_free((CUdeviceptr)block->base, block->bytes);
}

/* Map an allocation, whose handle is the caller's and no longer needed then. */
static epx_status_t
map(int32_t ordinal, CUmemGenericAllocationHandle handle, uint64_t bytes,
    epx__cuda_block_t *block)
{
    const epx__cuda_driver_t *driver = epx__cuda_driver();
    CUdeviceptr address = 0;
    const char *what = "cannot reserve addresses for a heap of the card";
    CUresult result = driver->address_reserve(&address, bytes, 0, 0, 0);

    if (result != CUDA_SUCCESS) {
        return epx__cuda_driver_fail(result, what);
    }
    what = "cannot map a heap of the card";
    result = driver->mem_map(address, bytes, 0, handle, 0);
    if (result != CUDA_SUCCESS) {
        goto free_address;
    }
    *block = (epx__cuda_block_t){ (char *)(uintptr_t)address, bytes,
                                  UINT64_C(1) << ordinal, unmap };
    what = "the card cannot reach a heap";
    result = set_access(ordinal, block);
    if (result != CUDA_SUCCESS) {
        goto unmap_block;
    }
    return EPX_OK;

unmap_block:
    (void)driver->mem_unmap(address, bytes);
    *block = (epx__cuda_block_t){ NULL, 0, 0, NULL };
free_address:
    (void)driver->address_free(address, bytes);
    return epx__cuda_driver_fail(result, what);
}

/* An allocation and, unless its type has none, its shareable handle. */
static CUresult
create(int32_t ordinal, CUmemAllocationHandleType type, uint64_t bytes,
       void *shareable, uint64_t *mapped_bytes_p,
       CUmemGenericAllocationHandle *handle_p)
{
    const epx__cuda_driver_t *driver = epx__cuda_driver();
    CUmemAllocationProp properties = properties_of(ordinal, type);
    size_t unit = 0;
    CUresult result = driver->mem_granularity(
        &unit, &properties, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED);

    if (result != CUDA_SUCCESS) {
        return result;
    }
    *mapped_bytes_p = epx__round_up(bytes, unit);
    result = driver->mem_create(handle_p, *mapped_bytes_p, &properties, 0);
    if (result == CUDA_SUCCESS && type != CU_MEM_HANDLE_TYPE_NONE) {
        result = driver->mem_export(shareable, *handle_p, type, 0);
        if (result != CUDA_SUCCESS) {
            (void)driver->mem_release(*handle_p);
        }
    }
    return result;
}

epx_status_t
epx__cuda_block_create(int32_t ordinal, CUmemAllocationHandleType type,
                       uint64_t bytes, void *shareable,
                       epx__cuda_block_t *block)
{
    CUmemGenericAllocationHandle handle;
    uint64_t mapped_bytes = 0;
    epx_status_t status;
    CUresult result =
        create(ordinal, type, bytes, shareable, &mapped_bytes, &handle);

    if (result == CUDA_ERROR_OUT_OF_MEMORY) {
        return no_memory(bytes);
    }
    if (result != CUDA_SUCCESS) {
        return epx__cuda_driver_fail(result, "cannot make a heap on the card");
    }
    status = map(ordinal, handle, mapped_bytes, block);
    (void)epx__cuda_driver()->mem_release(handle);
    return status;
}

epx_status_t
epx__cuda_block_import(int32_t ordinal, CUmemAllocationHandleType type,
                       void *os_handle, uint64_t mapped_bytes,
                       epx__cuda_block_t *block)
{
    CUmemGenericAllocationHandle handle;
    epx_status_t status;
    CUresult result = epx__cuda_driver()->mem_import(&handle, os_handle, type);

    if (result != CUDA_SUCCESS) {
        return epx__cuda_driver_fail(result, "the driver does not take a "
                                             "peer's handle of its heap");
    }
    status = map(ordinal, handle, mapped_bytes, block);
    (void)epx__cuda_driver()->mem_release(handle);
    return status;
}

bool
epx__cuda_can_share(int32_t ordinal, CUmemAllocationHandleType type)
{
    CUmemGenericAllocationHandle handle;
    union {
        int fd;
        CUmemFabricHandle fabric;
    } shareable;
    uint64_t mapped_bytes;
    CUresult result =
        create(ordinal, type, 1, &shareable, &mapped_bytes, &handle);

    if (result != CUDA_SUCCESS) {
        /* A full card may do it for whoever finds room. */
        return result == CUDA_ERROR_OUT_OF_MEMORY;
    }
    if (type == CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) {
        (void)close(shareable.fd);
    }
    (void)epx__cuda_driver()->mem_release(handle);
    return true;
}

/* ---- by cudaMalloc ---- */

static void
free_malloc(epx__cuda_block_t *block)
{
    (void)cudaFree(block->base);
}

static void
close_ipc(epx__cuda_block_t *block)
{
    (void)cudaIpcCloseMemHandle(block->base);
}

epx_status_t
epx__cuda_block_malloc(uint64_t bytes, void *shareable,
                       epx__cuda_block_t *block)
{
    uint64_t mapped_bytes = epx__round_up(bytes, MALLOC_UNIT);
    void *base = NULL;
    cudaError_t error = cudaMalloc(&base, mapped_bytes);

    if (error == cudaErrorMemoryAllocation) {
        (void)cudaGetLastError();
        return no_memory(bytes);
    }
    if (error == cudaSuccess && shareable != NULL) {
        error = cudaIpcGetMemHandle(shareable, base);
    }
    if (error != cudaSuccess) {
        epx_status_t status =
            epx__cuda_fail(error, "cannot make a heap on the card");

        (void)cudaFree(base);
        return status;
    }
    *block = (epx__cuda_block_t){ base, mapped_bytes, 0, free_malloc };
    return EPX_OK;
}

epx_status_t
epx__cuda_block_open_ipc(const void *handle, uint64_t mapped_bytes,
                         epx__cuda_block_t *block)
{
    cudaIpcMemHandle_t copy = *(const cudaIpcMemHandle_t *)handle;
    void *base = NULL;
    cudaError_t error =
        cudaIpcOpenMemHandle(&base, copy, cudaIpcMemLazyEnablePeerAccess);

    if (error != cudaSuccess) {
        return epx__cuda_fail(error, "the driver does not take a peer's "
                                     "handle of its heap");
    }
    *block = (epx__cuda_block_t){ base, mapped_bytes, 0, close_ipc };
    return EPX_OK;
}

/* ---- both ---- */

/* What cudaMalloc made is reached by enabling the way between the cards. */
static epx_status_t
enable_peer(const epx__cuda_block_t *block)
{
    struct cudaPointerAttributes attributes;
    cudaError_t error = cudaPointerGetAttributes(&attributes, block->base);

    if (error == cudaSuccess) {
        error = cudaDeviceEnablePeerAccess(attributes.device, 0);
    }
    if (error == cudaErrorPeerAccessAlreadyEnabled) {
        (void)cudaGetLastError();
        error = cudaSuccess;
    }
    return epx__cuda_check(error, "the card cannot reach another's heap");
}

void
epx__cuda_block_close(epx__cuda_block_t *block)
{
    if (block->base != NULL) {
        block->unmap(block);
        *block = (epx__cuda_block_t){ NULL, 0, 0, NULL };
    }
}

/* Of each device, made when first needed and kept: the driver spreads a
 * program's streams over the device's queues in the order in which they are
 * made, and streams that come and go between them make two of them share one.
 */
static pthread_mutex_t copy_lock = PTHREAD_MUTEX_INITIALIZER;
static cudaStream_t copy_streams[EPX__CUDA_MAX_CARDS];

static cudaError_t
copy_stream(cudaStream_t *stream_p)
{
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);

    if (error == cudaSuccess && device >= EPX__CUDA_MAX_CARDS) {
        error = cudaErrorInvalidDevice;
    }
    if (error == cudaSuccess && copy_streams[device] == NULL) {
        error = cudaStreamCreateWithFlags(&copy_streams[device],
                                          cudaStreamNonBlocking);
    }
    *stream_p = error == cudaSuccess ? copy_streams[device] : NULL;
    return error;
}

/* Ranks that are threads and share a card ask for the same.  While VMM changes
 * what may reach a block, nobody may copy to or from it, and a card that may
 * already must not ask again. */
epx_status_t
epx__cuda_block_allow(int32_t ordinal, epx__cuda_block_t *block)
{
    uint64_t card = UINT64_C(1) << ordinal;
    epx_status_t status = EPX_OK;

    if (block->unmap != unmap) {
        return enable_peer(block);
    }
    (void)pthread_mutex_lock(&copy_lock);
    if ((block->allowed & card) == 0) {
        CUresult result = set_access(ordinal, block);

        if (result == CUDA_SUCCESS) {
            block->allowed |= card;
        } else {
            status = epx__cuda_driver_fail(
                result, "the card cannot reach another's heap");
        }
    }
    (void)pthread_mutex_unlock(&copy_lock);
    return status;
}

epx_status_t
epx__cuda_copy(void *destination, const void *source, size_t bytes)
{
    cudaStream_t stream;
    cudaError_t error;

    (void)pthread_mutex_lock(&copy_lock);
    error = copy_stream(&stream);
    if (error == cudaSuccess) {
        error = source == NULL ? cudaMemsetAsync(destination, 0, bytes, stream)
                               : cudaMemcpyAsync(destination, source, bytes,
                                                 cudaMemcpyDefault, stream);
    }
    if (error == cudaSuccess) {
        error = cudaStreamSynchronize(stream);
    }
    (void)pthread_mutex_unlock(&copy_lock);
    return epx__cuda_check(error, "cannot copy to or from a heap");
}
