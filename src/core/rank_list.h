/* SPDX-License-Identifier: MIT */
/* "rank 3", "ranks 2, 5 and 7": ranks as a sentence names them. */
#ifndef EPX_CORE_RANK_LIST_H
#define EPX_CORE_RANK_LIST_H

#include <stdbool.h>
#include <stdint.h>

typedef struct epx__rank_list {
    char text[160];
} epx__rank_list_t;

/* The ranks for which listed(context, rank) holds; long lists end in "and N
 * more". */
epx__rank_list_t epx__rank_list_make(int32_t num_ranks,
                                     bool (*listed)(const void *context,
                                                    int32_t rank),
                                     const void *context);

#endif
