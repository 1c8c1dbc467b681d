// SPDX-License-Identifier: MIT
// Which entries of a routing are dropped, since the ranks of their experts are
// masked: a kernel of its own, which others then need not run.
#include "engine/cuda/cuda_count.cuh"
#include "engine/cuda/cuda_launch.cuh"

namespace
{

constexpr int THREADS = 512;

// One block.
__global__ void
__launch_bounds__(THREADS)
    drops_kernel(const __grid_constant__ cuda_drops_args_t args)
{
    grid_wait();
    const cuda_routing_t *routing = args.plan.routing;
    __shared__ uint32_t total;
    uint32_t count = 0;

    if (!__syncthreads_and(!is_broken(args.view))) {
        return;
    }
    if (threadIdx.x == 0) {
        total = 0;
    }
    __syncthreads();
    for (int64_t i = threadIdx.x; i < args.num_entries; i += THREADS) {
        bool is_dropped = args.plan.experts[i] == CUDA_EXPERT_DROPPED;

        count += is_dropped;
        if (args.dropped != nullptr) {
            args.dropped[i] = is_dropped;
        }
    }
    atomicAdd(&total, count);
    __syncthreads();
    if (args.tells && threadIdx.x == 0) {
        word_put(args.told.record->words + 1 + args.view.num_ranks +
                     args.plan.num_local + 1,
                 generation_of(args.told, *routing), total);
    }
}

} // namespace

cudaError_t
cuda_mask_load(size_t max_shared)
{
    return load(drops_kernel, max_shared);
}

cudaError_t
cuda_drops_launch(const cuda_drops_args_t *args, cudaStream_t stream)
{
    return launch(drops_kernel, 1, THREADS, 0, *args, stream);
}
