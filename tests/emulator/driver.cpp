// SPDX-License-Identifier: MIT
// The driver's functions.  Memory that can be mapped is a memfd, so that
// processes can share it as cards' memory is shared by file descriptors.
#include "emulator/device.h"

#include <cuda.h>
#include <cudaTypedefs.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

using namespace emulator;

static constexpr size_t UNIT = 2 << 20;

static CUresult
get_error_string(CUresult result, const char **text)
{
    *text = result == CUDA_ERROR_OUT_OF_MEMORY ? "out of memory"
                                               : "the emulator refuses it";
    return CUDA_SUCCESS;
}

static CUresult
device_get(CUdevice *device, int ordinal)
{
    *device = ordinal;
    return ordinal >= 0 && ordinal < num_devices() ? CUDA_SUCCESS
                                                   : CUDA_ERROR_INVALID_DEVICE;
}

static CUresult
device_get_attribute(int *value, CUdevice_attribute attribute, CUdevice)
{
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
        *value = DEVICE_SMS;
        break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
        *value = DEVICE_MAJOR;
        break;
    case CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS:
        *value = 1;
        break;
    default:
        *value = 0;
        break;
    }
    return CUDA_SUCCESS;
}

static CUresult
device_get_uuid(CUuuid *uuid, CUdevice device)
{
    memcpy(uuid->bytes, "EPX's emulator.", sizeof(uuid->bytes));
    uuid->bytes[sizeof(uuid->bytes) - 1] = (char)device;
    return CUDA_SUCCESS;
}

// A context is a device, and one.
static CUresult
context_retain(CUcontext *context, CUdevice device)
{
    *context = reinterpret_cast<CUcontext>((intptr_t)device + 1);
    return CUDA_SUCCESS;
}

static thread_local std::vector<int> left_behind;

static CUresult
context_push(CUcontext context)
{
    left_behind.push_back(current_device());
    set_current_device((int)(reinterpret_cast<intptr_t>(context) - 1));
    return CUDA_SUCCESS;
}

static CUresult
context_pop(CUcontext *context)
{
    *context = reinterpret_cast<CUcontext>((intptr_t)current_device() + 1);
    set_current_device(left_behind.back());
    left_behind.pop_back();
    return CUDA_SUCCESS;
}

// ---- memory that can be mapped: a handle is a file descriptor, and one ----

// The name of a file tells other processes, too, whose memory it is.
#define CARD "emulated card %d"

static int
device_of(int file)
{
    char path[32], name[64] = "";
    int device = 0;

    snprintf(path, sizeof(path), "/proc/self/fd/%d", file);
    (void)!readlink(path, name, sizeof(name) - 1);
    (void)!sscanf(name, "/memfd:" CARD, &device);
    return device;
}

static int
file_of(CUmemGenericAllocationHandle handle)
{
    return (int)handle - 1;
}

static CUresult
take_file(CUmemGenericAllocationHandle *handle, int file)
{
    *handle = (CUmemGenericAllocationHandle)(file + 1);
    return file < 0 ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}

static CUresult
mem_granularity(size_t *unit, const CUmemAllocationProp *,
                CUmemAllocationGranularity_flags)
{
    *unit = UNIT;
    return CUDA_SUCCESS;
}

static CUresult
mem_create(CUmemGenericAllocationHandle *handle, size_t bytes,
           const CUmemAllocationProp *properties, unsigned long long)
{
    char name[32];
    int file;

    snprintf(name, sizeof(name), CARD, properties->location.id);
    file = memfd_create(name, MFD_CLOEXEC);

    if (bytes > DEVICE_MEMORY || (file >= 0 && ftruncate(file, (off_t)bytes))) {
        (void)close(file);
        file = -1;
    }
    return take_file(handle, file);
}

static CUresult
mem_release(CUmemGenericAllocationHandle handle)
{
    return close(file_of(handle)) == 0 ? CUDA_SUCCESS
                                       : CUDA_ERROR_INVALID_VALUE;
}

static CUresult
mem_export(void *shareable, CUmemGenericAllocationHandle handle,
           CUmemAllocationHandleType type, unsigned long long)
{
    int file = type == CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
                   ? dup(file_of(handle))
                   : -1;

    memcpy(shareable, &file, sizeof(file));
    return file < 0 ? CUDA_ERROR_NOT_SUPPORTED : CUDA_SUCCESS;
}

static CUresult
mem_import(CUmemGenericAllocationHandle *handle, void *shareable,
           CUmemAllocationHandleType type)
{
    return type == CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
               ? take_file(handle, dup((int)(intptr_t)shareable))
               : CUDA_ERROR_NOT_SUPPORTED;
}

static void *
address_of(CUdeviceptr address)
{
    return reinterpret_cast<void *>(address);
}

static CUresult
address_reserve(CUdeviceptr *address, size_t bytes, size_t, CUdeviceptr,
                unsigned long long)
{
    void *reserved = mmap(nullptr, bytes, PROT_NONE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    *address = (CUdeviceptr)(uintptr_t)reserved;
    return reserved == MAP_FAILED ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}

static CUresult
address_free(CUdeviceptr address, size_t bytes)
{
    return munmap(address_of(address), bytes) == 0 ? CUDA_SUCCESS
                                                   : CUDA_ERROR_INVALID_VALUE;
}

static CUresult
mem_map(CUdeviceptr address, size_t bytes, size_t,
        CUmemGenericAllocationHandle handle, unsigned long long)
{
    if (mmap(address_of(address), bytes, PROT_READ | PROT_WRITE,
             MAP_SHARED | MAP_FIXED, file_of(handle), 0) == MAP_FAILED) {
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    memory_note(address_of(address), bytes, cudaMemoryTypeDevice,
                device_of(file_of(handle)));
    return CUDA_SUCCESS;
}

static CUresult
mem_unmap(CUdeviceptr address, size_t bytes)
{
    (void)memory_forget(address_of(address));
    return mmap(address_of(address), bytes, PROT_NONE,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1,
                0) == MAP_FAILED
               ? CUDA_ERROR_INVALID_VALUE
               : CUDA_SUCCESS;
}

static CUresult
mem_set_access(CUdeviceptr address, size_t, const CUmemAccessDesc *access,
               size_t count)
{
    bool ok = true;

    for (size_t i = 0; i < count; i++) {
        ok = memory_allow(address_of(address), access[i].location.id) && ok;
    }
    return ok ? CUDA_SUCCESS : CUDA_ERROR_ALREADY_MAPPED;
}

// ---- by name ----

#define FUNCTION(name, version, function) \
    { #name, reinterpret_cast<void *>(    \
                 static_cast<PFN_##name##_v##version>(function)) }

void *
emulator::driver_function(const char *name)
{
    static const struct {
        const char *name;
        void *function;
    } functions[] = {
        FUNCTION(cuGetErrorString, 6000, get_error_string),
        FUNCTION(cuDeviceGet, 2000, device_get),
        FUNCTION(cuDeviceGetAttribute, 2000, device_get_attribute),
        FUNCTION(cuDeviceGetUuid, 11040, device_get_uuid),
        FUNCTION(cuDevicePrimaryCtxRetain, 7000, context_retain),
        FUNCTION(cuCtxPushCurrent, 4000, context_push),
        FUNCTION(cuCtxPopCurrent, 4000, context_pop),
        FUNCTION(cuMemAddressReserve, 10020, address_reserve),
        FUNCTION(cuMemAddressFree, 10020, address_free),
        FUNCTION(cuMemCreate, 10020, mem_create),
        FUNCTION(cuMemRelease, 10020, mem_release),
        FUNCTION(cuMemMap, 10020, mem_map),
        FUNCTION(cuMemUnmap, 10020, mem_unmap),
        FUNCTION(cuMemSetAccess, 10020, mem_set_access),
        FUNCTION(cuMemExportToShareableHandle, 10020, mem_export),
        FUNCTION(cuMemImportFromShareableHandle, 10020, mem_import),
        FUNCTION(cuMemGetAllocationGranularity, 10020, mem_granularity),
    };

    for (const auto &it : functions) {
        if (strcmp(it.name, name) == 0) {
            return it.function;
        }
    }
    return nullptr;
}
