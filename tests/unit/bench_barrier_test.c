/* SPDX-License-Identifier: MIT */
/* The barrier holds everybody back, in threads and in processes, and a
 * deadline ends the wait. */
#include "bench_barrier.h"
#include "bench_times.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#define PARTIES 5
#define ROUNDS  400

struct shared {
    struct bench_barrier barrier;
    _Atomic int entered;
    _Atomic int early; /* parties that left a round before all had come */
};

static void *
party_main(void *arg)
{
    struct shared *shared = arg;
    for (int round = 1; round <= ROUNDS; round++) {
        atomic_fetch_add(&shared->entered, 1);
        bench_barrier_wait(&shared->barrier, BENCH_NO_DEADLINE);
        if (atomic_load(&shared->entered) < round * PARTIES) {
            atomic_fetch_add(&shared->early, 1);
        }
    }
    return NULL;
}

/* With enough cores it spins first, without it sleeps at once. */
static void
test_threads(void **state)
{
    (void)state;
    for (int cores = 1; cores <= PARTIES; cores += PARTIES - 1) {
        struct shared shared = { .entered = 0 };
        pthread_t threads[PARTIES];
        bench_barrier_init(&shared.barrier, PARTIES, cores);
        for (int i = 0; i < PARTIES; i++) {
            assert_int_equal(
                pthread_create(&threads[i], NULL, party_main, &shared), 0);
        }
        for (int i = 0; i < PARTIES; i++) {
            pthread_join(threads[i], NULL);
        }
        assert_int_equal(shared.early, 0);
        assert_int_equal(shared.entered, ROUNDS * PARTIES);
    }
}

static void
test_processes(void **state)
{
    struct shared *shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE,
                                 MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    (void)state;
    assert_ptr_not_equal(shared, MAP_FAILED);
    bench_barrier_init(&shared->barrier, PARTIES, 1);
    for (int i = 0; i < PARTIES; i++) {
        pid_t pid = fork();
        assert_true(pid >= 0);
        if (pid == 0) {
            party_main(shared);
            _exit(0);
        }
    }
    for (int i = 0; i < PARTIES; i++) {
        int status = 1;
        assert_true(wait(&status) > 0);
        assert_int_equal(status, 0);
    }
    assert_int_equal(shared->early, 0);
    assert_int_equal(shared->entered, ROUNDS * PARTIES);
    munmap(shared, sizeof *shared);
}

static void
test_deadline(void **state)
{
    struct bench_barrier barrier;
    (void)state;
    bench_barrier_init(&barrier, 2, 1);
    assert_false(bench_barrier_wait(&barrier, bench_now_ns() + 20000000));
    bench_barrier_init(&barrier, 1, 1);
    assert_true(bench_barrier_wait(&barrier, 0));
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_threads),
        cmocka_unit_test(test_processes),
        cmocka_unit_test(test_deadline),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
