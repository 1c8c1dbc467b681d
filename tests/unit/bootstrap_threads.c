/* SPDX-License-Identifier: MIT */
/* The threads of one process as ranks: epx_bootstrap_threads_create. */
#include "bootstrap_util.h"

#include <pthread.h>
#include <string.h>

#define NUM_RANKS 7

typedef struct member {
    epx_bootstrap_t *bootstrap;
    outcome_t outcome;
    pthread_t thread;
} member_t;

static void
start(member_t *members, epx_bootstrap_t **bootstraps, void *(*body)(void *),
      int32_t num_ranks)
{
    for (int32_t rank = 0; rank < num_ranks; rank++) {
        members[rank] = (member_t){ .bootstrap = bootstraps[rank] };
        assert_int_equal(bootstraps[rank]->size, sizeof(epx_bootstrap_t));
        assert_int_equal(bootstraps[rank]->rank, rank);
        assert_int_equal(bootstraps[rank]->num_ranks, num_ranks);
        assert_int_equal(
            pthread_create(&members[rank].thread, NULL, body, &members[rank]),
            0);
    }
}

static void
run(member_t *members, void *(*body)(void *), int32_t num_ranks)
{
    epx_bootstrap_t *bootstraps[NUM_RANKS];

    assert_int_equal(epx_bootstrap_threads_create(num_ranks, bootstraps),
                     EPX_OK);
    start(members, bootstraps, body, num_ranks);
    for (int32_t rank = 0; rank < num_ranks; rank++) {
        assert_int_equal(pthread_join(members[rank].thread, NULL), 0);
    }
}

static epx_status_t
gather(const epx_bootstrap_t *bootstrap, const void *send, void *recv,
       size_t bytes, int64_t ms)
{
    return bootstrap->allgather(bootstrap->context, send, recv, bytes,
                                in_ms(ms));
}

/* Rounds of different lengths, with nothing between them. */
static void *
gather_often(void *arg)
{
    member_t *member = arg;
    const epx_bootstrap_t *bootstrap = member->bootstrap;
    unsigned char send[64];
    unsigned char recv[NUM_RANKS * 64];

    for (int round = 0; round < 200; round++) {
        size_t bytes = (size_t)(round % 64);
        epx_status_t status;

        memset(send, bootstrap->rank * 16 + round % 16, sizeof(send));
        status = gather(bootstrap, send, recv, bytes, 30000);
        outcome_set(&member->outcome, status);
        for (size_t i = 0; i < bytes * (size_t)bootstrap->num_ranks; i++) {
            member->outcome.value += recv[i] != i / bytes * 16 + round % 16;
        }
    }
    epx_bootstrap_destroy(member->bootstrap);
    return NULL;
}

static void
test_gather(void **state)
{
    member_t members[NUM_RANKS];

    (void)state;
    for (int32_t num_ranks = 1; num_ranks <= NUM_RANKS; num_ranks += 3) {
        run(members, gather_often, num_ranks);
        for (int32_t rank = 0; rank < num_ranks; rank++) {
            outcome_check(&members[rank].outcome, EPX_OK, "");
            assert_int_equal(members[rank].outcome.value, 0);
        }
    }
}

/* Ranks 2 and 5 stay away until the others have given up, and come then. */
static void *
stay_away(void *arg)
{
    member_t *member = arg;
    int32_t rank = member->bootstrap->rank;
    bool late = rank == 2 || rank == 5;
    char send[4] = "abc";
    char recv[NUM_RANKS * 4];
    epx_status_t status;

    if (!late) {
        status = gather(member->bootstrap, send, recv, 4, 1500);
        outcome_set(&member->outcome, status);
    }
    return NULL;
}

static void
test_timeout_names_ranks(void **state)
{
    epx_bootstrap_t *bootstraps[NUM_RANKS];
    member_t members[NUM_RANKS];
    char send[4] = "abc";
    char recv[NUM_RANKS * 4];

    (void)state;
    assert_int_equal(epx_bootstrap_threads_create(NUM_RANKS, bootstraps),
                     EPX_OK);
    start(members, bootstraps, stay_away, NUM_RANKS);
    for (int32_t rank = 0; rank < NUM_RANKS; rank++) {
        assert_int_equal(pthread_join(members[rank].thread, NULL), 0);
        if (rank != 2 && rank != 5) {
            outcome_check(&members[rank].outcome, EPX_ERR_TIMEOUT,
                          "ranks 2 and 5 of 7");
        }
    }
    /* Whoever comes later neither hangs nor is served from two rounds. */
    for (int32_t rank = 0; rank < NUM_RANKS; rank++) {
        outcome_t outcome;

        outcome_set(&outcome, gather(bootstraps[rank], send, recv, 4, 30000));
        outcome_check(&outcome, EPX_ERR_BROKEN, "ranks 2 and 5 of 7");
        epx_bootstrap_destroy(bootstraps[rank]);
    }
}

static void *
disagree(void *arg)
{
    member_t *member = arg;
    char send[8] = "abcdefg";
    char recv[NUM_RANKS * 8];
    size_t bytes = member->bootstrap->rank == 3 ? 8 : 4;

    outcome_set(&member->outcome,
                gather(member->bootstrap, send, recv, bytes, 30000));
    epx_bootstrap_destroy(member->bootstrap);
    return NULL;
}

static void
test_other_length(void **state)
{
    member_t members[NUM_RANKS];

    (void)state;
    run(members, disagree, NUM_RANKS);
    for (int32_t rank = 0; rank < NUM_RANKS; rank++) {
        outcome_check(&members[rank].outcome, EPX_ERR_MISMATCH,
                      "rank 3 passed 8 bytes");
    }
}

static void *
leave(void *arg)
{
    member_t *member = arg;
    char send = 'a';
    char recv[NUM_RANKS];

    if (member->bootstrap->rank == 4) {
        epx_bootstrap_destroy(member->bootstrap);
    } else {
        outcome_set(&member->outcome,
                    gather(member->bootstrap, &send, recv, 1, 60000));
    }
    return NULL;
}

static void
test_destroyed_rank_is_lost(void **state)
{
    epx_bootstrap_t *bootstraps[NUM_RANKS];
    member_t members[NUM_RANKS];

    (void)state;
    assert_int_equal(epx_bootstrap_threads_create(NUM_RANKS, bootstraps),
                     EPX_OK);
    start(members, bootstraps, leave, NUM_RANKS);
    for (int32_t rank = 0; rank < NUM_RANKS; rank++) {
        assert_int_equal(pthread_join(members[rank].thread, NULL), 0);
        if (rank != 4) {
            /* The first to notice fails; later ones find it broken. */
            assert_true(members[rank].outcome.status == EPX_ERR_PEER_LOST ||
                        members[rank].outcome.status == EPX_ERR_BROKEN);
            assert_non_null(strstr(members[rank].outcome.error, "rank 4"));
            epx_bootstrap_destroy(bootstraps[rank]);
        }
    }
}

static void
check_call(epx_status_t status, epx_status_t expected, const char *part)
{
    outcome_t outcome;

    outcome_set(&outcome, status);
    outcome_check(&outcome, expected, part);
}

static void
test_arguments(void **state)
{
    epx_bootstrap_t *bootstrap;
    char byte = 'x';
    char copy = 0;

    (void)state;
    check_call(epx_bootstrap_threads_create(1, NULL), EPX_ERR_NULL,
               "bootstraps_p is null");
    check_call(epx_bootstrap_threads_create(0, &bootstrap), EPX_ERR_INVALID,
               "num_ranks is 0; it must be from 1 to 1024");
    check_call(epx_bootstrap_threads_create(-1, &bootstrap), EPX_ERR_INVALID,
               "num_ranks is -1");
    check_call(epx_bootstrap_threads_create(1025, &bootstrap), EPX_ERR_INVALID,
               "num_ranks is 1025");
    check_call(epx_bootstrap_threads_create(1, &bootstrap), EPX_OK, "");
    check_call(gather(bootstrap, NULL, &copy, 1, 1000), EPX_ERR_NULL,
               "send is null");
    check_call(gather(bootstrap, &byte, NULL, 1, 1000), EPX_ERR_NULL,
               "recv is null");
    check_call(gather(bootstrap, &byte, &copy, SIZE_MAX, 1000), EPX_ERR_INVALID,
               "bytes is");
    check_call(gather(bootstrap, NULL, NULL, 0, 1000), EPX_OK, "");
    check_call(gather(bootstrap, &byte, &copy, 1, 1000), EPX_OK, "");
    assert_int_equal(copy, 'x');
    epx_bootstrap_destroy(bootstrap);
    epx_bootstrap_destroy(NULL);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_gather),
        cmocka_unit_test(test_timeout_names_ranks),
        cmocka_unit_test(test_other_length),
        cmocka_unit_test(test_destroyed_rank_is_lost),
        cmocka_unit_test(test_arguments),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
