/* SPDX-License-Identifier: MIT */
/*
 * The functions of the CUDA driver that the runtime does not offer.  They are
 * asked of the runtime, so that nothing is linked with libcuda.
 */
#ifndef EPX_FABRIC_CUDA_CUDA_DRIVER_H
#define EPX_FABRIC_CUDA_CUDA_DRIVER_H

#include <cudaTypedefs.h>
#include <epx/epx.h>

/* field, name, version of its prototype */
#define EPX__CUDA_DRIVER_MAP(X)                          \
    X(get_error_string, cuGetErrorString, 6000)          \
    X(device_get, cuDeviceGet, 2000)                     \
    X(device_get_attribute, cuDeviceGetAttribute, 2000)  \
    X(device_get_uuid, cuDeviceGetUuid, 11040)           \
    X(context_retain, cuDevicePrimaryCtxRetain, 7000)    \
    X(context_push, cuCtxPushCurrent, 4000)              \
    X(context_pop, cuCtxPopCurrent, 4000)                \
    X(address_reserve, cuMemAddressReserve, 10020)       \
    X(address_free, cuMemAddressFree, 10020)             \
    X(mem_create, cuMemCreate, 10020)                    \
    X(mem_release, cuMemRelease, 10020)                  \
    X(mem_map, cuMemMap, 10020)                          \
    X(mem_unmap, cuMemUnmap, 10020)                      \
    X(mem_set_access, cuMemSetAccess, 10020)             \
    X(mem_export, cuMemExportToShareableHandle, 10020)   \
    X(mem_import, cuMemImportFromShareableHandle, 10020) \
    X(mem_granularity, cuMemGetAllocationGranularity, 10020)

typedef struct epx__cuda_driver {
#define EPX__CUDA_DRIVER_FIELD(field, name, version) \
    PFN_##name##_v##version field;
    EPX__CUDA_DRIVER_MAP(EPX__CUDA_DRIVER_FIELD)
#undef EPX__CUDA_DRIVER_FIELD
} epx__cuda_driver_t;

/* Find them all, once; needs a driver. */
epx_status_t epx__cuda_driver_load(void);

/* Those that epx__cuda_driver_load has found, else NULLs. */
const epx__cuda_driver_t *epx__cuda_driver(void);

/* What the driver says of a card, once it is loaded; 0: it does not say. */
int epx__cuda_attribute(CUdevice device, CUdevice_attribute attribute);

#endif
