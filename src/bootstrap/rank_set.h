/* SPDX-License-Identifier: MIT */
/* A set of ranks, laid out as it travels: rank r is bit r % 8 of byte r / 8. */
#ifndef EPX_BOOTSTRAP_RANK_SET_H
#define EPX_BOOTSTRAP_RANK_SET_H

#include "core/rank_list.h"

#include <epx/epx.h>
#include <stdbool.h>
#include <stdint.h>

#define EPX__RANK_SET_BYTES (EPX_MAX_RANKS / 8)

typedef struct epx__rank_set {
    unsigned char bits[EPX__RANK_SET_BYTES];
} epx__rank_set_t;

static inline void
epx__rank_set_add(epx__rank_set_t *set, int32_t rank)
{
    set->bits[rank / 8] |= (unsigned char)(1u << (rank % 8));
}

/* Takes the set as a void pointer so as to serve epx__rank_list_make. */
static inline bool
epx__rank_set_has(const void *set, int32_t rank)
{
    const epx__rank_set_t *ranks = set;

    return (ranks->bits[rank / 8] >> (rank % 8) & 1) != 0;
}

/* "ranks 2, 5 and 7" */
static inline epx__rank_list_t
epx__rank_set_list(const epx__rank_set_t *set, int32_t num_ranks)
{
    return epx__rank_list_make(num_ranks, epx__rank_set_has, set);
}

#endif
