// SPDX-License-Identifier: MIT
#include "bench_signals.h"

#include <cuda/atomic>

namespace
{

using word_ref = cuda::atomic_ref<uint64_t, cuda::thread_scope_system>;

__device__ uint64_t
timer_ns()
{
    uint64_t ns;

    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(ns));
    return ns;
}

// One thread: until a peer has told this turn; false when it is late.
__device__ bool
wait_for(uint64_t *word, uint64_t turn, uint64_t timeout_ns)
{
    uint64_t start = timer_ns();

    // Released by the peer in exchange().
    while (word_ref(*word).load(cuda::memory_order_acquire) < turn) {
        if (timer_ns() - start > timeout_ns) {
            return false;
        }
    }
    return true;
}

// The two exchanges have words of their own, so that nobody overwrites what a
// peer still waits for.
__device__ bool
exchange(const bench_signals &args, int which, uint64_t turn)
{
    uint64_t *own = args.words[args.rank] + which * BENCH_SIGNALS_MAX_RANKS;
    bool ok = true;

    if (threadIdx.x < args.num_ranks) {
        uint64_t *theirs = args.words[threadIdx.x] +
                           which * BENCH_SIGNALS_MAX_RANKS + args.rank;

        word_ref(*theirs).store(turn, cuda::memory_order_release);
        ok = wait_for(own + threadIdx.x, turn, args.timeout_ns);
    }
    return __syncthreads_and(ok) != 0;
}

__global__ void
signals_kernel(const __grid_constant__ bench_signals args)
{
    uint64_t *state = args.words[args.rank] + 2 * BENCH_SIGNALS_MAX_RANKS;
    uint64_t turn = state[0] + 1;

    if (blockIdx.x != 0) {
        return;
    }
    bool ok = exchange(args, 0, turn) && exchange(args, 1, turn);
    if (threadIdx.x == 0) {
        state[0] = turn;
        state[1] |= !ok;
    }
}

__global__ void
rest_kernel(uint64_t ns)
{
    uint64_t start = timer_ns();

    while (timer_ns() - start < ns) {
        __nanosleep(1000);
    }
}

} // namespace

extern "C" cudaError_t
bench_rest_launch(uint64_t ns, cudaStream_t stream)
{
    rest_kernel<<<1, 1, 0, stream>>>(ns);
    return cudaGetLastError();
}

extern "C" cudaError_t
bench_signals_launch(const struct bench_signals *args, int num_blocks,
                     cudaStream_t stream)
{
    signals_kernel<<<num_blocks, BENCH_SIGNALS_MAX_RANKS, 0, stream>>>(*args);
    return cudaGetLastError();
}
