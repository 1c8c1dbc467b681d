/* SPDX-License-Identifier: MIT */
/* Ranks as processes of their own, and what else the bootstrap tests share. */
#ifndef EPX_TESTS_BOOTSTRAP_UTIL_H
#define EPX_TESTS_BOOTSTRAP_UTIL_H

/* cmocka wants these before it */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "bootstrap/rendezvous.h"
#include "conformance/holdings.h"
#include "core/clock.h"

#include <sys/types.h>

#define MAX_PROCESSES 32

/* What a process has to tell when it ends. */
typedef struct outcome {
    epx_status_t status;
    char error[512];
    uint64_t value;
} outcome_t;

typedef struct processes {
    int count;
    pid_t pids[MAX_PROCESSES];
    int pipes[MAX_PROCESSES];
    outcome_t outcomes[MAX_PROCESSES];
} processes_t;

/* Forks a process that runs body(arg, index, outcome); index counts from 0. */
void process_start(processes_t *processes,
                   void (*body)(void *arg, int index, outcome_t *outcome),
                   void *arg);

/* Waits for one, for the first of two, or for all that are left.  A process
 * that crashed, or in which a sanitizer found something, fails the test. */
const outcome_t *process_wait(processes_t *processes, int index);
void processes_wait(processes_t *processes);
int process_wait_any(processes_t *processes, int a, int b);
void process_kill(processes_t *processes, int index);

/* Notes a status and its sentence. */
void outcome_set(outcome_t *outcome, epx_status_t status);

/* Fails the test, showing both, unless the outcome is `status` and its sentence
 * has `part` in it. */
void outcome_check(const outcome_t *outcome, epx_status_t status,
                   const char *part);

int64_t in_ms(int64_t ms);
void sleep_ms(int64_t ms);

/* Rank `rank` of num_ranks of the job that all tests use. */
epx__identity_t identity_make(int32_t rank, int32_t num_ranks);

#endif
