/* SPDX-License-Identifier: MIT */
/*
 * The agreement of core/mask.h between nodes, explored exhaustively: every
 * order in which a few ranks, each a node of its own, can take its steps and
 * hear each other, while some die, some are named that live, and the network
 * is cut.
 *
 * What a rank knows is its own: its roll, and the last pledge that it has
 * heard of each peer.  Pledges and signals are messages, which arrive late, or
 * never where a rank dies or a link is cut; one pledge at most is under way to
 * a peer.
 *
 * In an epoch each rank runs operations: it signals the peers that are not
 * masked, one by one, and waits for their signals.  When its roll has grown it
 * gives up, wherever it is, and agrees: pledges what stands there, joins when
 * no signal of its own is under way, makes its net ready when all have joined,
 * and begins when all are ready.  Who is masked, or refused for want of a
 * majority, leaves, and is lost to the others.
 *
 * Whom a rank notices to be lost it puts on its roll at once: nobody could see
 * the difference.  What stands in a pledge goes there one by one, while the
 * rank goes on.  It may also act on what it has read of the roll, or heard of
 * a peer, when there is more by now.  What a net tells masked ranks before it
 * cuts their links is left to chance.
 *
 * In every state:
 *     - of two epochs that have begun, whenever and wherever, one masks all
 *       that the other does; so they are the same if they mask equally many
 *     - of two ranks with operations open in different epochs, the one in the
 *       earlier epoch is masked in the later one
 *     - when a rank is ready, or has begun, all that remain have joined
 *     - a signal comes to a net that is ready for its epoch, and no later one
 * and whenever nothing is left to do but to fail, every rank that lives has
 * run all its operations, or is masked or refused and knows it.  If fewer than
 * half have died, and that is all, nobody is; if one has been named, or two
 * have lost touch, one; if the network is cut in two, the smaller part.  Every
 * step makes something grow that never shrinks, so that no path is endless.
 *
 * Lest it finds nothing for its own faults, it must also find what is wrong
 * when a rule is left out.  It goes breadth first, and tells the shortest way
 * to what it finds.
 */
#include "mask_far.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const flaw_names[NUM_FLAWS] = {
    "no flaw",
    "a minority goes on",
    "either half goes on",
    "the masks of who has joined are only counted",
    "nobody waits for others to join",
    "nobody waits for others to be ready",
    "a rank joins with signals under way",
    "a masked rank masks others",
    "of two ranks each gives up the other at once",
    "who is masked or refused stays",
};

static bool shows_ways; /* also to what flaws do */

/* ---- what must hold ---- */

static bool
has_joined(const rank_t *rank, unsigned set)
{
    return !takes_part(rank) || (rank->aims == set ? rank->place != AT_KNOWS
                                                   : holds(rank->aims, set));
}

static void
check_pair(const state_t *s, int a, int b)
{
    const rank_t *one = &s->ranks[a], *other = &s->ranks[b];

    if (takes_part(one) && one->place != AT_KNOWS && one->place != AT_JOINED) {
        expect(has(one->aims, b) || has_joined(other, one->aims),
               "a rank goes on, and one that remains has not joined");
    }
    if (is_open(one) && is_open(other) && one->begun != other->begun) {
        expect((holds(other->begun, one->begun) && has(other->begun, a)) ||
                   (holds(one->begun, other->begun) && has(one->begun, b)),
               "two ranks that take part are at work in two epochs");
    }
}

static void
check_state(const state_t *s)
{
    for (int a = 0; a < model.num_ranks; a++) {
        for (int b = 0; b < model.num_ranks; b++) {
            if (a != b) {
                check_pair(s, a, b);
            }
        }
    }
}

/* What grows with every step. */
static int
progress_of(const state_t *s)
{
    int progress = 128 * size_of(s->links) - s->deaths - s->mistakes - s->cuts -
                   s->partitions;

    for (int r = 0; r < model.num_ranks; r++) {
        const rank_t *rank = &s->ranks[r];
        int at = is_agreeing(rank) ? 16 * (rank->place - AT_KNOWS)
                 : is_open(rank)   ? 48 + 12 * rank->op + 2 * rank->at
                                   : 127;

        at += rank->place == AT_WAIT ? 10 : 0;
        progress += takes_part(rank) ? 128 * size_of(rank->aims) + at : 1 << 12;
        progress += 2 * size_of(rank->roll) - (rank->hears != 0);
    }
    for (int i = 0; i < MOST_PAIRS; i++) {
        const pair_t *pair = &s->pairs[i];

        progress += 8 * size_of(set_in(pair->told)) +
                    2 * (pair->told >> MOST_RANKS) - pair->is_on_way -
                    pair->on_way;
    }
    return progress;
}

/* How many have to get through, after what has happened. */
static int
must_get_through(const state_t *s)
{
    int deaths = model.deaths - s->deaths, cuts = model.cuts - s->cuts;
    int mistakes = model.mistakes - s->mistakes;
    int partitions = model.partitions - s->partitions;
    int num_ranks = model.num_ranks;

    if (mistakes + cuts + partitions > 1 ||
        (deaths > 0 && mistakes + cuts + partitions > 0) ||
        2 * deaths >= num_ranks || num_ranks == 2) {
        return 0;
    }
    if (mistakes + cuts > 0) {
        return model.has_grace || num_ranks == 3 ? num_ranks - 1 : 0;
    }
    return partitions > 0 ? (num_ranks + 1) / 2 : num_ranks - deaths;
}

static size_t num_ends, num_losses; /* the latter: where nobody is left */

/* Nothing but failures could still happen. */
static void
check_end(const state_t *s)
{
    int through = 0;

    for (int r = 0; r < model.num_ranks; r++) {
        expect(s->ranks[r].place == AT_REST || !takes_part(&s->ranks[r]),
               "a rank waits for ever");
        through += s->ranks[r].place == AT_REST;
    }
    expect(through >= must_get_through(s), "too few ranks get through");
    num_ends++;
    num_losses += through == 0;
}

/* ---- the search: breadth first ---- */

enum { CHUNK = 1 << 16, MOST_CHUNKS = 1 << 14 };

/* A state, and how it was come to. */
typedef struct seen {
    state_t state;
    uint32_t from;
    uint16_t step;
} seen_t;

static seen_t *chunks[MOST_CHUNKS];
static uint32_t *table; /* 1 + the number of a state; 0: free */
static size_t table_size, num_states;

static seen_t *
seen_at(size_t number)
{
    return &chunks[number / CHUNK][number % CHUNK];
}

static uint64_t
hash_of(const state_t *s)
{
    uint64_t words[sizeof(*s) / sizeof(uint64_t)];
    uint64_t hash = 0;

    _Static_assert(sizeof(words) == sizeof(*s), "whole words");
    memcpy(words, s, sizeof(words));
    for (size_t i = 0; i < sizeof(words) / sizeof(*words); i++) {
        hash = (hash ^ words[i]) * UINT64_C(0x9e3779b97f4a7c15);
        hash ^= hash >> 32;
    }
    return hash;
}

static size_t
place_of(const state_t *s)
{
    size_t at = hash_of(s) & (table_size - 1);

    while (table[at] != 0 &&
           memcmp(&seen_at(table[at] - 1)->state, s, sizeof(*s)) != 0) {
        at = (at + 1) & (table_size - 1);
    }
    return at;
}

static void *
take(size_t count, size_t size)
{
    void *memory = calloc(count, size);

    if (memory == NULL) {
        perror("mask_far_model");
        exit(1);
    }
    return memory;
}

static void
grow(void)
{
    free(table);
    table_size = table_size == 0 ? 1 << 16 : table_size * 2;
    table = take(table_size, sizeof(*table));
    for (size_t i = 0; i < num_states; i++) {
        table[place_of(&seen_at(i)->state)] = (uint32_t)(i + 1);
    }
}

static void
enter(const state_t *s, size_t from, int which)
{
    size_t at = place_of(s);

    if (table[at] != 0) {
        return;
    }
    if (num_states / CHUNK == MOST_CHUNKS) {
        (void)fprintf(stderr, "mask_far_model: too many states\n");
        exit(1);
    }
    if (chunks[num_states / CHUNK] == NULL) {
        chunks[num_states / CHUNK] = take(CHUNK, sizeof(seen_t));
    }
    *seen_at(num_states) = (seen_t){ *s, (uint32_t)from, (uint16_t)which };
    num_states++;
    table[at] = (uint32_t)num_states;
    check_state(s);
    if (num_states * 3 >= table_size * 2) {
        grow();
    }
}

/* All of some kinds; whether there are any. */
static bool
leave_by(size_t number, int first, int end, int *which_p)
{
    int per_kind = model.num_ranks * model.num_ranks;
    int progress = progress_of(&seen_at(number)->state);
    bool any = false;

    for (int i = first * per_kind; i < end * per_kind && wrong == NULL; i++) {
        bool is_of_one = i < STEP_PLEDGE * per_kind;
        state_t next;

        if (is_of_one && i % model.num_ranks != 0) {
            continue;
        }
        next = seen_at(number)->state;
        if (try_step(&next, i)) {
            any = true;
            *which_p = i;
            expect(progress_of(&next) > progress, "a step is none");
            enter(&next, number, i);
        }
    }
    return any;
}

static void
print_set(unsigned set)
{
    const char *comma = "";

    printf("{");
    for (int r = 0; r < MOST_RANKS; r++) {
        if (has(set, r)) {
            printf("%s%d", comma, r);
            comma = " ";
        }
    }
    printf("}");
}

static void
print_result(const rank_t *before, const rank_t *after)
{
    if (after->place != before->place && after->place == IS_MASKED) {
        printf(", and is masked");
    } else if (after->place != before->place && after->place == IS_REFUSED) {
        printf(", and is refused");
    }
    printf("\n");
}

static void
print_step(const state_t *before, int which)
{
    static const char *const stages[] = { "nothing", "knows", "joined",
                                          "ready" };
    int n = model.num_ranks, at = which % (n * n);
    kind_t kind = (kind_t)(which / (n * n));
    int r = at / n, other = at % n;
    state_t after = *before;

    (void)try_step(&after, which);
    if (kind == STEP_PART) {
        printf("    the network is cut: ");
        print_set((unsigned)at);
        printf(" from the others\n");
        return;
    }
    printf("    rank %d %s", r, step_names[kind]);
    if (kind >= STEP_PLEDGE && kind <= STEP_CUT) {
        printf(" %d", other);
    }
    if (kind == STEP_PLEDGE) {
        unsigned told = look_at(before, other, r)->told;

        printf(": %s ", stages[told >> MOST_RANKS]);
        print_set(set_in(told));
    }
    if (kind <= STEP_BEGIN) {
        printf(": ");
        print_set(kind == STEP_READ ? before->ranks[r].roll
                                    : before->ranks[r].aims);
    }
    print_result(&before->ranks[r], &after.ranks[r]);
}

/* How the state was come to. */
static void
print_way(size_t number)
{
    const seen_t *seen = seen_at(number);

    if (number > 0) {
        print_way(seen->from);
        print_step(&seen_at(seen->from)->state, seen->step);
    }
}

static void
explore(void)
{
    state_t start;
    int which = -1;

    memset(&start, 0, sizeof(start));
    start.epochs = 1;
    start.deaths = (unsigned)model.deaths & 3;
    start.mistakes = (unsigned)model.mistakes & 3;
    start.cuts = (unsigned)model.cuts & 3;
    start.partitions = (unsigned)model.partitions & 3;
    for (int r = 0; r < model.num_ranks; r++) {
        start.ranks[r].place = model.starts_idle ? AT_REST : AT_SIGNAL;
    }
    enter(&start, 0, 0);
    for (size_t i = 0; i < num_states && wrong == NULL; i++) {
        bool any = leave_by(i, 0, STEP_LATE, &which) ||
                   leave_by(i, STEP_LATE, STEP_NAME, &which);

        if (!any && wrong == NULL) {
            check_end(&seen_at(i)->state);
            which = -1;
        }
        if (wrong == NULL) {
            (void)leave_by(i, STEP_NAME, NUM_STEPS, &which);
        }
        if (wrong != NULL && (shows_ways || model.flaw == NO_FLAW)) {
            print_way(i);
            if (which >= 0) {
                print_step(&seen_at(i)->state, which);
            }
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
    num_ends = 0;
    num_losses = 0;
    table_size = 0;
    grow();
    explore();
    is_right = (wrong == NULL) == (model.flaw == NO_FLAW);
    printf("%d ranks, %d operations%s, %d deaths, %d named, %d cuts, "
           "%d partitions, %s, %s: %zu states, %zu ends (nobody is left in "
           "%zu), %s%s\n",
           model.num_ranks, model.num_ops,
           model.starts_idle ? " once some are masked" : "", model.deaths,
           model.mistakes, model.cuts, model.partitions,
           model.has_grace ? "with grace" : "without grace",
           flaw_names[model.flaw], num_states, num_ends, num_losses,
           wrong == NULL ? "all is well" : wrong,
           is_right ? "" : " (which is WRONG)");
    (void)fflush(stdout);
    for (size_t i = 0; i < MOST_CHUNKS; i++) {
        free(chunks[i]);
        chunks[i] = NULL;
    }
    free(table);
    table = NULL;
    return is_right;
}

static int
run_one(char **numbers)
{
    int n[9];

    for (int i = 0; i < 9; i++) {
        n[i] = atoi(numbers[i]);
    }
    if (n[0] < 2 || n[0] > MOST_RANKS || n[1] < 1 || n[1] > MOST_OPS ||
        n[8] < 0 || n[8] >= NUM_FLAWS) {
        (void)fprintf(stderr, "mask_far_model: no such model\n");
        return 2;
    }
    return run((model_t){ n[0], n[1], n[2] != 0, n[3] & 3, n[4] & 3, n[5] & 3,
                          n[6] & 3, n[7] != 0, (flaw_t)n[8] })
               ? 0
               : 1;
}

/*
 * Without arguments: what is explored in seconds, and each flaw.  With one,
 * more of it, in minutes and GiB.  With nine, one model: ranks, operations,
 * deaths, ranks named, cuts, partitions, grace (0 or 1), flaw.
 */
int
main(int argc, char **argv)
{
    static const model_t models[] = {
        { 2, 2, false, 1, 1, 1, 1, false, NO_FLAW },
        { 3, 2, false, 1, 0, 0, 0, true, NO_FLAW },
        { 3, 1, false, 2, 0, 0, 0, false, NO_FLAW },
        { 3, 1, false, 0, 1, 0, 0, true, NO_FLAW },
        { 3, 1, false, 1, 0, 1, 0, true, NO_FLAW },
        { 3, 1, false, 1, 0, 0, 1, true, NO_FLAW },
        { 3, 1, false, 0, 0, 1, 0, false, NO_FLAW },
        { 3, 1, false, 0, 0, 0, 1, false, NO_FLAW },
        { 4, 1, true, 1, 0, 0, 0, true, NO_FLAW },
        { 4, 1, true, 0, 0, 1, 0, true, NO_FLAW },
        { 4, 1, true, 0, 0, 0, 1, true, NO_FLAW },
        { 3, 1, false, 0, 0, 0, 1, true, NO_MAJORITY },
        { 4, 1, true, 0, 0, 0, 1, true, NO_LOWEST },
        { 3, 1, false, 0, 1, 1, 0, true, NO_SETS },
        { 3, 1, false, 1, 0, 0, 0, true, NO_JOIN },
        { 3, 1, false, 1, 0, 0, 0, true, NO_READY },
        { 3, 1, false, 1, 0, 0, 0, true, NO_REST },
        { 3, 1, false, 0, 0, 1, 0, false, NO_SELF },
        { 3, 1, false, 1, 1, 0, 0, true, NO_LEAVE },
    };
    static const model_t larger[] = {
        { 3, 1, false, 1, 1, 0, 0, true, NO_FLAW },
        { 3, 1, false, 0, 1, 1, 0, true, NO_FLAW },
        { 3, 2, false, 1, 0, 1, 0, false, NO_FLAW },
        { 3, 1, false, 2, 0, 1, 0, false, NO_FLAW },
        { 3, 1, false, 1, 0, 1, 1, false, NO_FLAW },
        { 3, 1, false, 0, 2, 0, 0, true, NO_FLAW },
        { 4, 1, true, 2, 0, 0, 0, true, NO_FLAW },
        { 4, 1, true, 0, 1, 0, 0, true, NO_FLAW },
        { 4, 1, true, 1, 0, 0, 1, true, NO_FLAW },
        { 4, 1, true, 0, 0, 1, 0, true, NO_GRACE },
    };
    bool is_well = true;

    shows_ways = argc > 1;
    if (argc == 10) {
        return run_one(argv + 1);
    }
    for (size_t i = 0; i < sizeof(models) / sizeof(*models); i++) {
        is_well = run(models[i]) && is_well;
    }
    for (size_t i = 0; argc > 1 && i < sizeof(larger) / sizeof(*larger); i++) {
        is_well = run(larger[i]) && is_well;
    }
    return is_well ? 0 : 1;
}
