/* SPDX-License-Identifier: MIT */
#include "conformance/series.h"
#include "conformance/run.h"

typedef struct series {
    const shape_t *shapes;
    uint64_t count;
} series_t;

/* Rank 0 counts, in the shared memory, the shapes that went well. */
static void
series_rank(world_rank_t *self, void *context)
{
    const series_t *series = context;
    uint64_t *done = self->shared;
    memory_t *memory = memory_open(self, series->shapes[0].device);
    bool ok = world_all_well(self);

    for (uint64_t i = 0; ok && i < series->count; i++) {
        world_progress(self);
        run_shape(self, &series->shapes[i], memory);
        ok = world_all_well(self);
        if (ok && self->rank == 0) {
            *done = i + 1;
        }
    }
    memory_close(memory);
}

uint64_t
series_run(world_kind_t kind, const shape_t *shapes, uint64_t count, char *text,
           size_t text_bytes)
{
    series_t series = { shapes, count };
    uint64_t *shared;
    uint64_t done;
    void *memory;

    world_run(kind, shapes[0].num_ranks, shapes[0].own_bootstrap,
              sizeof(*shared), series_rank, &series, &memory, text, text_bytes);
    shared = memory;
    done = *shared;
    world_release(memory, sizeof(*shared));
    return done;
}
