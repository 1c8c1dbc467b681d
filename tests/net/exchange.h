/* SPDX-License-Identifier: MIT */
/* What every network must do right: signals with what they carry, and transfers
 * of many sizes and shapes between all ranks at once. */
#ifndef EPX_TESTS_NET_EXCHANGE_H
#define EPX_TESTS_NET_EXCHANGE_H

#include "world.h"

/* As many steps as sizes, the bytes of the longest transfer of each. */
typedef struct exchange {
    const uint64_t *sizes;
    int num_sizes;
    uint64_t seed;
} exchange_t;

/* world->argument is an exchange_t. */
void exchange_main(rank_t *rank);

#endif
