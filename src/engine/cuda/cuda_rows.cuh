// SPDX-License-Identifier: MIT
//
// What the warps of a dispatch work with, and all that they write beside the
// payload of a row.
//
// Shared memory of a block:
//     targets  [R]
//     routes   [warps][K]            of the token at hand
//     entries  [warps][K]            what topk_idx and topk_weights hold of it
//     tokens   [warps]               its number
//     scales   [warps][2][words]     of the chunk at hand, when quantising
// and with bulk copies
//     barriers [warps][stages]
//     stages   [warps][stages]       chunks of x, and a row's scales that ride
//                                    along
//     values   [warps][2]            chunks as they are sent, when quantising
#ifndef EPX_ENGINE_CUDA_ROWS_CUH
#define EPX_ENGINE_CUDA_ROWS_CUH

#include "engine/cuda/cuda_step.cuh"

namespace
{

// The receive arrays of one rank as this rank reaches them; null if not wanted.
struct target {
    char *arrays[EPX__NUM_ARRAYS];
    uint64_t num_rows;
    uint64_t scale_row_stride, scale_stride, scale_expert_stride;
    uint64_t arrivals; // see epx__post_t
    int32_t first_expert, end_expert;
    bool takes_bulk_scales; // they lie dense, at multiples of 16 bytes

    __device__ char *x() const
    {
        return arrays[EPX__ARRAY_X];
    }
    __device__ uint32_t *scales() const
    {
        return reinterpret_cast<uint32_t *>(arrays[EPX__ARRAY_SCALES]);
    }
    __device__ char *topk_idx() const
    {
        return arrays[EPX__ARRAY_TOPK_IDX];
    }
    __device__ float *topk_weights() const
    {
        return reinterpret_cast<float *>(arrays[EPX__ARRAY_TOPK_WEIGHTS]);
    }
    __device__ int32_t *src_token() const
    {
        return reinterpret_cast<int32_t *>(arrays[EPX__ARRAY_SRC_TOKEN]);
    }
};

constexpr int CHUNK_SCALES = 64;  // words of scales of a chunk, at most
constexpr int COPY_CHUNK = 16384; // bytes of x in a chunk, at most
constexpr size_t COPY_SHARED = 192 * 1024; // of a block that copies, at most
constexpr int QUANTIZE_CHUNK = 8192;       // and when quantising
constexpr uint64_t CACHED_MOST = 16 << 20; // of rows, that caches hold
constexpr int ALIGN = 128;

__host__ __device__ size_t
round_up(size_t value, size_t to)
{
    return (value + to - 1) / to * to;
}

// An entry of a token's routing.
struct entry {
    int32_t expert; // -1: none
    float weight;
};

// Of a stage: a chunk, then scales.
__host__ __device__ size_t
stage_bytes(const cuda_dispatch_args_t &args)
{
    return round_up(args.chunk_bytes, ALIGN) +
           (args.scales_ride
                ? round_up((size_t)args.num_scales * sizeof(uint32_t), ALIGN)
                : 0);
}

__host__ __device__ size_t
values_bytes(const cuda_dispatch_args_t &args)
{
    return round_up(args.chunk_bytes / 2, ALIGN);
}

// Offsets of what the shared memory holds.
struct shared_map {
    size_t routes, entries, tokens, scales, barriers, stages, values, end;
};

__host__ __device__ shared_map
shared_make(const cuda_dispatch_args_t &args, bool is_bulk)
{
    bool quantizes = args.quantize != EPX_QUANTIZE_NONE;
    size_t warps = args.num_warps;
    shared_map map;

    map.routes =
        round_up((size_t)cuda_num_places(&args.view) * sizeof(target), 16);
    map.entries =
        map.routes + warps * args.plan.key.topk * sizeof(cuda_route_t);
    map.tokens = map.entries + warps * args.plan.key.topk * sizeof(entry);
    map.scales = round_up(map.tokens + warps * sizeof(int32_t), 16);
    map.barriers = round_up(
        map.scales +
            (quantizes ? warps * 2 * CHUNK_SCALES * sizeof(uint32_t) : 0),
        8);
    map.stages = map.barriers;
    map.values = map.barriers;
    map.end = map.barriers;
    if (is_bulk) {
        map.stages = round_up(
            map.barriers + warps * args.num_stages * sizeof(uint64_t), ALIGN);
        map.values = map.stages + warps * args.num_stages * stage_bytes(args);
        map.end = map.values + (quantizes ? warps * 2 * values_bytes(args) : 0);
    }
    return map;
}

// What a warp works with.
struct worker {
    const target *targets;
    cuda_route_t *routes; // [K]
    entry *entries;       // [K]
    int32_t *token;       // its number
    uint32_t *scales;     // [2][CHUNK_SCALES]
    uint64_t *barriers;
    char *stages;         // [num_stages]
    char *values;         // [2]
    int64_t index, count; // among the warps of the grid
    int lane;
};

__device__ worker
worker_make(const cuda_dispatch_args_t &args, char *shared, bool is_bulk)
{
    shared_map map = shared_make(args, is_bulk);
    int warp = threadIdx.x / 32;
    worker w;

    w.targets = reinterpret_cast<target *>(shared);
    w.routes = reinterpret_cast<cuda_route_t *>(shared + map.routes) +
               warp * args.plan.key.topk;
    w.entries = reinterpret_cast<entry *>(shared + map.entries) +
                warp * args.plan.key.topk;
    w.token = reinterpret_cast<int32_t *>(shared + map.tokens) + warp;
    w.scales = reinterpret_cast<uint32_t *>(shared + map.scales) +
               warp * 2 * CHUNK_SCALES;
    w.barriers = reinterpret_cast<uint64_t *>(shared + map.barriers) +
                 warp * args.num_stages;
    w.stages = shared + map.stages + warp * args.num_stages * stage_bytes(args);
    w.values = shared + map.values + warp * 2 * values_bytes(args);
    w.index = (int64_t)blockIdx.x * args.num_warps + warp;
    w.count = (int64_t)gridDim.x * args.num_warps;
    w.lane = threadIdx.x % 32;
    return w;
}

__device__ uint64_t
rows_per_expert(const cuda_dispatch_args_t &args)
{
    return args.plan.key.layout == EPX_LAYOUT_EXPERT_SLOTS
               ? args.plan.key.max_tokens_per_rank * args.view.num_ranks
               : 0;
}

// a * b, or more than anything holds.
__device__ uint64_t
saturating_product(uint64_t a, uint64_t b)
{
    return __umul64hi(a, b) != 0 ? UINT64_MAX / 8 : min(a * b, UINT64_MAX / 8);
}

// Bytes from the first to the last of a rank's scales.
__device__ uint64_t
scale_extent(const cuda_dispatch_args_t &args, const epx__post_t &post,
             uint64_t num_rows, int num_experts)
{
    uint64_t per = rows_per_expert(args);
    uint64_t experts = per == 0 ? 1 : num_experts;
    uint64_t rows = per == 0 ? num_rows : per;

    if (experts == 0 || rows == 0) {
        return 0;
    }
    return saturating_product(
        4, saturating_product(experts - 1, post.scale_expert_stride) +
               saturating_product(rows - 1, post.scale_row_stride) +
               saturating_product(args.num_scales - 1, post.scale_stride) + 1);
}

// One lane: the checks of one array of a post; *at_p is where it is, null if it
// is not given.
__device__ bool
array_open(const cuda_dispatch_args_t &args, int array, const epx__post_t &post,
           const peer &p, int num_experts, char **at_p)
{
    uint64_t topk = args.plan.key.topk;
    uint64_t idx_bytes = args.plan.key.idx_dtype == EPX_I64 ? 8 : 4;
    bool by_rank = args.plan.key.layout == EPX_LAYOUT_RANK_MAJOR;
    uint64_t offset = post.offset[array];
    uint64_t rows = p.rows, row_bytes = 4, alignment = 4;
    bool is_needed = false, is_sent = true;

    switch ((epx__array_t)array) {
    case EPX__ARRAY_X:
        row_bytes = args.row_bytes;
        alignment = EPX_ROW_ALIGN;
        is_needed = true;
        break;
    case EPX__ARRAY_SCALES:
        is_sent = args.num_scales > 0;
        is_needed = is_sent;
        rows = 1;
        row_bytes = is_sent ? scale_extent(args, post, p.rows, num_experts) : 0;
        break;
    case EPX__ARRAY_TOPK_IDX:
        is_sent = by_rank;
        row_bytes = topk * idx_bytes;
        alignment = idx_bytes;
        break;
    case EPX__ARRAY_TOPK_WEIGHTS:
        is_sent = args.topk_weights != nullptr;
        row_bytes = by_rank ? topk * 4 : 4;
        break;
    default:
        break;
    }
    is_sent = is_sent && p.rows > 0;
    *at_p = is_sent && offset != 0 ? p.segment + offset : nullptr;
    return !is_sent || (offset != 0 ? extent_fits(args.view, p, offset, rows,
                                                  row_bytes, alignment)
                                    : !is_needed);
}

// 2. A warp: where rows go on one rank, by its post, whose numbers are checked.
__device__ bool
target_open(const cuda_dispatch_args_t &args, int r, const epx__post_t &post,
            const peer &p, target *to)
{
    const cuda_view_t &view = args.view;
    int num_experts = (int)args.plan.key.num_experts;
    int lane = threadIdx.x % 32;
    int first = epx__first_expert(num_experts, view.num_ranks, r);
    int end = epx__first_expert(num_experts, view.num_ranks, r + 1);
    char *at = nullptr;
    bool ok = post.num_rows >= p.rows &&
              (lane >= EPX__NUM_ARRAYS ||
               array_open(args, lane, post, p, end - first, &at));

    if (lane < EPX__NUM_ARRAYS) {
        to->arrays[lane] = at;
    }
    if (lane == EPX__ARRAY_SCALES) {
        to->scale_row_stride = post.scale_row_stride;
        to->scale_stride = post.scale_stride;
        to->scale_expert_stride = post.scale_expert_stride;
        to->takes_bulk_scales = post.scale_stride == 1 &&
                                post.scale_row_stride % 4 == 0 &&
                                post.scale_expert_stride % 4 == 0 &&
                                reinterpret_cast<uintptr_t>(at) % 16 == 0;
    }
    if (lane == EPX__NUM_ARRAYS) {
        to->num_rows = p.rows;
        to->arrivals = post.arrivals;
        to->first_expert = first;
        to->end_expert = end;
    }
    ok = __all_sync(~0u, ok) != 0;
    if (!ok && lane == 0) {
        report_rank(view, CUDA_IN_DISPATCH, post.step, EPX_ERR_PEER_DATA, r);
    }
    return ok;
}

// With several nodes, before the posts are looked at: those of other nodes get
// the rows that go there, packed.  Ranks there get none from here.
__device__ void
nodes_open(const cuda_dispatch_args_t &args, target *targets)
{
    const cuda_nodes_t &nodes = args.view.nodes;
    int num_ranks = args.view.num_ranks;

    for (int r = threadIdx.x; r < num_ranks; r += blockDim.x) {
        if (!is_near(args.view, r)) {
            targets[r] = target{};
        }
    }
    for (int n = threadIdx.x; n < nodes.num_nodes; n += blockDim.x) {
        target *to = &targets[num_ranks + n];

        *to = target{};
        if (n == nodes.own) {
            continue;
        }
        uint32_t count = args.plan.node_counts[n];
        char *base = cuda_region(&args.rail.by_node[EPX__LANE_OUT],
                                 cuda_far_node(n, nodes.own));
        cuda_parcel_t parcel = cuda_parcel(&args.rail.kinds[EPX__LANE_OUT],
                                           args.topk_weights != nullptr, count);

        to->arrays[EPX__ARRAY_X] = cuda_region_rows(
            &args.rail.by_node[EPX__LANE_OUT], cuda_far_node(n, nodes.own));
        to->arrays[EPX__ARRAY_SCALES] = base + parcel.scales;
        to->scale_row_stride = args.num_scales;
        to->scale_stride = 1;
        to->takes_bulk_scales = args.num_scales % 4 == 0;
        to->num_rows = count;
    }
}

// Row numbers fit 32 bits: see cuda_plan.c.
__device__ uint32_t *
scales_at(const cuda_dispatch_args_t &args, const target &to, uint64_t row)
{
    uint32_t per = (uint32_t)rows_per_expert(args);
    uint32_t expert = per == 0 ? 0 : (uint32_t)row / per;

    return to.scales() + expert * to.scale_expert_stride +
           ((uint32_t)row - expert * per) * to.scale_row_stride;
}

// What is known of a token, on its way from memory: two entries to a lane.
struct token_load {
    int32_t token; // its number at its source
    cuda_route_t routes[EPX_MAX_TOPK / 32];
    entry entries[EPX_MAX_TOPK / 32];
};

__device__ token_load
load_token(const cuda_dispatch_args_t &args, const worker &w, int64_t token)
{
    int topk = (int)args.plan.key.topk;
    token_load load;

    load.token = (int32_t)token;
#pragma unroll
    for (int i = 0; i < EPX_MAX_TOPK / 32; i++) {
        int k = i * 32 + w.lane;
        int64_t at = token * topk + k;
        bool is_there = k < topk && token < args.num_tokens;

        load.routes[i] = { -1, 0 };
        load.entries[i] = { -1, 0.0f };
        if (is_there) {
            load.routes[i] = args.plan.sends[at];
            load.entries[i].expert = args.plan.experts[at];
        }
        if (is_there && args.topk_weights != nullptr) {
            load.entries[i].weight = args.topk_weights[at];
        }
    }
    return load;
}

// Put it where all lanes see it; routes that cannot be are left out.
__device__ void
take_token(const cuda_dispatch_args_t &args, const worker &w,
           const token_load &load)
{
    int topk = (int)args.plan.key.topk;

    __syncwarp();
#pragma unroll
    for (int i = 0; i < EPX_MAX_TOPK / 32; i++) {
        int k = i * 32 + w.lane;
        cuda_route_t route = load.routes[i];

        if (route.rank >= 0 && route.row >= w.targets[route.rank].num_rows) {
            route.rank = -1;
        }
        if (k < topk) {
            w.routes[k] = route;
            w.entries[k] = load.entries[i];
        }
    }
    if (w.lane == 0) {
        *w.token = load.token;
    }
    __syncwarp();
}

// Scales, from `first` on, to every row of the token whose target is `wanted`.
template <typename Scale, typename Wanted>
__device__ void
put_scales(const cuda_dispatch_args_t &args, const worker &w, int64_t first,
           int64_t count, Scale scale, Wanted wanted)
{
    int topk = (int)args.plan.key.topk;

    for (int64_t j = w.lane; j < count; j += 32) {
        uint32_t value = scale(j);

        for (int k = 0; k < topk; k++) {
            cuda_route_t route = w.routes[k];

            if (route.rank >= 0 && wanted(w.targets[route.rank])) {
                const target &to = w.targets[route.rank];

                scales_at(args, to, route.row)[(first + j) * to.scale_stride] =
                    value;
            }
        }
    }
}

#if EPX__HAS_BULK

// The same from shared memory, by bulk stores where the target takes them.
__device__ void
put_scales_bulk(const cuda_dispatch_args_t &args, const worker &w,
                int64_t first, int64_t count, const uint32_t *words)
{
    int topk = (int)args.plan.key.topk;
    bool fits = first % 4 == 0 && count % 4 == 0;
    bool others = false;

    for (int k = w.lane; k < topk; k += 32) {
        cuda_route_t route = w.routes[k];

        if (route.rank < 0) {
            continue;
        }
        if (fits && w.targets[route.rank].takes_bulk_scales) {
            bulk_store(scales_at(args, w.targets[route.rank], route.row) +
                           first,
                       words, (uint32_t)(count * sizeof(uint32_t)));
        } else {
            others = true;
        }
    }
    if (__any_sync(~0u, others)) {
        put_scales(
            args, w, first, count, [&](int64_t j) { return words[j]; },
            [&](const target &to) { return !fits || !to.takes_bulk_scales; });
    }
}

#endif

// RANK_MAJOR: entry k of a row.
__device__ void
put_entry(const cuda_dispatch_args_t &args, const target &to, uint64_t row,
          int k, const entry &from)
{
    bool here = from.expert >= to.first_expert && from.expert < to.end_expert;
    uint64_t at = row * args.plan.key.topk + k;
    int local = here ? from.expert - to.first_expert : -1;

    if (to.topk_idx() != nullptr && args.plan.key.idx_dtype == EPX_I64) {
        reinterpret_cast<int64_t *>(to.topk_idx())[at] = local;
    } else if (to.topk_idx() != nullptr) {
        reinterpret_cast<int32_t *>(to.topk_idx())[at] = local;
    }
    if (to.topk_weights() != nullptr) {
        to.topk_weights()[at] = here ? from.weight : 0.0f;
    }
}

// All that goes with a row but its payload and what rides with it; scales may
// be null.
__device__ void
put_companions(const cuda_dispatch_args_t &args, const worker &w,
               const uint32_t *scales)
{
    int topk = (int)args.plan.key.topk;
    bool by_rank = args.plan.key.layout == EPX_LAYOUT_RANK_MAJOR;

    for (int k = w.lane; k < topk; k += 32) {
        cuda_route_t route = w.routes[k];

        if (route.rank >= 0) {
            const target &to = w.targets[route.rank];

            if (to.src_token() != nullptr) {
                to.src_token()[route.row] = *w.token;
            }
            if (!by_rank && to.topk_weights() != nullptr) {
                to.topk_weights()[route.row] = w.entries[k].weight;
            }
        }
    }
    // A lane to each entry of each row; the rows end with the first -1.
    for (int i = w.lane / topk, k = w.lane % topk; by_rank && i < topk;) {
        cuda_route_t route = w.routes[i];

        if (route.rank < 0) {
            break;
        }
        put_entry(args, w.targets[route.rank], route.row, k, w.entries[k]);
        i += 32 / topk;
        k += 32 % topk;
        i += k >= topk;
        k -= k >= topk ? topk : 0;
    }
    if (scales != nullptr && !args.scales_ride) {
        put_scales(
            args, w, 0, args.num_scales,
            [&](int64_t j) { return scales[j * args.scale_stride]; },
            [](const target &) { return true; });
    }
}

} // namespace

#endif
