/* SPDX-License-Identifier: MIT */
/* usage: hosts_meet SECONDS: the smallest program that needs its peers.  Prints
 * who it is in the group that a launcher's ranks make. */
#include <epx/epx.h>
#include <stdio.h>
#include <stdlib.h>

static int
fail(void)
{
    fprintf(stderr, "hosts_meet: %s\n", epx_last_error());
    return EXIT_FAILURE;
}

int
main(int argc, char **argv)
{
    uint64_t seconds = argc > 1 ? strtoull(argv[1], NULL, 10) : 20;
    epx_group_config_t config = EPX_GROUP_CONFIG_INIT;
    epx_group_info_t info = EPX_GROUP_INFO_INIT;
    epx_bootstrap_t *bootstrap = NULL;
    epx_group_t *group = NULL;

    if (epx_bootstrap_env_create(seconds * 1000000000, &bootstrap) != EPX_OK) {
        return fail();
    }
    config.bootstrap = bootstrap;
    config.heap_bytes = 1 << 20;
    config.timeout_ns = seconds * 1000000000;
    if (epx_group_create(&config, &group) != EPX_OK ||
        epx_group_query(group, &info) != EPX_OK) {
        return fail();
    }
    printf("rank %d of %d on node %d of %d\n", info.rank, info.num_ranks,
           info.node, info.num_nodes);
    if (epx_group_destroy(group) != EPX_OK) {
        return fail();
    }
    epx_bootstrap_destroy(bootstrap);
    return EXIT_SUCCESS;
}
