/* SPDX-License-Identifier: MIT */
#include "bench_nccl.h"

#include "bench_nccl_library.h"
#include "bench_rng.h"

#include <stdlib.h>
#include <string.h>

/* NCCL is slower where a part does not start at a multiple of a few bytes. */
#define ALIGNMENT    256u
#define FILLED_BYTES ((size_t)1 << 20)

/* Of a buffer. */
struct part {
    uint64_t offset;
    uint64_t bytes;
};

/* For dispatch, combine. */
struct peer {
    struct part sent[2];
    struct part received[2];
};

struct bench_nccl {
    const struct bench_rank *rank;
    struct bench_card *card;
    struct bench_nccl_library library;
    void *comm;
    struct peer *peers; /* [R] */
    char *from;
    char *to;
    uint64_t bytes; /* of each */
};

static void
check(const struct bench_nccl *self, int result, const char *what)
{
    if (result) {
        bench_rank_fail(self->rank->run, self->rank->rank, "NCCL cannot %s: %s",
                        what, self->library.ncclGetErrorString(result));
    }
}

void
bench_nccl_start(struct bench_nccl *self, enum bench_op op)
{
    int combine = op == BENCH_NCCL_COMBINE;
    check(self, self->library.ncclGroupStart(), "start a group");
    for (int32_t r = 0; r < self->rank->run->options->ranks; r++) {
        const struct part *sent = &self->peers[r].sent[combine];
        const struct part *received = &self->peers[r].received[combine];
        if (sent->bytes) {
            check(self,
                  self->library.ncclSend(self->from + sent->offset, sent->bytes,
                                         BENCH_NCCL_INT8, r, self->comm,
                                         self->card->stream),
                  "send");
        }
        if (received->bytes) {
            check(self,
                  self->library.ncclRecv(self->to + received->offset,
                                         received->bytes, BENCH_NCCL_INT8, r,
                                         self->comm, self->card->stream),
                  "receive");
        }
    }
    check(self, self->library.ncclGroupEnd(), "end a group");
}

/* ---- opening and closing ---- */

/* The next part of a buffer that is taken up to *end_p. */
static struct part
take_part(uint64_t *end_p, int64_t rows, uint64_t row_bytes)
{
    struct part part = { *end_p, (uint64_t)rows * row_bytes };
    *end_p += (part.bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return part;
}

/* A combine takes the rows of its dispatch back. */
static void
plan_parts(struct bench_nccl *self, const int64_t *to, const int64_t *from)
{
    const struct bench_run *run = self->rank->run;
    for (int combine = 0; combine < 2; combine++) {
        uint64_t row_bytes = bench_shape_row_bytes(&run->shape, combine);
        uint64_t sent = 0;
        uint64_t received = 0;
        for (int32_t r = 0; r < run->options->ranks; r++) {
            struct peer *peer = &self->peers[r];
            peer->sent[combine] =
                take_part(&sent, combine ? from[r] : to[r], row_bytes);
            peer->received[combine] =
                take_part(&received, combine ? to[r] : from[r], row_bytes);
        }
        self->bytes = sent > self->bytes ? sent : self->bytes;
        self->bytes = received > self->bytes ? received : self->bytes;
    }
}

static void
count_rows(struct bench_nccl *self)
{
    const struct bench_run *run = self->rank->run;
    size_t ranks = (size_t)run->options->ranks;
    int64_t *to = calloc(ranks, sizeof *to);
    int64_t *from = calloc(ranks, sizeof *from);
    if (!to || !from ||
        !bench_shape_rows(run->routing, self->rank->rank, to, from)) {
        bench_rank_fail(run, self->rank->rank, "no memory for the routing");
    }
    plan_parts(self, to, from);
    free(from);
    free(to);
}

/* With contents that are no zeros, as what the card copies is. */
static void
take_buffers(struct bench_nccl *self)
{
    const struct bench_card_ops *ops = self->card->ops;
    struct bench_rng rng = bench_rng_make(0, 0, 0, 0);
    uint64_t *words = malloc(FILLED_BYTES);
    if (!words) {
        bench_rank_fail(self->rank->run, self->rank->rank,
                        "no memory for %zu bytes", FILLED_BYTES);
    }
    for (size_t i = 0; i < FILLED_BYTES / sizeof *words; i++) {
        words[i] = bench_rng_next(&rng);
    }
    self->from = ops->take(self->card, self->bytes);
    self->to = ops->take(self->card, self->bytes);
    for (uint64_t at = 0; at < self->bytes; at += FILLED_BYTES) {
        uint64_t left = self->bytes - at;
        ops->upload(self->card, self->from + at, words,
                    left < FILLED_BYTES ? left : FILLED_BYTES);
    }
    free(words);
}

/* All ranks, by what rank 0 puts where they see it. */
static void
connect_all(struct bench_nccl *self)
{
    const struct bench_run *run = self->rank->run;
    struct bench_shared *shared = run->shared;
    struct bench_nccl_id id;
    if (self->rank->rank == 0) {
        check(self, self->library.ncclGetUniqueId(&id), "make an id");
        memcpy(shared->gather, &id, sizeof id);
    }
    bench_barrier_wait(&shared->ranks, BENCH_NO_DEADLINE);
    memcpy(&id, shared->gather, sizeof id);
    bench_barrier_wait(&shared->ranks, BENCH_NO_DEADLINE);
    check(self,
          self->library.ncclCommInitRank(&self->comm, run->options->ranks, id,
                                         self->rank->rank),
          "connect the ranks");
}

struct bench_nccl *
bench_nccl_open(const struct bench_rank *rank)
{
    const struct bench_run *run = rank->run;
    const struct bench_options *o = run->options;
    struct bench_error error = { "no memory for NCCL's peers" };
    struct bench_nccl *self = o->vs_nccl ? calloc(1, sizeof *self) : NULL;
    if (!o->vs_nccl) {
        return NULL;
    }
    if (!self ||
        !(self->peers = calloc((size_t)o->ranks, sizeof *self->peers)) ||
        !bench_nccl_load(&self->library, &error)) {
        bench_rank_fail(run, rank->rank, "%s", error.text);
    }
    self->rank = rank;
    self->card = rank->card;
    self->bytes = ALIGNMENT;
    count_rows(self);
    take_buffers(self);
    connect_all(self);
    /* The first transfers make the links, which no graph may. */
    bench_nccl_start(self, BENCH_NCCL_DISPATCH);
    bench_nccl_start(self, BENCH_NCCL_COMBINE);
    self->card->ops->synchronize(self->card);
    /* Nobody makes links while another's kernels wait. */
    bench_barrier_wait(&run->shared->ranks, BENCH_NO_DEADLINE);
    return self;
}

void
bench_nccl_close(struct bench_nccl *self)
{
    if (!self) {
        return;
    }
    /* NCCL waits for the end of graphs that hold its work. */
    self->card->ops->forget(self->card, BENCH_NCCL_DISPATCH);
    self->card->ops->forget(self->card, BENCH_NCCL_COMBINE);
    bench_barrier_wait(&self->rank->run->shared->ranks, BENCH_NO_DEADLINE);
    check(self, self->library.ncclCommDestroy(self->comm), "part the ranks");
    self->card->ops->give_back(self->card, self->from);
    self->card->ops->give_back(self->card, self->to);
    free(self->peers);
    free(self);
}
