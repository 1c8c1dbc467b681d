/* SPDX-License-Identifier: MIT */
/* Worker threads: as many as should work may, once a round, and are done when
 * the round is. */
#include "engine/cpu/cpu_pool.h"
#include "api_common.h"
#include "core/clock.h"
#include "engine/cpu/cpu_share.h"

#include <pthread.h>
#include <stdlib.h>

enum { MOST_WORKERS = 6, ROUNDS = 1000, ITEMS = 4001 };

typedef struct round {
    int calls[MOST_WORKERS]; /* plain: each worker has its own */
    int number;
    int num_wanted; /* that the caller waits for */
    int num_there;
} round_t;

static void
count_call(void *context, int32_t worker)
{
    round_t *round = context;
    int64_t deadline = epx__now_ns() + 10 * EPX__NS_PER_SEC;

    /* Written by the caller before the round, read by it after. */
    round->calls[worker] += round->number;
    (void)__atomic_add_fetch(&round->num_there, 1, __ATOMIC_SEQ_CST);
    while (worker == 0 &&
           __atomic_load_n(&round->num_there, __ATOMIC_SEQ_CST) <
               round->num_wanted &&
           epx__now_ns() < deadline) {
    }
}

/* Each once, numbered from 0 on. */
static void
check_round(const round_t *round, int32_t most)
{
    assert_in_range(round->num_there, round->num_wanted, most);
    for (int w = 0; w < MOST_WORKERS; w++) {
        assert_int_equal(round->calls[w],
                         w < round->num_there ? round->number : 0);
    }
}

static void
run_rounds(int32_t num_workers, int64_t spin_ns)
{
    epx__pool_t *pool = NULL;

    WORKS(epx__pool_open(num_workers, spin_ns, NULL, NULL, &pool));
    for (int i = 1; i <= ROUNDS; i++) {
        int32_t most = 1 + i % num_workers;
        round_t round = { .number = i, .num_wanted = i % 4 == 0 ? most : 1 };

        epx__pool_run(pool, most, count_call, &round);
        check_round(&round, most);
    }
    epx__pool_close(pool);
}

static void
workers_work_once_a_round(void **state)
{
    static const int64_t spins[] = { 0, 20000 };

    (void)state;
    for (int s = 0; s < 2; s++) {
        for (int32_t workers = 1; workers <= MOST_WORKERS; workers++) {
            run_rounds(workers, spins[s]);
        }
    }
}

static void
opens_and_closes(void **state)
{
    epx__pool_t *pool;

    (void)state;
    for (int i = 0; i < 60; i++) {
        WORKS(epx__pool_open(1 + i % MOST_WORKERS, i % 2 * 10000, NULL, NULL,
                             &pool));
        epx__pool_close(pool);
    }
}

/* ---- waiting for the others ---- */

enum { MOST_CALLS = 3 };

static bool
count_meanwhile(void *context)
{
    (void)__atomic_add_fetch((int *)context, 1, __ATOMIC_SEQ_CST);
    return true;
}

typedef struct meeting {
    int calls;
    bool has_come; /* the other worker, */
} meeting_t;

/* Who is not done before the caller, which leaves then, has used its time. */
static void
await_calls(void *context, int32_t worker)
{
    meeting_t *meeting = context;
    int64_t deadline = epx__now_ns() + 10 * EPX__NS_PER_SEC;

    if (worker > 0) {
        __atomic_store_n(&meeting->has_come, true, __ATOMIC_SEQ_CST);
    }
    while (epx__now_ns() < deadline &&
           (worker == 0 ? !__atomic_load_n(&meeting->has_come, __ATOMIC_SEQ_CST)
                        : __atomic_load_n(&meeting->calls, __ATOMIC_SEQ_CST) <
                              MOST_CALLS)) {
    }
}

static void
the_caller_uses_the_time(void **state)
{
    epx__pool_t *pool = NULL;
    meeting_t meeting = { 0 };

    (void)state;
    WORKS(epx__pool_open(2, 10 * EPX__NS_PER_SEC, count_meanwhile,
                         &meeting.calls, &pool));
    epx__pool_run(pool, 2, await_calls, &meeting);
    assert_true(meeting.calls >= MOST_CALLS);
    epx__pool_close(pool);
}

/* ---- sharing ---- */

typedef struct job {
    cpu_share_t share;
    unsigned char taken[ITEMS];
    int64_t num_taken[MOST_WORKERS];
} job_t;

static void
take_items(void *context, int32_t worker)
{
    job_t *job = context;
    int64_t begin, end;

    while (cpu_share_next(&job->share, worker, &begin, &end)) {
        for (int64_t i = begin; i < end; i++) {
            job->taken[i]++;
        }
        job->num_taken[worker] += end - begin;
    }
}

static void
run_job(job_t *job, epx__pool_t *pool, int32_t num_workers, cpu_share_t share)
{
    memset(job, 0, sizeof(*job));
    job->share = share;
    job->share.is_timed = true;
    epx__pool_run(pool, num_workers, take_items, job);
    for (int64_t i = 0; i < ITEMS; i++) {
        assert_int_equal(job->taken[i], i < share.num_items);
    }
    assert_int_equal(job->share.num_timed, job->num_taken[share.timed_worker]);
    assert_true(job->share.spent_ns >= 0);
}

static void
every_item_is_taken_once(void **state)
{
    static const int64_t counts[] = { 0, 1, 2, 63, 64, 65, 1000, ITEMS };
    static const int64_t grains[] = { 1, 2, 7, 64, ITEMS, ITEMS + 1 };
    static epx_group_t on_one_node;
    static job_t job;
    epx__pool_t *pool = NULL;
    cpu_share_t share;

    (void)state;
    WORKS(epx__pool_open(MOST_WORKERS, 0, NULL, NULL, &pool));
    for (size_t c = 0; c < sizeof(counts) / sizeof(*counts); c++) {
        share = cpu_share_of(&on_one_node, counts[c], MOST_WORKERS);
        run_job(&job, pool, MOST_WORKERS, share);
        for (size_t g = 0; g < sizeof(grains) / sizeof(*grains); g++) {
            share.grain = grains[g];
            run_job(&job, pool, MOST_WORKERS, share);
        }
    }
    epx__pool_close(pool);
}

/* A network that has something to do a few times. */
typedef struct network {
    pthread_t caller;
    int64_t left;
    int64_t num_calls;
    int64_t num_calls_of_others;
} network_t;

static bool
attend(void *context)
{
    network_t *network = context;

    if (!pthread_equal(pthread_self(), network->caller)) {
        (void)__atomic_fetch_add(&network->num_calls_of_others, 1,
                                 __ATOMIC_RELAXED);
        return false;
    }
    network->num_calls++;
    return network->left-- > 0;
}

static void
worker_0_attends_to_the_network(void **state)
{
    static const int64_t works[] = { 0, 3, INT64_MAX };
    static const int64_t counts[] = { 0, 1, ITEMS };
    static epx_group_t group;
    static job_t job;
    epx__pool_t *pool = NULL;
    network_t network;

    (void)state;
    group.remote = (epx__remote_t){ .context = &network, .attend = attend };
    WORKS(epx__pool_open(MOST_WORKERS, 0, NULL, NULL, &pool));
    for (int i = 0; i < 3 * 3 * MOST_WORKERS; i++) {
        int64_t work = works[i % 3];
        int64_t count = counts[i / 3 % 3];
        int32_t num_workers = 1 + i / 9;

        network = (network_t){ .caller = pthread_self(), .left = work };
        run_job(&job, pool, num_workers,
                cpu_share_of(&group, count, num_workers));
        assert_int_equal(network.num_calls_of_others, 0);
        if (num_workers == 1) {
            assert_int_equal(network.num_calls, 0);
            assert_int_equal(job.num_taken[0], count);
        } else if (work == INT64_MAX) {
            assert_int_equal(job.num_taken[0], 0);
        }
        if (count == 0) {
            assert_int_equal(network.num_calls, 0);
        }
    }
    epx__pool_close(pool);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(workers_work_once_a_round),
        cmocka_unit_test(opens_and_closes),
        cmocka_unit_test(the_caller_uses_the_time),
        cmocka_unit_test(every_item_is_taken_once),
        cmocka_unit_test(worker_0_attends_to_the_network),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
