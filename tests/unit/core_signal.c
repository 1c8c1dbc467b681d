/* SPDX-License-Identifier: MIT */
/*
 * Signals between ranks, over segments that the test makes itself.  The groups
 * may wait for an hour, so that a wake-up that is lost hangs the rank for good,
 * which the world notices.
 */
#include "api_common.h"
#include "conformance/rng.h"
#include "conformance/world.h"
#include "core/atomic.h"
#include "core/group.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { EXPERTS = 4, STEPS = 3000, MOST_RANKS = 16 };

static const uint64_t hour_ns = UINT64_C(3600000000000);

/* A group that can signal and wait, and nothing else. */
typedef struct member {
    epx_group_t group;
    epx__peer_t peers[MOST_RANKS];
} member_t;

/* segments: map.heap bytes for each rank, zeroed. */
static void
member_open(member_t *m, int32_t rank, int32_t num_ranks, void *segments)
{
    const int32_t node_of[MOST_RANKS] = { 0 };

    memset(m, 0, sizeof(*m));
    assert_int_equal(epx__nodes_open(&m->group.nodes, rank, num_ranks, node_of),
                     EPX_OK);
    m->group.rank = rank;
    m->group.num_ranks = num_ranks;
    m->group.timeout_ns = hour_ns;
    m->group.map = epx__map_make((uint32_t)num_ranks, EXPERTS);
    m->group.peers = m->peers;
    (void)pthread_mutex_init(&m->group.state_lock, NULL);
    for (int32_t r = 0; r < num_ranks; r++) {
        m->peers[r].base = (char *)segments + (size_t)r * m->group.map.heap;
        m->peers[r].bytes = m->group.map.heap;
    }
}

static void
member_close(member_t *m)
{
    epx__nodes_close(&m->group.nodes);
    (void)pthread_mutex_destroy(&m->group.state_lock);
}

/* ---- many steps ---- */

typedef struct tempo {
    int32_t num_ranks;
    int64_t spin_ns;
    bool runs_ahead; /* up to 8 steps open at once */
} tempo_t;

static void
dawdle(rng_t *rng)
{
    struct timespec nap = { 0, rng_int(rng, 0, 200000) };

    if (rng_one_in(rng, 20)) {
        (void)nanosleep(&nap, NULL);
    }
}

/* What travels with a signal. */
static uint64_t
payload_of(uint64_t step, int32_t from, int32_t to)
{
    return step * 1000003 + (uint64_t)from * 1009 + (uint64_t)to;
}

static void
start_step(member_t *m, uint64_t step)
{
    const epx_group_t *group = &m->group;

    for (int32_t r = 0; r < group->num_ranks; r++) {
        epx__map_post(&group->map, m->peers[r].base, step,
                      (uint32_t)group->rank)
            ->num_rows = payload_of(step, group->rank, r);
    }
    epx__signal_near(&m->group, step, EPX__GATE_READY);
}

static void
finish_step(world_rank_t *self, member_t *m, uint64_t step)
{
    epx_group_t *group = &m->group;

    (void)world_failed(self,
                       epx__wait_all(group, step, EPX__GATE_READY, "a test"),
                       "waiting for READY");
    for (int32_t r = 0; r < group->num_ranks; r++) {
        uint64_t got = epx__map_post(&group->map, epx__group_segment(group),
                                     step, (uint32_t)r)
                           ->num_rows;

        if (got != payload_of(step, r, group->rank)) {
            world_fail(self, "step %" PRIu64 ": rank %d sent %" PRIu64, step, r,
                       got);
        }
    }
    epx__signal_near(group, step, EPX__GATE_DONE);
    (void)world_failed(self,
                       epx__wait_all(group, step, EPX__GATE_DONE, "a test"),
                       "waiting for DONE");
}

/* Counters of signals start where they soon wrap around. */
static void
wind_up(member_t *m)
{
    for (uint64_t step = 0; step < EPX__NUM_SLOTS; step++) {
        for (int gate = 0; gate < EPX__NUM_GATES; gate++) {
            epx__map_gate(&m->group.map, epx__group_segment(&m->group), step,
                          (epx__gate_t)gate)
                ->count = UINT32_MAX - 100;
        }
    }
}

static void
step_and_step(world_rank_t *self, void *context)
{
    const tempo_t *tempo = context;
    rng_t rng = rng_of(11, (uint64_t)self->rank, 0);
    uint64_t started = 0, finished = 0;
    member_t m;

    member_open(&m, self->rank, self->num_ranks, self->shared);
    m.group.spin_ns = tempo->spin_ns;
    wind_up(&m);
    world_barrier(self);
    while (finished < STEPS && !self->failed) {
        bool may_start = started < STEPS && started - finished < EPX__MAX_OPEN;
        bool may_finish = started > finished;

        dawdle(&rng);
        if (may_start &&
            (!may_finish || (tempo->runs_ahead && rng_one_in(&rng, 2)))) {
            start_step(&m, ++started);
        } else {
            finish_step(self, &m, ++finished);
        }
    }
    member_close(&m);
}

static void
run_tempo(tempo_t tempo)
{
    size_t bytes = epx__map_make((uint32_t)tempo.num_ranks, EXPERTS).heap *
                   (size_t)tempo.num_ranks;
    char text[4096];

    for (int kind = WORLD_THREAD; kind <= WORLD_SHM; kind++) {
        if (!world_run((world_kind_t)kind, tempo.num_ranks, true, bytes,
                       step_and_step, &tempo, NULL, text, sizeof(text))) {
            print_error("%s, %d ranks:\n%s", world_name((world_kind_t)kind),
                        tempo.num_ranks, text);
            fail();
        }
    }
}

static void
sleepers_are_always_woken(void **state)
{
    (void)state;
    run_tempo((tempo_t){ 2, 0, false });
    run_tempo((tempo_t){ 3, 0, true });
}

static void
spinners_that_fall_asleep_are_woken(void **state)
{
    (void)state;
    run_tempo((tempo_t){ 2, 20000, true });
    run_tempo((tempo_t){ 4, 5000, false });
}

/* ---- what can go wrong ---- */

/* All ranks of a group in this thread, none of which has waited yet. */
typedef struct company {
    member_t members[MOST_RANKS];
    void *segments;
} company_t;

static void
company_open(company_t *c, int32_t num_ranks)
{
    size_t bytes = epx__map_make((uint32_t)num_ranks, EXPERTS).heap;

    c->segments = aligned_alloc(EPX__PAGE, bytes * (size_t)num_ranks);
    assert_non_null(c->segments);
    memset(c->segments, 0, bytes * (size_t)num_ranks);
    for (int32_t r = 0; r < num_ranks; r++) {
        member_open(&c->members[r], r, num_ranks, c->segments);
    }
}

static void
company_close(company_t *c, int32_t num_ranks)
{
    for (int32_t r = 0; r < num_ranks; r++) {
        member_close(&c->members[r]);
    }
    free(c->segments);
}

/* silent: bit r is set when rank r does not signal. */
static void
check_timeout(int32_t num_ranks, uint32_t silent, const char *sentence)
{
    static company_t company;
    epx_group_t *group = &company.members[0].group;

    company_open(&company, num_ranks);
    group->timeout_ns = 20000000;
    for (int32_t r = 0; r < num_ranks; r++) {
        if ((silent >> r & 1) == 0) {
            epx__signal(&company.members[r].group, 0, 5, EPX__GATE_DONE);
        }
        /* these are of no use to rank 0 */
        epx__signal(&company.members[r].group, 0, 5, EPX__GATE_READY);
        epx__signal(&company.members[r].group, 0, 4, EPX__GATE_DONE);
        epx__signal(&company.members[r].group, num_ranks - 1, 6,
                    EPX__GATE_DONE);
    }
    REFUSED(epx__wait_all(group, 5, EPX__GATE_DONE, "a test"), EPX_ERR_TIMEOUT,
            sentence);
    REFUSED(epx__group_check(group), EPX_ERR_BROKEN, sentence);
    assert_true(epx__group_is_broken(group));
    company_close(&company, num_ranks);
}

static void
timeouts_name_the_missing(void **state)
{
    (void)state;
    check_timeout(2, 1u << 1,
                  "rank 0 timed out in a test after 0.020 s, "
                  "waiting for rank 1");
    check_timeout(5, 1u << 2 | 1u << 4, "waiting for ranks 2 and 4");
    check_timeout(5, 1u << 0, "waiting for rank 0");
    check_timeout(8, 0xff, "waiting for ranks 0, 1, 2, 3, 4, 5, 6 and 7");
    check_timeout(16, 0xfffe, "11, 12 and 3 more");
}

/* A word that no rank at this step can have written. */
static void
check_corrupt(uint64_t word)
{
    static company_t company;
    epx_group_t *group = &company.members[0].group;
    char sentence[128];

    company_open(&company, 3);
    for (int32_t r = 0; r < 3; r++) {
        epx__signal(&company.members[r].group, 0, 7, EPX__GATE_READY);
    }
    epx__store_release_u64(epx__map_arrival(&group->map,
                                            epx__group_segment(group), 7,
                                            EPX__GATE_READY, 1),
                           word);
    (void)snprintf(
        sentence, sizeof(sentence),
        "rank 1 signalled step %" PRIu64 " in a test, which is step 7", word);
    REFUSED(epx__wait_all(group, 7, EPX__GATE_READY, "a test"),
            EPX_ERR_PEER_DATA, sentence);
    REFUSED(epx__group_check(group), EPX_ERR_BROKEN, sentence);
    company_close(&company, 3);
}

static void
signals_of_the_future_break_the_group(void **state)
{
    (void)state;
    check_corrupt(8);
    check_corrupt(7 + EPX__NUM_SLOTS);
    check_corrupt(UINT64_C(1) << 63);
    check_corrupt(UINT64_MAX);
}

/* What sleepers and signallers tell each other may be rubbish: the wait still
 * ends, at the latest with its timeout. */
static void
corrupt_gate_lines_do_not_hang(void **state)
{
    static company_t company;
    epx_group_t *group = &company.members[0].group;

    (void)state;
    for (uint32_t rubbish = 0; rubbish < 3; rubbish++) {
        company_open(&company, 2);
        memset(epx__map_gate(&group->map, epx__group_segment(group), 1,
                             EPX__GATE_READY),
               (int)(rubbish * 0x7f), sizeof(epx__gate_line_t));
        group->timeout_ns = 20000000;
        epx__signal(group, 0, 1, EPX__GATE_READY);
        REFUSED(epx__wait_all(group, 1, EPX__GATE_READY, "a test"),
                EPX_ERR_TIMEOUT, "waiting for rank 1");
        epx__signal(&company.members[1].group, 0, 1, EPX__GATE_READY);
        WORKS(epx__wait_all(group, 1, EPX__GATE_READY, "a test"));
        company_close(&company, 2);
    }
}

/* The first error is the one that counts. */
static void
groups_break_once(void **state)
{
    static company_t company;
    epx_group_t *group = &company.members[0].group;

    (void)state;
    company_open(&company, 1);
    WORKS(epx__group_check(group));
    assert_false(epx__group_is_broken(group));
    assert_int_equal(
        epx__group_break(group, epx__fail(EPX_ERR_PEER_DATA, "the first")),
        EPX_ERR_PEER_DATA);
    assert_int_equal(
        epx__group_break(group, epx__fail(EPX_ERR_TIMEOUT, "the second")),
        EPX_ERR_TIMEOUT);
    assert_string_equal(epx_last_error(), "the second");
    REFUSED(epx__group_check(group), EPX_ERR_BROKEN, "earlier: the first");
    company_close(&company, 1);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sleepers_are_always_woken),
        cmocka_unit_test(spinners_that_fall_asleep_are_woken),
        cmocka_unit_test(timeouts_name_the_missing),
        cmocka_unit_test(signals_of_the_future_break_the_group),
        cmocka_unit_test(corrupt_gate_lines_do_not_hang),
        cmocka_unit_test(groups_break_once),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
