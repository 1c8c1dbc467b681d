/* SPDX-License-Identifier: MIT */
#include "engine/engine.h"

const epx__engine_ops_t *const epx__engines[] = {
    &epx__engine_cpu,
    NULL,
};

const epx__engine_ops_t *
epx__engine_find(epx_device_t device)
{
    for (int i = 0; epx__engines[i] != NULL; i++) {
        if (epx__engines[i]->device == device) {
            return epx__engines[i];
        }
    }
    return NULL;
}
