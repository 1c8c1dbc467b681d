// SPDX-License-Identifier: MIT
//
// The sums of a combine between nodes:
//     1. for each forward: what the ranks of this node have made of another
//        rank's tokens, added up and rounded, goes back there
//     2. this rank's own: the rows on its node one by one, and what has come
//        from the others
// Both add up as cuda_pull.cuh does, which is told by a copy of the arguments
// where rows and weights lie.
#include "engine/cuda/cuda_launch.cuh"
#include "engine/cuda/cuda_pull.cuh"
#include "engine/cuda/cuda_trip.cuh"

namespace
{

// All threads.
__device__ void
copy_args(const cuda_combine_args_t &from, cuda_combine_args_t *to)
{
    static_assert(sizeof(from) % sizeof(uint64_t) == 0, "whole words");
    for (int i = threadIdx.x; i < sizeof(from) / sizeof(uint64_t);
         i += blockDim.x) {
        reinterpret_cast<uint64_t *>(to)[i] =
            reinterpret_cast<const uint64_t *>(&from)[i];
    }
}

// 1. One thread: the tokens are those of a parcel that has come, and the sums
// go into one.
__device__ void
open_partial(const cuda_combine_args_t &args, uint64_t step,
             cuda_combine_args_t *mine)
{
    char *from = cuda_region(&args.rail.by_forward[EPX__LANE_OUT],
                             (int32_t)args.forward);
    char *to = cuda_region(&args.rail.by_forward[EPX__LANE_BACK],
                           (int32_t)args.forward);
    // As the proxy has checked it.
    const cuda_parcel_head_t head =
        *reinterpret_cast<const cuda_parcel_head_t *>(from);
    cuda_parcel_t out = cuda_parcel(&args.rail.kinds[EPX__LANE_OUT],
                                    head.has_weights, head.count);
    cuda_parcel_t back = cuda_parcel(&args.rail.kinds[EPX__LANE_BACK],
                                     head.wants_weights, head.count);

    mine->num_tokens = (int64_t)head.count;
    mine->plan.routes = reinterpret_cast<cuda_route_t *>(from + out.routes);
    mine->topk_weights =
        head.has_weights != 0
            ? reinterpret_cast<const float *>(from + out.weights)
            : nullptr;
    mine->plan.pull_ks = nullptr;
    mine->bias[0] = nullptr;
    mine->bias[1] = nullptr;
    mine->has_bias = 0;
    mine->out = cuda_region_rows(&args.rail.by_forward[EPX__LANE_BACK],
                                 (int32_t)args.forward);
    mine->out_topk_weights = head.wants_weights != 0
                                 ? reinterpret_cast<float *>(to + back.weights)
                                 : nullptr;
    mine->own_is_aligned = 1;
    mine->wait_ns = nullptr;
    if (blockIdx.x == 0) {
        cuda_parcel_head_t *answer = reinterpret_cast<cuda_parcel_head_t *>(to);

        answer->step = step;
        answer->count = head.count;
        answer->has_weights = head.wants_weights;
    }
}

// 2. All threads: the sums of other nodes, as sources behind the ranks.
__device__ void
open_nodes(const cuda_combine_args_t &args, source *sources)
{
    const cuda_nodes_t &nodes = args.view.nodes;

    for (int n = threadIdx.x; n < nodes.num_nodes; n += blockDim.x) {
        source *to = &sources[args.view.num_ranks + n];

        *to = source{};
        if (n == nodes.own || args.is_partial) {
            continue;
        }
        const char *from = cuda_region(&args.rail.by_node[EPX__LANE_BACK],
                                       cuda_far_node(n, nodes.own));
        const cuda_parcel_head_t *head =
            reinterpret_cast<const cuda_parcel_head_t *>(from);
        cuda_parcel_t parcel = cuda_parcel(&args.rail.kinds[EPX__LANE_BACK],
                                           head->has_weights, head->count);

        to->x = cuda_region_rows(&args.rail.by_node[EPX__LANE_BACK],
                                 cuda_far_node(n, nodes.own));
        to->topk_weights =
            reinterpret_cast<const float *>(from + parcel.weights);
        to->num_rows = head->count;
    }
    for (int r = threadIdx.x; r < args.view.num_ranks; r += blockDim.x) {
        if (!is_near(args.view, r)) {
            sources[r] = source{};
        }
    }
}

// out_topk_weights in the layouts by expert, where another node sends a
// token's weights side by side.
__device__ void
pass_weights(const cuda_combine_args_t &args, const source *sources)
{
    const cuda_view_t &view = args.view;
    int topk = (int)args.plan.key.topk;
    int64_t threads = (int64_t)gridDim.x * blockDim.x;

    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
         i < args.num_tokens * topk; i += threads) {
        cuda_route_t route = args.plan.routes[i];
        float weight = 0.0f;

        if (route.rank >= 0 && is_near(view, route.rank)) {
            if (route.row < sources[route.rank].num_rows) {
                weight = sources[route.rank].topk_weights[route.row];
            }
        } else if (route.rank >= 0) {
            int node = view.nodes.node_of[route.rank];
            uint32_t at =
                (uint32_t)args.plan
                    .node_ordinals[node * args.plan.token_capacity + i / topk];
            const source &from = sources[view.num_ranks + node];

            if (at < from.num_rows) {
                weight = from.topk_weights[(uint64_t)at * topk + i % topk];
            }
        }
        args.out_topk_weights[i] = weight;
    }
}

template <epx_dtype_t DTYPE, bool BULK>
__global__ void
__launch_bounds__(WARPS * 32, 1)
    rail_combine_kernel(const __grid_constant__ cuda_combine_args_t args)
{
    grid_wait();
    char *shared = dynamic_shared();
    __shared__ cuda_combine_args_t mine;
    __shared__ epx__post_t post;
    const cuda_view_t &view = args.view;
    const cuda_routing_t *routing = args.plan.routing;
    bool by_rank = args.plan.key.layout == EPX_LAYOUT_RANK_MAJOR;
    bool passes =
        args.is_partial == 0 && !by_rank && args.out_topk_weights != nullptr;
    source *sources = reinterpret_cast<source *>(shared);
    char *segment = first_segment(view);
    bool works = !is_broken(view) && routing->failed == 0;

    if (!__syncthreads_and(works)) {
        return;
    }
    copy_args(args, &mine);
    __syncthreads();
    if (threadIdx.x == 0) {
        post = args.post;
        post.step = routing->open_step;
        post.signature.plan_id = routing->plan_id;
        mine.plan.routes = args.plan.pulls;
        if (args.is_partial) {
            open_partial(args, post.step, &mine);
        }
    }
    open_nodes(args, sources);
    __syncthreads();
    uint64_t step = post.step;
    if (!pull<DTYPE, BULK>(mine, post, shared,
                           !passes && mine.out_topk_weights != nullptr)) {
        return;
    }
    if (passes) {
        pass_weights(args, sources);
    }
    if (args.is_partial) {
        return;
    }
    arrive_all<false>(view, step, segment);
    if (blockIdx.x == 0 &&
        arrivals_wait_all(view, step, CUDA_IN_COMBINE, sources, false,
                          args.wait_ns) &&
        threadIdx.x == 0) {
        // So this rank's blocks have read what has come.
        st_relaxed_sys(&trip_at(view, step)->ended, step);
    }
}

template <epx_dtype_t DTYPE, bool BULK> struct kernels {
    static constexpr kernel_t kernel = rail_combine_kernel<DTYPE, BULK>;
};

} // namespace

cudaError_t
cuda_rail_combine_load(size_t max_shared)
{
    return kernels_load<kernels>(max_shared);
}

cudaError_t
cuda_rail_combine_launch(const cuda_combine_args_t *args, epx_dtype_t dtype,
                         cuda_mover_t mover, int num_blocks,
                         cudaStream_t stream)
{
    epx_dtype_t adds =
        args->post.signature.quantize == EPX_QUANTIZE_LOGFMT10 ? LOGFMT : dtype;

    return launch(kernel_of<kernels>(adds, mover), num_blocks, WARPS * 32,
                  shared_make(args->view, mover == CUDA_MOVER_BULK).end, *args,
                  stream);
}
