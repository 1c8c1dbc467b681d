/* SPDX-License-Identifier: MIT */
/* Threads of the library leave signals to those of the program. */
#include "api_common.h"

#include "core/thread.h"

#include <signal.h>
#include <unistd.h>

static void *
note_mask(void *argument)
{
    (void)pthread_sigmask(SIG_SETMASK, NULL, argument);
    return NULL;
}

static void
all_signals_are_blocked_in_them(void **state)
{
    static const int signals[] = { SIGINT, SIGTERM, SIGHUP, SIGCHLD, SIGUSR1 };
    sigset_t inside, before, after;
    pthread_t id;

    (void)state;
    (void)pthread_sigmask(SIG_SETMASK, NULL, &before);
    assert_int_equal(epx__thread_start(&id, note_mask, &inside, "a test"),
                     EPX_OK);
    assert_int_equal(pthread_join(id, NULL), 0);
    (void)pthread_sigmask(SIG_SETMASK, NULL, &after);
    for (size_t i = 0; i < sizeof(signals) / sizeof(*signals); i++) {
        assert_int_equal(sigismember(&inside, signals[i]), 1);
        assert_int_equal(sigismember(&after, signals[i]),
                         sigismember(&before, signals[i]));
    }
}

/* A program that blocks a signal and waits for it gets it, whatever threads
 * its group has. */
static void
sigwait_gets_what_is_sent(void **state)
{
    epx_group_config_t config = EPX_GROUP_CONFIG_INIT;
    epx_bootstrap_t *bootstrap;
    epx_queue_t *queue;
    epx_group_t *group;
    sigset_t terminate;
    int got = 0;

    (void)state;
    assert_int_equal(epx_bootstrap_threads_create(1, &bootstrap), EPX_OK);
    config.bootstrap = bootstrap;
    config.heap_bytes = 1 << 20;
    config.num_workers = 3;
    assert_int_equal(epx_group_create(&config, &group), EPX_OK);
    assert_int_equal(epx_queue_create(group, &queue), EPX_OK);
    (void)sigemptyset(&terminate);
    (void)sigaddset(&terminate, SIGTERM);
    assert_int_equal(pthread_sigmask(SIG_BLOCK, &terminate, NULL), 0);
    assert_int_equal(kill(getpid(), SIGTERM), 0);
    assert_int_equal(sigwait(&terminate, &got), 0);
    assert_int_equal(got, SIGTERM);
    assert_int_equal(epx_queue_destroy(queue), EPX_OK);
    assert_int_equal(epx_group_destroy(group), EPX_OK);
    epx_bootstrap_destroy(bootstrap);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(all_signals_are_blocked_in_them),
        cmocka_unit_test(sigwait_gets_what_is_sent),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
