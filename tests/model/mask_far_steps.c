/* SPDX-License-Identifier: MIT */
#include "mask_far.h"

#include <stddef.h>

model_t model;
const char *wrong;

void
expect(bool is_so, const char *what)
{
    if (!is_so && wrong == NULL) {
        wrong = what;
    }
}

/* ---- sets, pairs and links ---- */

static pair_t *
pair_of(state_t *s, int from, int to)
{
    return &s->pairs[from * (model.num_ranks - 1) + (to < from ? to : to - 1)];
}

static unsigned
link_of(int a, int b)
{
    return 1u << (a < b ? b * (b - 1) / 2 + a : a * (a - 1) / 2 + b);
}

static bool
is_cut(const state_t *s, int a, int b)
{
    return (s->links & link_of(a, b)) != 0;
}

/* What is under way is lost. */
static void
cut(state_t *s, int a, int b)
{
    for (int i = 0; i < 2; i++) {
        pair_t *pair = i == 0 ? pair_of(s, a, b) : pair_of(s, b, a);

        pair->told = 0;
        pair->is_on_way = 0;
        pair->on_way = 0;
    }
    s->links |= link_of(a, b) & 0x3f;
}

/* ---- what a rank knows ---- */

static uint8_t
pledge_of(unsigned set, int place)
{
    return (uint8_t)(set | (unsigned)(place - AT_KNOWS + 1) << MOST_RANKS);
}

/* Whether it is a pledge to these masks, at least at that place. */
static bool
is_pledge_to(unsigned pledge, unsigned set, int place)
{
    bool is_same = model.flaw == NO_SETS
                       ? size_of(set_in(pledge)) == size_of(set)
                       : set_in(pledge) == set;

    return is_same && pledge >> MOST_RANKS >= (unsigned)(place - AT_KNOWS + 1);
}

/* Whether all that remain have come to the place. */
static bool
have_come(const state_t *s, int r, int place)
{
    const rank_t *rank = &s->ranks[r];

    for (int from = 0; from < model.num_ranks; from++) {
        if (from != r && !has(rank->aims, from) && !has(rank->seen, from) &&
            !is_pledge_to(look_at(s, from, r)->heard, rank->aims, place)) {
            return false;
        }
    }
    return true;
}

/* Of the ranks that have taken part so far. */
static bool
has_majority(const rank_t *rank)
{
    unsigned all = (1u << model.num_ranks) - 1;
    unsigned before = all & ~rank->begun, after = all & ~rank->aims;
    int lowest = __builtin_ctz(before);

    if (model.flaw == NO_MAJORITY) {
        return true;
    }
    return 2 * size_of(after) > size_of(before) ||
           (2 * size_of(after) == size_of(before) &&
            (has(after, lowest) || model.flaw == NO_LOWEST));
}

/* ---- pledges ---- */

/* Whether all have been given what this rank pledges now. */
static bool
all_are_told(const state_t *s, int r)
{
    const rank_t *rank = &s->ranks[r];

    for (int to = 0; to < model.num_ranks; to++) {
        if (to != r && !is_cut(s, r, to) &&
            look_at(s, r, to)->told != pledge_of(rank->aims, rank->place)) {
            return false;
        }
    }
    return true;
}

/* Tell whoever has taken in the last one; false: nobody. */
static bool
tell(state_t *s, int r)
{
    const rank_t *rank = &s->ranks[r];
    uint8_t pledge = pledge_of(rank->aims, rank->place);
    bool any = false;

    for (int to = 0; to < model.num_ranks; to++) {
        pair_t *pair = to == r ? NULL : pair_of(s, r, to);

        if (pair == NULL || is_cut(s, r, to) || pair->is_on_way ||
            pair->told == pledge) {
            continue;
        }
        pair->told = pledge & 0x7f;
        pair->is_on_way = 1;
        any = true;
    }
    return any;
}

/* ---- steps: false where the rank can only wait ---- */

/* Forget what has no effect any more, lest it makes states differ. */
static void
forget(state_t *s, int r, unsigned set)
{
    for (int from = 0; from < model.num_ranks; from++) {
        if (from == r) {
            continue;
        }
        pair_of(s, from, r)->arrived = 0;
        if (has(set, from) && s->ranks[r].hears != from + 1) {
            pair_of(s, from, r)->heard = 0;
        }
    }
}

static void
end(state_t *s, int r, place_t place)
{
    s->ranks[r] = (rank_t){ .place = place, .begun = s->ranks[r].begun };
    forget(s, r, (1u << model.num_ranks) - 1);
}

/* The roll, because it has grown. */
static bool
step_read(state_t *s, int r)
{
    rank_t *rank = &s->ranks[r];

    if (!takes_part(rank) || rank->roll == rank->aims) {
        return false;
    }
    rank->aims = rank->roll;
    rank->place = AT_KNOWS;
    rank->at = 0;
    rank->op = 0;
    rank->seen = 0;
    forget(s, r, rank->aims);
    if (has(rank->aims, r)) {
        end(s, r, IS_MASKED);
        return true;
    }
    (void)tell(s, r);
    if (!has_majority(rank)) {
        end(s, r, IS_REFUSED);
    }
    return true;
}

static bool
step_tell(state_t *s, int r)
{
    return is_agreeing(&s->ranks[r]) && tell(s, r);
}

static bool
step_join(state_t *s, int r)
{
    rank_t *rank = &s->ranks[r];

    if (rank->place != AT_KNOWS) {
        return false;
    }
    for (int to = 0; to < model.num_ranks; to++) {
        if (to != r && !has(rank->aims, to) && look_at(s, r, to)->on_way > 0 &&
            model.flaw != NO_REST) {
            return false;
        }
    }
    rank->place = AT_JOINED;
    (void)tell(s, r);
    return true;
}

static bool
step_renew(state_t *s, int r)
{
    rank_t *rank = &s->ranks[r];

    if (rank->place != AT_JOINED || !all_are_told(s, r) ||
        (!have_come(s, r, AT_JOINED) && model.flaw != NO_JOIN)) {
        return false;
    }
    rank->place = AT_READY;
    rank->renewed = rank->aims;
    rank->seen = 0;
    for (int other = 0; other < model.num_ranks; other++) {
        if (has(rank->aims, other)) {
            cut(s, r, other);
        }
    }
    (void)tell(s, r);
    return true;
}

static bool
step_begin(state_t *s, int r)
{
    rank_t *rank = &s->ranks[r];

    if (rank->place != AT_READY || !all_are_told(s, r) ||
        (!have_come(s, r, AT_READY) && model.flaw != NO_READY)) {
        return false;
    }
    for (unsigned set = 0; set < 1u << model.num_ranks; set++) {
        expect((s->epochs >> set & 1) == 0 || holds(set, rank->aims) ||
                   holds(rank->aims, set),
               "two epochs have begun, and neither masks all that the other "
               "does");
    }
    s->epochs |= (uint16_t)(1u << rank->aims);
    rank->begun = rank->aims;
    rank->seen = 0;
    rank->place = AT_SIGNAL;
    return true;
}

static bool
step_signal(state_t *s, int r)
{
    rank_t *rank = &s->ranks[r];

    if (rank->place != AT_SIGNAL) {
        return false;
    }
    if (rank->at != (unsigned)r && !has(rank->begun, rank->at) &&
        !is_cut(s, r, rank->at)) {
        pair_of(s, r, rank->at)->on_way++;
    }
    rank->at++;
    if (rank->at == (unsigned)model.num_ranks) {
        rank->at = 0;
        rank->place = AT_WAIT;
    }
    return true;
}

static bool
step_wait(state_t *s, int r)
{
    rank_t *rank = &s->ranks[r];

    if (rank->place != AT_WAIT) {
        return false;
    }
    for (int from = 0; from < model.num_ranks; from++) {
        if (from != r && !has(rank->begun, from) &&
            look_at(s, from, r)->arrived <= rank->op) {
            return false;
        }
    }
    rank->op++;
    rank->place = rank->op == (unsigned)model.num_ops ? AT_REST : AT_SIGNAL;
    return true;
}

/* One more of what stands in a pledge goes on the roll; the rank itself last,
 * since then it adds nobody any more. */
static bool
step_add(state_t *s, int r)
{
    rank_t *rank = &s->ranks[r];
    unsigned pledged, left, others;

    if (rank->hears == 0) {
        return false;
    }
    pledged = set_in(look_at(s, (int)rank->hears - 1, r)->heard);
    left = pledged & ~rank->roll;
    others = left & ~(1u << r);
    left = others != 0 ? others : left;
    rank->roll |= left & -left;
    if (has(rank->roll, r) || holds(rank->roll, pledged)) {
        rank->hears = 0;
    }
    return true;
}

/* ---- messages ---- */

/* Who has left takes nothing any more. */
static bool
can_hear(const state_t *s, int r)
{
    const rank_t *rank = &s->ranks[r];

    return rank->hears == 0 && (takes_part(rank) || (model.flaw == NO_LEAVE &&
                                                     rank->place != IS_DEAD));
}

static bool
hear_pledge(state_t *s, int from, int r)
{
    rank_t *rank = &s->ranks[r];
    pair_t *pair = pair_of(s, from, r);

    if (!pair->is_on_way || !can_hear(s, r)) {
        return false;
    }
    pair->is_on_way = 0;
    if (!takes_part(rank) || (has(rank->roll, from) && model.flaw != NO_SELF)) {
        return true;
    }
    if ((rank->place == AT_JOINED || rank->place == AT_READY) &&
        is_pledge_to(pair->heard, rank->aims, (int)rank->place) &&
        !is_pledge_to(pair->told, rank->aims, (int)rank->place)) {
        rank->seen |= 1u << from;
    }
    pair->heard = pair->told;
    if (!has(rank->roll, r) && !holds(rank->roll, set_in(pair->heard))) {
        rank->hears = (unsigned)from + 1;
        (void)step_add(s, r);
    }
    return true;
}

static bool
hear_signal(state_t *s, int from, int r)
{
    const rank_t *rank = &s->ranks[r];
    pair_t *pair = pair_of(s, from, r);

    if (pair->on_way == 0 || !can_hear(s, r)) {
        return false;
    }
    pair->on_way--;
    expect(!takes_part(rank) || rank->renewed == s->ranks[from].begun,
           holds(rank->renewed, s->ranks[from].begun)
               ? "a signal comes to a net that is ready for a later epoch"
               : "a signal comes to a net that is not ready for its epoch");
    if (rank->place <= AT_REST || rank->place == AT_READY) {
        pair->arrived++;
    }
    return true;
}

/* ---- losses ---- */

/* Notices that the other has ended, or that their link is cut. */
static bool
notice(state_t *s, int r, int other, bool is_late)
{
    rank_t *rank = &s->ranks[r];
    bool is_gone = s->ranks[other].place == IS_DEAD ||
                   (!takes_part(&s->ranks[other]) && model.flaw != NO_LEAVE);
    bool waits =
        model.has_grace && model.flaw != NO_GRACE && other < r && !is_gone;

    if (!takes_part(rank) || !can_hear(s, r) || has(rank->roll, r) ||
        waits != is_late || !(is_gone || is_cut(s, r, other)) ||
        (has(rank->roll, other) && is_cut(s, r, other))) {
        return false;
    }
    rank->roll |= 1u << other;
    cut(s, r, other);
    return true;
}

static bool
die(state_t *s, int r)
{
    if (!takes_part(&s->ranks[r]) || s->deaths == 0) {
        return false;
    }
    end(s, r, IS_DEAD);
    s->deaths--;
    return true;
}

/* The caller wants to be without another that lives. */
static bool
name(state_t *s, int r, int other)
{
    rank_t *rank = &s->ranks[r];

    if (!takes_part(rank) || !takes_part(&s->ranks[other]) ||
        s->mistakes == 0 || has(rank->roll, other) || has(rank->roll, r)) {
        return false;
    }
    rank->roll |= 1u << other;
    s->mistakes--;
    return true;
}

static bool
cut_link(state_t *s, int a, int b)
{
    if (s->cuts == 0 || is_cut(s, a, b) || !takes_part(&s->ranks[a]) ||
        !takes_part(&s->ranks[b])) {
        return false;
    }
    cut(s, a, b);
    s->cuts--;
    return true;
}

/* Those of the set from all others. */
static bool
part(state_t *s, unsigned set)
{
    if (s->partitions == 0) {
        return false;
    }
    for (int a = 0; a < model.num_ranks; a++) {
        for (int b = 0; b < model.num_ranks; b++) {
            if (has(set, a) && !has(set, b)) {
                cut(s, a, b);
            }
        }
    }
    s->partitions--;
    return true;
}

/* ---- every step that there is ---- */

const char *const step_names[NUM_STEPS] = {
    "reads its roll",
    "pledges again",
    "joins",
    "is ready",
    "begins",
    "signals",
    "completes an operation",
    "adds one more to its roll",
    "hears the pledge of",
    "takes the signal of",
    "notices the loss of",
    "gives up at last",
    "names",
    "has no link any more to",
    "dies",
    "", /* it has words of its own */
};

static bool
step_of_one(state_t *s, kind_t kind, int r)
{
    switch (kind) {
    case STEP_READ:
        return step_read(s, r);
    case STEP_TELL:
        return step_tell(s, r);
    case STEP_JOIN:
        return step_join(s, r);
    case STEP_RENEW:
        return step_renew(s, r);
    case STEP_BEGIN:
        return step_begin(s, r);
    case STEP_SIGNAL:
        return step_signal(s, r);
    case STEP_WAIT:
        return step_wait(s, r);
    case STEP_ADD:
        return step_add(s, r);
    case STEP_DIE:
        return die(s, r);
    default:
        return false;
    }
}

static bool
step_of_two(state_t *s, kind_t kind, int r, int other)
{
    switch (kind) {
    case STEP_PLEDGE:
        return hear_pledge(s, other, r);
    case STEP_ARRIVE:
        return hear_signal(s, other, r);
    case STEP_NOTICE:
    case STEP_LATE:
        return notice(s, r, other, kind == STEP_LATE);
    case STEP_NAME:
        return name(s, r, other);
    case STEP_CUT:
        return r < other && cut_link(s, r, other);
    default:
        return false;
    }
}

static bool
step(state_t *s, kind_t kind, int r, int other)
{
    switch (kind) {
    case STEP_PLEDGE:
    case STEP_ARRIVE:
    case STEP_NOTICE:
    case STEP_LATE:
    case STEP_NAME:
    case STEP_CUT:
        return r != other && step_of_two(s, kind, r, other);
    default:
        return other == 0 && step_of_one(s, kind, r);
    }
}

bool
try_step(state_t *s, int which)
{
    int n = model.num_ranks, at = which % (n * n);
    kind_t kind = (kind_t)(which / (n * n));

    if (kind == STEP_PART) {
        /* The highest is never in the set: it is in the other one. */
        return at > 0 && at < 1 << (n - 1) && part(s, (unsigned)at);
    }
    return step(s, kind, at / n, at % n);
}
