// SPDX-License-Identifier: MIT
// The device, its memory, and errors.
#include "emulator/device.h"
#include "emulator/flush.h"

#include <cuda.h>
#include <map>
#include <mutex>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

namespace emulator
{

static thread_local cudaError_t last_error;

cudaError_t
error(cudaError_t found)
{
    last_error = found;
    return found;
}

struct noted {
    size_t bytes;
    cudaMemoryType type;
    int device;
    unsigned allowed; // a bit for each device
};

struct notes {
    std::mutex lock;
    std::map<uintptr_t, noted> of; // by where they begin
};

static notes *const the_notes = new notes;

void
memory_note(void *base, size_t bytes, cudaMemoryType type, int device)
{
    std::lock_guard<std::mutex> held(the_notes->lock);

    the_notes->of[(uintptr_t)base] = { bytes, type, device, 0 };
}

bool
memory_forget(void *base)
{
    std::lock_guard<std::mutex> held(the_notes->lock);

    return the_notes->of.erase((uintptr_t)base) == 1;
}

static noted
note_of(const void *ptr)
{
    std::lock_guard<std::mutex> held(the_notes->lock);
    auto after = the_notes->of.upper_bound((uintptr_t)ptr);

    if (after != the_notes->of.begin()) {
        const auto &found = *--after;

        if ((uintptr_t)ptr - found.first < found.second.bytes) {
            return found.second;
        }
    }
    return { 0, cudaMemoryTypeUnregistered, 0, 0 };
}

bool
memory_allow(void *base, int device)
{
    std::lock_guard<std::mutex> held(the_notes->lock);
    auto found = the_notes->of.find((uintptr_t)base);
    bool is_new = found != the_notes->of.end() &&
                  (found->second.allowed >> device & 1) == 0;

    if (is_new) {
        found->second.allowed |= 1u << device;
    }
    return is_new;
}

bool
memory_reaches(const void *ptr, int device)
{
    noted note = note_of(ptr);

    return note.type != cudaMemoryTypeDevice ||
           (note.allowed >> device & 1) != 0;
}

// ---- the devices ----

static constexpr int MOST_DEVICES = 16;
static thread_local int the_device;

int
num_devices()
{
    static const char *const text = getenv("EPX_EMULATOR_CARDS");
    static const int value = text == nullptr ? 1 : atoi(text);

    return value < 1 ? 1 : value > MOST_DEVICES ? MOST_DEVICES : value;
}

int
current_device()
{
    return the_device;
}

void
set_current_device(int device)
{
    the_device = device;
}

} // namespace emulator

using namespace emulator;

// ---- errors ----

const char *
cudaGetErrorName(cudaError_t error)
{
    switch (error) {
    case cudaSuccess:
        return "cudaSuccess";
    case cudaErrorInvalidValue:
        return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
        return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration:
        return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice:
        return "cudaErrorInvalidDevice";
    case cudaErrorInvalidResourceHandle:
        return "cudaErrorInvalidResourceHandle";
    case cudaErrorNotReady:
        return "cudaErrorNotReady";
    case cudaErrorIllegalAddress:
        return "cudaErrorIllegalAddress";
    case cudaErrorNotSupported:
        return "cudaErrorNotSupported";
    case cudaErrorStreamCaptureUnsupported:
        return "cudaErrorStreamCaptureUnsupported";
    default:
        return "an error that the emulator does not give";
    }
}

const char *
cudaGetErrorString(cudaError_t error)
{
    return cudaGetErrorName(error);
}

cudaError_t
cudaGetLastError()
{
    cudaError_t found = last_error;

    last_error = cudaSuccess;
    return found;
}

// ---- the device ----

cudaError_t
cudaDriverGetVersion(int *version)
{
    *version = CUDART_VERSION;
    return cudaSuccess;
}

cudaError_t
cudaGetDeviceCount(int *count)
{
    *count = num_devices();
    return cudaSuccess;
}

cudaError_t
cudaGetDevice(int *device)
{
    *device = current_device();
    return cudaSuccess;
}

static cudaError_t
check_device(int device)
{
    return device >= 0 && device < num_devices()
               ? cudaSuccess
               : error(cudaErrorInvalidDevice);
}

cudaError_t
cudaSetDevice(int device)
{
    if (check_device(device) != cudaSuccess) {
        return error(cudaErrorInvalidDevice);
    }
    set_current_device(device);
    return cudaSuccess;
}

cudaError_t
cudaGetDeviceProperties(cudaDeviceProp *properties, int device)
{
    *properties = {};
    snprintf(properties->name, sizeof(properties->name), "EPX's emulator");
    properties->totalGlobalMem = DEVICE_MEMORY;
    properties->major = DEVICE_MAJOR;
    properties->multiProcessorCount = DEVICE_SMS;
    return check_device(device);
}

cudaError_t
cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device)
{
    switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
        *value = DEVICE_SMS;
        break;
    case cudaDevAttrComputeCapabilityMajor:
        *value = DEVICE_MAJOR;
        break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
        *value = (int)DEVICE_SHARED;
        break;
    }
    return check_device(device);
}

static void (*flush_writes)();

void
emulator_on_flush(void (*flush)())
{
    flush_writes = flush;
}

cudaError_t
cudaDeviceFlushGPUDirectRDMAWrites(cudaFlushGPUDirectRDMAWritesTarget,
                                   cudaFlushGPUDirectRDMAWritesScope)
{
    if (flush_writes != nullptr) {
        flush_writes();
    }
    return cudaSuccess;
}

cudaError_t
cudaDeviceGetPCIBusId(char *text, int bytes, int device)
{
    snprintf(text, (size_t)bytes, "0000:00:%02d.0", device);
    return check_device(device);
}

cudaError_t
cudaDeviceCanAccessPeer(int *can, int device, int peer)
{
    *can = device != peer;
    return cudaSuccess;
}

cudaError_t
cudaDeviceEnablePeerAccess(int, unsigned)
{
    return error(cudaErrorInvalidDevice);
}

cudaError_t
cudaDeviceGetP2PAttribute(int *value, cudaDeviceP2PAttr, int device, int peer)
{
    *value = device != peer;
    return cudaSuccess;
}

cudaError_t
cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned,
                                 unsigned long long,
                                 cudaDriverEntryPointQueryResult *result)
{
    *function = driver_function(name);
    *result = *function == nullptr ? cudaDriverEntryPointSymbolNotFound
                                   : cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

// ---- memory ----

static constexpr size_t MALLOC_ALIGN = 256;
static constexpr size_t HOST_ALIGN = 4096;
static constexpr size_t SPOILT_BYTES = 1 << 20; // at most: more costs time
static constexpr int GARBAGE = 0xc9;

static cudaError_t
allocate(void **ptr, size_t bytes, size_t alignment, cudaMemoryType type)
{
    if (bytes > DEVICE_MEMORY || posix_memalign(ptr, alignment, bytes) != 0) {
        return error(cudaErrorMemoryAllocation);
    }
    memset(*ptr, GARBAGE, bytes < SPOILT_BYTES ? bytes : SPOILT_BYTES);
    memory_note(*ptr, bytes, type, current_device());
    (void)memory_allow(*ptr, current_device());
    return cudaSuccess;
}

cudaError_t
cudaMalloc(void **ptr, size_t bytes)
{
    return allocate(ptr, bytes, MALLOC_ALIGN, cudaMemoryTypeDevice);
}

cudaError_t
cudaHostAlloc(void **ptr, size_t bytes, unsigned)
{
    return allocate(ptr, bytes, HOST_ALIGN, cudaMemoryTypeHost);
}

cudaError_t
cudaFree(void *ptr)
{
    if (ptr != nullptr && !memory_forget(ptr)) {
        return error(cudaErrorInvalidValue);
    }
    free(ptr);
    return cudaSuccess;
}

cudaError_t
cudaFreeHost(void *ptr)
{
    return cudaFree(ptr);
}

cudaError_t
cudaMemGetInfo(size_t *left, size_t *total)
{
    *left = DEVICE_MEMORY;
    *total = DEVICE_MEMORY;
    return cudaSuccess;
}

cudaError_t
cudaPointerGetAttributes(cudaPointerAttributes *attributes, const void *ptr)
{
    noted note = note_of(ptr);

    *attributes = { note.type, note.device };
    return cudaSuccess;
}

cudaError_t
cudaIpcGetMemHandle(cudaIpcMemHandle_t *, void *)
{
    return error(cudaErrorNotSupported);
}

cudaError_t
cudaIpcOpenMemHandle(void **, cudaIpcMemHandle_t, unsigned)
{
    return error(cudaErrorNotSupported);
}

cudaError_t
cudaIpcCloseMemHandle(void *)
{
    return error(cudaErrorNotSupported);
}
