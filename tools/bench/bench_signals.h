/* SPDX-License-Identifier: MIT */
/* A kernel that does what every operation must: one of its blocks tells every
 * peer something, waits until all have told it, and does so once more. */
#ifndef EPX_BENCH_SIGNALS_H
#define EPX_BENCH_SIGNALS_H

#include <cuda_runtime_api.h>
#include <stdint.h>

#define BENCH_SIGNALS_MAX_RANKS 32

/* The words of a rank, on its card: [2, MAX_RANKS], of which each source writes
 * its own; then how often the kernel has run, and whether it was ever late. */
#define BENCH_SIGNALS_WORDS (2 * BENCH_SIGNALS_MAX_RANKS + 2)
#define BENCH_SIGNALS_LATE  (2 * BENCH_SIGNALS_MAX_RANKS + 1)

struct bench_signals {
    uint64_t *words[BENCH_SIGNALS_MAX_RANKS];
    int32_t rank;
    int32_t num_ranks;
    uint64_t timeout_ns;
};

#ifdef __cplusplus
extern "C"
#endif
    cudaError_t
    bench_signals_launch(const struct bench_signals *args, int num_blocks,
                         cudaStream_t stream);

/* A thread that sleeps for so long. */
#ifdef __cplusplus
extern "C"
#endif
    cudaError_t
    bench_rest_launch(uint64_t ns, cudaStream_t stream);

#endif
