// SPDX-License-Identifier: MIT
//
// Combine in one hop:
//     1. block 0 posts where this rank keeps its experts' outputs
//     2. every block waits for all posts, and opens the sources
//     3. each warp takes chunks of tokens: see cuda_pull.cuh
//     4. each block tells every rank that it is done; block 0 waits for the
//        blocks of all ranks: then x may change
// A send-only combine is 1 alone, and its completion 2 to 4.
#include "engine/cuda/cuda_launch.cuh"
#include "engine/cuda/cuda_pull.cuh"

namespace
{

template <epx_dtype_t DTYPE, bool BULK>
__global__ void
__launch_bounds__(WARPS * 32, 1)
    combine_kernel(const __grid_constant__ cuda_combine_args_t args)
{
    grid_wait();
    char *shared = dynamic_shared();
    __shared__ epx__post_t post;
    __shared__ start now;
    const cuda_view_t &view = args.view;
    bool tells = args.posts && blockIdx.x == 0;
    bool is_last_warp = threadIdx.x / 32 == WARPS - 1;
    uint64_t word = is_last_warp ? start_load(view, args.plan.routing) : 0;
    char *segment = first_segment(view);

    // x, which the stream has written, is released while the rest is read.
    if (tells && threadIdx.x < num_tellers<epx__post_t>(view)) {
        fence_acq_rel(view);
    }
    if (is_last_warp) {
        start_keep(word, &now);
        post_begin(args.post, &post);
        __syncwarp();
        // Announcing takes a step; what only pulls belongs to an earlier one.
        post_end(now, args.posts ? now.state.step + 1 : now.routing.open_step,
                 args.num_pullers, &post);
    }
    __syncthreads();
    // A plan that was refused was so on every rank: nobody takes this step.
    if (now.state.broken != 0 || now.routing.failed != 0) {
        return;
    }
    uint64_t step = post.step;
    if (tells) {
        tell_all(view, step, 0, post);
    }
    if (!args.pulls) {
        if (threadIdx.x == 0) {
            args.plan.routing->open_step = step;
        }
        step_end(view, step, post.arrivals);
        return;
    }
    if (!pull<DTYPE, BULK>(args, post, shared,
                           args.out_topk_weights != nullptr)) {
        return;
    }
    arrive_all<false>(view, step, segment);
    if (blockIdx.x == 0 &&
        arrivals_wait_all(view, step, CUDA_IN_COMBINE,
                          reinterpret_cast<source *>(shared), false,
                          args.wait_ns) &&
        args.posts) {
        grid_release();
        step_end(view, step, post.arrivals);
    }
}

template <epx_dtype_t DTYPE, bool BULK> struct kernels {
    static constexpr kernel_t kernel = combine_kernel<DTYPE, BULK>;
};

} // namespace

cudaError_t
cuda_combine_load(size_t max_shared)
{
    return kernels_load<kernels>(max_shared);
}

size_t
cuda_combine_shared_bytes(const cuda_view_t *view, cuda_mover_t mover)
{
    return shared_make(*view, mover == CUDA_MOVER_BULK).end;
}

// Chunks are as long as can be, but where that leaves warps without work while
// others do their last one.
static void
choose_chunk(cuda_combine_args_t *args, int num_blocks, uint64_t unit)
{
    constexpr uint64_t FEW = 12; // rounds of all warps
    uint64_t longest = (uint64_t)SPAN * spans_of(args->batch_rows);
    uint64_t warps = (uint64_t)num_blocks * WARPS, best = UINT64_MAX;
    uint64_t least = (args->row_bytes + longest - 1) / longest;
    uint64_t rounds = ((uint64_t)args->num_tokens * least + warps - 1) / warps;

    args->chunk_bytes = (uint32_t)longest;
    for (uint64_t n = least; rounds <= FEW && n <= 2 * least; n++) {
        uint64_t bytes =
            ((args->row_bytes + n - 1) / n + unit - 1) / unit * unit;
        uint64_t chunks = (args->row_bytes + bytes - 1) / bytes;
        uint64_t cost =
            ((uint64_t)args->num_tokens * chunks + warps - 1) / warps * bytes;

        if (cost < best) {
            best = cost;
            args->chunk_bytes = (uint32_t)bytes;
        }
    }
    args->num_chunks = (uint32_t)((args->row_bytes + args->chunk_bytes - 1) /
                                  args->chunk_bytes);
    args->last_bytes =
        (uint32_t)(args->row_bytes -
                   (uint64_t)(args->num_chunks - 1) * args->chunk_bytes);
}

void
cuda_combine_shape(cuda_combine_args_t *args, uint32_t rows_per_token,
                   int num_blocks, uint32_t unit_bytes)
{
    args->batch_rows = rows_per_token < MOST_ROWS ? rows_per_token : MOST_ROWS;
    args->num_batches =
        (rows_per_token + args->batch_rows - 1) / args->batch_rows;
    choose_chunk(args, num_blocks, unit_bytes);
    args->num_stages =
        ROOM / SPAN / (uint32_t)spans_of(args->batch_rows) / args->batch_rows;
}

cudaError_t
cuda_combine_launch(const cuda_combine_args_t *args, epx_dtype_t dtype,
                    cuda_mover_t mover, int num_blocks, cudaStream_t stream)
{
    size_t shared = shared_make(args->view, mover == CUDA_MOVER_BULK).end;
    epx_dtype_t adds =
        args->post.signature.quantize == EPX_QUANTIZE_LOGFMT10 ? LOGFMT : dtype;

    return launch(kernel_of<kernels>(adds, mover), num_blocks, WARPS * 32,
                  shared, *args, stream);
}
