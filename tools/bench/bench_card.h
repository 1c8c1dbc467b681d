/* SPDX-License-Identifier: MIT */
/*
 * The card that a rank works on.  Whatever fails ends the process.
 *
 * Ranks may share a card, and what takes memory or waits for all of the card
 * would wait for the kernels of other ranks, too.  So everything is taken
 * before the ranks start to work, and copies are made through pinned memory.
 */
#ifndef EPX_BENCH_CARD_H
#define EPX_BENCH_CARD_H

#include "bench_run.h"

/* Points of a stream whose times are kept, at most. */
#define BENCH_MAX_MARKS 256

struct bench_card {
    const struct bench_card_ops *ops;
    const struct bench_run *run;
    int32_t rank;
    int32_t ordinal;
    int32_t num_cards; /* that the ranks use */
    epx_stream_t stream;
};

struct bench_card_ops {
    /* The rank's card, its stream, and what the rest needs. */
    struct bench_card *(*open)(const struct bench_run *run, int32_t rank);
    void (*close)(struct bench_card *card);
    /* Memory outside the group's heap. */
    void *(*take)(struct bench_card *card, size_t bytes);
    void (*give_back)(struct bench_card *card, void *ptr);
    /* Complete when they return. */
    void (*upload)(struct bench_card *card, void *to, const void *from,
                   size_t bytes);
    void (*download)(struct bench_card *card, void *to, const void *from,
                     size_t bytes);
    /* Until the stream has run. */
    void (*synchronize)(struct bench_card *card);
    /* A mark notes when the stream has come to it; valid once it has run.  In a
     * graph, when its last replay has. */
    void (*mark)(struct bench_card *card, int32_t mark);
    int64_t (*between_ns)(struct bench_card *card, int32_t from, int32_t to);
    /* What the stream is given from capture on becomes a graph of the
     * operation, which replay gives it. */
    void (*capture)(struct bench_card *card);
    void (*captured)(struct bench_card *card, enum bench_op op);
    void (*replay)(struct bench_card *card, enum bench_op op);
    /* Ends its graph, if there is one. */
    void (*forget)(struct bench_card *card, enum bench_op op);
    /* The stream does nothing for a while, but for a thread that sleeps. */
    void (*rest)(struct bench_card *card, uint64_t ns);
    /* BENCH_SIGNALS, in the stream. */
    void (*signal)(struct bench_card *card);
    /* Bytes of the card that are taken, by whomever. */
    int64_t (*used_bytes)(struct bench_card *card);
    /* How long it takes to copy BENCH_CARD_COPY_BYTES on rank 0's card; not in
     * a soak. */
    int64_t (*copy_ns)(struct bench_card *card);
};

/* NULL when epx-bench was built without CUDA. */
extern const struct bench_card_ops *const bench_card_cuda;

#endif
