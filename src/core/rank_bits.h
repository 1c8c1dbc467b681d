/* SPDX-License-Identifier: MIT */
/* Sets of ranks: a bit for each, u64 [EPX_MAX_RANKS / 64]. */
#ifndef EPX_CORE_RANK_BITS_H
#define EPX_CORE_RANK_BITS_H

#include <stdbool.h>
#include <stdint.h>

static inline bool
epx__has_rank(const uint64_t *ranks, int32_t rank)
{
    uint32_t at = (uint32_t)rank;

    return (ranks[at / 64] >> at % 64 & 1) != 0;
}

#endif
