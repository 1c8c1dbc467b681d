/* SPDX-License-Identifier: MIT */
/* Tests of the public interface that several ranks run: processes, and then
 * threads. */
#ifndef TESTS_UNIT_API_WORLD_H
#define TESTS_UNIT_API_WORLD_H

#include "api_common.h"
#include "conformance/world.h"

/* What world_run is called with. */
typedef struct api_world {
    world_kind_t kind;
    int32_t num_ranks;
    bool own_bootstrap;
    size_t shared_bytes;
    world_fn *fn;
} api_world_t;

static inline void
api_world_test(void **state)
{
    const api_world_t *world = *state;
    char text[WORLD_MAX_RANKS * WORLD_TEXT];

    if (!world_run(world->kind, world->num_ranks, world->own_bootstrap,
                   world->shared_bytes, world->fn, NULL, NULL, text,
                   sizeof(text))) {
        print_error("%s", text);
        fail();
    }
}

/* All that such a program's main does; `kind` is of no interest. */
static inline int
api_world_main(const api_world_t *world)
{
    api_world_t threads = *world, processes = *world;
    const struct CMUnitTest tests[] = {
        { "processes", api_world_test, NULL, NULL, &processes },
        { "threads", api_world_test, NULL, NULL, &threads },
    };

    threads.kind = WORLD_THREAD;
    processes.kind = WORLD_SHM;
    return cmocka_run_group_tests(tests, NULL, NULL);
}

#endif
