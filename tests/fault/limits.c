/* SPDX-License-Identifier: MIT */
/*
 * A rank that runs out of descriptors or of memory at every place of making and
 * using a group: both ranks end with a sentence or do their work, nothing is
 * left behind, and once there is enough it all works.
 */
#include "conformance/holdings.h"
#include "conformance/world.h"
#include "fault.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

/* What rank 1 may have beyond what it has when it starts. */
typedef struct limit {
    int resource;
    int64_t more;
} limit_t;

typedef struct shared {
    fault_meeting_t first;
    fault_meeting_t second;
    bool was_refused;
} shared_t;

static fault_round_t calm_round = { .seed = 3,
                                    .layout = EPX_LAYOUT_EXPERT_MAJOR,
                                    .is_split = true,
                                    .has_slots = true,
                                    .hidden = 64 };

static void
never(void *context, int32_t layer, fault_point_t point)
{
    (void)context;
    (void)layer;
    (void)point;
}

/* Bytes of address space in use. */
static int64_t
address_space(void)
{
    FILE *stream = fopen("/proc/self/statm", "r");
    long long pages = 0;

    if (stream != NULL) {
        if (fscanf(stream, "%lld", &pages) != 1) {
            pages = 0;
        }
        (void)fclose(stream);
    }
    return pages * sysconf(_SC_PAGESIZE);
}

static epx_status_t
use_group(epx_group_t *group)
{
    fault_layers_t *layers = fault_layers_open(&calm_round, group, never, NULL);
    epx_status_t status = EPX_ERR_NO_MEMORY; /* the test's own */
    const char *wrong = NULL;

    for (int32_t i = 1; layers != NULL && i <= 3; i++) {
        status = fault_layers_run(layers, i, &wrong);
        if (status != EPX_OK) {
            break;
        }
    }
    if (layers == NULL) {
        /* The peer must not wait for us. */
        (void)epx_group_abort(group);
    } else {
        if (status != EPX_OK) {
            (void)epx_group_abort(group);
        }
        fault_layers_close(layers);
    }
    return status;
}

static epx_status_t
make_and_use(const world_rank_t *self, fault_meeting_t *meeting)
{
    fault_seat_t seat = { meeting, self->rank, self->num_ranks };
    epx_bootstrap_t bootstrap = fault_bootstrap(&seat);
    epx_group_config_t config = EPX_GROUP_CONFIG_INIT;
    epx_group_t *group;
    epx_status_t status;

    config.bootstrap = &bootstrap;
    config.heap_bytes = 4 << 20;
    config.num_workers = 3;
    config.timeout_ns = 2000000000;
    status = epx_group_create(&config, &group);
    if (status != EPX_OK) {
        return status;
    }
    status = use_group(group);
    (void)epx_group_destroy(group);
    return status;
}

static void
limits_rank(world_rank_t *self, void *context)
{
    const limit_t *limit = context;
    shared_t *shared = self->shared;
    int descriptors = count_descriptors();
    struct rlimit before, low;
    epx_status_t status;

    (void)getrlimit((unsigned)limit->resource, &before);
    low = before;
    if (self->rank == 1) {
        low.rlim_cur =
            (rlim_t)(limit->more + (limit->resource == RLIMIT_NOFILE
                                        ? descriptors - 3 /* ., .. and itself */
                                        : address_space()));
        (void)setrlimit((unsigned)limit->resource, &low);
    }
    status = make_and_use(self, &shared->first);
    (void)setrlimit((unsigned)limit->resource, &before);
    if (status != EPX_OK && epx_last_error()[0] == '\0') {
        world_fail(self, "status %d without a sentence", (int)status);
    }
    if (count_descriptors() != descriptors) {
        world_fail(self, "%d descriptors before, %d after", descriptors,
                   count_descriptors());
    }
    world_barrier(self);
    (void)world_failed(self, make_and_use(self, &shared->second),
                       "with enough of it");
    if (self->rank == 1) {
        shared->was_refused = status != EPX_OK;
    }
}

static int
try_limit(limit_t limit, int64_t *num_refused_p)
{
    char text[4096];
    void *memory = NULL;
    bool is_well = world_run(WORLD_SHM, 2, true, sizeof(shared_t), limits_rank,
                             &limit, &memory, text, sizeof(text));

    *num_refused_p += ((const shared_t *)memory)->was_refused;
    world_release(memory, sizeof(shared_t));
    if (!is_well) {
        fprintf(stderr, "%s %lld:\n%s",
                limit.resource == RLIMIT_NOFILE ? "descriptors" : "bytes",
                (long long)limit.more, text);
    }
    return is_well ? 0 : 1;
}

int
main(void)
{
    int64_t refused_fds = 0, refused_bytes = 0;
    int num_bad = 0;

    for (int64_t fds = 0; fds < 10; fds++) {
        num_bad += try_limit((limit_t){ RLIMIT_NOFILE, fds }, &refused_fds);
    }
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
    /* Stacks of threads are the largest pieces. */
    for (int64_t pages = 0; pages < 40 << 8; pages += pages < 16 ? 4 : 384) {
        num_bad +=
            try_limit((limit_t){ RLIMIT_AS, pages * 4096 }, &refused_bytes);
    }
#endif
    printf("%lld and %lld times there was not enough; %d went wrong\n",
           (long long)refused_fds, (long long)refused_bytes, num_bad);
    return num_bad == 0 ? 0 : 1;
}
