/* SPDX-License-Identifier: MIT */
/* One run: what was asked, and the memory in which its ranks meet. */
#ifndef EPX_BENCH_RUN_H
#define EPX_BENCH_RUN_H

#include "bench_barrier.h"
#include "bench_shape.h"
#include "bench_times.h"

/* How the copies that set the ceiling are made. */
enum bench_copy_kind {
    BENCH_COPY_CACHED, /* memcpy */
    BENCH_COPY_STREAM, /* stores around the caches */
    BENCH_NUM_COPIES,
};

/* How UCX brings bytes to another host. */
enum bench_way {
    BENCH_WAY_EAGER, /* active messages, */
    BENCH_WAY_RENDEZVOUS,
    BENCH_WAY_PUT, /* or puts, a flush, and a message that tells of it */
    BENCH_NUM_WAYS,
};

/* Timed iterations and copies take turns in so many blocks, or in as many as
 * there are iterations if that is less. */
#define BENCH_BLOCKS           5
#define BENCH_COPIES_PER_BLOCK 4

/* Bytes of the copy that shows what a card allows: far more than its caches
 * hold. */
#define BENCH_CARD_COPY_BYTES ((size_t)1 << 31)

/* Bytes of one rank in one round of an allgather. */
#define BENCH_GATHER_BYTES 4096u

/* What a soak has found. */
struct bench_soak {
    _Atomic int goes_on; /* rank 0 says so before each turn */
    int64_t turns;
    int64_t groups;
    int64_t ns;
    /* Of rank 0's process: the most in the first half, the least in the last
     * quarter. */
    int64_t first_bytes;
    int64_t last_bytes;
};

/* In memory that all ranks share, at one address. */
struct bench_shared {
    struct bench_barrier ranks;
    struct bench_barrier copiers; /* every worker of every rank */
    _Atomic int failed;           /* somebody has told why */
    char engine[16];              /* of epx_group_query, by rank 0 */
    char fabric[16];
    char device[32]; /* the network's interface, of rank 0 */
    struct bench_series ops[BENCH_NUM_SERIES];
    struct bench_series copies[BENCH_NUM_OPS][BENCH_NUM_COPIES];
    struct bench_series transfers[BENCH_NUM_OPS][BENCH_NUM_WAYS];
    _Atomic uint64_t transferred; /* ranks' transfers that have ended */
    _Atomic uint64_t wire_bytes[BENCH_NUM_OPS]; /* that interfaces counted */
    struct bench_series card_copies;            /* on rank 0's */
    int32_t num_cards; /* that the ranks use, by rank 0 */
    /* In a graph: the blocks of the operation's largest kernel, each of which
     * holds an SM; of rank 0; 0: unknown. */
    int32_t num_blocks[BENCH_NUM_OPS];
    uint64_t **signals; /* [R] the words of each rank's BENCH_SIGNALS */
    struct bench_soak soak;
    uint8_t *gather; /* [R, BENCH_GATHER_BYTES] */
};

struct bench_run {
    const struct bench_options *options;
    const struct bench_routing *routing;
    struct bench_shape shape;
    uint64_t op_bytes[BENCH_NUM_OPS];
    uint64_t net_bytes[BENCH_NUM_OPS]; /* of rows, between hosts */
    size_t copy_bytes; /* of each of a worker's two buffers for copies */
    struct bench_shared *shared;
    size_t shared_bytes;
    int32_t blocks;
    int64_t start_ns;
};

bool bench_run_open(struct bench_run *run, const struct bench_options *options,
                    const struct bench_routing *routing,
                    struct bench_error *error);
void bench_run_close(struct bench_run *run);

/* Bytes that each worker reads, and as many that it writes, to copy what the
 * operation moves. */
size_t bench_run_copied(const struct bench_run *run, enum bench_op op);

/* Tells on stderr, unless another rank has done so, and ends the process. */
__attribute__((noreturn, format(printf, 3, 4))) void
bench_rank_fail(const struct bench_run *run, int32_t rank, const char *format,
                ...);

/* Shows how far rank 0 has come, on a terminal, once a run takes long. */
struct bench_progress {
    int64_t shown_ns;
    bool shown;
};
void bench_progress_show(struct bench_progress *progress,
                         const struct bench_run *run, const char *phase,
                         int64_t done, int64_t all);
void bench_progress_clear(struct bench_progress *progress);

#endif
