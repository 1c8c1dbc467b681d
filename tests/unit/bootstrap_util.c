/* SPDX-License-Identifier: MIT */
#include "bootstrap_util.h"

#include "bootstrap/net.h"

#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

void
process_start(processes_t *processes,
              void (*body)(void *arg, int index, outcome_t *outcome), void *arg)
{
    int index = processes->count++;
    int ends[2];

    assert_in_range(index, 0, MAX_PROCESSES - 1);
    assert_int_equal(pipe(ends), 0);
    (void)fflush(NULL);
    processes->pids[index] = fork();
    assert_true(processes->pids[index] >= 0);
    if (processes->pids[index] == 0) {
        outcome_t outcome = { 0 };

        (void)close(ends[0]);
        body(arg, index, &outcome);
        if (write(ends[1], &outcome, sizeof(outcome)) !=
            (ssize_t)sizeof(outcome)) {
            _exit(2);
        }
        exit(0); /* not _exit: leaks are looked for on the way out */
    }
    (void)close(ends[1]);
    processes->pipes[index] = ends[0];
}

const outcome_t *
process_wait(processes_t *processes, int index)
{
    outcome_t *outcome = &processes->outcomes[index];
    ssize_t n = read(processes->pipes[index], outcome, sizeof(*outcome));
    int status = -1;

    assert_int_equal(waitpid(processes->pids[index], &status, 0),
                     processes->pids[index]);
    (void)close(processes->pipes[index]);
    processes->pids[index] = 0;
    assert_int_equal(status, 0);
    assert_int_equal(n, sizeof(*outcome));
    return outcome;
}

int
process_wait_any(processes_t *processes, int a, int b)
{
    struct pollfd polls[2] = {
        { .fd = processes->pipes[a], .events = POLLIN },
        { .fd = processes->pipes[b], .events = POLLIN },
    };
    int index;

    assert_true(poll(polls, 2, -1) > 0);
    index = polls[0].revents != 0 ? a : b;
    (void)process_wait(processes, index);
    return index;
}

void
process_kill(processes_t *processes, int index)
{
    assert_int_equal(kill(processes->pids[index], SIGKILL), 0);
    assert_int_equal(waitpid(processes->pids[index], NULL, 0),
                     processes->pids[index]);
    (void)close(processes->pipes[index]);
    processes->pids[index] = 0;
}

void
processes_wait(processes_t *processes)
{
    for (int i = 0; i < processes->count; i++) {
        if (processes->pids[i] != 0) {
            (void)process_wait(processes, i);
        }
    }
}

void
outcome_set(outcome_t *outcome, epx_status_t status)
{
    outcome->status = status;
    (void)snprintf(outcome->error, sizeof(outcome->error), "%s",
                   status == EPX_OK ? "" : epx_last_error());
}

void
outcome_check(const outcome_t *outcome, epx_status_t status, const char *part)
{
    if (outcome->status != status || strstr(outcome->error, part) == NULL) {
        fail_msg("status %d, \"%s\"; expected %d, \"...%s...\"",
                 outcome->status, outcome->error, status, part);
    }
}

int64_t
in_ms(int64_t ms)
{
    return epx__now_ns() + ms * EPX__NS_PER_MS;
}

void
sleep_ms(int64_t ms)
{
    (void)epx__poll_until(NULL, 0, in_ms(ms));
}

epx__identity_t
identity_make(int32_t rank, int32_t num_ranks)
{
    epx__identity_t identity = { .rank = rank, .num_ranks = num_ranks };

    memset(identity.job, 7, sizeof(identity.job));
    memset(identity.secret, 42, sizeof(identity.secret));
    return identity;
}
