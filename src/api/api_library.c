/* SPDX-License-Identifier: MIT */
#include "api/api_args.h"
#include "core/cores.h"
#include "core/status.h"
#include "engine/common/placement.h"
#include "engine/engine.h"
#include "fabric/fabric.h"

#include <stddef.h>

#define STRING_(x) #x
#define STRING(x)  STRING_(x)
#define VERSION               \
    STRING(EPX_VERSION_MAJOR) \
    "." STRING(EPX_VERSION_MINOR) "." STRING(EPX_VERSION_PATCH)

#define MAX_LISTED 16

static const char *engine_names[MAX_LISTED];
static const char *fabric_names[MAX_LISTED];
static pthread_once_t names_once = PTHREAD_ONCE_INIT;

static void
list_names(void)
{
    static const epx_device_t devices[] = { EPX_DEVICE_CPU, EPX_DEVICE_CUDA };
    int num_engines = 0, num_fabrics = 0;

    for (size_t i = 0; i < sizeof(devices) / sizeof(*devices); i++) {
        const char *why;
        const epx__engine_ops_t *engine = epx__engine_look(devices[i], &why);

        if (engine == NULL) {
            continue;
        }
        engine_names[num_engines++] = engine->name;
        for (int j = 0; engine->fabrics[j] != NULL; j++) {
            if (num_fabrics < MAX_LISTED - 1) {
                fabric_names[num_fabrics++] = engine->fabrics[j]->name;
            }
        }
    }
}

epx_status_t
epx_library_query(epx_library_info_t *info)
{
    epx_library_info_t now = EPX_LIBRARY_INFO_INIT;

    (void)pthread_once(&names_once, list_names);
    now.version = VERSION;
    now.engines = engine_names;
    now.fabrics = fabric_names;
    now.cpu_isa = epx__engine_cpu.isa();
    now.num_cores = epx__cores_get().count;
    return epx__args_return(info, &now, sizeof(now),
                            EPX__BYTES_THROUGH(epx_library_info_t, num_cores),
                            "info");
}

epx_status_t
epx_device_query(epx_device_t device, int32_t ordinal, epx_device_info_t *info)
{
    epx_device_info_t now = EPX_DEVICE_INFO_INIT;
    const epx__engine_ops_t *engine;
    epx_status_t status = epx__engine_find(device, &engine);

    if (status == EPX_OK) {
        status = engine->device_info(ordinal, &now);
    }
    return status == EPX_OK
               ? epx__args_return(
                     info, &now, sizeof(now),
                     EPX__BYTES_THROUGH(epx_device_info_t, fast_devices),
                     "info")
               : status;
}

size_t
epx_dtype_size(epx_dtype_t dtype)
{
    switch (dtype) {
    case EPX_F8E4M3:
    case EPX_F8E5M2:
    case EPX_BYTES:
        return 1;
    case EPX_F16:
    case EPX_BF16:
        return 2;
    case EPX_F32:
    case EPX_I32:
        return 4;
    case EPX_I64:
        return 8;
    }
    return 0;
}

epx_status_t
epx_local_experts(int32_t num_experts, int32_t num_ranks, int32_t rank,
                  int32_t *first_p, int32_t *count_p)
{
    if (first_p == NULL || count_p == NULL) {
        return epx__fail(EPX_ERR_NULL, "first_p or count_p is null");
    }
    if (num_experts < 1 || num_ranks < 1 || num_ranks > EPX_MAX_RANKS) {
        return epx__fail(EPX_ERR_INVALID,
                         "num_experts is %d and num_ranks %d; allowed are 1 "
                         "and up, and 1 to %d",
                         num_experts, num_ranks, EPX_MAX_RANKS);
    }
    if (rank < 0 || rank >= num_ranks) {
        return epx__fail(EPX_ERR_INVALID, "rank is %d; allowed are 0 to %d",
                         rank, num_ranks - 1);
    }
    *first_p = epx__first_expert(num_experts, num_ranks, rank);
    *count_p = epx__first_expert(num_experts, num_ranks, rank + 1) - *first_p;
    return EPX_OK;
}
