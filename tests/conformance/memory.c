/* SPDX-License-Identifier: MIT */
#include "conformance/memory.h"
#include <stdlib.h>
#include <string.h>

static void
cpu_close(memory_t *memory)
{
    free(memory);
}

static void *
cpu_alloc(memory_t *memory, size_t bytes)
{
    void *ptr;

    (void)memory;
    return posix_memalign(&ptr, 64, bytes) ? NULL : ptr;
}

static void
cpu_free(memory_t *memory, void *ptr)
{
    (void)memory;
    free(ptr);
}

static bool
cpu_copy(memory_t *memory, void *to, const void *from, size_t bytes)
{
    (void)memory;
    if (bytes > 0) {
        memcpy(to, from, bytes);
    }
    return true;
}

/* The first stream is none: the call runs in its caller. */
static bool
cpu_open_streams(memory_t *memory, epx_group_t *group)
{
    memory->streams[0] = NULL;
    memory->num_streams = 1;
    while (memory->num_streams < MEMORY_MAX_STREAMS) {
        epx_queue_t *queue;

        if (world_failed(memory->self, epx_queue_create(group, &queue),
                         "epx_queue_create")) {
            return false;
        }
        memory->streams[memory->num_streams++] = queue;
    }
    return true;
}

static bool
cpu_close_streams(memory_t *memory)
{
    bool ok = true;

    while (memory->num_streams > 1) {
        epx_queue_t *queue = memory->streams[--memory->num_streams];

        ok = !world_failed(memory->self, epx_queue_destroy(queue),
                           "epx_queue_destroy") &&
             ok;
    }
    return ok;
}

static bool
cpu_synchronize(memory_t *memory, epx_stream_t stream)
{
    return !stream || !world_failed(memory->self, epx_queue_synchronize(stream),
                                    "epx_queue_synchronize");
}

memory_t *
memory_cpu_open(world_rank_t *self)
{
    static const memory_ops_t ops = { .close = cpu_close,
                                      .alloc = cpu_alloc,
                                      .free = cpu_free,
                                      .upload = cpu_copy,
                                      .download = cpu_copy,
                                      .open_streams = cpu_open_streams,
                                      .close_streams = cpu_close_streams,
                                      .synchronize = cpu_synchronize };
    memory_t *memory = calloc(1, sizeof(*memory));

    if (!memory) {
        world_fail(self, "no memory");
        return NULL;
    }
    *memory = (memory_t){ .ops = &ops,
                          .self = self,
                          .device = EPX_DEVICE_CPU,
                          .on_host = true,
                          .max_workers = 4 };
    return memory;
}

/* ---- of either device ---- */

const char *
memory_obstacle(epx_device_t device)
{
    if (device == EPX_DEVICE_CPU) {
        return NULL;
    }
#ifdef EPX_TEST_CUDA
    return memory_cuda_obstacle();
#else
    return "this test was built without the CUDA engine";
#endif
}

memory_t *
memory_open(world_rank_t *self, epx_device_t device)
{
#ifdef EPX_TEST_CUDA
    if (device == EPX_DEVICE_CUDA) {
        return memory_cuda_open(self);
    }
#endif
    (void)device;
    return memory_cpu_open(self);
}

void
memory_close(memory_t *memory)
{
    if (memory) {
        memory->ops->close(memory);
    }
}
