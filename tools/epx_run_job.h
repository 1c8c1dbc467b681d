/* SPDX-License-Identifier: MIT */
/* One job, from its first process to its last. */
#ifndef EPX_RUN_JOB_H
#define EPX_RUN_JOB_H

#include <stdbool.h>
#include <stdint.h>

/* Exit statuses of epx-run's own, as those of env(1) and timeout(1). */
enum {
    EPX__EXIT_TIMEOUT = 124,
    EPX__EXIT_LAUNCHER = 125,
    EPX__EXIT_CANNOT_RUN = 126,
    EPX__EXIT_NOT_FOUND = 127,
    EPX__EXIT_SIGNAL = 128,
};

struct epx__hosts;

typedef struct epx__run_options {
    char **argv;    /* the program and its arguments; a member's is
                     * allocated */
    int num_ranks;  /* on this host */
    int first_rank; /* of those */
    bool is_member; /* of a job on several hosts, for its launcher; */
    const struct epx__hosts *hosts; /* that launcher has them; or NULL */
    bool prefix;
    bool bind;
    int64_t grace_ns;
    int64_t timeout_ns; /* 0: none */
} epx__run_options_t;

/* Runs the job and returns the exit status of epx-run.  By then no process of
 * the job is left. */
int epx__job_run(const epx__run_options_t *options);

#endif
