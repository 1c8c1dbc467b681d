/* SPDX-License-Identifier: MIT */
/* Where experts live and how much a row weighs: arithmetic that every engine
 * shares.  Plain C that nvcc accepts too. */
#ifndef EPX_ENGINE_COMMON_PLACEMENT_H
#define EPX_ENGINE_COMMON_PLACEMENT_H

#include "core/host_device.h"

#include <epx/epx.h>
#include <stdint.h>

/* The first expert of a rank: contiguous blocks, the first E mod R ranks hold
 * one more.  With rank == num_ranks, E. */
EPX__INLINE int32_t
epx__first_expert(int32_t num_experts, int32_t num_ranks, int32_t rank)
{
    int32_t quotient = num_experts / num_ranks;
    int32_t extra = num_experts % num_ranks;

    return rank * quotient + (rank < extra ? rank : extra);
}

/* Scales that quantising a row of H channels makes, in elements of 4 bytes. */
EPX__INLINE int64_t
epx__quantize_num_scales(epx_quantize_t quantize, int64_t hidden)
{
    int64_t blocks = (hidden + EPX_SCALE_BLOCK - 1) / EPX_SCALE_BLOCK;

    switch (quantize) {
    case EPX_QUANTIZE_F8E4M3_F32:
    case EPX_QUANTIZE_F8E4M3_POW2:
        return blocks;
    case EPX_QUANTIZE_F8E4M3_UE8M0:
        return (blocks + 3) / 4;
    case EPX_QUANTIZE_NONE:
    case EPX_QUANTIZE_LOGFMT10: /* has none of its own */
        break;
    }
    return 0;
}

#endif
