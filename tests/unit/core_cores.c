/* SPDX-License-Identifier: MIT */
/* The set of cores that this thread may use. */
#include "api_common.h"
#include "core/cores.h"

#include <pthread.h>
#include <sched.h>

static void
is_the_threads_affinity(void **state)
{
    epx__cores_t cores = epx__cores_get();
    cpu_set_t set;

    (void)state;
    assert_int_equal(sched_getaffinity(0, sizeof(set), &set), 0);
    assert_int_equal(cores.count, CPU_COUNT(&set));
    for (int core = 0; core < CPU_SETSIZE; core++) {
        assert_int_equal(cores.words[core / 64] >> core % 64 & 1,
                         CPU_ISSET(core, &set) != 0);
    }
    assert_true(epx__cores_overlap(&cores, &cores));
}

/* A thread, so that the program's own affinity stays. */
static void *
pin_and_get(void *arg)
{
    epx__cores_t *cores = arg;
    cpu_set_t set;
    int core = 0;

    if (sched_getaffinity(0, sizeof(set), &set) != 0) {
        return NULL;
    }
    while (!CPU_ISSET(core, &set)) {
        core++;
    }
    CPU_ZERO(&set);
    CPU_SET(core, &set);
    if (sched_setaffinity(0, sizeof(set), &set) == 0) {
        *cores = epx__cores_get();
    }
    return NULL;
}

static void
follows_a_pinned_thread(void **state)
{
    epx__cores_t all = epx__cores_get();
    epx__cores_t one = { { 0 }, 0 };
    pthread_t thread;

    (void)state;
    assert_int_equal(pthread_create(&thread, NULL, pin_and_get, &one), 0);
    assert_int_equal(pthread_join(thread, NULL), 0);
    assert_int_equal(one.count, 1);
    assert_true(epx__cores_overlap(&all, &one));
    assert_int_equal(epx__cores_get().count, all.count);
}

static void
overlaps_where_a_core_is_shared(void **state)
{
    epx__cores_t low = { { 3 }, 2 };
    epx__cores_t high = { { 0 }, 1 };
    epx__cores_t both = { { 2 }, 2 };
    epx__cores_t uncounted = { { 0 }, 2000 };

    (void)state;
    high.words[15] = UINT64_C(1) << 63;
    both.words[15] = UINT64_C(1) << 63;
    assert_false(epx__cores_overlap(&low, &high));
    assert_false(epx__cores_overlap(&high, &low));
    assert_true(epx__cores_overlap(&low, &both));
    assert_true(epx__cores_overlap(&both, &high));
    /* a set that did not fit may have any core in it */
    assert_true(epx__cores_overlap(&low, &uncounted));
    assert_true(epx__cores_overlap(&uncounted, &low));
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(is_the_threads_affinity),
        cmocka_unit_test(follows_a_pinned_thread),
        cmocka_unit_test(overlaps_where_a_core_is_shared),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
