/* SPDX-License-Identifier: MIT */
#include "bench_card.h"

#include <cuda_runtime_api.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define STAGING_BYTES ((size_t)8 << 20)

struct cuda_card {
    struct bench_card base;
    cudaStream_t stream;
    cudaEvent_t marks[BENCH_MAX_MARKS];
    cudaGraphExec_t graphs[BENCH_NUM_OPS];
    void *staging;
    /* On rank 0, BENCH_CARD_COPY_BYTES each. */
    void *from;
    void *to;
};

static void
check(const struct bench_card *card, cudaError_t error, const char *call)
{
    if (error != cudaSuccess) {
        bench_rank_fail(card->run, card->rank, "%s: %s", call,
                        cudaGetErrorString(error));
    }
}

static void
choose_card(struct bench_card *card)
{
    const struct bench_options *o = card->run->options;
    int count = 0;
    check(card, cudaGetDeviceCount(&count), "cudaGetDeviceCount");
    if (o->card >= count) {
        bench_rank_fail(card->run, card->rank,
                        "--device is 'cuda:%d'; allowed: cuda:0 to cuda:%d",
                        o->card, count - 1);
    }
    if (o->card == BENCH_ALL_CARDS) {
        card->ordinal = card->rank % count;
        card->num_cards = o->ranks < count ? o->ranks : count;
    } else {
        card->ordinal = o->card;
        card->num_cards = 1;
    }
    check(card, cudaSetDevice(card->ordinal), "cudaSetDevice");
}

static void *
cuda_take(struct bench_card *card, size_t bytes)
{
    void *ptr = NULL;
    check(card, cudaMalloc(&ptr, bytes), "cudaMalloc");
    return ptr;
}

static void
cuda_give_back(struct bench_card *card, void *ptr)
{
    check(card, cudaFree(ptr), "cudaFree");
}

static void
cuda_synchronize(struct bench_card *card)
{
    check(card, cudaStreamSynchronize(card->stream), "cudaStreamSynchronize");
}

static void
cuda_upload(struct bench_card *card, void *to, const void *from, size_t bytes)
{
    struct cuda_card *self = (struct cuda_card *)card;
    for (size_t at = 0; at < bytes; at += STAGING_BYTES) {
        size_t part = bytes - at < STAGING_BYTES ? bytes - at : STAGING_BYTES;
        memcpy(self->staging, (const char *)from + at, part);
        check(card,
              cudaMemcpyAsync((char *)to + at, self->staging, part,
                              cudaMemcpyHostToDevice, self->stream),
              "cudaMemcpyAsync to the card");
        cuda_synchronize(card);
    }
}

static void
cuda_download(struct bench_card *card, void *to, const void *from, size_t bytes)
{
    struct cuda_card *self = (struct cuda_card *)card;
    for (size_t at = 0; at < bytes; at += STAGING_BYTES) {
        size_t part = bytes - at < STAGING_BYTES ? bytes - at : STAGING_BYTES;
        check(card,
              cudaMemcpyAsync(self->staging, (const char *)from + at, part,
                              cudaMemcpyDeviceToHost, self->stream),
              "cudaMemcpyAsync from the card");
        cuda_synchronize(card);
        memcpy((char *)to + at, self->staging, part);
    }
}

static void
cuda_mark(struct bench_card *card, int32_t mark)
{
    struct cuda_card *self = (struct cuda_card *)card;
    check(card, cudaEventRecord(self->marks[mark], self->stream),
          "cudaEventRecord");
}

static int64_t
cuda_between_ns(struct bench_card *card, int32_t from, int32_t to)
{
    struct cuda_card *self = (struct cuda_card *)card;
    float ms = 0;
    check(card, cudaEventElapsedTime(&ms, self->marks[from], self->marks[to]),
          "cudaEventElapsedTime");
    return llround((double)ms * 1e6);
}

/* Other threads of the process may do what a capture would forbid them. */
static void
cuda_capture(struct bench_card *card)
{
    check(
        card,
        cudaStreamBeginCapture(card->stream, cudaStreamCaptureModeThreadLocal),
        "cudaStreamBeginCapture");
}

static void
cuda_captured(struct bench_card *card, enum bench_op op)
{
    struct cuda_card *self = (struct cuda_card *)card;
    cudaGraph_t graph = NULL;
    check(card, cudaStreamEndCapture(self->stream, &graph),
          "cudaStreamEndCapture");
    check(card, cudaGraphInstantiateWithFlags(&self->graphs[op], graph, 0),
          "cudaGraphInstantiateWithFlags");
    check(card, cudaGraphDestroy(graph), "cudaGraphDestroy");
    check(card, cudaGraphUpload(self->graphs[op], self->stream),
          "cudaGraphUpload");
    cuda_synchronize(card);
}

static void
cuda_replay(struct bench_card *card, enum bench_op op)
{
    struct cuda_card *self = (struct cuda_card *)card;
    check(card, cudaGraphLaunch(self->graphs[op], self->stream),
          "cudaGraphLaunch");
}

static int64_t
cuda_used_bytes(struct bench_card *card)
{
    size_t unused = 0;
    size_t all = 0;
    check(card, cudaMemGetInfo(&unused, &all), "cudaMemGetInfo");
    return (int64_t)(all - unused);
}

static void
copy_once(struct cuda_card *self)
{
    check(&self->base,
          cudaMemcpyAsync(self->to, self->from, BENCH_CARD_COPY_BYTES,
                          cudaMemcpyDeviceToDevice, self->stream),
          "cudaMemcpyAsync on the card");
}

static int64_t
cuda_copy_ns(struct bench_card *card)
{
    struct cuda_card *self = (struct cuda_card *)card;
    cuda_mark(card, 0);
    copy_once(self);
    cuda_mark(card, 1);
    cuda_synchronize(card);
    return cuda_between_ns(card, 0, 1);
}

/* Contents that are no zeros, which some cards copy faster; and all that the
 * copies set up. */
static void
open_copies(struct cuda_card *self)
{
    struct bench_card *card = &self->base;
    self->from = cuda_take(card, BENCH_CARD_COPY_BYTES);
    self->to = cuda_take(card, BENCH_CARD_COPY_BYTES);
    uint64_t *words = self->staging;
    for (size_t i = 0; i < STAGING_BYTES / sizeof *words; i++) {
        words[i] = (i + 1) * UINT64_C(0x9e3779b97f4a7c15);
    }
    for (size_t at = 0; at < BENCH_CARD_COPY_BYTES; at += STAGING_BYTES) {
        check(card,
              cudaMemcpyAsync((char *)self->from + at, self->staging,
                              STAGING_BYTES, cudaMemcpyHostToDevice,
                              self->stream),
              "cudaMemcpyAsync to the card");
    }
    copy_once(self);
    cuda_synchronize(card);
}

static const struct bench_card_ops cuda_ops;

static struct bench_card *
cuda_open(const struct bench_run *run, int32_t rank)
{
    struct cuda_card *self = calloc(1, sizeof *self);
    if (!self) {
        bench_rank_fail(run, rank, "no memory for a card");
    }
    struct bench_card *card = &self->base;
    card->ops = &cuda_ops;
    card->run = run;
    card->rank = rank;
    choose_card(card);
    check(card, cudaStreamCreateWithFlags(&self->stream, cudaStreamNonBlocking),
          "cudaStreamCreateWithFlags");
    card->stream = self->stream;
    check(card, cudaHostAlloc(&self->staging, STAGING_BYTES, 0),
          "cudaHostAlloc");
    for (int32_t i = 0; i < BENCH_MAX_MARKS; i++) {
        check(card, cudaEventCreate(&self->marks[i]), "cudaEventCreate");
    }
    if (rank == 0 && !run->options->soak_s) {
        open_copies(self);
    }
    return card;
}

static void
cuda_close(struct bench_card *card)
{
    struct cuda_card *self = (struct cuda_card *)card;
    for (int op = 0; op < BENCH_NUM_OPS; op++) {
        if (self->graphs[op]) {
            check(card, cudaGraphExecDestroy(self->graphs[op]),
                  "cudaGraphExecDestroy");
        }
    }
    for (int32_t i = 0; i < BENCH_MAX_MARKS; i++) {
        check(card, cudaEventDestroy(self->marks[i]), "cudaEventDestroy");
    }
    check(card, cudaStreamDestroy(self->stream), "cudaStreamDestroy");
    check(card, cudaFreeHost(self->staging), "cudaFreeHost");
    cuda_give_back(card, self->from);
    cuda_give_back(card, self->to);
    free(self);
}

static const struct bench_card_ops cuda_ops = {
    .open = cuda_open,
    .close = cuda_close,
    .take = cuda_take,
    .give_back = cuda_give_back,
    .upload = cuda_upload,
    .download = cuda_download,
    .synchronize = cuda_synchronize,
    .mark = cuda_mark,
    .between_ns = cuda_between_ns,
    .capture = cuda_capture,
    .captured = cuda_captured,
    .replay = cuda_replay,
    .used_bytes = cuda_used_bytes,
    .copy_ns = cuda_copy_ns,
};

const struct bench_card_ops *const bench_card_cuda = &cuda_ops;
