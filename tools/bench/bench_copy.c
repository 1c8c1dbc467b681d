/* SPDX-License-Identifier: MIT */
#include "bench_copy.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#ifdef __x86_64__
#include <emmintrin.h>
#endif

/* One worker; the first of a rank is the rank itself. */
struct bench_copier {
    const struct bench_rank *rank;
    const struct bench_run *run;
    int32_t worker;
    char *from; /* run->copy_bytes */
    char *to;
    pthread_t thread;
};

/* Both 16-byte aligned; bytes is a multiple of 64. */
static void
copy_stream(char *to, const char *from, size_t bytes)
{
#ifdef __x86_64__
    for (size_t i = 0; i < bytes; i += 64) {
        const __m128i *a = (const __m128i *)(from + i);
        __m128i *b = (__m128i *)(to + i);
        __m128i w0 = _mm_load_si128(a);
        __m128i w1 = _mm_load_si128(a + 1);
        __m128i w2 = _mm_load_si128(a + 2);
        __m128i w3 = _mm_load_si128(a + 3);
        _mm_stream_si128(b, w0);
        _mm_stream_si128(b + 1, w1);
        _mm_stream_si128(b + 2, w2);
        _mm_stream_si128(b + 3, w3);
    }
    _mm_sfence();
#else
    memcpy(to, from, bytes);
#endif
}

/* The copies of one operation and kind; the first only warms up. */
static void
time_copies(const struct bench_copier *self, const struct bench_series *series,
            enum bench_copy_kind kind, size_t bytes, int32_t block)
{
    int32_t party =
        self->rank->rank * self->run->options->workers + self->worker;
    int32_t first = block * BENCH_COPIES_PER_BLOCK;
    for (int32_t i = -1; i < BENCH_COPIES_PER_BLOCK; i++) {
        struct bench_span span;
        bench_barrier_wait(&self->run->shared->copiers, BENCH_NO_DEADLINE);
        span.start = bench_now_ns();
        if (kind == BENCH_COPY_CACHED) {
            memcpy(self->to, self->from, bytes);
        } else {
            copy_stream(self->to, self->from, bytes);
        }
        span.end = bench_now_ns();
        if (i >= 0) {
            series->spans[(size_t)(first + i) * (size_t)series->parties +
                          (size_t)party] = span;
        }
    }
}

void
bench_copy_block(struct bench_copier *copier, int32_t block)
{
    const struct bench_run *run = copier->run;
    for (int op = 0; op < BENCH_NUM_OPS; op++) {
        const struct bench_series *series = run->shared->copies[op];
        size_t bytes = bench_run_copied(run, (enum bench_op)op);
        for (int kind = 0; series[0].count && kind < BENCH_NUM_COPIES; kind++) {
            time_copies(copier, &series[kind], (enum bench_copy_kind)kind,
                        bytes, block);
        }
    }
}

/* One worker of a rank, with buffers of its own. */
static void
open_worker(struct bench_copier *self, const struct bench_rank *rank,
            int32_t worker)
{
    size_t bytes = rank->run->copy_bytes;
    *self = (struct bench_copier){ .rank = rank,
                                   .run = rank->run,
                                   .worker = worker,
                                   .from = bench_rank_take(rank, 1, bytes),
                                   .to = bench_rank_take(rank, 1, bytes) };
    memset(self->from, 1, bytes);
    memset(self->to, 1, bytes);
}

static void
close_worker(struct bench_copier *self)
{
    bench_rank_give_back(self->rank, self->from, 1, self->run->copy_bytes);
    bench_rank_give_back(self->rank, self->to, 1, self->run->copy_bytes);
}

/* A rank's other workers: the barrier of each copy keeps them in step. */
static void *
worker_main(void *arg)
{
    struct bench_copier *self = arg;
    for (int32_t block = 0; block < self->run->blocks; block++) {
        bench_copy_block(self, block);
    }
    return NULL;
}

struct bench_copier *
bench_copy_open(const struct bench_rank *rank)
{
    int32_t workers = rank->run->options->workers;
    struct bench_copier *all = calloc((size_t)workers, sizeof *all);
    if (!all) {
        bench_rank_fail(rank->run, rank->rank, "no memory for %d workers",
                        workers);
    }
    open_worker(&all[0], rank, 0);
    for (int32_t w = 1; w < workers; w++) {
        open_worker(&all[w], rank, w);
        int code = pthread_create(&all[w].thread, NULL, worker_main, &all[w]);
        if (code) {
            bench_rank_fail(rank->run, rank->rank, "cannot start a thread: %s",
                            strerror(code));
        }
    }
    return all;
}

void
bench_copy_close(struct bench_copier *copier)
{
    int32_t workers = copier->run->options->workers;
    for (int32_t w = 1; w < workers; w++) {
        pthread_join(copier[w].thread, NULL);
    }
    for (int32_t w = 0; w < workers; w++) {
        close_worker(&copier[w]);
    }
    free(copier);
}
