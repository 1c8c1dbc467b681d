/* SPDX-License-Identifier: MIT */
/* Processes of one host meet over TCP, or say why they do not. */
#include "bootstrap_util.h"

#include "bootstrap/net.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* What the processes of one test are told: index i is rank i of num_ranks, but
 * one of them may be odd. */
typedef struct plan {
    const char *host;
    uint16_t port;
    int32_t num_ranks;
    int64_t timeout_ms;
    int odd; /* -1: none */
    epx__identity_t odd_identity;
    int64_t odd_delay_ms;
    int64_t odd_timeout_ms;
} plan_t;

static plan_t
plan_make(uint16_t port, int32_t num_ranks)
{
    return (plan_t){
        .host = "127.0.0.1",
        .port = port,
        .num_ranks = num_ranks,
        .timeout_ms = 60000,
        .odd = -1,
        .odd_timeout_ms = 60000,
    };
}

/* A plan in which process `odd` is, unless the test changes that, as all. */
static plan_t
plan_make_odd(uint16_t port, int32_t num_ranks, int odd)
{
    plan_t plan = plan_make(port, num_ranks);

    plan.odd = odd;
    plan.odd_identity = identity_make(odd, num_ranks);
    return plan;
}

static epx_status_t
join(const plan_t *plan, int index, epx__star_t **star_p)
{
    bool odd = index == plan->odd;
    epx__identity_t identity =
        odd ? plan->odd_identity : identity_make(index, plan->num_ranks);

    if (odd) {
        sleep_ms(plan->odd_delay_ms);
    }
    return epx__rendezvous_open(
        &identity, plan->host, plan->port,
        in_ms(odd ? plan->odd_timeout_ms : plan->timeout_ms), star_p);
}

/* Several allgathers; counts wrong bytes. */
static epx_status_t
gather_some(epx__star_t *star, const plan_t *plan, int rank, uint64_t *wrong_p)
{
    static const size_t lengths[] = { 8, 0, 1, 1 << 20, 333 };
    size_t num_ranks = (size_t)plan->num_ranks;

    for (size_t i = 0; i < sizeof(lengths) / sizeof(*lengths); i++) {
        size_t bytes = lengths[i];
        unsigned char *send = malloc(bytes + 1);
        unsigned char *recv = calloc(num_ranks, bytes + 1);
        epx_status_t status;

        memset(send, rank * 16 + (int)i, bytes);
        status = epx__star_allgather(star, send, recv, bytes, in_ms(60000));
        for (size_t at = 0; status == EPX_OK && at < bytes * num_ranks; at++) {
            *wrong_p += recv[at] != at / bytes * 16 + i;
        }
        free(send);
        free(recv);
        if (status != EPX_OK) {
            return status;
        }
    }
    return EPX_OK;
}

static void
join_and_gather(void *arg, int index, outcome_t *outcome)
{
    const plan_t *plan = arg;
    epx__star_t *star;
    epx_status_t status = join(plan, index, &star);

    if (status == EPX_OK) {
        status = gather_some(star, plan, index, &outcome->value);
        epx__star_destroy(star);
    }
    outcome_set(outcome, status);
}

static void
start(processes_t *processes, plan_t *plan, int count,
      void (*body)(void *, int, outcome_t *))
{
    *processes = (processes_t){ 0 };
    for (int i = 0; i < count; i++) {
        process_start(processes, body, plan);
    }
}

/* Checks all but the odd process, if there is one. */
static void
check(const processes_t *processes, const plan_t *plan, epx_status_t status,
      const char *part)
{
    for (int i = 0; i < processes->count; i++) {
        if (i != plan->odd) {
            outcome_check(&processes->outcomes[i], status, part);
            assert_int_equal(processes->outcomes[i].value, 0);
        }
    }
}

static void
run(processes_t *processes, plan_t *plan, int count,
    void (*body)(void *, int, outcome_t *), epx_status_t status,
    const char *part)
{
    start(processes, plan, count, body);
    processes_wait(processes);
    check(processes, plan, status, part);
}

static void
test_8_ranks(void **state)
{
    processes_t processes;
    plan_t plan;
    uint16_t port;
    int guard = port_reserve("127.0.0.1", &port);

    (void)state;
    plan = plan_make(port, 8);
    run(&processes, &plan, 8, join_and_gather, EPX_OK, "");
    (void)close(guard);
}

static void
test_rank_0_comes_last(void **state)
{
    processes_t processes;
    plan_t plan;
    uint16_t port;
    int guard = port_reserve("127.0.0.1", &port);

    (void)state;
    plan = plan_make_odd(port, 3, 0);
    plan.odd_delay_ms = 700;
    run(&processes, &plan, 3, join_and_gather, EPX_OK, "");
    outcome_check(&processes.outcomes[0], EPX_OK, "");
    (void)close(guard);
}

static void
test_names_and_ipv6(void **state)
{
    static const char *const hosts[] = { "localhost", "::1" };
    static const char *const addresses[] = { "127.0.0.1", "::1" };
    processes_t processes;
    plan_t plan;
    uint16_t port;

    (void)state;
    for (size_t i = 0; i < 2; i++) {
        int guard = port_reserve(addresses[i], &port);

        if (guard < 0) {
            print_message("skipped: this machine has no %s\n", hosts[i]);
            continue;
        }
        plan = plan_make(port, 3);
        plan.host = hosts[i];
        run(&processes, &plan, 3, join_and_gather, EPX_OK, "");
        (void)close(guard);
    }
}

/* An odd process comes before the last of the right ones, is told why it cannot
 * join, and disturbs nobody. */
static void
check_refused(const epx__identity_t *odd_identity, epx_status_t status,
              const char *part)
{
    processes_t processes;
    plan_t plan;
    uint16_t port;
    int guard = port_reserve("127.0.0.1", &port);

    plan = plan_make_odd(port, 3, 2);
    plan.odd_identity = *odd_identity;
    start(&processes, &plan, 3, join_and_gather);
    outcome_check(process_wait(&processes, 2), status, part);
    plan.odd = 3; /* nobody yet: the next process is the true rank 2 */
    processes.count = 2;
    process_start(&processes, join_and_gather, &plan);
    processes_wait(&processes);
    check(&processes, &plan, EPX_OK, "");
    (void)close(guard);
}

static void
test_refusals(void **state)
{
    epx__identity_t odd;

    (void)state;
    odd = identity_make(2, 3);
    odd.secret[0] ^= 1;
    check_refused(&odd, EPX_ERR_AUTH, "does not hold the secret of rank 2");
    odd = identity_make(7, 3);
    check_refused(&odd, EPX_ERR_MISMATCH, "ranks there are below 3");
    odd = identity_make(2, 4);
    check_refused(&odd, EPX_ERR_MISMATCH,
                  "rank 2 was started as one of 4 ranks");
    odd = identity_make(2, 3);
    odd.job[0] ^= 1;
    check_refused(&odd, EPX_ERR_MISMATCH, "belongs to another job");
}

/* Two processes claim rank 1: one of them joins, the other learns why it
 * cannot. */
static void
test_duplicate_rank(void **state)
{
    processes_t processes;
    plan_t plan;
    uint16_t port;
    int guard = port_reserve("127.0.0.1", &port);
    int refused;

    (void)state;
    plan = plan_make_odd(port, 3, 2);
    plan.odd_identity.rank = 1;
    start(&processes, &plan, 3, join_and_gather);
    /* Whichever it is ends first: the other waits for rank 2. */
    refused = process_wait_any(&processes, 1, 2);
    outcome_check(&processes.outcomes[refused], EPX_ERR_MISMATCH,
                  "another process has already joined as rank 1");
    plan.odd = 3;
    plan.odd_identity.rank = 2;
    process_start(&processes, join_and_gather, &plan);
    processes_wait(&processes);
    for (int i = 0; i < 4; i++) {
        if (i != refused) {
            outcome_check(&processes.outcomes[i], EPX_OK, "");
        }
    }
    (void)close(guard);
}

static void
test_missing_ranks_are_named(void **state)
{
    processes_t processes;
    plan_t plan;
    uint16_t port;
    int guard = port_reserve("127.0.0.1", &port);

    (void)state;
    /* 0..3 of 7 come; the one whose patience ends first knows it too. */
    for (int impatient = 0; impatient < 2; impatient++) {
        plan = plan_make_odd(port, 7, impatient);
        plan.timeout_ms = 4000;
        plan.odd_timeout_ms = 2000;
        run(&processes, &plan, 4, join_and_gather, EPX_ERR_TIMEOUT,
            "ranks 4, 5 and 6 of 7 did not join");
        outcome_check(&processes.outcomes[impatient], EPX_ERR_TIMEOUT,
                      "ranks 4, 5 and 6 of 7 did not join");
    }
    (void)close(guard);
}

static void
test_no_rank_0(void **state)
{
    processes_t processes = { 0 };
    plan_t plan;
    uint16_t port;
    int guard = port_reserve("127.0.0.1", &port);

    (void)state;
    plan = plan_make_odd(port, 2, 0);
    plan.odd_identity = identity_make(1, 2);
    plan.odd_timeout_ms = 500;
    process_start(&processes, join_and_gather, &plan);
    outcome_check(process_wait(&processes, 0), EPX_ERR_TIMEOUT,
                  "rank 1 did not reach rank 0 in time: 127.0.0.1:");
    (void)close(guard);
}

typedef struct address_case {
    const char *host;
    int32_t rank;
    epx_status_t status;
    const char *part;
} address_case_t;

static void
open_at(void *arg, int index, outcome_t *outcome)
{
    const address_case_t *at = (const address_case_t *)arg + index;
    epx__identity_t identity = identity_make(at->rank, 2);
    epx__star_t *star;

    outcome_set(outcome, epx__rendezvous_open(&identity, at->host, 29501,
                                              in_ms(700), &star));
}

static void
test_unusable_addresses(void **state)
{
    static address_case_t cases[] = {
        { "0.0.0.0", 0, EPX_ERR_ENVIRONMENT, "every interface" },
        { "::", 0, EPX_ERR_ENVIRONMENT, "every interface" },
        { "::ffff:0.0.0.0", 0, EPX_ERR_ENVIRONMENT, "every interface" },
        { "0.0.0.0", 1, EPX_ERR_ENVIRONMENT, "every interface" },
        { "203.0.113.7", 0, EPX_ERR_SYSTEM, "rank 0 cannot listen at 203.0" },
        { "no-such-host.invalid", 0, EPX_ERR_ENVIRONMENT,
          "no-such-host.invalid cannot be resolved" },
        { "no-such-host.invalid", 1, EPX_ERR_TIMEOUT,
          "no-such-host.invalid cannot be resolved" },
    };
    const int count = (int)(sizeof(cases) / sizeof(*cases));
    processes_t processes = { 0 };

    (void)state;
    for (int i = 0; i < count; i++) {
        process_start(&processes, open_at, cases);
    }
    processes_wait(&processes);
    for (int i = 0; i < count; i++) {
        outcome_check(&processes.outcomes[i], cases[i].status, cases[i].part);
    }
}

static void
test_port_in_use(void **state)
{
    epx__identity_t identity = identity_make(0, 2);
    epx__star_t *star;
    outcome_t outcome;
    char part[64];
    uint16_t port;
    int guard = port_reserve("127.0.0.1", &port);

    (void)state;
    assert_int_equal(listen(guard, 1), 0);
    outcome_set(&outcome, epx__rendezvous_open(&identity, "127.0.0.1", port,
                                               in_ms(30000), &star));
    (void)snprintf(part, sizeof(part), "127.0.0.1:%u: Address already in use",
                   port);
    outcome_check(&outcome, EPX_ERR_SYSTEM, part);
    (void)close(guard);
}

/* Takes one connection, hears its hello, answers and hangs up. */
static void
answer(int server, const char *text, size_t bytes)
{
    unsigned char hello[EPX__HELLO_BYTES];
    struct pollfd poll_fd = { .fd = server, .events = POLLIN };
    int client;

    assert_int_equal(poll(&poll_fd, 1, 60000), 1);
    client = accept(server, NULL, NULL);
    assert_true(client >= 0);
    if (recv(client, hello, sizeof(hello), MSG_WAITALL) ==
        (ssize_t)sizeof(hello)) {
        (void)send(client, text, bytes, MSG_NOSIGNAL);
    }
    (void)close(client);
}

/* Whatever answers at the port, time after time, but is no rank 0.  Only what
 * proves that rank 0 is another's, or another version's, ends the join early.
 */
static void
test_strange_server(void **state)
{
    static const struct {
        const char *text;
        size_t bytes;
        int64_t timeout_ms;
        epx_status_t status;
        const char *part;
    } cases[] = {
        { "HTTP/1.1 400 Bad Request\r\n\r\n", 28, 1500, EPX_ERR_TIMEOUT,
          "is not rank 0 of an EPX job" },
        { "EPXR\x9\0\2\0", 8, 600000, EPX_ERR_MISMATCH, "speaks version 9" },
        { "EPXR\2\0\2\0 sixty-four bytes, half of them a nonce, half no proof"
          " at all...",
          72, 600000, EPX_ERR_AUTH, "does not hold the secret of rank 1" },
        { "EPXR\2\0\2\0 and then it hangs up", 28, 1500, EPX_ERR_TIMEOUT,
          "rank 1 did not reach rank 0 in time" },
    };

    (void)state;
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        processes_t processes = { 0 };
        struct pollfd polls[2];
        plan_t plan;
        uint16_t port;
        int server = port_reserve("127.0.0.1", &port);

        assert_int_equal(listen(server, 16), 0);
        plan = plan_make_odd(port, 2, 0);
        plan.odd_identity = identity_make(1, 2);
        plan.odd_timeout_ms = cases[i].timeout_ms;
        process_start(&processes, join_and_gather, &plan);
        for (;;) {
            polls[0] = (struct pollfd){ .fd = server, .events = POLLIN };
            polls[1] =
                (struct pollfd){ .fd = processes.pipes[0], .events = POLLIN };
            assert_true(poll(polls, 2, 60000) > 0);
            if (polls[1].revents != 0) {
                break;
            }
            answer(server, cases[i].text, cases[i].bytes);
        }
        outcome_check(process_wait(&processes, 0), cases[i].status,
                      cases[i].part);
        (void)close(server);
    }
}

/* The port is somebody else's at first.  If rank 0 does not come either, that
 * is part of the sentence. */
static void
test_port_is_released(void **state)
{
    epx__address_t address;

    (void)state;
    for (int comes = 0; comes < 2; comes++) {
        processes_t processes = { 0 };
        plan_t plan;
        uint16_t port;
        int guard = port_reserve("127.0.0.1", &port);
        int server;

        plan = plan_make_odd(port, 2, 0);
        plan.odd_identity = identity_make(1, 2);
        plan.odd_timeout_ms = comes ? 60000 : 1500;
        process_start(&processes, join_and_gather, &plan);
        /* Only now: the process is to have no copy of this. */
        assert_int_equal(
            epx__net_listen("127.0.0.1", port, in_ms(5000), &server, &address),
            EPX_OK);
        answer(server, "SSH-2.0-server\r\n", 16);
        (void)close(server);
        if (comes) {
            plan.odd = 1;
            plan.odd_identity = identity_make(0, 2);
            process_start(&processes, join_and_gather, &plan);
            outcome_check(process_wait(&processes, 0), EPX_OK, "");
            outcome_check(process_wait(&processes, 1), EPX_OK, "");
        } else {
            outcome_check(process_wait(&processes, 0), EPX_ERR_TIMEOUT,
                          "; before, what listens at");
        }
        processes_wait(&processes);
        (void)close(guard);
    }
}

/* All join, then rank 2 of 4 stays away from the third allgather. */
static void
join_and_stay_away(void *arg, int index, outcome_t *outcome)
{
    const plan_t *plan = arg;
    char send[4] = "abc";
    char recv[4 * 4];
    epx__star_t *star;
    epx_status_t status = join(plan, index, &star);

    for (int i = 0; i < 3 && status == EPX_OK; i++) {
        int64_t ms = i < 2                ? 60000
                     : index == plan->odd ? plan->odd_timeout_ms
                                          : plan->timeout_ms;

        if (i == 2 && index == 2) {
            sleep_ms(plan->timeout_ms + 1000);
        }
        status = epx__star_allgather(star, send, recv, 4, in_ms(ms));
    }
    outcome_set(outcome, status);
    /* What comes after a failure fails, at once. */
    status = epx__star_allgather(star, send, recv, 4, in_ms(60000));
    outcome->value = status != EPX_ERR_BROKEN;
    epx__star_destroy(star);
}

static void
test_late_rank_is_named(void **state)
{
    processes_t processes;
    plan_t plan;
    uint16_t port;
    int guard = port_reserve("127.0.0.1", &port);

    (void)state;
    for (int impatient = 0; impatient < 2; impatient++) {
        plan = plan_make_odd(port, 4, impatient);
        plan.timeout_ms = 4000;
        plan.odd_timeout_ms = 2000;
        run(&processes, &plan, 4, join_and_stay_away, EPX_ERR_TIMEOUT,
            "rank 2 of 4 kept allgather 3 waiting");
        outcome_check(&processes.outcomes[impatient], EPX_ERR_TIMEOUT,
                      "rank 2 of 4 kept allgather 3 waiting");
        assert_int_equal(processes.outcomes[impatient].value, 0);
    }
    (void)close(guard);
}

/* All join; rank 2 of 4 goes away, or passes another length. */
static void
join_and_leave(void *arg, int index, outcome_t *outcome)
{
    const plan_t *plan = arg;
    char send[4] = "abc";
    char recv[4 * 4];
    epx__star_t *star;
    epx_status_t status = join(plan, index, &star);

    if (status == EPX_OK && index != 2) {
        status = epx__star_allgather(star, send, recv, 4, in_ms(60000));
    }
    if (status != EPX_OK || index == 2) {
        outcome_set(outcome, status);
    }
    epx__star_destroy(star);
}

static void
test_lost_rank_is_named(void **state)
{
    processes_t processes;
    plan_t plan;
    uint16_t port;
    int guard = port_reserve("127.0.0.1", &port);

    (void)state;
    plan = plan_make_odd(port, 4, 2);
    run(&processes, &plan, 4, join_and_leave, EPX_ERR_PEER_LOST,
        "rank 2 went away before allgather 1");
    outcome_check(&processes.outcomes[2], EPX_OK, "");
    (void)close(guard);
}

static void
join_and_disagree(void *arg, int index, outcome_t *outcome)
{
    const plan_t *plan = arg;
    char send[8] = "abcdefg";
    char recv[4 * 8];
    epx__star_t *star;
    epx_status_t status = join(plan, index, &star);

    if (status == EPX_OK) {
        status = epx__star_allgather(star, send, recv, index == 2 ? 8 : 4,
                                     in_ms(60000));
        epx__star_destroy(star);
    }
    outcome_set(outcome, status);
}

static void
test_other_length(void **state)
{
    processes_t processes;
    plan_t plan;
    uint16_t port;
    int guard = port_reserve("127.0.0.1", &port);

    (void)state;
    plan = plan_make(port, 4);
    run(&processes, &plan, 4, join_and_disagree, EPX_ERR_MISMATCH,
        "rank 2 passed another number of bytes to allgather 1");
    (void)close(guard);
}

static void
join_and_sleep(void *arg, int index, outcome_t *outcome)
{
    if (index == 2) {
        epx__star_t *star;

        (void)join(arg, index, &star);
        sleep_ms(600000);
    }
    join_and_gather(arg, index, outcome);
}

/* Killed in the midst of things, rank 2 is noticed long before any deadline. */
static void
test_killed_rank_is_named(void **state)
{
    processes_t processes;
    plan_t plan;
    uint16_t port;
    int guard = port_reserve("127.0.0.1", &port);

    (void)state;
    plan = plan_make_odd(port, 4, 2);
    start(&processes, &plan, 4, join_and_sleep);
    sleep_ms(1500);
    process_kill(&processes, 2);
    processes_wait(&processes);
    check(&processes, &plan, EPX_ERR_PEER_LOST,
          "rank 2 went away before allgather 1");
    (void)close(guard);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_8_ranks),
        cmocka_unit_test(test_rank_0_comes_last),
        cmocka_unit_test(test_names_and_ipv6),
        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_duplicate_rank),
        cmocka_unit_test(test_missing_ranks_are_named),
        cmocka_unit_test(test_no_rank_0),
        cmocka_unit_test(test_unusable_addresses),
        cmocka_unit_test(test_port_in_use),
        cmocka_unit_test(test_strange_server),
        cmocka_unit_test(test_port_is_released),
        cmocka_unit_test(test_late_rank_is_named),
        cmocka_unit_test(test_lost_rank_is_named),
        cmocka_unit_test(test_other_length),
        cmocka_unit_test(test_killed_rank_is_named),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
