/* SPDX-License-Identifier: MIT */
#include "core/rank_list.h"

#include <stdio.h>

#define MAX_NAMED 12

epx__rank_list_t
epx__rank_list_make(int32_t num_ranks,
                    bool (*listed)(const void *context, int32_t rank),
                    const void *context)
{
    epx__rank_list_t list;
    int32_t named[MAX_NAMED];
    int32_t count = 0;
    int32_t shown;
    size_t at;

    for (int32_t rank = 0; rank < num_ranks; rank++) {
        if (listed(context, rank)) {
            if (count < MAX_NAMED) {
                named[count] = rank;
            }
            count++;
        }
    }
    shown = count < MAX_NAMED ? count : MAX_NAMED;
    at = (size_t)snprintf(list.text, sizeof(list.text), "%s",
                          count == 0   ? "no rank"
                          : count == 1 ? "rank "
                                       : "ranks ");
    for (int32_t i = 0; i < shown; i++) {
        const char *before = i == 0 ? "" : i == count - 1 ? " and " : ", ";

        at += (size_t)snprintf(list.text + at, sizeof(list.text) - at, "%s%d",
                               before, named[i]);
    }
    if (count > shown) {
        (void)snprintf(list.text + at, sizeof(list.text) - at, " and %d more",
                       count - shown);
    }
    return list;
}
