/* SPDX-License-Identifier: MIT */
#include "engine/cpu/cpu_pool.h"

#include "core/atomic.h"
#include "core/clock.h"
#include "core/status.h"
#include "core/thread.h"

#include <pthread.h>
#include <stdlib.h>

#define FOREVER_NS (INT64_C(3600) * EPX__NS_PER_SEC)

typedef struct thread {
    epx__pool_t *pool;
    pthread_t id;
    int32_t worker;
} thread_t;

struct epx__pool {
    int32_t num_threads;
    int64_t spin_ns;
    epx__meanwhile_fn_t meanwhile;
    void *meanwhile_context;
    /* A new round: fn, context and num_workers are written before, released
     * by `round` and acquired by the workers. */
    uint32_t round;
    uint32_t running; /* threads that have not returned from this round */
    bool stopping;
    int32_t num_workers;
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

static void *
thread_main(void *argument)
{
    thread_t *self = argument;
    epx__pool_t *pool = self->pool;

    for (uint32_t round = 0;; round++) {
        wait_while(pool, &pool->round, round, NULL);
        if (pool->stopping) {
            return NULL;
        }
        if (self->worker < pool->num_workers) {
            pool->fn(pool->context, self->worker);
        }
        if (epx__add_u32(&pool->running, (uint32_t)-1) == 0) {
            epx__futex_wake_all(&pool->running);
        }
    }
}

static void
start_round(epx__pool_t *pool)
{
    epx__store_u32(&pool->running, (uint32_t)pool->num_threads);
    (void)epx__add_u32(&pool->round, 1);
    epx__futex_wake_all(&pool->round);
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
        thread->worker = i + 1;
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
    pool->stopping = true;
    start_round(pool);
    for (int32_t i = 0; i < pool->num_threads; i++) {
        (void)pthread_join(pool->threads[i].id, NULL);
    }
    free(pool);
}

void
epx__pool_run(epx__pool_t *pool, int32_t num_workers, epx__work_fn_t fn,
              void *context)
{
    uint32_t running;

    if (num_workers == 1 || pool->num_threads == 0) {
        fn(context, 0);
        return;
    }
    pool->num_workers = num_workers;
    pool->fn = fn;
    pool->context = context;
    start_round(pool);
    fn(context, 0);
    while ((running = epx__load_u32(&pool->running)) != 0) {
        wait_while(pool, &pool->running, running, pool->meanwhile);
    }
}
