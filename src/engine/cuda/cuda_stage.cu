// SPDX-License-Identifier: MIT
// Between the caller's arrays and the blocks of the heap that stand in for them
// where peers must reach: the rows that were received, and no others.
#include "engine/cuda/cuda_launch.cuh"
#include "engine/cuda/cuda_step.cuh"

namespace
{

constexpr int THREADS = 512;

// Rows that hold received data, padding included: one run, or in EXPERT_SLOTS
// one for each local expert.
struct run {
    uint64_t begin, count;
};

__device__ int
num_runs(const cuda_stage_args_t &args)
{
    return args.plan.key.layout == EPX_LAYOUT_EXPERT_SLOTS ? args.plan.num_local
                                                           : 1;
}

__device__ run
run_at(const cuda_stage_args_t &args, int i)
{
    if (args.plan.key.layout == EPX_LAYOUT_EXPERT_SLOTS) {
        uint64_t most = args.plan.key.max_tokens_per_rank * args.view.num_ranks;

        return { (uint64_t)args.plan.expert_offsets[i],
                 min((uint64_t)args.plan.expert_rows[i], most) };
    }
    return { 0, min(args.plan.rank_rows[args.view.rank], args.max_rows) };
}

template <typename Unit>
__device__ void
copy_units(char *to, const char *from, uint64_t bytes)
{
    uint64_t count = bytes / sizeof(Unit);
    uint64_t stride = (uint64_t)gridDim.x * THREADS;

#pragma unroll 4
    for (uint64_t i = (uint64_t)blockIdx.x * THREADS + threadIdx.x; i < count;
         i += stride) {
        reinterpret_cast<Unit *>(to)[i] =
            reinterpret_cast<const Unit *>(from)[i];
    }
}

__device__ void
copy_array(const cuda_stage_args_t &args, const cuda_staged_t &array)
{
    char *to = args.to_user ? array.user : array.heap;
    const char *from = args.to_user ? array.heap : array.user;

    for (int i = 0; i < num_runs(args); i++) {
        run rows = run_at(args, i);
        uint64_t at = rows.begin * array.row_bytes;
        uint64_t bytes = rows.count * array.row_bytes;

        switch (array.unit) {
        case 16:
            copy_units<uint4>(to + at, from + at, bytes);
            break;
        case 8:
            copy_units<uint64_t>(to + at, from + at, bytes);
            break;
        case 4:
            copy_units<uint32_t>(to + at, from + at, bytes);
            break;
        case 2:
            copy_units<uint16_t>(to + at, from + at, bytes);
            break;
        default:
            copy_units<uint8_t>(to + at, from + at, bytes);
        }
    }
}

// Dense in the heap, strided in the caller's array.
__device__ void
copy_scales(const cuda_stage_args_t &args)
{
    bool is_slots = args.plan.key.layout == EPX_LAYOUT_EXPERT_SLOTS;
    uint64_t stride = (uint64_t)gridDim.x * THREADS;

    for (int e = 0; e < num_runs(args); e++) {
        run rows = run_at(args, e);
        uint64_t count = rows.count * args.num_scales;
        uint32_t *to =
            args.user_scales + (is_slots ? e * args.expert_stride : 0);
        const uint32_t *from = args.heap_scales + rows.begin * args.num_scales;

        for (uint64_t i = (uint64_t)blockIdx.x * THREADS + threadIdx.x;
             i < count; i += stride) {
            uint64_t row = i / args.num_scales;

            to[row * args.row_stride +
               (i - row * args.num_scales) * args.scale_stride] = from[i];
        }
    }
}

__global__ void
__launch_bounds__(THREADS)
    stage_kernel(const __grid_constant__ cuda_stage_args_t args)
{
    grid_wait();
    if (is_broken(args.view) || args.plan.routing->failed != 0) {
        return;
    }
    for (uint32_t i = 0; i < args.num_arrays; i++) {
        copy_array(args, args.arrays[i]);
    }
    if (args.user_scales != nullptr) {
        copy_scales(args);
    }
}

} // namespace

cudaError_t
cuda_stage_load(size_t max_shared)
{
    return load(stage_kernel, max_shared);
}

cudaError_t
cuda_stage_launch(const cuda_stage_args_t *args, int num_blocks,
                  cudaStream_t stream)
{
    return launch(stage_kernel, num_blocks, THREADS, 0, *args, stream);
}
