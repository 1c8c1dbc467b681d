/* SPDX-License-Identifier: MIT */
/* In the place of engine/engine_module.c: the emulated module is linked. */
#include "engine/engine.h"

extern const epx__engine_ops_t epx__engine_cuda;

const epx__engine_ops_t *
epx__engine_module(const char **why_p)
{
    *why_p = "";
    return &epx__engine_cuda;
}
