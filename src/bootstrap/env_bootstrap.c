/* SPDX-License-Identifier: MIT */
#include "bootstrap/bootstrap.h"
#include "bootstrap/launch_env.h"
#include "bootstrap/rendezvous.h"
#include "bootstrap/secret.h"
#include "core/clock.h"
#include "core/env.h"
#include "core/status.h"

#include <sodium.h>
#include <string.h>
#include <unistd.h>

#define DEFAULT_TIMEOUT_NS (30 * EPX__NS_PER_SEC)

static const char *
get_variable(void *context, const char *name)
{
    (void)context;
    return epx__env_string(name);
}

/* With one rank there is nobody to ask. */
static epx_status_t
single_allgather(void *context, const void *send, void *recv, size_t bytes,
                 int64_t deadline_ns)
{
    epx_status_t status = epx__allgather_check(send, recv, bytes, 1);

    (void)context;
    (void)deadline_ns;
    if (status == EPX_OK && bytes > 0) {
        memmove(recv, send, bytes);
    }
    return status;
}

static epx_status_t
meet(const epx__launch_t *launch, int64_t deadline_ns, epx__star_t **star_p)
{
    epx__identity_t identity = { .rank = launch->rank,
                                 .num_ranks = launch->num_ranks };
    epx_status_t status;

    if (sodium_init() < 0) {
        return epx__fail(EPX_ERR_SYSTEM,
                         "libsodium cannot be set up on this system");
    }
    memcpy(identity.job, launch->job, sizeof(identity.job));
    status = epx__secret_load(identity.secret);
    if (status == EPX_OK) {
        status = epx__rendezvous_open(&identity, launch->host, launch->port,
                                      deadline_ns, star_p);
    }
    sodium_memzero(&identity, sizeof(identity));
    return status;
}

epx_status_t
epx_bootstrap_env_create(uint64_t timeout_ns, epx_bootstrap_t **bootstrap_p)
{
    int64_t deadline_ns = epx__deadline_ns(
        timeout_ns == 0 ? (uint64_t)DEFAULT_TIMEOUT_NS : timeout_ns);
    epx_bootstrap_t bootstrap = EPX_BOOTSTRAP_INIT;
    epx__launch_t launch;
    epx__star_t *star = NULL;
    epx_status_t status;

    if (bootstrap_p == NULL) {
        return epx__fail(EPX_ERR_NULL, "bootstrap_p is null");
    }
    (void)epx__launch_warn_unknown(environ);
    status = epx__launch_parse(get_variable, NULL, &launch);
    if (status == EPX_OK && launch.num_ranks > 1) {
        status = meet(&launch, deadline_ns, &star);
    }
    if (status != EPX_OK) {
        return status;
    }
    bootstrap.rank = launch.rank;
    bootstrap.num_ranks = launch.num_ranks;
    bootstrap.allgather = star == NULL ? single_allgather : epx__star_allgather;
    bootstrap.destroy = star == NULL ? NULL : epx__star_destroy;
    bootstrap.context = star;
    status = epx__bootstrap_new(&bootstrap, bootstrap_p);
    if (status != EPX_OK && star != NULL) {
        epx__star_destroy(star);
    }
    return status;
}
