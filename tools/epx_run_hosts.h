/* SPDX-License-Identifier: MIT */
/*
 * Jobs on several hosts.  The launcher starts an agent for each host (ssh, or
 * what --agent says), and that starts this very program there, as a member:
 *
 *     launcher          agent HOST epx-run --member       a rank of HOST
 *        |  the job, on its standard input                     |
 *        |---------------------------->|  starts its ranks     |
 *        |                             |---------------------->|
 *        |      their output, prefixed |                       |
 *        |<----------------------------|<----------------------|
 *        |  end of input: end the job  |                       |
 *        |---------------------------->|  SIGTERM, SIGKILL     |
 *
 * The secret of the job is never on a command line.
 */
#ifndef EPX_RUN_HOSTS_H
#define EPX_RUN_HOSTS_H

#include "epx_run_job.h"

#include <stddef.h>

typedef struct epx__host {
    const char *name;
    int first_rank;
    int num_ranks;
} epx__host_t;

typedef struct epx__hosts {
    epx__host_t *hosts;
    int num_hosts;
    int num_ranks;       /* of all */
    const char *address; /* of the first, for the others */
    int port;            /* there, and the next one; 0: some */
    char **agent;        /* its words, ended by NULL */
    char **names;        /* variables to pass on, ended by NULL */
    char program[4096];  /* this one, on all hosts */
} epx__hosts_t;

/* "A:4,B:4"; without a number a host has one rank.  False, and told why: */
bool epx__hosts_parse(epx__hosts_t *hosts, const char *list);
/* What --agent, --address and the rest have left open, and checks. */
bool epx__hosts_complete(epx__hosts_t *hosts, const char *agent);
void epx__hosts_free(epx__hosts_t *hosts);

/* The words that start the member on a host, ended by NULL; to be freed. */
char **epx__hosts_command(const epx__hosts_t *hosts, int host);

/* A pipe from which the member reads its part of the job, written already; the
 * end of input is when *lifeline_p is closed.  -1 with errno. */
int epx__hosts_send(const epx__run_options_t *options, int host,
                    int *lifeline_p);

/* The member's side: options, working directory and environment.  False, and
 * told why. */
bool epx__hosts_receive(epx__run_options_t *options);

#endif
