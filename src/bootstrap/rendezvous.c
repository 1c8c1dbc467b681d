/* SPDX-License-Identifier: MIT */
#include "bootstrap/rendezvous.h"

#include "bootstrap/join.h"
#include "core/clock.h"
#include "core/status.h"

#include <sodium.h>
#include <stdlib.h>
#include <unistd.h>

epx_status_t
epx__rendezvous_open(const epx__identity_t *identity, const char *host,
                     uint16_t port, int64_t deadline_ns, epx__star_t **star_p)
{
    int32_t num_links = identity->rank == 0 ? identity->num_ranks : 1;
    epx__link_t *links = calloc((size_t)num_links, sizeof(*links));
    epx__star_t *star;
    epx_status_t status;

    if (links == NULL) {
        return epx__fail(EPX_ERR_NO_MEMORY, "no memory for %d connections",
                         num_links);
    }
    status = identity->rank == 0
                 ? epx__join_listen(identity, host, port, deadline_ns, links)
                 : epx__join_connect(identity, host, port, deadline_ns, links);
    if (status != EPX_OK) {
        goto free_links;
    }
    status =
        epx__star_create(identity->rank, identity->num_ranks, links, &star);
    if (status != EPX_OK) {
        goto close_links;
    }
    status = epx__star_start(star, deadline_ns);
    if (status != EPX_OK) {
        epx__star_destroy(star);
        goto free_links;
    }
    *star_p = star;
    goto free_links;

close_links:
    for (int32_t i = identity->rank == 0 ? 1 : 0; i < num_links; i++) {
        (void)close(links[i].fd);
    }
free_links:
    sodium_memzero(links, (size_t)num_links * sizeof(*links));
    free(links);
    return status;
}
