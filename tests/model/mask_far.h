/* SPDX-License-Identifier: MIT */
/* What tests/model/mask_far_model.c explores: what ranks know, and which steps
 * they take. */
#ifndef EPX_TESTS_MODEL_MASK_FAR_H
#define EPX_TESTS_MODEL_MASK_FAR_H

#include <stdbool.h>
#include <stdint.h>

enum {
    MOST_RANKS = 4,
    MOST_PAIRS = MOST_RANKS * (MOST_RANKS - 1),
    MOST_OPS = 2,
};

/* Where a rank is. */
typedef enum place {
    AT_SIGNAL, /* to the peer `at` */
    AT_WAIT,
    AT_REST,  /* all operations are over */
    AT_KNOWS, /* the first stage of a pledge; these three are in their order */
    AT_JOINED,
    AT_READY,
    IS_MASKED, /* and knows it */
    IS_REFUSED,
    IS_DEAD,
} place_t;

/* Sets of ranks are bits. */
typedef struct rank {
    uint32_t place : 4;
    uint32_t at : 3;
    uint32_t op : 2;
    uint32_t roll : 4;
    uint32_t aims : 4;    /* what it has read of the roll */
    uint32_t begun : 4;   /* who is masked in its epoch */
    uint32_t renewed : 4; /* the same of its net */
    uint32_t seen : 4;    /* who had come as far, and has gone on since */
    uint32_t hears : 3;   /* 1 + whose pledge goes on the roll; 0: nobody's */
} rank_t;

/* From one rank to another.  A pledge is a set, and the stage above it. */
typedef struct pair {
    uint8_t told : 7;
    uint8_t is_on_way : 1; /* what was told */
    uint8_t heard;
    uint8_t on_way : 4; /* signals */
    uint8_t arrived : 4;
} pair_t;

typedef struct state {
    rank_t ranks[MOST_RANKS];
    pair_t pairs[MOST_PAIRS];
    uint16_t epochs;         /* bits: the sets that have begun */
    uint16_t links : 6;      /* bits: those that are cut */
    uint16_t deaths : 2;     /* that may still happen */
    uint16_t mistakes : 2;   /* the same of live ranks that are named */
    uint16_t cuts : 2;       /* of single links */
    uint16_t partitions : 2; /* of the network in two */
} state_t;

/* A rule that is left out. */
typedef enum flaw {
    NO_FLAW,
    NO_MAJORITY, /* whoever remains goes on */
    NO_LOWEST,   /* so does each half */
    NO_SETS,     /* joins count if as many are masked */
    NO_JOIN,     /* is ready without waiting for the others */
    NO_READY,    /* begins without waiting for their nets */
    NO_REST,     /* joins with signals under way */
    NO_SELF,     /* masks whom masked ranks mask */
    NO_GRACE,    /* gives up a lower rank at once */
    NO_LEAVE,    /* stays when it is masked or refused */
    NUM_FLAWS,
} flaw_t;

typedef struct model {
    int num_ranks;
    int num_ops;
    bool starts_idle; /* nobody works in the first epoch */
    int deaths;
    int mistakes;
    int cuts;
    int partitions;
    /* Of two ranks that have lost touch, the higher waits as long as anything
     * else happens before it gives up the lower: less to explore. */
    bool has_grace;
    flaw_t flaw;
} model_t;

extern model_t model;
extern const char *wrong; /* the first thing */

void expect(bool is_so, const char *what);

/* Every kind of step, of one rank, or of one with another. */
typedef enum kind {
    STEP_READ,
    STEP_TELL,
    STEP_JOIN,
    STEP_RENEW,
    STEP_BEGIN,
    STEP_SIGNAL,
    STEP_WAIT,
    STEP_ADD,
    STEP_PLEDGE, /* from here on of two ranks */
    STEP_ARRIVE,
    STEP_NOTICE,
    STEP_LATE, /* only when there is nothing else to do */
    STEP_NAME, /* from here on what fails */
    STEP_CUT,
    STEP_DIE,
    STEP_PART, /* a set in the place of a rank */
    NUM_STEPS,
} kind_t;

extern const char *const step_names[NUM_STEPS];

/* Steps are numbered by kind, rank and other rank.  False where that one cannot
 * be taken. */
bool try_step(state_t *s, int which);

static inline bool
has(unsigned set, int r)
{
    return (set >> r & 1) != 0;
}

static inline int
size_of(unsigned set)
{
    return __builtin_popcount(set);
}

static inline bool
holds(unsigned set, unsigned part)
{
    return (part & ~set) == 0;
}

static inline bool
is_open(const rank_t *rank)
{
    return rank->place == AT_SIGNAL || rank->place == AT_WAIT;
}

static inline bool
is_agreeing(const rank_t *rank)
{
    return rank->place >= AT_KNOWS && rank->place <= AT_READY;
}

static inline bool
takes_part(const rank_t *rank)
{
    return rank->place < IS_MASKED;
}

static inline unsigned
set_in(unsigned pledge)
{
    return pledge & ((1u << MOST_RANKS) - 1);
}

static inline const pair_t *
look_at(const state_t *s, int from, int to)
{
    return &s->pairs[from * (model.num_ranks - 1) + (to < from ? to : to - 1)];
}

#endif
