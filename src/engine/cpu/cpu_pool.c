/* SPDX-License-Identifier: MIT */
#include "engine/cpu/cpu_pool.h"

#include "core/atomic.h"
#include "core/clock.h"
#include "core/status.h"
#include "core/thread.h"

#include <pthread.h>
#include <stdlib.h>

#define FOREVER_NS (INT64_C(3600) * EPX__NS_PER_SEC)

#define MOST_WORKERS 1023

/* A round: its number above, whether a thread may still join, how many workers
 * there may be, how many others have joined, and how many of those are at it.
 */
#define ROUND_SHIFT  32
#define ROUND_OPEN   (UINT64_C(1) << 30)
#define ROUND_MOST   (UINT64_C(1) << 20)
#define ROUND_JOINED (UINT64_C(1) << 10)
#define ROUND_ACTIVE UINT64_C(1)

static inline int32_t
round_field(uint64_t state, uint64_t field)
{
    return (int32_t)(state / field % 1024);
}

typedef struct thread {
    epx__pool_t *pool;
    pthread_t id;
} thread_t;

struct epx__pool {
    int32_t num_threads;
    int64_t spin_ns;
    epx__meanwhile_fn_t meanwhile;
    void *meanwhile_context;
    uint64_t state; /* of the round; releases fn and context */
    uint32_t round; /* its number, for those that sleep */
    uint32_t ends;  /* times that the last thread has left a closed round */
    uint32_t stopping;
    epx__work_fn_t fn;
    void *context;
    thread_t threads[];
};

/* Until *word is no longer `value`. */
static void
wait_while(const epx__pool_t *pool, uint32_t *word, uint32_t value,
           epx__meanwhile_fn_t meanwhile)
{
    int64_t start = epx__now_ns();

    while (epx__load_u32(word) == value) {
        if (epx__now_ns() - start >= pool->spin_ns) {
            epx__futex_wait(word, value, FOREVER_NS);
        } else if (meanwhile == NULL || !meanwhile(pool->meanwhile_context)) {
            epx__pause();
        }
    }
}

/* Returns the worker's number; 0: the round is over, or has enough. */
static int32_t
join_round(epx__pool_t *pool, uint32_t round)
{
    uint64_t state = __atomic_load_n(&pool->state, __ATOMIC_ACQUIRE);

    while (state >> ROUND_SHIFT == round && (state & ROUND_OPEN) != 0 &&
           round_field(state, ROUND_JOINED) + 1 <
               round_field(state, ROUND_MOST)) {
        if (__atomic_compare_exchange_n(
                &pool->state, &state, state + ROUND_JOINED + ROUND_ACTIVE,
                false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
            return round_field(state, ROUND_JOINED) + 1;
        }
    }
    return 0;
}

static void
leave_round(epx__pool_t *pool)
{
    uint64_t state =
        __atomic_sub_fetch(&pool->state, ROUND_ACTIVE, __ATOMIC_ACQ_REL);

    if ((state & ROUND_OPEN) == 0 && round_field(state, ROUND_ACTIVE) == 0) {
        (void)epx__add_u32(&pool->ends, 1);
        epx__futex_wake_all(&pool->ends);
    }
}

static void *
thread_main(void *argument)
{
    epx__pool_t *pool = ((thread_t *)argument)->pool;
    uint32_t round = 0;

    for (;;) {
        int32_t worker;

        wait_while(pool, &pool->round, round, NULL);
        round = epx__load_u32(&pool->round);
        if (epx__load_u32(&pool->stopping) != 0) {
            return NULL;
        }
        worker = join_round(pool, round);
        if (worker > 0) {
            pool->fn(pool->context, worker);
            leave_round(pool);
        }
    }
}

static void
start_round(epx__pool_t *pool, int32_t num_workers)
{
    uint32_t round = pool->round + 1;

    __atomic_store_n(&pool->state,
                     (uint64_t)round << ROUND_SHIFT | ROUND_OPEN |
                         (uint64_t)num_workers * ROUND_MOST,
                     __ATOMIC_RELEASE);
    epx__store_u32(&pool->round, round);
    epx__futex_wake_all(&pool->round);
}

/* Nobody joins any more; wait for those that have. */
static void
end_round(epx__pool_t *pool)
{
    uint64_t state =
        __atomic_and_fetch(&pool->state, ~ROUND_OPEN, __ATOMIC_ACQ_REL);

    while (round_field(state, ROUND_ACTIVE) > 0) {
        uint32_t ends = epx__load_u32(&pool->ends);

        state = __atomic_load_n(&pool->state, __ATOMIC_ACQUIRE);
        if (round_field(state, ROUND_ACTIVE) > 0) {
            wait_while(pool, &pool->ends, ends, pool->meanwhile);
        }
    }
}

epx_status_t
epx__pool_open(int32_t num_workers, int64_t spin_ns,
               epx__meanwhile_fn_t meanwhile, void *context,
               epx__pool_t **pool_p)
{
    size_t bytes =
        sizeof(epx__pool_t) + (size_t)(num_workers - 1) * sizeof(thread_t);
    epx__pool_t *pool = calloc(1, bytes);

    if (pool == NULL) {
        return epx__fail(EPX_ERR_NO_MEMORY, "no memory for %d workers",
                         num_workers);
    }
    pool->spin_ns = spin_ns;
    pool->meanwhile = meanwhile;
    pool->meanwhile_context = context;
    for (int32_t i = 0; i < num_workers - 1; i++) {
        thread_t *thread = &pool->threads[i];
        epx_status_t status;

        thread->pool = pool;
        status = epx__thread_start(&thread->id, thread_main, thread,
                                   "a worker thread");
        if (status != EPX_OK) {
            epx__pool_close(pool);
            return status;
        }
        pool->num_threads++;
    }
    *pool_p = pool;
    return EPX_OK;
}

void
epx__pool_close(epx__pool_t *pool)
{
    epx__store_u32(&pool->stopping, 1);
    start_round(pool, 1);
    for (int32_t i = 0; i < pool->num_threads; i++) {
        (void)pthread_join(pool->threads[i].id, NULL);
    }
    free(pool);
}

void
epx__pool_run(epx__pool_t *pool, int32_t num_workers, epx__work_fn_t fn,
              void *context)
{
    if (num_workers == 1 || pool->num_threads == 0) {
        fn(context, 0);
        return;
    }
    pool->fn = fn;
    pool->context = context;
    start_round(pool, num_workers < MOST_WORKERS ? num_workers : MOST_WORKERS);
    fn(context, 0);
    end_round(pool);
}
