/* SPDX-License-Identifier: MIT */
/* How the end of a group gets round between its ranks: by abort, by failure, by
 * leaving; and what rubbish in its place does. */
#include "api_common.h"
#include "conformance/world.h"
#include "core/atomic.h"
#include "core/clock.h"
#include "core/lost.h"

#include <pthread.h>
#include <stdio.h>

enum { RANKS = 3 };

/* Far beyond any test: what ends sooner ends for another reason. */
static const uint64_t hour_ns = UINT64_C(3600000000000);

static epx_group_t *
create_group(world_rank_t *self)
{
    epx_group_config_t config = EPX_GROUP_CONFIG_INIT;
    epx_group_t *group = NULL;

    config.bootstrap = self->bootstrap;
    config.heap_bytes = 1 << 20;
    config.num_workers = 1;
    config.timeout_ns = hour_ns;
    config.lost_after_ns = 30 * (uint64_t)EPX__NS_PER_SEC;
    (void)world_failed(self, epx_group_create(&config, &group), "group");
    return group;
}

/* Rank 0 waits for the others, who never come. */
static epx_status_t
wait_in_vain(epx_group_t *group)
{
    epx_plan_args_t args = api_plan_args(EPX_LAYOUT_RANK_MAJOR);
    epx_plan_counts_t counts = EPX_PLAN_COUNTS_INIT;
    epx_plan_t *plan;
    epx_status_t status = epx_plan_create(group, &args, NULL, &plan);

    if (status == EPX_OK) {
        epx__error_t error;

        status = epx_plan_counts(plan, &counts);
        epx__error_save(&error, status);
        (void)epx_plan_destroy(plan);
        (void)epx__error_restore(&error);
    }
    return status;
}

static void
expect(world_rank_t *self, const char *when, epx_status_t got,
       epx_status_t want, const char *word)
{
    if (got != want || strstr(epx_last_error(), word) == NULL) {
        world_fail(self,
                   "%s: expected status %d and a sentence with '%s', got %d "
                   "and '%s'",
                   when, (int)want, word, (int)got, epx_last_error());
    }
}

static void
nap(void)
{
    const struct timespec time = { 0, 50000000 };

    (void)nanosleep(&time, NULL);
}

static void
run(world_fn *fn)
{
    char text[4096];

    for (int kind = WORLD_THREAD; kind <= WORLD_SHM; kind++) {
        if (!world_run((world_kind_t)kind, RANKS, true, 0, fn, NULL, NULL, text,
                       sizeof(text))) {
            print_error("%s:\n%s", world_name((world_kind_t)kind), text);
            fail();
        }
    }
}

/* ---- abort ---- */

/* Rank 2 aborts; rank 0 is waiting, rank 1 is at work elsewhere. */
static void
abort_rank(world_rank_t *self, void *context)
{
    epx_group_t *group = create_group(self);
    const char *word = "rank 2 aborted the group";

    (void)context;
    if (self->failed) {
        return;
    }
    world_barrier(self);
    if (self->rank == 2) {
        nap();
        (void)world_failed(self, epx_group_abort(group), "abort");
        (void)world_failed(self, epx_group_abort(group), "again");
    }
    if (self->rank == 0) {
        expect(self, "a wait", wait_in_vain(group), EPX_ERR_ABORTED, word);
    }
    world_barrier(self);
    expect(self, "status", epx_group_status(group), EPX_ERR_ABORTED, word);
    if (self->rank != 0) {
        expect(self, "the first call", wait_in_vain(group), EPX_ERR_ABORTED,
               word);
    }
    expect(self, "the next call", wait_in_vain(group), EPX_ERR_BROKEN, word);
    expect(self, "status", epx_group_status(group), EPX_ERR_ABORTED, word);
    (void)world_failed(self, epx_group_destroy(group), "destroy");
}

static void
abort_ends_all_waits(void **state)
{
    (void)state;
    run(abort_rank);
}

static void *
abort_soon(void *group)
{
    nap();
    (void)epx_group_abort(group);
    return NULL;
}

/* Every rank waits for itself to be aborted by another of its threads. */
static void
abort_thread_rank(world_rank_t *self, void *context)
{
    epx_group_t *group = create_group(self);
    pthread_t thread;

    (void)context;
    if (self->failed) {
        return;
    }
    if (self->rank == 1) {
        (void)pthread_create(&thread, NULL, abort_soon, group);
    }
    if (self->rank != 2) {
        expect(self, "a wait", wait_in_vain(group), EPX_ERR_ABORTED,
               "rank 1 aborted");
    }
    if (self->rank == 1) {
        (void)pthread_join(thread, NULL);
    }
    world_barrier(self);
    (void)world_failed(self, epx_group_destroy(group), "destroy");
}

static void
abort_comes_from_any_thread(void **state)
{
    (void)state;
    run(abort_thread_rank);
}

/* ---- failures and goodbyes ---- */

static void
failure_rank(world_rank_t *self, void *context)
{
    epx_group_t *group = create_group(self);

    (void)context;
    if (self->failed) {
        return;
    }
    world_barrier(self);
    if (self->rank == 1) {
        nap();
        (void)epx__group_break(group,
                               epx__fail(EPX_ERR_PEER_DATA, "rank 2 is odd"));
        expect(self, "the next call", wait_in_vain(group), EPX_ERR_BROKEN,
               "earlier: rank 2 is odd");
    } else {
        expect(self, "a wait", wait_in_vain(group), EPX_ERR_PEER_DATA,
               "rank 2 is odd");
    }
    world_barrier(self);
    (void)world_failed(self, epx_group_destroy(group), "destroy");
}

static void
failures_are_everybodys(void **state)
{
    (void)state;
    run(failure_rank);
}

/* Rank 2 leaves: who waits for it is told, who does not goes on. */
static void
leave_rank(world_rank_t *self, void *context)
{
    epx_group_t *group = create_group(self);

    (void)context;
    if (self->failed) {
        return;
    }
    world_barrier(self);
    if (self->rank == 2) {
        nap();
        (void)world_failed(self, epx_group_destroy(group), "destroy");
    }
    if (self->rank == 0) {
        expect(self, "a wait", wait_in_vain(group), EPX_ERR_PEER_LOST,
               "rank 2 left the group while rank 0 waited in");
    }
    world_barrier(self);
    if (self->rank == 1) {
        expect(self, "later", epx_group_status(group), EPX_ERR_PEER_LOST,
               "rank 2 left the group while rank 0");
    }
    if (self->rank != 2) {
        (void)world_failed(self, epx_group_destroy(group), "destroy");
    }
}

static void
nobody_waits_for_those_who_left(void **state)
{
    (void)state;
    run(leave_rank);
}

static void
leave_in_peace_rank(world_rank_t *self, void *context)
{
    epx_group_t *group = create_group(self);

    (void)context;
    if (self->failed) {
        return;
    }
    if (self->rank != 0) {
        (void)world_failed(self, epx_group_destroy(group), "destroy");
        if (self->kind == WORLD_SHM) {
            return; /* and its process ends */
        }
    }
    for (int i = 0; self->rank == 0 && i < 6; i++) {
        nap();
        (void)world_failed(self, epx_group_status(group), "status");
    }
    if (self->rank == 0) {
        (void)world_failed(self, epx_group_destroy(group), "destroy");
    }
}

static void
leaving_harms_nobody(void **state)
{
    (void)state;
    run(leave_in_peace_rank);
}

/* ---- rubbish ---- */

/* What rank 1 leaves in the vitals of rank 0 and in its own. */
typedef struct rubbish {
    uint32_t alarm;
    int32_t status;
    int byte; /* that fills the sentence */
    epx_status_t want;
    const char *word;
} rubbish_t;

static void
rubbish_rank(world_rank_t *self, void *context)
{
    const rubbish_t *rubbish = context;
    epx_group_t *group = create_group(self);

    if (self->failed) {
        return;
    }
    if (self->rank == 1) {
        epx__vitals_t *own = epx__lost_vitals(group, 1);

        own->status = rubbish->status;
        memset(own->text, rubbish->byte, sizeof(own->text));
        epx__store_u32(&epx__lost_vitals(group, 0)->alarm, rubbish->alarm);
    }
    world_barrier(self);
    if (self->rank == 0) {
        expect(self, "rubbish", epx_group_status(group), rubbish->want,
               rubbish->word);
    }
    world_barrier(self);
    (void)world_failed(self, epx_group_destroy(group), "destroy");
}

static void
rubbish_is_an_error_like_others(void **state)
{
    const rubbish_t all[] = {
        { 2, EPX_ERR_TIMEOUT, 'x', EPX_ERR_TIMEOUT, "xxxx" },
        { 2, EPX_OK, 'x', EPX_ERR_PEER_DATA, "xxxx" },
        { 2, EPX_ERR_NULL, '\n', EPX_ERR_PEER_DATA, "????" },
        { 2, 12345, '\x9b', EPX_ERR_PEER_DATA, "????" },
        { 2, INT32_MIN, 0, EPX_ERR_PEER_DATA, "but not why" },
        { RANKS + 1, 0, 0, EPX_ERR_PEER_DATA, "a failure at rank 3" },
        { UINT32_MAX, 0, 0, EPX_ERR_PEER_DATA, "rank 65534" },
        { UINT32_C(1) << 31, 0, 0, EPX_ERR_PEER_DATA, "rank -1" },
    };
    char text[4096];

    (void)state;
    for (size_t i = 0; i < sizeof(all) / sizeof(*all); i++) {
        rubbish_t one = all[i];

        if (!world_run(WORLD_THREAD, RANKS, true, 0, rubbish_rank, &one, NULL,
                       text, sizeof(text))) {
            print_error("case %zu:\n%s", i, text);
            fail();
        }
    }
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(abort_ends_all_waits),
        cmocka_unit_test(abort_comes_from_any_thread),
        cmocka_unit_test(failures_are_everybodys),
        cmocka_unit_test(nobody_waits_for_those_who_left),
        cmocka_unit_test(leaving_harms_nobody),
        cmocka_unit_test(rubbish_is_an_error_like_others),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
