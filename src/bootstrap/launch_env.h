/* SPDX-License-Identifier: MIT */
/* What launchers say in the environment.  The parser is a pure function of what
 * `get` returns, so that it can be tested without an environment. */
#ifndef EPX_BOOTSTRAP_LAUNCH_ENV_H
#define EPX_BOOTSTRAP_LAUNCH_ENV_H

#include "bootstrap/net.h"
#include "bootstrap/rendezvous_wire.h"

typedef struct epx__launch {
    int32_t rank;
    int32_t num_ranks;
    char host[EPX__MAX_HOST_BYTES];    /* where rank 0 listens, and the port; */
    uint16_t port;                     /* unset with one rank */
    unsigned char job[EPX__JOB_BYTES]; /* hash of the job's id */
} epx__launch_t;

/* Returns a variable's value, NULL when it is unset. */
typedef const char *(*epx__getenv_t)(void *context, const char *name);

/* EPX_ERR_ENVIRONMENT names the variable, its value and what is allowed. */
epx_status_t epx__launch_parse(epx__getenv_t get, void *context,
                               epx__launch_t *launch);

/* Warns in the log of variables that start with EPX_ and mean nothing;
 * returns how many there are.  `environment` is as in environ(7). */
size_t epx__launch_warn_unknown(char *const *environment);

#endif
