// SPDX-License-Identifier: MIT
//
// Dispatch in one hop:
//     1. block 0 posts where this rank wants its rows
//     2. every block waits for all posts, and opens the targets: where rows go
//        on each rank
//     3. each warp takes tokens: a row is loaded once and stored to its final
//        place on every rank that wants it
//     4. each block tells every rank that it is done; block 0 waits for the
//        blocks of all ranks, in a send-only dispatch for this rank's alone
// With several nodes ranks are those of this one, and rows for others go to
// memory that the network reads, which takes the place of a rank; what comes
// from there, later kernels forward (cuda_rail.cu).
// cuda_wait_launch waits for the others of a send-only dispatch.
#include "engine/cuda/cuda_count.cuh"
#include "engine/cuda/cuda_launch.cuh"
#include "engine/cuda/cuda_send.cuh"

namespace
{

// This rank's tokens.
struct token_source {
    const cuda_dispatch_args_t &args;
    int64_t num_tokens;

    __device__ explicit token_source(const cuda_dispatch_args_t &from)
        : args(from), num_tokens(from.num_tokens)
    {
    }

    __device__ const char *row(int64_t token) const
    {
        return args.x + token * args.in_bytes;
    }

    __device__ const uint32_t *scales(int64_t token) const
    {
        return args.scales == nullptr
                   ? nullptr
                   : args.scales + token * args.scale_token_stride;
    }

    __device__ token_load load(const worker &w, int64_t token) const
    {
        return load_token(args, w, token);
    }
};

template <bool BULK, bool QUANTIZE>
__global__ void __launch_bounds__(256, 1)
    dispatch_kernel(const __grid_constant__ cuda_dispatch_args_t args)
{
    grid_wait();
    char *shared = dynamic_shared();
    __shared__ epx__post_t post;
    const cuda_view_t &view = args.view;
    uint64_t step = step_now(view);
    bool works = !is_broken(view) && args.plan.routing->failed == 0;
    char *segment = first_segment(view);

    if (threadIdx.x == 0) {
        post = args.post;
        post.step = step;
        post.signature.plan_id = args.plan.routing->plan_id;
        post.arrivals =
            *arrivals_sum(view, step) + gridDim.x + args.num_forwarders;
    }
    // A plan that was refused was so on every rank: nobody takes this step.
    if (!__syncthreads_and(works)) {
        return;
    }
    if (blockIdx.x == 0) {
        tell_all(view, step, 0, post);
    }
    worker w = worker_make(args, shared, BULK);
    token_source source(args);
#if EPX__HAS_BULK
    if (BULK) {
        load_first(args, w, source);
    }
#endif
    target *targets = reinterpret_cast<target *>(shared);
    if (view.nodes.num_nodes > 1) {
        nodes_open(args, targets);
    }
    bool ok = posts_wait<epx__post_t, false>(
        view, step, CUDA_IN_DISPATCH, post.signature, args.plan.rank_rows,
        blockIdx.x == 0 ? args.wait_ns : nullptr,
        [&](int r, const epx__post_t &theirs, const peer &p) {
            return target_open(args, r, theirs, p, &targets[r]);
        });
    if (ok) {
        send_rows<BULK, QUANTIZE, true>(args, w, source);
        clear_padding(args, w);
        if (blockIdx.x == 0) {
            give_counts(args);
        }
        arrive_all<true>(view, step, segment);
    }
#if EPX__HAS_BULK
    if (BULK && !ok) {
        drop_first(args, w, source);
    }
#endif
    if (ok && blockIdx.x == 0) {
        bool is_all = args.is_send_only == 0 && args.num_forwarders == 0;

        if (threadIdx.x == 0) {
            args.plan.routing->open_step = step;
        }
        if (args.num_forwarders != 0) {
            // This rank's own, of which those are not here yet.
            if (threadIdx.x == 0) {
                targets[view.rank].arrivals -= args.num_forwarders;
            }
            __syncthreads();
        }
        if (arrivals_wait_all(view, step, CUDA_IN_DISPATCH, targets, !is_all,
                              args.wait_ns)) {
            grid_release();
            step_end(view, step, post.arrivals);
        }
    }
}

// The end of a send-only dispatch.
__global__ void
wait_kernel(const __grid_constant__ cuda_wait_args_t args)
{
    grid_wait();
    const cuda_view_t &view = args.view;
    bool works = !is_broken(view) && args.plan.routing->failed == 0;
    uint64_t step = args.plan.routing->open_step;

    if (!works) {
        return;
    }
    for (int r = threadIdx.x; r < view.num_ranks; r += blockDim.x) {
        if (is_masked(view, r)) {
            continue;
        }
        // Known to be there: the send has waited for it.
        uint64_t target = words_read<epx__post_t>(view, step, r, 0).arrivals;

        if (!arrivals_wait_timed(view, step, CUDA_IN_DISPATCH, r, target,
                                 args.wait_ns)) {
            break;
        }
    }
}

using kernel_t = void (*)(const cuda_dispatch_args_t);

kernel_t
kernel_of(cuda_mover_t mover, bool quantizes)
{
    if (mover == CUDA_MOVER_BULK) {
        return quantizes ? dispatch_kernel<true, true>
                         : dispatch_kernel<true, false>;
    }
    return quantizes ? dispatch_kernel<false, true>
                     : dispatch_kernel<false, false>;
}

} // namespace

cudaError_t
cuda_dispatch_load(size_t max_shared)
{
    cudaError_t error = load(wait_kernel, max_shared);

    for (int i = 0; i < 4 && error == cudaSuccess; i++) {
        error = load(kernel_of((cuda_mover_t)(i / 2), i % 2 != 0), max_shared);
    }
    return error;
}

cudaError_t
cuda_dispatch_starts_early(uint32_t *does)
{
    cudaFuncAttributes attributes = {};
    cudaError_t error = cudaFuncGetAttributes(&attributes, wait_kernel);

    // The driver may have compiled them from code for older cards, without
    // grid_wait.
    *does = attributes.ptxVersion >= 90;
    return error;
}

size_t
cuda_dispatch_shape(cuda_dispatch_args_t *args, cuda_mover_t mover,
                    size_t max_shared)
{
    bool quantizes = args->quantize != EPX_QUANTIZE_NONE;
    // Whole words of scales to a chunk, and not much more than a row of the
    // usual models, so that several fit.
    uint64_t unit = quantizes ? 2 * 4 * EPX_SCALE_BLOCK : ALIGN;
    uint64_t most = quantizes ? QUANTIZE_CHUNK : COPY_CHUNK;
    uint64_t parts = (args->in_bytes + most - 1) / most;

    args->chunk_bytes = round_up((args->in_bytes + parts - 1) / parts, unit);
    args->num_chunks = (uint32_t)((args->in_bytes + args->chunk_bytes - 1) /
                                  args->chunk_bytes);
    // As much or more comes to each rank.
    args->passes_cache =
        (uint64_t)args->num_tokens * args->row_bytes >= CACHED_MOST;
    // Scales that a bulk copy can take, and that are not more than a row.
    args->scales_ride =
        mover == CUDA_MOVER_BULK && args->scales != nullptr &&
        args->scale_stride == 1 && args->num_scales % 4 == 0 &&
        args->scale_token_stride % 4 == 0 &&
        reinterpret_cast<uintptr_t>(args->scales) % 16 == 0 &&
        args->num_scales * sizeof(uint32_t) <= args->chunk_bytes;
    // Quantising keeps the warps busy: more of them, with fewer rows ahead.
    // Copying does not, and a few warps leave the memory in better order.
    args->num_stages = mover != CUDA_MOVER_BULK ? 0 : quantizes ? 2 : 3;
    size_t most_shared =
        quantizes || max_shared < COPY_SHARED ? max_shared : COPY_SHARED;

    args->num_warps = 8;
    while (args->num_warps > 1 &&
           shared_make(*args, mover == CUDA_MOVER_BULK).end > most_shared) {
        args->num_warps--;
    }
    return shared_make(*args, mover == CUDA_MOVER_BULK).end;
}

cudaError_t
cuda_dispatch_launch(const cuda_dispatch_args_t *args, cuda_mover_t mover,
                     int num_blocks, cudaStream_t stream)
{
    kernel_t kernel = kernel_of(mover, args->quantize != EPX_QUANTIZE_NONE);
    size_t shared = shared_make(*args, mover == CUDA_MOVER_BULK).end;

    return launch(kernel, num_blocks, args->num_warps * 32, shared, *args,
                  stream);
}

cudaError_t
cuda_wait_launch(const cuda_wait_args_t *args, cudaStream_t stream)
{
    return launch(wait_kernel, 1, 128, 0, *args, stream);
}
