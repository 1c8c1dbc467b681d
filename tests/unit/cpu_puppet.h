/* SPDX-License-Identifier: MIT */
/*
 * Two ranks of one process.  Rank 0, the victim, runs the library; rank 1 is a
 * puppet of the test, which writes into the victim's segment all that a real
 * rank would have written for one plan, one dispatch and one combine, and then
 * spoils some of it.
 */
#ifndef TESTS_UNIT_CPU_PUPPET_H
#define TESTS_UNIT_CPU_PUPPET_H

#include "api_common.h"
#include "conformance/world.h"
#include "core/group.h"

/* Both ranks route by api_topk_idx: experts 0..2 are the victim's. */
enum {
    PUPPET_RANKS = 2,
    PUPPET_LOCAL = API_EXPERTS / PUPPET_RANKS,
    PUPPET_HIDDEN = 64, /* F8E4M3 to the experts */
    PUPPET_OUTPUT = 32, /* F16 back */
    PUPPET_SCALES = 2,
    PUPPET_ROWS = PUPPET_LOCAL * PUPPET_RANKS * API_TOKENS, /* at most */
    PUPPET_HEAP = 1 << 16,
    PUPPET_STRIDE = 1 << 12, /* from one array of the puppet to the next */
    /* Receive slots: head, experts and weights; then scales and payload. */
    PUPPET_SLOT_HEAD = 64,
    PUPPET_SLOT = PUPPET_SLOT_HEAD + 128,
};

/* The steps of the one layer. */
enum { STEP_COUNTS = 1, STEP_DISPATCH = 2, STEP_COMBINE = 3 };

typedef struct puppet {
    epx_group_t *victim;
    epx_group_t *strings; /* rank 1's group: how the test reaches the victim */
    epx_layout_t layout;
    bool send_only; /* the dispatch goes through receive slots */
    bool no_weights;
    /* Runs after the victim's plan is made; NULL for nothing. */
    void (*late)(struct puppet *puppet, int64_t number);
    int64_t number;
    const char *call; /* the victim's last */
} puppet_t;

/* Spoils what the puppet has said. */
typedef void puppet_spoil_fn(puppet_t *puppet, int64_t number);

/* What the puppet wrote into the victim's segment. */
epx__count_row_t *puppet_counts(const puppet_t *puppet);
uint32_t *puppet_tokens(const puppet_t *puppet); /* [R] */
uint32_t *puppet_rows(const puppet_t *puppet);   /* [E] */
epx__post_t *puppet_post(const puppet_t *puppet, uint64_t step);
/* The victim's receive slot of the puppet's ordinal'th token, with `late` and
 * send_only; parity is 0 or 1. */
char *puppet_slot(const puppet_t *puppet, int parity, int ordinal);

/* Makes the two ranks and says everything rightly; and releases them. */
void puppet_open(puppet_t *puppet);
void puppet_close(puppet_t *puppet);

/* The victim's plan, counts, dispatch and combine, up to the first error. */
epx_status_t puppet_play(puppet_t *puppet);

/* NULL, or what the victim wrote where it had no business. */
const char *puppet_damage(const puppet_t *puppet);

/* Row r of the puppet's array as the victim's dispatch left it. */
int32_t puppet_src_token(const puppet_t *puppet, int row);

/*
 * Plays in a process of its own, in which spoil(puppet, number) has been
 * called.  The victim must refuse with EPX_ERR_PEER_DATA or EPX_ERR_MISMATCH
 * and leave everything alone.  late: call spoil when the victim's plan is made.
 * harmless: it may also take no notice.
 */
typedef struct puppet_case {
    const char *name;
    epx_layout_t layout;
    bool send_only;
    bool no_weights;
    bool late;
    bool harmless;
    puppet_spoil_fn *spoil;
    int64_t number;
} puppet_case_t;

void puppet_check(const puppet_case_t *one);
/* For each layout that is possible. */
void puppet_check_layouts(puppet_case_t one);

#endif
