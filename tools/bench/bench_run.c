/* SPDX-License-Identifier: MIT */
#include "bench_run.h"

#include "bench_link.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* What rounding an allocation up may take. */
#define COPY_SPARE_BYTES  65536
#define PROGRESS_AFTER_NS INT64_C(1000000000)
#define PROGRESS_EVERY_NS INT64_C(200000000)

/* Where the next array goes: an offset alone while base is NULL. */
struct cursor {
    uint8_t *base;
    size_t offset;
};

static void *
cursor_take(struct cursor *at, size_t bytes)
{
    uint8_t *here = at->base ? at->base + at->offset : NULL;
    at->offset += (bytes + 63) / 64 * 64;
    return here;
}

static void
series_place(struct bench_series *series, int32_t count, int32_t parties,
             struct cursor *at)
{
    size_t bytes = sizeof(struct bench_span) * (size_t)count * (size_t)parties;
    *series = (struct bench_series){ .spans = cursor_take(at, bytes),
                                     .count = count,
                                     .parties = parties };
}

/* Lays the arrays out from *at on, which ends up behind them. */
static void
shared_place(struct bench_shared *shared, const struct bench_run *run,
             struct cursor *at)
{
    const struct bench_options *o = run->options;
    int32_t copies = run->blocks * BENCH_COPIES_PER_BLOCK;
    bool cuda = o->device == EPX_DEVICE_CUDA;
    for (int op = 0; op < BENCH_NUM_OPS; op++) {
        bool active = bench_op_active((enum bench_op)op, o);
        bool copied = active && run->op_bytes[op] && !cuda;
        series_place(&shared->ops[op], active ? o->iters : 0, o->ranks, at);
        /* The host has one clock for all ranks, streams have their own. */
        shared->ops[op].own_clocks = cuda && op != BENCH_PLAN;
        for (int kind = 0; kind < BENCH_NUM_COPIES; kind++) {
            series_place(&shared->copies[op][kind], copied ? copies : 0,
                         o->ranks * o->workers, at);
        }
    }
    for (int op = BENCH_NUM_OPS; op < BENCH_NUM_SERIES; op++) {
        bool active = bench_op_active((enum bench_op)op, o);
        series_place(&shared->ops[op], active ? o->iters : 0, o->ranks, at);
        shared->ops[op].own_clocks = true;
    }
    for (int i = 0; i < 2 * BENCH_NUM_WAYS; i++) {
        int op = i < BENCH_NUM_WAYS ? BENCH_DISPATCH : BENCH_COMBINE;
        series_place(&shared->transfers[op][i % BENCH_NUM_WAYS],
                     o->vs_ucx ? o->iters : 0, o->ranks, at);
    }
    series_place(&shared->card_copies, cuda ? copies : 0, 1, at);
    shared->signals =
        cursor_take(at, (size_t)o->ranks * sizeof *shared->signals);
    shared->gather = cursor_take(at, (size_t)o->ranks * BENCH_GATHER_BYTES);
}

size_t
bench_run_copied(const struct bench_run *run, enum bench_op op)
{
    const struct bench_options *o = run->options;
    uint64_t parts = 2 * (uint64_t)o->ranks * (uint64_t)o->workers;
    return (size_t)((run->op_bytes[op] / parts + 63) / 64 * 64);
}

/* The copies' buffers serve all operations, and lie in the heap too. */
static void
add_copies(struct bench_run *run)
{
    const struct bench_options *o = run->options;
    for (int i = 0; i < BENCH_NUM_OPS; i++) {
        enum bench_op op = (enum bench_op)i;
        size_t bytes = bench_run_copied(run, op);
        if (bench_op_active(op, o) && bytes > run->copy_bytes) {
            run->copy_bytes = bytes;
        }
    }
    run->shape.heap_bytes +=
        2 * (uint64_t)o->workers * (run->copy_bytes + COPY_SPARE_BYTES);
}

bool
bench_run_open(struct bench_run *run, const struct bench_options *options,
               const struct bench_routing *routing, struct bench_error *error)
{
    struct bench_shared measured;
    struct cursor at = { NULL, 0 };
    *run = (struct bench_run){ .options = options,
                               .routing = routing,
                               .blocks = options->iters < BENCH_BLOCKS
                                             ? options->iters
                                             : BENCH_BLOCKS,
                               .start_ns = bench_now_ns() };
    if (!bench_shape_make(&run->shape, routing, error)) {
        return false;
    }
    if (!bench_shape_bytes(&run->shape, routing, run->op_bytes) ||
        !bench_link_bytes(&run->shape, routing, run->net_bytes)) {
        return bench_fail(error, "no memory for the routing");
    }
    if (options->device == EPX_DEVICE_CPU) {
        add_copies(run);
    }
    cursor_take(&at, sizeof measured);
    shared_place(&measured, run, &at);
    void *base = mmap(NULL, at.offset, PROT_READ | PROT_WRITE,
                      MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) {
        return bench_fail(error, "cannot map %zu bytes: %s", at.offset,
                          strerror(errno));
    }
    run->shared = base;
    run->shared_bytes = at.offset;
    at = (struct cursor){ base, 0 };
    cursor_take(&at, sizeof measured);
    shared_place(run->shared, run, &at);
    bench_barrier_init(&run->shared->ranks, options->ranks, options->cores);
    bench_barrier_init(&run->shared->copiers, options->ranks * options->workers,
                       options->cores);
    return true;
}

void
bench_run_close(struct bench_run *run)
{
    if (run->shared) {
        munmap(run->shared, run->shared_bytes);
    }
    run->shared = NULL;
}

void
bench_rank_fail(const struct bench_run *run, int32_t rank, const char *format,
                ...)
{
    struct bench_error sentence;
    va_list list;
    va_start(list, format);
    vsnprintf(sentence.text, sizeof sentence.text, format, list);
    va_end(list);
    if (atomic_exchange(&run->shared->failed, 1)) {
        /* What follows from another's failure is not worth a line; that rank
         * ends this process, or its parent does. */
        for (;;) {
            pause();
        }
    }
    fprintf(stderr, "epx-bench: rank %d: %s\n", rank, sentence.text);
    _exit(1);
}

void
bench_progress_show(struct bench_progress *progress,
                    const struct bench_run *run, const char *phase,
                    int64_t done, int64_t all)
{
    int64_t now = bench_now_ns();
    if (now - run->start_ns < PROGRESS_AFTER_NS ||
        now - progress->shown_ns < PROGRESS_EVERY_NS || !isatty(2)) {
        return;
    }
    fprintf(stderr, "\r\033[Kepx-bench: %s %lld of %lld", phase,
            (long long)done, (long long)all);
    progress->shown_ns = now;
    progress->shown = true;
}

void
bench_progress_clear(struct bench_progress *progress)
{
    if (progress->shown) {
        fputs("\r\033[K", stderr);
    }
    progress->shown = false;
}
