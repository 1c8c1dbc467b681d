/* SPDX-License-Identifier: MIT */
#include "conformance/memory.h"
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum {
    MAX_CARDS = 16,
    ARENA_BYTES = 256 << 20,
    ARENA_ALIGN = 256,
    STAGING_BYTES = 1 << 20,
    MAX_WORKERS = 8,
    /* A card has 32 queues.  Two streams that share one wait for each other,
     * which streams whose kernels wait for each other must not. */
    MAX_THREADS_WITH_STREAMS_TO_SPARE = 8,
};

typedef struct cuda_memory {
    memory_t base;
    uint8_t *arena; /* what lies outside the group's heap */
    size_t used;
    int64_t num_live;
    void *staging; /* pinned: copies of other memory block other threads */
    cudaStream_t copies;
    cudaStream_t own[MEMORY_MAX_STREAMS];
    int32_t num_own;
} cuda_memory_t;

/* Streams are made once and used again, since the driver spreads over the
 * card's queues only those that it makes one after the other. */
typedef struct pool {
    cudaStream_t streams[WORLD_MAX_RANKS * MEMORY_MAX_STREAMS];
    int32_t num_streams;
} pool_t;

static pthread_mutex_t pool_lock = PTHREAD_MUTEX_INITIALIZER;
static pool_t pools[MAX_CARDS];

/* On the current card. */
static cudaError_t
take_stream(pool_t *pool, cudaStream_t *stream_p)
{
    cudaError_t error = cudaSuccess;

    pthread_mutex_lock(&pool_lock);
    if (pool->num_streams > 0) {
        *stream_p = pool->streams[--pool->num_streams];
    } else {
        error = cudaStreamCreateWithFlags(stream_p, cudaStreamNonBlocking);
    }
    pthread_mutex_unlock(&pool_lock);
    return error;
}

static void
give_stream(pool_t *pool, cudaStream_t stream)
{
    pthread_mutex_lock(&pool_lock);
    pool->streams[pool->num_streams++] = stream;
    pthread_mutex_unlock(&pool_lock);
}

static bool
failed(const memory_t *memory, cudaError_t error, const char *call)
{
    if (error != cudaSuccess) {
        world_fail(memory->self, "%s: %s", call, cudaGetErrorString(error));
    }
    return error != cudaSuccess;
}

static void
cuda_close(memory_t *memory)
{
    cuda_memory_t *self = (cuda_memory_t *)memory;

    while (self->num_own > 0) {
        give_stream(&pools[memory->ordinal], self->own[--self->num_own]);
    }
    failed(memory, cudaFreeHost(self->staging), "cudaFreeHost");
    failed(memory, cudaFree(self->arena), "cudaFree");
    free(self);
}

/* What is free is found again once all of it is. */
static void *
cuda_alloc(memory_t *memory, size_t bytes)
{
    cuda_memory_t *self = (cuda_memory_t *)memory;
    size_t rounded = (bytes + ARENA_ALIGN - 1) / ARENA_ALIGN * ARENA_ALIGN;
    void *ptr = self->arena + self->used;

    if (rounded > ARENA_BYTES - self->used) {
        return NULL;
    }
    self->used += rounded;
    self->num_live++;
    return ptr;
}

static void
cuda_free(memory_t *memory, void *ptr)
{
    cuda_memory_t *self = (cuda_memory_t *)memory;

    if (ptr && --self->num_live == 0) {
        self->used = 0;
    }
}

static bool
copy_piece(cuda_memory_t *self, void *to, const void *from, size_t bytes,
           enum cudaMemcpyKind kind)
{
    return !failed(&self->base,
                   cudaMemcpyAsync(to, from, bytes, kind, self->copies),
                   "cudaMemcpyAsync") &&
           !failed(&self->base, cudaStreamSynchronize(self->copies),
                   "cudaStreamSynchronize after a copy");
}

static size_t
piece_at(size_t at, size_t bytes)
{
    return bytes - at < STAGING_BYTES ? bytes - at : STAGING_BYTES;
}

static bool
cuda_upload(memory_t *memory, void *to, const void *from, size_t bytes)
{
    cuda_memory_t *self = (cuda_memory_t *)memory;

    for (size_t at = 0; at < bytes; at += STAGING_BYTES) {
        size_t piece = piece_at(at, bytes);

        memcpy(self->staging, (const uint8_t *)from + at, piece);
        if (!copy_piece(self, (uint8_t *)to + at, self->staging, piece,
                        cudaMemcpyHostToDevice)) {
            return false;
        }
    }
    return true;
}

static bool
cuda_download(memory_t *memory, void *to, const void *from, size_t bytes)
{
    cuda_memory_t *self = (cuda_memory_t *)memory;

    for (size_t at = 0; at < bytes; at += STAGING_BYTES) {
        size_t piece = piece_at(at, bytes);

        if (!copy_piece(self, self->staging, (const uint8_t *)from + at, piece,
                        cudaMemcpyDeviceToHost)) {
            return false;
        }
        memcpy((uint8_t *)to + at, self->staging, piece);
    }
    return true;
}

/* They are made with the memory, before any group. */
static bool
cuda_streams_are_there(memory_t *memory, epx_group_t *group)
{
    (void)group;
    return memory->num_streams > 0;
}

static bool
cuda_keep_streams(memory_t *memory)
{
    (void)memory;
    return true;
}

static bool
cuda_synchronize(memory_t *memory, epx_stream_t stream)
{
    return !failed(memory, cudaStreamSynchronize(stream),
                   "cudaStreamSynchronize");
}

static bool
make_streams(cuda_memory_t *self)
{
    memory_t *memory = &self->base;
    bool scarce = memory->self->kind == WORLD_THREAD &&
                  memory->self->num_ranks > MAX_THREADS_WITH_STREAMS_TO_SPARE;
    int32_t wanted = scarce ? 1 : MEMORY_MAX_STREAMS;

    while (self->num_own < wanted) {
        if (failed(
                memory,
                take_stream(&pools[memory->ordinal], &self->own[self->num_own]),
                "cudaStreamCreateWithFlags")) {
            return false;
        }
        self->num_own++;
    }
    self->copies = self->own[0];
    return true;
}

/* What the driver sets up for a stream when it is first used may wait for the
 * kernels that run, and so for those of a rank whose peer is this one: use each
 * of them while nobody waits. */
static bool
use_streams(cuda_memory_t *self)
{
    for (int32_t i = 0; i < self->num_own; i++) {
        if (failed(&self->base,
                   cudaMemsetAsync(self->arena, 0, 1, self->own[i]),
                   "cudaMemsetAsync") ||
            !cuda_synchronize(&self->base, self->own[i])) {
            return false;
        }
    }
    return true;
}

/* The default stream is one for all threads of a process, so that ranks that
 * are threads would wait for each other in it. */
static void
offer_streams(cuda_memory_t *self)
{
    memory_t *memory = &self->base;
    bool threads = memory->self->kind == WORLD_THREAD;

    if (!threads || memory->self->num_ranks == 1) {
        memory->streams[memory->num_streams++] = NULL;
    }
    for (int32_t i = self->num_own == 1 ? 0 : 1; i < self->num_own; i++) {
        memory->streams[memory->num_streams++] = self->own[i];
    }
}

/* How many cards the ranks should be spread over. */
static int
num_cards(void)
{
    const char *text = getenv("EPX_TEST_CARDS");

    return text ? (int)strtol(text, NULL, 10) : 1;
}

static bool
choose_card(memory_t *memory)
{
    int count = 0;

    if (failed(memory, cudaGetDeviceCount(&count), "cudaGetDeviceCount")) {
        return false;
    }
    count = count < num_cards() ? count : num_cards();
    memory->ordinal =
        memory->self->rank % (count < MAX_CARDS ? count : MAX_CARDS);
    return !failed(memory, cudaSetDevice(memory->ordinal), "cudaSetDevice");
}

static bool
take_all(cuda_memory_t *self)
{
    memory_t *memory = &self->base;
    uint64_t word = 0;
    int sms = 0;
    int32_t share;

    if (memory->self->kind != WORLD_THREAD) {
        /* A process has queues of its own, and MPS not so many for each. */
        unsetenv("CUDA_DEVICE_MAX_CONNECTIONS");
    }
    if (!choose_card(memory) ||
        failed(memory,
               cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount,
                                      memory->ordinal),
               "cudaDeviceGetAttribute") ||
        failed(memory, cudaMalloc((void **)&self->arena, ARENA_BYTES),
               "cudaMalloc") ||
        failed(memory, cudaHostAlloc(&self->staging, STAGING_BYTES, 0),
               "cudaHostAlloc")) {
        return false;
    }
    share = sms / memory->self->num_ranks;
    memory->min_workers = 1;
    memory->max_workers = share < MAX_WORKERS ? share : MAX_WORKERS;
    if (!make_streams(self)) {
        return false;
    }
    offer_streams(self);
    /* Copy once each way, for the same reason. */
    return use_streams(self) &&
           cuda_upload(memory, self->arena, &word, sizeof(word)) &&
           cuda_download(memory, &word, self->arena, sizeof(word));
}

memory_t *
memory_cuda_open(world_rank_t *self)
{
    static const memory_ops_t ops = { .close = cuda_close,
                                      .alloc = cuda_alloc,
                                      .free = cuda_free,
                                      .upload = cuda_upload,
                                      .download = cuda_download,
                                      .open_streams = cuda_streams_are_there,
                                      .close_streams = cuda_keep_streams,
                                      .synchronize = cuda_synchronize };
    cuda_memory_t *memory = calloc(1, sizeof(*memory));

    if (!memory) {
        world_fail(self, "no memory");
        return NULL;
    }
    memory->base = (memory_t){
        .ops = &ops, .self = self, .device = EPX_DEVICE_CUDA, .is_async = true
    };
    if (!take_all(memory)) {
        cuda_close(&memory->base);
        return NULL;
    }
    return &memory->base;
}

/* ---- whether there is a card ---- */

static void
look_for_card(char *why, size_t why_bytes)
{
    int count = 0;
    cudaError_t error = cudaGetDeviceCount(&count);

    if (error != cudaSuccess) {
        snprintf(why, why_bytes, "no CUDA device: %s",
                 cudaGetErrorString(error));
    } else if (count == 0) {
        snprintf(why, why_bytes, "no CUDA device");
    } else if (num_cards() < 1) {
        snprintf(why, why_bytes, "EPX_TEST_CARDS is no number of cards");
    } else if (count == 1 && num_cards() > 1) {
        snprintf(why, why_bytes, "only one CUDA device");
    }
}

/* A process that has used CUDA cannot fork ranks that use it. */
const char *
memory_cuda_obstacle(void)
{
    enum { WHY_BYTES = 256 };
    static char why[WHY_BYTES];
    char *shared = mmap(NULL, WHY_BYTES, PROT_READ | PROT_WRITE,
                        MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    int status = -1;
    pid_t pid;

    setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);
    fflush(NULL);
    pid = shared == MAP_FAILED ? -1 : fork();
    if (pid < 0) {
        return "no process can be started to look for a CUDA device";
    }
    if (pid == 0) {
        look_for_card(shared, WHY_BYTES);
        _exit(0);
    }
    if (waitpid(pid, &status, 0) != pid || status != 0) {
        snprintf(shared, WHY_BYTES, "the look for a CUDA device failed");
    }
    memcpy(why, shared, WHY_BYTES);
    munmap(shared, WHY_BYTES);
    return why[0] ? why : NULL;
}
