/* SPDX-License-Identifier: MIT */
/* Worker threads: everybody who should work does, once a round, and is done
 * when the round is. */
#include "engine/cpu/cpu_pool.h"
#include "api_common.h"

#include <stdlib.h>

enum { MOST_WORKERS = 6, ROUNDS = 2000, ITEMS = 4001 };

typedef struct round {
    int calls[MOST_WORKERS]; /* plain: each worker has its own */
    int number;
} round_t;

static void
count_call(void *context, int32_t worker)
{
    round_t *round = context;

    /* Written by the caller before the round, read by it after. */
    round->calls[worker] += round->number;
}

static void
run_rounds(int32_t num_workers, int64_t spin_ns)
{
    epx__pool_t *pool = NULL;
    round_t round = { { 0 }, 0 };
    int expected[MOST_WORKERS] = { 0 };

    WORKS(epx__pool_open(num_workers, spin_ns, &pool));
    for (int i = 1; i <= ROUNDS; i++) {
        int32_t used = 1 + i % num_workers;

        round.number = i;
        epx__pool_run(pool, used, count_call, &round);
        for (int w = 0; w < MOST_WORKERS; w++) {
            expected[w] += w < used ? i : 0;
            assert_int_equal(round.calls[w], expected[w]);
        }
    }
    epx__pool_close(pool);
}

static void
each_worker_works_once_a_round(void **state)
{
    static const int64_t spins[] = { 0, 20000 };

    (void)state;
    for (int s = 0; s < 2; s++) {
        for (int32_t workers = 1; workers <= MOST_WORKERS; workers += 2) {
            run_rounds(workers, spins[s]);
        }
        run_rounds(2, spins[s]);
    }
}

static void
opens_and_closes(void **state)
{
    epx__pool_t *pool;

    (void)state;
    for (int i = 0; i < 60; i++) {
        WORKS(epx__pool_open(1 + i % MOST_WORKERS, i % 2 * 10000, &pool));
        epx__pool_close(pool);
    }
}

/* ---- sharing ---- */

typedef struct job {
    epx__share_t share;
    unsigned char taken[ITEMS];
} job_t;

static void
take_items(void *context, int32_t worker)
{
    job_t *job = context;
    int64_t begin, end;

    (void)worker;
    while (epx__share_next(&job->share, &begin, &end)) {
        for (int64_t i = begin; i < end; i++) {
            job->taken[i]++;
        }
    }
}

static void
check_share(epx__pool_t *pool, int64_t items, int64_t grain)
{
    static job_t job;

    memset(&job, 0, sizeof(job));
    job.share.num_items = items;
    job.share.grain = grain;
    epx__pool_run(pool, MOST_WORKERS, take_items, &job);
    for (int64_t i = 0; i < ITEMS; i++) {
        assert_int_equal(job.taken[i], i < items);
    }
}

static void
every_item_is_taken_once(void **state)
{
    static const int64_t counts[] = { 0, 1, 2, 63, 64, 65, 1000, ITEMS };
    static const int64_t grains[] = { 1, 2, 7, 64, ITEMS, ITEMS + 1 };
    epx__pool_t *pool = NULL;

    (void)state;
    WORKS(epx__pool_open(MOST_WORKERS, 0, &pool));
    for (size_t c = 0; c < sizeof(counts) / sizeof(*counts); c++) {
        for (size_t g = 0; g < sizeof(grains) / sizeof(*grains); g++) {
            check_share(pool, counts[c], grains[g]);
        }
    }
    epx__pool_close(pool);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(each_worker_works_once_a_round),
        cmocka_unit_test(opens_and_closes),
        cmocka_unit_test(every_item_is_taken_once),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
