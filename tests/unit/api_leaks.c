/* SPDX-License-Identifier: MIT */
/* Two hundred rounds of making and destroying everything leave no descriptor,
 * thread or mapping behind. */
#include "api_world.h"
#include "conformance/holdings.h"
#include <stdio.h>

enum { RANKS = 2, WARM_UP = 20, ROUNDS = 200, HIDDEN = 8, ROWS = 8 };

static int
count_lines(const char *path)
{
    FILE *stream = fopen(path, "r");
    int count = 0;
    int c;

    while (stream && (c = getc(stream)) != EOF) {
        count += c == '\n';
    }
    if (stream) {
        fclose(stream);
    }
    return count;
}

typedef struct usage {
    int fds;
    int threads;
    int mappings;
} usage_t;

static usage_t
usage_now(void)
{
    return (usage_t){ count_descriptors(), count_threads(),
                      count_lines("/proc/self/maps") };
}

/* Everything that can be made, used once, and destroyed. */
static bool
round_of_life(world_rank_t *self)
{
    static _Thread_local uint16_t x[API_TOKENS * HIDDEN];
    static _Thread_local uint16_t recv[ROWS * HIDDEN];
    epx_group_config_t config = EPX_GROUP_CONFIG_INIT;
    epx_plan_args_t args = api_plan_args(EPX_LAYOUT_RANK_MAJOR);
    epx_dispatch_args_t dispatch = EPX_DISPATCH_ARGS_INIT;
    epx_group_t *group;
    epx_queue_t *queue;
    epx_plan_t *plan;
    void *memory;

    config.bootstrap = self->bootstrap;
    config.heap_bytes = 1 << 20;
    config.num_workers = 3;
    dispatch.x = x;
    dispatch.hidden = HIDDEN;
    dispatch.dtype = EPX_F16;
    dispatch.recv_x = recv;
    dispatch.recv_rows = ROWS;
    return !world_failed(self, epx_group_create(&config, &group), "group") &&
           !world_failed(self, epx_queue_create(group, &queue), "queue") &&
           !world_failed(self, epx_mem_alloc(group, 5000, &memory), "memory") &&
           !world_failed(self, epx_plan_create(group, &args, queue, &plan),
                         "plan") &&
           !world_failed(self, epx_dispatch(plan, &dispatch, queue),
                         "dispatch") &&
           !world_failed(self, epx_queue_synchronize(queue), "synchronize") &&
           !world_failed(self, epx_plan_destroy(plan), "plan destroy") &&
           !world_failed(self, epx_queue_destroy(queue), "queue destroy") &&
           !world_failed(self, epx_group_destroy(group), "group destroy");
}

/* A failed creation must leave nothing behind either. */
static bool
failed_round(world_rank_t *self)
{
    epx_group_config_t config = EPX_GROUP_CONFIG_INIT;
    epx_group_t *group;

    config.bootstrap = self->bootstrap;
    config.heap_bytes = 1 << 20;
    config.max_experts = 8 + self->rank;
    if (epx_group_create(&config, &group) != EPX_ERR_MISMATCH) {
        world_fail(self, "configs that differ were accepted");
    }
    return !self->failed;
}

/* Threads share what is counted: all stand still while rank 0 looks. */
static usage_t
count_quietly(world_rank_t *self)
{
    usage_t usage = { 0 };

    world_barrier(self);
    if (self->kind == WORLD_SHM || self->rank == 0) {
        usage = usage_now();
    }
    world_barrier(self);
    return usage;
}

static void
many_rounds_rank(world_rank_t *self, void *context)
{
    usage_t before = { 0 };
    usage_t after;

    (void)context;
    for (int i = 0; i < WARM_UP + ROUNDS; i++) {
        if (i == WARM_UP) {
            before = count_quietly(self);
        }
        if (!round_of_life(self) || (i % 10 == 0 && !failed_round(self))) {
            return;
        }
    }
    after = count_quietly(self);
    if (after.fds != before.fds) {
        world_fail(self, "descriptors: %d before, %d after", before.fds,
                   after.fds);
    }
    if (after.threads != before.threads) {
        world_fail(self, "threads: %d before, %d after", before.threads,
                   after.threads);
    }
    /* The C library may keep some stacks and arenas; a leak would be ROUNDS. */
    if (after.mappings > before.mappings + ROUNDS / 4) {
        world_fail(self, "mappings: %d before, %d after", before.mappings,
                   after.mappings);
    }
}

int
main(void)
{
    const api_world_t world = {
        .num_ranks = RANKS,
        .own_bootstrap = true,
        .fn = many_rounds_rank,
    };

    return api_world_main(&world);
}
