/* SPDX-License-Identifier: MIT */
/* Starting ranks: what they find in their environment and how they are tied to
 * the launcher. */
#ifndef EPX_RUN_START_H
#define EPX_RUN_START_H

#include <signal.h>
#include <stdbool.h>
#include <sys/resource.h>
#include <sys/types.h>

typedef struct epx__start {
    char **argv; /* the program and its arguments */
    int num_ranks;
    int first_rank;
    bool bind;      /* each rank to its share of the usable cores */
    bool is_member; /* the launcher is on another host, and has seen to all
                     * that ranks share */
    /* What is started are agents, each for a host of these; or NULL. */
    const struct epx__hosts *hosts;
    int stdin_fd; /* of the next one; -1: what is usual */
    pid_t launcher;
    pid_t group; /* the job's process group; 0 until rank 0 has made it */
    /* What the launcher changes for itself and its ranks get back. */
    sigset_t signal_mask;
    struct sigaction sigpipe;
    struct rlimit num_files;
} epx__start_t;

/* Sets up this process and the environment that all ranks share.  On failure
 * *what_p says what could not be done; errno tells why. */
bool epx__start_prepare(epx__start_t *start, const char **what_p);

/*
 * Starts a rank with its output going to out_fd and err_fd (STDOUT_FILENO and
 * STDERR_FILENO: as they are) and waits until its program runs.  Returns -1
 * with errno when that fails; *exec_failed_p tells whether it was the program
 * that could not be run.
 */
pid_t epx__start_rank(epx__start_t *start, int rank, int out_fd, int err_fd,
                      bool *exec_failed_p);

#endif
