/* SPDX-License-Identifier: MIT */
/* What ranks of several nodes tell each other when ranks are masked:
 * core/mask.h. */
#ifndef EPX_CORE_PLEDGE_H
#define EPX_CORE_PLEDGE_H

#include <epx/epx.h>
#include <stdint.h>

/* How far a rank has come towards going on without those of `masked`. */
typedef enum epx__stage {
    EPX__STAGE_KNOWS = 1, /* of all of them */
    EPX__STAGE_JOINED,    /* takes part in nothing that one of them does */
    EPX__STAGE_READY,     /* all that remain have joined; it can be signalled */
} epx__stage_t;

/* What a rank tells those of other nodes when ranks are masked. */
typedef struct epx__pledge {
    uint64_t masked[EPX_MAX_RANKS / 64]; /* a bit for each rank */
    uint64_t last_step; /* that it may have signalled, once it has joined */
    uint32_t stage;     /* epx__stage_t */
    uint32_t unused;
} epx__pledge_t;

#endif
