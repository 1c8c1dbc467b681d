/* SPDX-License-Identifier: MIT */
#ifndef MOE_LM_CHECK_H
#define MOE_LM_CHECK_H

#include <epx/epx.h>

#include <stdio.h>
#include <stdlib.h>

/* Ends the program with the library's own sentence when a call fails.  The
 * other ranks then end too: their next wait for this one runs out. */
#define CHECK(call)                                            \
    do {                                                       \
        if ((call) != EPX_OK) {                                \
            fprintf(stderr, "moe_lm: %s\n", epx_last_error()); \
            exit(EXIT_FAILURE);                                \
        }                                                      \
    } while (0)

#endif
