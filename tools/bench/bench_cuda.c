/* SPDX-License-Identifier: MIT */
#include "bench_card.h"
#include "bench_signals.h"

#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define STAGING_BYTES      ((size_t)8 << 20)
#define SIGNALS_TIMEOUT_NS UINT64_C(30000000000)

/* Of a graph, as many as there are nodes of any that is made here. */
#define MAX_NODES 1024

struct cuda_card {
    struct bench_card base;
    cudaStream_t stream;
    cudaEvent_t marks[BENCH_MAX_MARKS];
    cudaGraphExec_t graphs[BENCH_NUM_GRAPHS];
    bool captures;
    struct bench_signals signals;
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
    /* NCCL would refuse it, but not in such words. */
    if (o->vs_nccl && card->num_cards < o->ranks) {
        bench_rank_fail(card->run, card->rank,
                        "--vs nccl needs a card for each rank: %d ranks on %d "
                        "card%s",
                        o->ranks, card->num_cards,
                        card->num_cards == 1 ? "" : "s");
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
    check(card,
          cudaEventRecordWithFlags(self->marks[mark], self->stream,
                                   self->captures ? cudaEventRecordExternal
                                                  : cudaEventRecordDefault),
          "cudaEventRecordWithFlags");
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
    struct cuda_card *self = (struct cuda_card *)card;
    check(
        card,
        cudaStreamBeginCapture(card->stream, cudaStreamCaptureModeThreadLocal),
        "cudaStreamBeginCapture");
    self->captures = true;
}

/* The blocks of a kernel in a graph; 0 for other nodes.  Asks the driver: the
 * kernels belong to another copy of the runtime, the module's. */
static int32_t
blocks_of(const struct bench_card *card, cudaGraphNode_t node)
{
    enum cudaDriverEntryPointQueryResult found;
    enum cudaGraphNodeType type;
    CUDA_KERNEL_NODE_PARAMS_v2 params;
    PFN_cuGraphKernelNodeGetParams_v12000 get_params = NULL;
    check(card, cudaGraphNodeGetType(node, &type), "cudaGraphNodeGetType");
    if (type != cudaGraphNodeTypeKernel) {
        return 0;
    }
    check(card,
          cudaGetDriverEntryPointByVersion("cuGraphKernelNodeGetParams",
                                           (void **)&get_params, 12000,
                                           cudaEnableDefault, &found),
          "cudaGetDriverEntryPointByVersion");
    return found == cudaDriverEntryPointSuccess &&
                   get_params(node, &params) == CUDA_SUCCESS
               ? (int32_t)params.gridDimX
               : 0;
}

static int32_t
most_blocks(const struct bench_card *card, cudaGraph_t graph)
{
    cudaGraphNode_t nodes[MAX_NODES];
    size_t count = MAX_NODES;
    int32_t most = 0;
    check(card, cudaGraphGetNodes(graph, nodes, &count), "cudaGraphGetNodes");
    for (size_t i = 0; i < count && i < MAX_NODES; i++) {
        int32_t blocks = blocks_of(card, nodes[i]);
        most = blocks > most ? blocks : most;
    }
    return most;
}

static void
cuda_captured(struct bench_card *card, enum bench_op op)
{
    struct cuda_card *self = (struct cuda_card *)card;
    cudaGraph_t graph = NULL;
    check(card, cudaStreamEndCapture(self->stream, &graph),
          "cudaStreamEndCapture");
    self->captures = false;
    if (card->rank == 0 && op < BENCH_NUM_OPS) {
        card->run->shared->num_blocks[op] = most_blocks(card, graph);
    }
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

static void
cuda_forget(struct bench_card *card, enum bench_op op)
{
    struct cuda_card *self = (struct cuda_card *)card;
    if (self->graphs[op]) {
        check(card, cudaGraphExecDestroy(self->graphs[op]),
              "cudaGraphExecDestroy");
    }
    self->graphs[op] = NULL;
}

static void
cuda_signal(struct bench_card *card)
{
    struct cuda_card *self = (struct cuda_card *)card;
    check(card,
          bench_signals_launch(&self->signals, card->run->options->workers,
                               self->stream),
          "launching the signals");
}

static void
cuda_rest(struct bench_card *card, uint64_t ns)
{
    const struct cuda_card *self = (const struct cuda_card *)card;
    check(card, bench_rest_launch(ns, self->stream), "launching a rest");
}

/* Lets this card reach the memory of the other ranks' cards, which stays so. */
static void
reach_cards(const struct bench_card *card)
{
    bool all = card->run->options->card == BENCH_ALL_CARDS;
    for (int32_t peer = 0; all && peer < card->num_cards; peer++) {
        int can = 0;
        if (peer == card->ordinal) {
            continue;
        }
        check(card, cudaDeviceCanAccessPeer(&can, card->ordinal, peer),
              "cudaDeviceCanAccessPeer");
        if (!can) {
            bench_rank_fail(card->run, card->rank,
                            "--signals needs cards that reach each other's "
                            "memory: card %d cannot reach card %d",
                            card->ordinal, peer);
        }
        cudaError_t error = cudaDeviceEnablePeerAccess(peer, 0);
        if (error == cudaErrorPeerAccessAlreadyEnabled) {
            (void)cudaGetLastError(); /* which forgets it */
        } else {
            check(card, error, "cudaDeviceEnablePeerAccess");
        }
    }
}

/* All ranks take theirs before any works. */
static void
open_signals(struct cuda_card *self)
{
    struct bench_card *card = &self->base;
    struct bench_shared *shared = card->run->shared;
    size_t bytes = BENCH_SIGNALS_WORDS * sizeof(uint64_t);
    reach_cards(card);
    uint64_t *words = cuda_take(card, bytes);
    check(card, cudaMemsetAsync(words, 0, bytes, self->stream),
          "cudaMemsetAsync");
    cuda_synchronize(card);
    shared->signals[card->rank] = words;
    bench_barrier_wait(&shared->ranks, BENCH_NO_DEADLINE);
    self->signals.rank = card->rank;
    self->signals.num_ranks = card->run->options->ranks;
    self->signals.timeout_ns = SIGNALS_TIMEOUT_NS;
    for (int32_t r = 0; r < card->run->options->ranks; r++) {
        self->signals.words[r] = shared->signals[r];
    }
    /* The kernel's code is loaded before anybody waits on the card. */
    cuda_signal(card);
    cuda_synchronize(card);
}

static void
close_signals(struct cuda_card *self)
{
    struct bench_card *card = &self->base;
    uint64_t *words = self->signals.words[card->rank];
    uint64_t late = 0;
    cuda_download(card, &late, words + BENCH_SIGNALS_LATE, sizeof late);
    if (late) {
        bench_rank_fail(card->run, card->rank,
                        "a peer's signal did not come within %llu s",
                        (unsigned long long)(SIGNALS_TIMEOUT_NS / 1000000000));
    }
    bench_barrier_wait(&card->run->shared->ranks, BENCH_NO_DEADLINE);
    cuda_give_back(card, words);
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
    if (run->options->signals) {
        open_signals(self);
    }
    return card;
}

static void
cuda_close(struct bench_card *card)
{
    struct cuda_card *self = (struct cuda_card *)card;
    if (card->run->options->signals) {
        close_signals(self);
    }
    for (int op = 0; op < BENCH_NUM_GRAPHS; op++) {
        cuda_forget(card, (enum bench_op)op);
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
    .forget = cuda_forget,
    .rest = cuda_rest,
    .signal = cuda_signal,
    .used_bytes = cuda_used_bytes,
    .copy_ns = cuda_copy_ns,
};

const struct bench_card_ops *const bench_card_cuda = &cuda_ops;
