/* SPDX-License-Identifier: MIT */
/*
 * The agreement of core/mask.h, explored exhaustively: every order in which a
 * few ranks can take its steps, one access to shared memory each, while some
 * die between any two steps, and some are thought lost that are not.
 *
 * Each rank runs operations: it signals every peer that is not masked, one by
 * one, and waits for their signals.  When it learns that a rank is lost or that
 * the roll has grown it gives up, wherever it is, and agrees: reads the roll,
 * adds whom it misses, joins, looks whether the others have, and begins the
 * epoch with its first operation.  A rank that has run them all leaves.
 *
 * In every state:
 *     - somebody is not on the roll, and nobody is twice
 *     - of two ranks with operations open in different epochs, the one in the
 *       earlier epoch is masked in the later one
 *     - who waits finds no signal of a later epoch from a rank that takes part
 * and whenever nothing is left to do but to fail, every rank that lives has run
 * all its operations, or is masked and knows it.  States must not repeat on a
 * path, so that something comes of every step.
 *
 * Lest it finds nothing for its own faults, it must also find what is wrong
 * when a rule is left out.
 */
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_RANKS = 4, MOST_OPS = 2 };

/* Where a rank is. */
typedef enum place {
    AT_SIGNAL, /* to the peer `at` */
    AT_WAIT,
    AT_READ,  /* entry `at` of the roll */
    AT_ADD,   /* entry `at`, by a compare-and-swap */
    AT_JOIN,  /* tell the epoch `at` */
    AT_LOOK,  /* whether all have joined epoch `at` */
    AT_LEAVE, /* all operations are over */
    IS_GONE,
    IS_MASKED, /* and knows it */
    IS_DEAD,
} place_t;

typedef struct rank {
    uint8_t place;
    uint8_t at;
    uint8_t epoch;
    uint8_t op;
    uint8_t lost; /* bits: whom it thinks lost */
} rank_t;

typedef struct state {
    rank_t ranks[MOST_RANKS];
    uint8_t roll[MOST_RANKS];   /* 1 + rank; 0: free */
    uint8_t joined[MOST_RANKS]; /* as peers see it */
    /* At the rank, from the source: 1 + the epoch of its last signal. */
    uint8_t signals[MOST_OPS][MOST_RANKS][MOST_RANKS];
    uint8_t deaths;   /* that may still happen */
    uint8_t mistakes; /* the same of live ranks thought lost */
    uint8_t unused[2];
} state_t;

/* A rule that is left out. */
typedef enum flaw {
    NO_FLAW,
    NO_JOIN,   /* begins an epoch without waiting for the others */
    NO_SWAP,   /* adds to the roll without comparing */
    NO_GROWTH, /* the roll alone makes nobody give up */
    NO_SELF,   /* adds others though it is on the roll itself */
    NUM_FLAWS,
} flaw_t;

static const char *const flaw_names[NUM_FLAWS] = {
    "no flaw",
    "nobody waits for others to join",
    "the roll is written without comparing",
    "nobody looks at the roll unasked",
    "a masked rank masks others",
};

typedef struct model {
    int num_ranks;
    int num_ops;
    int deaths;
    int mistakes;
    flaw_t flaw;
} model_t;

static model_t model;
static const char *wrong; /* the first thing */

static void
expect(bool holds, const char *what)
{
    if (!holds && wrong == NULL) {
        wrong = what;
    }
}

/* ---- what a rank knows ---- */

/* Who is masked in an epoch, as bits. */
static unsigned
mask_of(const state_t *s, int epoch)
{
    unsigned mask = 0;

    for (int i = 0; i < epoch; i++) {
        mask |= s->roll[i] == 0 ? 0 : 1u << (s->roll[i] - 1);
    }
    return mask;
}

static bool
has_grown(const state_t *s, int epoch)
{
    return epoch < model.num_ranks && s->roll[epoch] != 0;
}

/* Whom the rank thinks lost who is not among the first `length` of the roll. */
static int
next_to_mask(const state_t *s, int r, int length)
{
    unsigned left = s->ranks[r].lost & ~mask_of(s, length);

    return left == 0 ? -1 : __builtin_ctz(left);
}

static bool
must_give_up(const state_t *s, int r)
{
    int epoch = s->ranks[r].epoch;

    return (has_grown(s, epoch) && model.flaw != NO_GROWTH) ||
           next_to_mask(s, r, epoch) >= 0;
}

/* ---- steps: false where the rank can only wait ---- */

static void
agree(rank_t *rank)
{
    rank->place = AT_READ;
    rank->at = 0;
}

static bool
step_signal(state_t *s, int r)
{
    rank_t *rank = &s->ranks[r];

    if (must_give_up(s, r)) {
        agree(rank);
        return true;
    }
    if (rank->at == model.num_ranks) {
        rank->place = AT_WAIT;
        rank->at = 0;
        return true;
    }
    if ((mask_of(s, rank->epoch) >> rank->at & 1) == 0) {
        s->signals[rank->op][rank->at][r] = (uint8_t)(rank->epoch + 1);
    }
    rank->at++;
    return true;
}

static bool
step_wait(state_t *s, int r)
{
    rank_t *rank = &s->ranks[r];
    unsigned mask = mask_of(s, rank->epoch);
    bool is_complete = true;

    for (int from = 0; from < model.num_ranks; from++) {
        int signal = s->signals[rank->op][r][from];

        if ((mask >> from & 1) == 0) {
            is_complete = is_complete && signal > rank->epoch;
            expect(signal <= rank->epoch + 1 ||
                       (mask_of(s, model.num_ranks) >> r & 1) != 0,
                   "a signal of a later epoch is found");
        }
    }
    if (is_complete) {
        rank->op++;
        rank->place = rank->op == model.num_ops ? AT_LEAVE : AT_SIGNAL;
        rank->at = 0;
        return true;
    }
    if (must_give_up(s, r)) {
        agree(rank);
        return true;
    }
    return false;
}

static bool
step_read(state_t *s, int r)
{
    rank_t *rank = &s->ranks[r];

    if (rank->at < model.num_ranks && s->roll[rank->at] != 0) {
        rank->at++;
        return true;
    }
    /* All that was there has been read. */
    if ((mask_of(s, rank->at) >> r & 1) != 0 && model.flaw != NO_SELF) {
        rank->place = IS_MASKED;
    } else if (next_to_mask(s, r, rank->at) >= 0) {
        rank->place = AT_ADD;
    } else {
        expect(rank->at > rank->epoch, "agreed on nothing new");
        rank->place = AT_JOIN;
    }
    return true;
}

static bool
step_add(state_t *s, int r)
{
    rank_t *rank = &s->ranks[r];

    expect(rank->at < model.num_ranks, "the roll is too short");
    if (rank->at < model.num_ranks &&
        (s->roll[rank->at] == 0 || model.flaw == NO_SWAP)) {
        s->roll[rank->at] = (uint8_t)(next_to_mask(s, r, rank->at) + 1);
    }
    agree(rank);
    return true;
}

static bool
step_join(state_t *s, int r)
{
    s->joined[r] = s->ranks[r].at;
    s->ranks[r].place = AT_LOOK;
    return true;
}

static bool
step_look(state_t *s, int r)
{
    rank_t *rank = &s->ranks[r];
    bool have_joined = true;

    if (has_grown(s, rank->at) || next_to_mask(s, r, rank->at) >= 0) {
        agree(rank);
        return true;
    }
    for (int other = 0; other < model.num_ranks; other++) {
        have_joined =
            have_joined && ((mask_of(s, rank->at) >> other & 1) != 0 ||
                            s->joined[other] == rank->at);
    }
    if (!have_joined && model.flaw != NO_JOIN) {
        return false;
    }
    rank->epoch = rank->at;
    rank->op = 0;
    rank->at = 0;
    rank->place = AT_SIGNAL;
    return true;
}

static bool
step(state_t *s, int r)
{
    switch ((place_t)s->ranks[r].place) {
    case AT_SIGNAL:
        return step_signal(s, r);
    case AT_WAIT:
        return step_wait(s, r);
    case AT_READ:
        return step_read(s, r);
    case AT_ADD:
        return step_add(s, r);
    case AT_JOIN:
        return step_join(s, r);
    case AT_LOOK:
        return step_look(s, r);
    case AT_LEAVE:
        s->ranks[r].place = IS_GONE;
        return true;
    case IS_GONE:
    case IS_MASKED:
    case IS_DEAD:
        break;
    }
    return false;
}

/* A rank learns that another has died or left. */
static bool
learn(state_t *s, int r, int other)
{
    rank_t *rank = &s->ranks[r];
    uint8_t place = s->ranks[other].place;

    if (rank->place >= AT_LEAVE || (place != IS_DEAD && place != IS_GONE) ||
        (rank->lost >> other & 1) != 0) {
        return false;
    }
    rank->lost |= (uint8_t)(1 << other);
    return true;
}

static bool
die(state_t *s, int r)
{
    if (s->ranks[r].place >= IS_GONE || s->deaths == 0) {
        return false;
    }
    s->ranks[r].place = IS_DEAD;
    s->deaths--;
    return true;
}

static bool
err(state_t *s, int r, int other)
{
    rank_t *rank = &s->ranks[r];

    if (rank->place >= AT_LEAVE || s->mistakes == 0 || r == other ||
        (rank->lost >> other & 1) != 0) {
        return false;
    }
    rank->lost |= (uint8_t)(1 << other);
    s->mistakes--;
    return true;
}

/* ---- what must hold ---- */

static bool
has_open(const rank_t *rank)
{
    return rank->place == AT_SIGNAL || rank->place == AT_WAIT;
}

static void
check_state(const state_t *s)
{
    unsigned seen = 0;

    for (int i = 0; i < model.num_ranks; i++) {
        unsigned bit = s->roll[i] == 0 ? 0 : 1u << (s->roll[i] - 1);

        expect((seen & bit) == 0, "a rank is on the roll twice");
        seen |= bit;
    }
    expect(seen != (1u << model.num_ranks) - 1, "all ranks are masked");
    for (int a = 0; a < model.num_ranks; a++) {
        for (int b = 0; b < model.num_ranks; b++) {
            const rank_t *early = &s->ranks[a], *late = &s->ranks[b];

            expect(!has_open(early) || !has_open(late) ||
                       early->epoch >= late->epoch ||
                       (mask_of(s, late->epoch) >> a & 1) != 0,
                   "two ranks that take part are at work in two epochs");
        }
    }
}

/* Nothing but failures could still happen. */
static void
check_end(const state_t *s)
{
    unsigned mask = mask_of(s, model.num_ranks);

    for (int r = 0; r < model.num_ranks; r++) {
        uint8_t place = s->ranks[r].place;

        expect(place == IS_GONE || place == IS_DEAD ||
                   (place == IS_MASKED && (mask >> r & 1) != 0),
               "a rank waits for ever");
    }
}

/* ---- the search: depth first, so that a path that bites its tail shows ----
 */

typedef struct seen {
    state_t state;
    bool is_used;
    bool is_on_path;
} seen_t;

static seen_t *table;
static size_t table_size, num_states;

static uint64_t
hash_of(const state_t *s)
{
    const unsigned char *bytes = (const unsigned char *)s;
    uint64_t hash = UINT64_C(14695981039346656037);

    for (size_t i = 0; i < sizeof(*s); i++) {
        hash = (hash ^ bytes[i]) * UINT64_C(1099511628211);
    }
    return hash ^ hash >> 29;
}

static size_t
place_in(const seen_t *places, size_t size, const state_t *s)
{
    size_t at = hash_of(s) & (size - 1);

    while (places[at].is_used &&
           memcmp(&places[at].state, s, sizeof(*s)) != 0) {
        at = (at + 1) & (size - 1);
    }
    return at;
}

static void *
take(size_t count, size_t size)
{
    void *memory = calloc(count, size);

    if (memory == NULL) {
        perror("mask_model");
        exit(1);
    }
    return memory;
}

static void
grow(void)
{
    size_t size = table_size == 0 ? 1 << 16 : table_size * 2;
    seen_t *larger = take(size, sizeof(*larger));

    for (size_t i = 0; i < table_size; i++) {
        if (table[i].is_used) {
            larger[place_in(larger, size, &table[i].state)] = table[i];
        }
    }
    free(table);
    table = larger;
    table_size = size;
}

/* One that is being left by its steps, one after the other. */
typedef struct frame {
    state_t state;
    int next; /* step to try */
    bool has_moved;
} frame_t;

static frame_t *path;
static size_t path_length, path_room;

static void
enter(const state_t *s)
{
    frame_t *longer;
    size_t at;

    if (num_states * 2 >= table_size) {
        grow();
    }
    at = place_in(table, table_size, s);
    if (table[at].is_used) {
        expect(!table[at].is_on_path, "a state repeats");
        return;
    }
    table[at] = (seen_t){ *s, true, true };
    num_states++;
    check_state(s);
    if (path_length == path_room) {
        path_room = path_room * 2 + 64;
        longer = realloc(path, path_room * sizeof(*path));
        if (longer == NULL) {
            perror("mask_model");
            exit(1);
        }
        path = longer;
    }
    path[path_length++] = (frame_t){ *s, 0, false };
}

/* The steps of all ranks, what they learn, then what fails; false beyond. */
static bool
try_step(state_t *s, int which, bool *moves_p, bool *is_fault_p)
{
    int n = model.num_ranks;
    int kind = which / (n * n), r = which / n % n, other = which % n;

    *moves_p = false;
    *is_fault_p = kind >= 2;
    switch (kind) {
    case 0:
        *moves_p = other == 0 && step(s, r);
        return true;
    case 1:
        *moves_p = learn(s, r, other);
        return true;
    case 2:
        *moves_p = other == 0 && die(s, r);
        return true;
    case 3:
        *moves_p = err(s, r, other);
        return true;
    default:
        return false;
    }
}

static void
leave(const frame_t *frame)
{
    if (!frame->has_moved) {
        check_end(&frame->state);
    }
    table[place_in(table, table_size, &frame->state)].is_on_path = false;
    path_length--;
}

static void
explore(void)
{
    state_t start;

    memset(&start, 0, sizeof(start));
    start.deaths = (uint8_t)model.deaths;
    start.mistakes = (uint8_t)model.mistakes;
    enter(&start);
    while (path_length > 0 && wrong == NULL) {
        frame_t *frame = &path[path_length - 1];
        state_t next = frame->state;
        bool moves, is_fault;

        if (!try_step(&next, frame->next++, &moves, &is_fault)) {
            leave(frame);
        } else if (moves) {
            frame->has_moved = frame->has_moved || !is_fault;
            enter(&next);
        }
    }
}

/* Whether what was found is what ought to be. */
static bool
run(model_t its)
{
    bool is_right;

    model = its;
    wrong = NULL;
    num_states = 0;
    table_size = 0;
    path_length = 0;
    grow();
    explore();
    is_right = (wrong == NULL) == (model.flaw == NO_FLAW);
    printf("%d ranks, %d operations, %d deaths, %d mistakes, %s: %zu states, "
           "%s%s\n",
           model.num_ranks, model.num_ops, model.deaths, model.mistakes,
           flaw_names[model.flaw], num_states,
           wrong == NULL ? "all is well" : wrong,
           is_right ? "" : " (which is WRONG)");
    free(table);
    table = NULL;
    return is_right;
}

int
main(int argc, char **argv)
{
    const model_t models[] = {
        { 2, 2, 1, 1, NO_FLAW }, { 3, 1, 1, 0, NO_FLAW },
        { 3, 1, 0, 1, NO_FLAW }, { 3, 1, 1, 1, NO_JOIN },
        { 3, 1, 1, 1, NO_SWAP }, { 3, 1, 1, 1, NO_GROWTH },
        { 3, 1, 0, 2, NO_SELF }, { 3, 1, 1, 1, NO_FLAW },
        { 3, 1, 0, 2, NO_FLAW },
    };
    size_t count = sizeof(models) / sizeof(*models) - (argc > 1 ? 0 : 2);
    bool is_well = true;

    (void)argv; /* any argument: the last two as well, in a minute */
    for (size_t i = 0; i < count; i++) {
        is_well = run(models[i]) && is_well;
    }
    free(path);
    return is_well ? 0 : 1;
}
