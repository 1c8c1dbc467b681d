// SPDX-License-Identifier: MIT
//
// What the device does of a dispatch or combine between nodes, beside the
// kernels that it has in a single one:
//     route      after a plan's kernel: which tokens go to which node, and with
//                them the places that dispatch and combine follow
//     pack       a step's first kernel: begins its trip, and packs what goes
//                with the tokens; rows are packed by the dispatch itself
//     turn       tells the proxy, and waits for it: a single warp
//     forward    the rows that have come, to their final places on this node
// Sums for other nodes are cuda_rail_combine.cu's.
#include "engine/cuda/cuda_launch.cuh"
#include "engine/cuda/cuda_send.cuh"
#include "engine/cuda/cuda_trip.cuh"

namespace
{

constexpr int THREADS = 512;

__device__ int
node_of(const cuda_view_t &view, int rank)
{
    return view.nodes.node_of[rank];
}

__device__ bool
works(const cuda_view_t &view, const cuda_plan_view_t &plan)
{
    return !is_broken(view) && plan.routing->failed == 0;
}

// A plan that was refused was so on every rank: nobody takes the step, unless
// that counts new routing.
__device__ bool
takes_step(const cuda_view_t &view, const cuda_plan_view_t &plan,
           uint32_t is_new)
{
    return is_new != 0 ? !is_broken(view) : works(view, plan);
}

// ---- route ----

__device__ bool
goes_to(const cuda_rail_args_t &args, int64_t token, int node)
{
    int topk = (int)args.plan.key.topk;
    const cuda_route_t *routes = args.plan.routes + token * topk;
    bool goes = false;

    for (int k = 0; k < topk && !goes; k++) {
        goes =
            routes[k].rank >= 0 && node_of(args.view, routes[k].rank) == node;
    }
    return goes;
}

// A block for each node: number its tokens, in their order.
__global__ void
__launch_bounds__(THREADS)
    nodes_kernel(const __grid_constant__ cuda_rail_args_t args)
{
    grid_wait();
    __shared__ uint32_t counts[THREADS / 32];
    int node = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int64_t row = node * args.plan.token_capacity;
    uint32_t base = 0;

    if (!works(args.view, args.plan) || node == args.view.nodes.own) {
        return;
    }
    for (int64_t first = 0; first < args.num_tokens; first += THREADS) {
        int64_t token = first + threadIdx.x;
        bool goes = token < args.num_tokens && goes_to(args, token, node);
        uint32_t here = __ballot_sync(~0u, goes);
        uint32_t ordinal = base + __popc(here & ((1u << lane) - 1));

        if (lane == 0) {
            counts[warp] = __popc(here);
        }
        __syncthreads();
        for (int w = 0; w < THREADS / 32; w++) {
            ordinal += w < warp ? counts[w] : 0;
            base += counts[w];
        }
        if (token < args.num_tokens) {
            args.plan.node_ordinals[row + token] = goes ? (int)ordinal : -1;
        }
        if (goes) {
            args.plan.node_tokens[row + ordinal] = (int32_t)token;
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        args.plan.node_counts[node] = base;
    }
}

// Where a token's row is, or goes to, on another node.
__device__ cuda_route_t
node_route(const cuda_rail_args_t &args, int64_t token, int node)
{
    int ordinal =
        args.plan.node_ordinals[node * args.plan.token_capacity + token];

    return ordinal < 0
               ? cuda_route_t{ -1, 0 }
               : cuda_route_t{ args.view.num_ranks + node, (uint32_t)ordinal };
}

// What a dispatch follows: a node stands where the first of its ranks, or of
// their experts, does.
__device__ void
make_sends(const cuda_rail_args_t &args, int64_t token)
{
    int topk = (int)args.plan.key.topk, count = 0;
    bool by_rank = args.plan.key.layout == EPX_LAYOUT_RANK_MAJOR;
    const cuda_route_t *routes = args.plan.routes + token * topk;
    cuda_route_t *sends = args.plan.sends + token * topk;

    for (int k = 0; k < topk; k++) {
        cuda_route_t route = routes[k];
        bool is_new = true;

        if (route.rank >= 0 && !is_near(args.view, route.rank)) {
            int node = node_of(args.view, route.rank);

            for (int j = 0; j < k && is_new; j++) {
                is_new = routes[j].rank < 0 ||
                         node_of(args.view, routes[j].rank) != node;
            }
            route =
                is_new ? node_route(args, token, node) : cuda_route_t{ -1, 0 };
        }
        if (!by_rank) {
            sends[k] = route;
        } else if (route.rank >= 0) {
            sends[count++] = route;
        }
    }
    for (; by_rank && count < topk; count++) {
        sends[count] = { -1, 0 };
    }
}

// What a combine follows: node by node, this one's rows one by one.
__device__ void
make_pulls(const cuda_rail_args_t &args, int64_t token)
{
    int topk = (int)args.plan.key.topk, count = 0;
    const cuda_route_t *routes = args.plan.routes + token * topk;
    cuda_route_t *pulls = args.plan.pulls + token * topk;
    int32_t *ks = args.plan.pull_ks + token * topk;

    for (int n = 0; n < args.view.nodes.num_nodes; n++) {
        if (n != args.view.nodes.own) {
            cuda_route_t route = node_route(args, token, n);

            if (route.rank >= 0) {
                ks[count] = -1;
                pulls[count++] = route;
            }
            continue;
        }
        for (int k = 0; k < topk; k++) {
            if (routes[k].rank >= 0 && is_near(args.view, routes[k].rank)) {
                ks[count] = k;
                pulls[count++] = routes[k];
            }
        }
    }
    for (; count < topk; count++) {
        ks[count] = -1;
        pulls[count] = { -1, 0 };
    }
}

__global__ void
__launch_bounds__(THREADS)
    places_kernel(const __grid_constant__ cuda_rail_args_t args)
{
    grid_wait();
    if (!works(args.view, args.plan)) {
        return;
    }
    for (int64_t token = (int64_t)blockIdx.x * THREADS + threadIdx.x;
         token < args.num_tokens; token += (int64_t)gridDim.x * THREADS) {
        make_sends(args, token);
        make_pulls(args, token);
    }
}

// ---- pack ----

// One thread: whether the memory of this step is free of older ones; waits.
__device__ bool
wait_free(const cuda_rail_args_t &args, uint64_t step)
{
    const cuda_view_t &view = args.view;
    const cuda_trip_t *trip = trip_at(view, step);
    const uint64_t *marks = args.rail.marks;
    cuda_deadline deadline = {};
    bool late = false;

    for (;;) {
        uint64_t begun = ld_relaxed_sys(&trip->begun);

        // Another block of this kernel may have begun the trip by now.
        if ((begun == step || ld_acquire_sys(&trip->closed) == begun) &&
            ld_acquire_sys(&marks[CUDA_MARK_FREE]) ==
                ld_relaxed_sys(&marks[0])) {
            return true;
        }
        if (!deadline_holds(view, &deadline, &late)) {
            if (late) {
                report_trip(view, step, trip, EPX__LANE_OUT);
            }
            return false;
        }
    }
}

// One thread: show the step to the proxy.
__device__ void
begin_trip(const cuda_rail_args_t &args, uint64_t step)
{
    cuda_trip_t *trip = trip_at(args.view, step);

    trip->kind = args.kind;
    trip->rail = args.rail;
    fence_acq_rel_sys();
    st_relaxed_sys(&trip->begun, step);
    fence_acq_rel_sys(); // before this step's words
}

// A token's part of the parcel, but for its row and scales.
__device__ void
pack_token(const cuda_rail_args_t &args, int node, char *base,
           const cuda_parcel_t &parcel, int64_t i)
{
    int topk = (int)args.plan.key.topk, count = 0;
    bool by_rank = args.plan.key.layout == EPX_LAYOUT_RANK_MAJOR;
    int64_t token = args.plan.node_tokens[node * args.plan.token_capacity + i];
    int32_t *experts =
        reinterpret_cast<int32_t *>(base + parcel.experts) + i * topk;
    cuda_route_t *routes =
        reinterpret_cast<cuda_route_t *>(base + parcel.routes) + i * topk;
    float *weights =
        reinterpret_cast<float *>(base + parcel.weights) + i * topk;

    reinterpret_cast<int32_t *>(base + parcel.tokens)[i] = (int32_t)token;
    for (int k = 0; k < topk; k++) {
        int expert = args.plan.experts[token * topk + k];
        cuda_route_t route = args.plan.routes[token * topk + k];
        bool is_there =
            route.rank >= 0 && node_of(args.view, route.rank) == node;

        // By rank, entries and routes have orders of their own.
        experts[k] = by_rank || is_there ? expert : -1;
        if (!by_rank) {
            routes[k] = is_there ? route : cuda_route_t{ -1, 0 };
        } else if (is_there) {
            routes[count++] = route;
        }
        if (args.topk_weights != nullptr) {
            weights[k] = args.topk_weights[token * topk + k];
        }
    }
    for (; by_rank && count < topk; count++) {
        routes[count] = { -1, 0 };
    }
}

// As many blocks for each node.
__global__ void
__launch_bounds__(THREADS)
    pack_kernel(const __grid_constant__ cuda_rail_args_t args)
{
    grid_wait();
    const cuda_view_t &view = args.view;
    int num_nodes = view.nodes.num_nodes;
    int node = blockIdx.x % num_nodes;
    int64_t block = blockIdx.x / num_nodes;
    int64_t num_blocks = gridDim.x / num_nodes;
    uint64_t step = step_now(view);

    if (!takes_step(view, args.plan, args.is_new) ||
        !__syncthreads_and(threadIdx.x != 0 || wait_free(args, step))) {
        return;
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        begin_trip(args, step);
    }
    // Receive slots are filled by the dispatch alone.
    if (node == view.nodes.own || args.rail.is_slots != 0) {
        return;
    }
    uint32_t count = args.plan.node_counts[node];
    bool has_weights = args.topk_weights != nullptr;
    char *base = cuda_region(&args.rail.by_node[EPX__LANE_OUT],
                             cuda_far_node(node, view.nodes.own));
    cuda_parcel_t parcel =
        cuda_parcel(&args.rail.kinds[EPX__LANE_OUT], has_weights, count);
    if (block == 0 && threadIdx.x == 0) {
        cuda_parcel_head_t *head = reinterpret_cast<cuda_parcel_head_t *>(base);

        head->step = step;
        head->count = count;
        head->has_weights = has_weights;
        head->wants_weights = args.wants_weights;
    }
    for (int64_t i = block * THREADS + threadIdx.x; i < count;
         i += num_blocks * THREADS) {
        pack_token(args, node, base, parcel, i);
    }
}

// ---- turn ----

__global__ void
turn_kernel(const __grid_constant__ cuda_turn_args_t args)
{
    grid_wait();
    const cuda_view_t &view = args.view;
    uint64_t step = args.plan.routing->open_step;
    cuda_trip_t *trip = trip_at(view, step);

    if (!takes_step(view, args.plan, args.is_new) || threadIdx.x != 0) {
        return;
    }
    // All that kernels before this one have written; acquired by the proxy.
    fence_acq_rel_sys();
    switch (args.tell) {
    case CUDA_TELL_PACKED:
        st_relaxed_sys(&args.marks[0], step);
        st_relaxed_sys(&trip->packed, step);
        break;
    case CUDA_TELL_SUMMED:
        st_relaxed_sys(&trip->summed, step);
        break;
    case CUDA_TELL_ENDED:
        st_relaxed_sys(&trip->ended, step);
        break;
    default:
        break;
    }
    if (args.wait >= 0) {
        (void)trip_wait(view, step, trip, args.wait, args.wait_ns);
    }
}

// ---- forward ----

// The parcel that has come from a rank of another node.
struct inbound {
    char *base;
    char *rows;
    int64_t begin; // of its tokens among all that have come
    cuda_parcel_t parcel;
    bool has_weights;
};

// All of them as one array of tokens.
struct forward_source {
    const cuda_dispatch_args_t &args;
    const inbound *inbounds; // [F]
    int64_t num_tokens;

    __device__ const inbound &of(int64_t token) const
    {
        int f = args.view.nodes.num_forwards - 1;

        while (f > 0 && inbounds[f].begin > token) {
            f--;
        }
        return inbounds[f];
    }

    __device__ const char *row(int64_t token) const
    {
        const inbound &from = of(token);

        return from.rows + (token - from.begin) * args.row_bytes;
    }

    __device__ const uint32_t *scales(int64_t token) const
    {
        const inbound &from = of(token);

        return args.num_scales == 0
                   ? nullptr
                   : reinterpret_cast<const uint32_t *>(from.base +
                                                        from.parcel.scales) +
                         (token - from.begin) * args.num_scales;
    }

    __device__ token_load load(const worker &w, int64_t token) const
    {
        int topk = (int)args.plan.key.topk;
        bool is_there = token < num_tokens;
        token_load load = {};

#pragma unroll
        for (int i = 0; i < EPX_MAX_TOPK / 32; i++) {
            load.routes[i] = { -1, 0 };
            load.entries[i] = { -1, 0.0f };
        }
        if (!is_there) {
            return load;
        }
        const inbound &from = of(token);
        int64_t at = token - from.begin;
        load.token = reinterpret_cast<const int32_t *>(from.base +
                                                       from.parcel.tokens)[at];
#pragma unroll
        for (int i = 0; i < EPX_MAX_TOPK / 32; i++) {
            int k = i * 32 + w.lane;

            if (k < topk) {
                load_entry(from, at * topk + k, &load, i);
            }
        }
        return load;
    }

    __device__ void load_entry(const inbound &from, int64_t at,
                               token_load *load, int i) const
    {
        cuda_route_t route = reinterpret_cast<const cuda_route_t *>(
            from.base + from.parcel.routes)[at];

        // A peer's word: take_token checks the row.
        if (route.rank >= 0 && route.rank < args.view.num_ranks) {
            load->routes[i] = route;
        }
        load->entries[i].expert = reinterpret_cast<const int32_t *>(
            from.base + from.parcel.experts)[at];
        if (from.has_weights) {
            load->entries[i].weight = reinterpret_cast<const float *>(
                from.base + from.parcel.weights)[at];
        }
    }
};

// One thread: what has come, which the proxy has checked.
__device__ int64_t
inbounds_open(const cuda_dispatch_args_t &args, inbound *inbounds)
{
    int64_t begin = 0;

    for (int f = 0; f < args.view.nodes.num_forwards; f++) {
        inbound *to = &inbounds[f];

        to->base = cuda_region(&args.rail.by_forward[EPX__LANE_OUT], f);
        to->rows = cuda_region_rows(&args.rail.by_forward[EPX__LANE_OUT], f);
        const cuda_parcel_head_t *head =
            reinterpret_cast<const cuda_parcel_head_t *>(to->base);
        to->begin = begin;
        to->has_weights = head->has_weights != 0;
        to->parcel = cuda_parcel(&args.rail.kinds[EPX__LANE_OUT],
                                 head->has_weights, head->count);
        begin += (int64_t)head->count;
    }
    return begin;
}

__host__ __device__ size_t
inbounds_at(const cuda_dispatch_args_t &args, bool is_bulk)
{
    return round_up(shared_make(args, is_bulk).end, 16);
}

__host__ __device__ size_t
forward_shared(const cuda_dispatch_args_t &args, bool is_bulk)
{
    return inbounds_at(args, is_bulk) +
           args.view.nodes.num_forwards * sizeof(inbound);
}

template <bool BULK>
__global__ void __launch_bounds__(256, 1)
    forward_kernel(const __grid_constant__ cuda_dispatch_args_t args)
{
    grid_wait();
    char *shared = dynamic_shared();
    __shared__ epx__signature_t mine;
    __shared__ int64_t num_tokens;
    const cuda_view_t &view = args.view;
    uint64_t step = args.plan.routing->open_step;
    target *targets = reinterpret_cast<target *>(shared);
    inbound *inbounds =
        reinterpret_cast<inbound *>(shared + inbounds_at(args, BULK));
    char *segment = first_segment(view);

    if (!__syncthreads_and(works(view, args.plan))) {
        return;
    }
    if (threadIdx.x == 0) {
        mine = args.post.signature;
        mine.plan_id = args.plan.routing->plan_id;
        num_tokens = inbounds_open(args, inbounds);
    }
    for (int r = threadIdx.x; r < cuda_num_places(&view); r += blockDim.x) {
        if (r >= view.num_ranks || !is_near(view, r)) {
            targets[r] = target{};
        }
    }
    __syncthreads();
    if (!posts_wait<epx__post_t, false>(
            view, step, CUDA_IN_DISPATCH, mine, args.plan.rank_rows, nullptr,
            [&](int r, const epx__post_t &theirs, const peer &p) {
                return target_open(args, r, theirs, p, &targets[r]);
            })) {
        return;
    }
    worker w = worker_make(args, shared, BULK);
    forward_source source = { args, inbounds, num_tokens };
#if EPX__HAS_BULK
    fence_proxy_async_global();
    if (BULK) {
        load_first(args, w, source);
        __syncwarp();
    }
#endif
    send_rows<BULK, false, false>(args, w, source);
    arrive_all<true>(view, step, segment);
    if (blockIdx.x == 0 &&
        arrivals_wait_all(view, step, CUDA_IN_DISPATCH, targets, false,
                          args.wait_ns) &&
        threadIdx.x == 0) {
        // So this rank's blocks have read what has come.
        fence_acq_rel_sys();
        st_relaxed_sys(&trip_at(view, step)->ended, step);
    }
}

} // namespace

cudaError_t
cuda_rail_load(size_t max_shared)
{
    cudaError_t error = load(nodes_kernel, max_shared);

    if (error == cudaSuccess) {
        error = load(places_kernel, max_shared);
    }
    if (error == cudaSuccess) {
        error = load(pack_kernel, max_shared);
    }
    if (error == cudaSuccess) {
        error = load(turn_kernel, max_shared);
    }
    if (error == cudaSuccess) {
        error = load(forward_kernel<true>, max_shared);
    }
    return error == cudaSuccess ? load(forward_kernel<false>, max_shared)
                                : error;
}

cudaError_t
cuda_rail_route_launch(const cuda_rail_args_t *args, int num_blocks,
                       cudaStream_t stream)
{
    cudaError_t error = launch(nodes_kernel, args->view.nodes.num_nodes,
                               THREADS, 0, *args, stream);

    return error == cudaSuccess
               ? launch(places_kernel, num_blocks, THREADS, 0, *args, stream)
               : error;
}

cudaError_t
cuda_rail_pack_launch(const cuda_rail_args_t *args, int num_blocks,
                      cudaStream_t stream)
{
    int num_nodes = args->view.nodes.num_nodes;
    int each = (num_blocks + num_nodes - 1) / num_nodes;

    return launch(pack_kernel, each * num_nodes, THREADS, 0, *args, stream);
}

cudaError_t
cuda_rail_turn_launch(const cuda_turn_args_t *args, cudaStream_t stream)
{
    return launch(turn_kernel, 1, 32, 0, *args, stream);
}

size_t
cuda_rail_forward_shape(cuda_dispatch_args_t *args, cuda_mover_t mover,
                        size_t max_shared)
{
    bool is_bulk = mover == CUDA_MOVER_BULK;
    size_t more = forward_shared(*args, is_bulk) -
                  shared_make(*args, is_bulk).end + ALIGN;

    if (more >= max_shared) {
        return more + max_shared;
    }
    (void)cuda_dispatch_shape(args, mover, max_shared - more);
    return forward_shared(*args, is_bulk);
}

cudaError_t
cuda_rail_forward_launch(const cuda_dispatch_args_t *args, cuda_mover_t mover,
                         int num_blocks, cudaStream_t stream)
{
    bool is_bulk = mover == CUDA_MOVER_BULK;

    return launch(is_bulk ? forward_kernel<true> : forward_kernel<false>,
                  num_blocks, args->num_warps * 32,
                  forward_shared(*args, is_bulk), *args, stream);
}
