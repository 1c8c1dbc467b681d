/* SPDX-License-Identifier: MIT */
#include "engine/engine.h"

const epx__engine_ops_t *
epx__engine_look(epx_device_t device, const char **why_p)
{
    switch (device) {
    case EPX_DEVICE_CPU:
        return &epx__engine_cpu;
    case EPX_DEVICE_CUDA:
        return epx__engine_module(why_p);
    }
    *why_p = "allowed are EPX_DEVICE_CPU (0) and EPX_DEVICE_CUDA (1)";
    return NULL;
}

epx_status_t
epx__engine_find(epx_device_t device, const epx__engine_ops_t **engine_p)
{
    const char *why = "";

    *engine_p = epx__engine_look(device, &why);
    return *engine_p != NULL
               ? EPX_OK
               : epx__fail(EPX_ERR_UNSUPPORTED, "the device is %d: %s",
                           (int)device, why);
}
