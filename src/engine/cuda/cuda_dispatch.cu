// SPDX-License-Identifier: MIT
//
// Dispatch in one hop:
//     1. block 0 posts where this rank wants its rows
//     2. every block waits for all posts, and opens the targets: where rows go
//        on each rank
//     3. each warp takes tokens: a row is loaded once and stored to its final
//        place on every rank that wants it
//     4. the last block signals DONE and waits for everybody's
// A send-only dispatch ends after the signal; cuda_wait_launch waits.
//
// Shared memory of a block:
//     targets  [R]
//     routes   [warps][K]            of the token at hand
//     entries  [warps][K]            what topk_idx and topk_weights hold of it
//     scales   [warps][2][words]     of the chunk at hand, when quantising
// and with bulk copies
//     barriers [warps][stages]
//     stages   [warps][stages]       chunks of x, with the row's scales if
//     those
//                                    ride along
//     values   [warps][2]            chunks as they are sent, when quantising
#include "engine/cuda/cuda_quantize.cuh"
#include "engine/cuda/cuda_step.cuh"

namespace
{

// The receive arrays of one rank as this rank reaches them; null if not wanted.
struct target {
    char *x;
    uint32_t *scales;
    char *topk_idx;
    float *topk_weights;
    int32_t *src_token;
    uint64_t num_rows;
    uint64_t scale_row_stride, scale_stride, scale_expert_stride;
    int32_t first_expert, end_expert;
    bool takes_bulk_scales; // they lie dense, at multiples of 16 bytes
};

constexpr int CHUNK_SCALES = 64;     // words of scales of a chunk, at most
constexpr int COPY_CHUNK = 16384;    // bytes of x in a chunk, at most
constexpr int QUANTIZE_CHUNK = 8192; // and when quantising
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
    size_t routes, entries, scales, barriers, stages, values, end;
};

__host__ __device__ shared_map
shared_make(const cuda_dispatch_args_t &args, bool is_bulk)
{
    bool quantizes = args.quantize != EPX_QUANTIZE_NONE;
    size_t warps = args.num_warps;
    shared_map map;

    map.routes = round_up((size_t)args.view.num_ranks * sizeof(target), 16);
    map.entries =
        map.routes + warps * args.plan.key.topk * sizeof(cuda_route_t);
    map.scales =
        round_up(map.entries + warps * args.plan.key.topk * sizeof(entry), 16);
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

// 2. Where rows go on one rank, by its post, whose numbers are checked.
__device__ bool
target_open(const cuda_dispatch_args_t &args, int r, const epx__post_t &post,
            target *to)
{
    const cuda_view_t &view = args.view;
    int num_experts = (int)args.plan.key.num_experts;
    uint64_t topk = args.plan.key.topk;
    uint64_t idx_bytes = args.plan.key.idx_dtype == EPX_I64 ? 8 : 4;
    bool by_rank = args.plan.key.layout == EPX_LAYOUT_RANK_MAJOR;
    uint64_t rows = args.plan.rank_rows[r];
    target t = {};

    t.num_rows = rows;
    t.first_expert = epx__first_expert(num_experts, view.num_ranks, r);
    t.end_expert = epx__first_expert(num_experts, view.num_ranks, r + 1);
    t.scale_row_stride = post.scale_row_stride;
    t.scale_stride = post.scale_stride;
    t.scale_expert_stride = post.scale_expert_stride;
    uint64_t scale_bytes =
        args.num_scales == 0
            ? 0
            : scale_extent(args, post, rows, t.end_expert - t.first_expert);
    const struct {
        uint64_t rows, row_bytes, alignment;
        bool needed, sent;
    } arrays[EPX__NUM_ARRAYS] = {
        { rows, args.row_bytes, EPX_ROW_ALIGN, true, true },
        { 1, scale_bytes, 4, args.num_scales > 0, args.num_scales > 0 },
        { rows, topk * idx_bytes, idx_bytes, false, by_rank },
        { rows, by_rank ? topk * 4 : 4, 4, false,
          args.topk_weights != nullptr },
        { rows, 4, 4, false, true },
    };
    char *at[EPX__NUM_ARRAYS] = {};
    bool ok = post.num_rows >= rows;
#pragma unroll
    for (int i = 0; i < EPX__NUM_ARRAYS; i++) {
        uint64_t offset = post.offset[i];

        if (rows == 0 || !arrays[i].sent) {
            continue;
        }
        ok = ok && (offset != 0
                        ? extent_fits(view, r, offset, arrays[i].rows,
                                      arrays[i].row_bytes, arrays[i].alignment)
                        : !arrays[i].needed);
        at[i] = offset != 0 ? view.segments[r] + offset : nullptr;
    }
    t.x = at[EPX__ARRAY_X];
    t.scales = reinterpret_cast<uint32_t *>(at[EPX__ARRAY_SCALES]);
    t.takes_bulk_scales = t.scale_stride == 1 && t.scale_row_stride % 4 == 0 &&
                          t.scale_expert_stride % 4 == 0 &&
                          reinterpret_cast<uintptr_t>(t.scales) % 16 == 0;
    t.topk_idx = at[EPX__ARRAY_TOPK_IDX];
    t.topk_weights = reinterpret_cast<float *>(at[EPX__ARRAY_TOPK_WEIGHTS]);
    t.src_token = reinterpret_cast<int32_t *>(at[EPX__ARRAY_SRC_TOKEN]);
    *to = t;
    if (!ok) {
        report_rank(view, CUDA_IN_DISPATCH, post.step, EPX_ERR_PEER_DATA, r,
                    &post);
    }
    return ok;
}

__device__ uint32_t *
scales_at(const cuda_dispatch_args_t &args, const target &to, uint64_t row)
{
    uint64_t per = rows_per_expert(args);
    uint64_t expert = per == 0 ? 0 : row / per;

    return to.scales + expert * to.scale_expert_stride +
           (row - expert * per) * to.scale_row_stride;
}

// What is known of a token, on its way from memory: two entries to a lane.
struct token_load {
    cuda_route_t routes[EPX_MAX_TOPK / 32];
    entry entries[EPX_MAX_TOPK / 32];
};

__device__ token_load
load_token(const cuda_dispatch_args_t &args, const worker &w, int64_t token)
{
    int topk = (int)args.plan.key.topk;
    token_load load;

#pragma unroll
    for (int i = 0; i < EPX_MAX_TOPK / 32; i++) {
        int k = i * 32 + w.lane;
        int64_t at = token * topk + k;
        bool is_there = k < topk && token < args.num_tokens;

        load.routes[i] = { -1, 0 };
        load.entries[i] = { -1, 0.0f };
        if (is_there) {
            load.routes[i] = args.plan.routes[at];
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

    if (to.topk_idx != nullptr && args.plan.key.idx_dtype == EPX_I64) {
        reinterpret_cast<int64_t *>(to.topk_idx)[at] = local;
    } else if (to.topk_idx != nullptr) {
        reinterpret_cast<int32_t *>(to.topk_idx)[at] = local;
    }
    if (to.topk_weights != nullptr) {
        to.topk_weights[at] = here ? from.weight : 0.0f;
    }
}

// All that goes with a row but its payload and what rides with it.
__device__ void
put_companions(const cuda_dispatch_args_t &args, const worker &w, int64_t token)
{
    int topk = (int)args.plan.key.topk;
    bool by_rank = args.plan.key.layout == EPX_LAYOUT_RANK_MAJOR;

    for (int k = w.lane; k < topk; k += 32) {
        cuda_route_t route = w.routes[k];

        if (route.rank >= 0) {
            const target &to = w.targets[route.rank];

            if (to.src_token != nullptr) {
                to.src_token[route.row] = (int32_t)token;
            }
            if (!by_rank && to.topk_weights != nullptr) {
                to.topk_weights[route.row] = w.entries[k].weight;
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
    if (args.scales != nullptr && !args.scales_ride) {
        const uint32_t *from = args.scales + token * args.scale_token_stride;

        put_scales(
            args, w, 0, args.num_scales,
            [&](int64_t j) { return from[j * args.scale_stride]; },
            [](const target &) { return true; });
    }
}

// A part of a token's row.
struct piece {
    int64_t token;
    uint32_t chunk;
    uint64_t offset; // in the row of x
    uint32_t bytes;
};

__device__ piece
piece_make(const cuda_dispatch_args_t &args, int64_t item)
{
    piece p;

    p.token = args.num_chunks == 1 ? item : item / args.num_chunks;
    p.chunk = (uint32_t)(item - p.token * args.num_chunks);
    p.offset = p.chunk * args.chunk_bytes;
    p.bytes = (uint32_t)min(args.chunk_bytes, args.in_bytes - p.offset);
    return p;
}

// The scales of a quantised piece.
struct piece_scales {
    uint32_t *words;
    int64_t first; // among those of the row
    int count;
};

// Quantise a piece, eight channels of each lane at a time: load(i) are those
// from channel 8 * i on, store(i, values) takes them away.
template <typename Load, typename Store>
__device__ piece_scales
quantize_piece(const cuda_dispatch_args_t &args, const worker &w,
               const piece &p, uint32_t *words, Load load, Store store)
{
    constexpr int PER_BLOCK = EPX_SCALE_BLOCK / 8;
    bool is_packed = args.quantize == EPX_QUANTIZE_F8E4M3_UE8M0;
    int count = p.bytes / 16;
    int blocks = (count + PER_BLOCK - 1) / PER_BLOCK;
    piece_scales scales;

    scales.words = words;
    scales.count = is_packed ? (blocks + 3) / 4 : blocks;
    scales.first = p.offset / (2 * EPX_SCALE_BLOCK) / (is_packed ? 4 : 1);
    for (int j = w.lane; j < scales.count; j += 32) {
        words[j] = 0;
    }
    __syncwarp();
#pragma unroll 2
    for (int at = 0; at < count; at += 32) {
        int i = at + w.lane;
        float scale;
        uint2 values = quantize_octet(
            args.quantize, i < count ? load(i) : make_uint4(0, 0, 0, 0),
            &scale);

        if (i < count) {
            store(i, values);
        }
        if (i < count && i % PER_BLOCK == 0) {
            scale_put(args.quantize, words, i / PER_BLOCK, scale);
        }
    }
    __syncwarp();
    return scales;
}

// 16 bytes of a row that need not be aligned.
__device__ uint4
load_16(const char *from, bool is_aligned)
{
    uint4 value;

    if (is_aligned) {
        return ld_stream(from);
    }
    for (int i = 0; i < 16; i++) {
        reinterpret_cast<char *>(&value)[i] = from[i];
    }
    return value;
}

// Four loads are on their way before the first is stored.
template <typename Load, typename Store>
__device__ void
copy_piece(const worker &w, const piece &p, Load load, Store store)
{
    int count = p.bytes / 16;

    for (int at = w.lane; at < count; at += 4 * 32) {
        uint4 values[4];

#pragma unroll
        for (int u = 0; u < 4; u++) {
            if (at + u * 32 < count) {
                values[u] = load(at + u * 32);
            }
        }
#pragma unroll
        for (int u = 0; u < 4; u++) {
            if (at + u * 32 < count) {
                store(p.offset + 16 * (at + u * 32), values[u]);
            }
        }
    }
}

// 3, with loads and stores.
template <bool QUANTIZE>
__device__ void
send_plain(const cuda_dispatch_args_t &args, const worker &w)
{
    int64_t num_items = args.num_tokens * args.num_chunks;
    int topk = (int)args.plan.key.topk;
    bool is_aligned = args.x_is_aligned != 0;

    for (int64_t item = w.index; item < num_items; item += w.count) {
        piece p = piece_make(args, item);
        const char *from = args.x + p.token * args.in_bytes + p.offset;

        take_token(args, w, load_token(args, w, p.token));
        if (p.chunk == 0) {
            put_companions(args, w, p.token);
        }
        auto load = [&](int i) { return load_16(from + 16 * i, is_aligned); };
        auto store = [&](uint64_t at, auto value) {
            for (int k = 0; k < topk; k++) {
                cuda_route_t route = w.routes[k];

                if (route.rank >= 0) {
                    *reinterpret_cast<decltype(value) *>(
                        w.targets[route.rank].x + route.row * args.row_bytes +
                        at) = value;
                }
            }
        };
        if constexpr (QUANTIZE) {
            piece_scales scales = quantize_piece(
                args, w, p, w.scales, load, [&](int i, uint2 values) {
                    store(p.offset / 2 + 8 * i, values);
                });

            put_scales(
                args, w, scales.first, scales.count,
                [&](int64_t j) { return scales.words[j]; },
                [](const target &) { return true; });
        } else {
            copy_piece(w, p, load, store);
        }
    }
}

#if EPX__HAS_BULK

// One lane: start loading a piece.
__device__ void
load_piece(const cuda_dispatch_args_t &args, const worker &w, int64_t item,
           uint32_t stage)
{
    piece p = piece_make(args, item);
    char *to = w.stages + stage * stage_bytes(args);
    bool has_scales = args.scales_ride && p.chunk == 0;
    uint32_t scale_bytes =
        has_scales ? (uint32_t)(args.num_scales * sizeof(uint32_t)) : 0;

    mbarrier_arrive_expect(&w.barriers[stage], p.bytes + scale_bytes);
    bulk_load(to, args.x + p.token * args.in_bytes + p.offset, p.bytes,
              &w.barriers[stage]);
    if (has_scales) {
        bulk_load(to + round_up(args.chunk_bytes, ALIGN),
                  args.scales + p.token * args.scale_token_stride, scale_bytes,
                  &w.barriers[stage]);
    }
}

// Ask for the next piece of work that no warp has taken yet; item_taken waits
// for the answer.  Warps go at the pace of the memory that they write to: who
// is early takes more.
__device__ uint32_t
take_item(const cuda_dispatch_args_t &args, const worker &w)
{
    return w.lane == 0 ? atomicAdd(&args.view.state->taken, 1u) : 0;
}

__device__ int64_t
item_taken(uint32_t taken)
{
    return __shfl_sync(~0u, taken, 0);
}

constexpr int MAX_STAGES = 3;

// 3, with bulk copies: loads run num_stages - 1 pieces ahead.
template <bool QUANTIZE>
__device__ void
send_bulk(const cuda_dispatch_args_t &args, const worker &w)
{
    int64_t num_items = args.num_tokens * args.num_chunks;
    int64_t items[MAX_STAGES]; // the piece at hand, and those ahead
    size_t stride = stage_bytes(args);
    int topk = (int)args.plan.key.topk;
    uint32_t stage = 0, parity = 0, turn = 0;

    if (w.lane == 0) {
        for (uint32_t s = 0; s < args.num_stages; s++) {
            mbarrier_init(&w.barriers[s], 1);
        }
        fence_mbarrier_init();
    }
    __syncwarp();
#pragma unroll
    for (int s = 0; s < MAX_STAGES; s++) {
        items[s] = num_items;
        if (s < args.num_stages) {
            items[s] = item_taken(take_item(args, w));
        }
        if (w.lane == 0 && s + 1 < args.num_stages && items[s] < num_items) {
            load_piece(args, w, items[s], s);
        }
    }
    token_load token = load_token(args, w, piece_make(args, items[0]).token);
    while (items[0] < num_items) {
        piece p = piece_make(args, items[0]);
        int64_t last = args.num_stages == 2 ? items[1] : items[2];
        char *from = w.stages + stage * stride;
        uint64_t at = p.offset;
        uint32_t bytes = p.bytes;

        // The stage before this one is free once its stores have read it; so
        // is, when quantising, the half of values that this turn writes.
        bulk_wait_read<QUANTIZE ? 1 : 0>();
        __syncwarp();
        if (w.lane == 0 && last < num_items) {
            load_piece(args, w, last,
                       stage == 0 ? args.num_stages - 1 : stage - 1);
        }
        uint32_t taken = take_item(args, w);
        take_token(args, w, token);
        token = load_token(args, w, piece_make(args, items[1]).token);
        mbarrier_wait(&w.barriers[stage], parity);
        if constexpr (QUANTIZE) {
            char *values = w.values + turn * values_bytes(args);
            piece_scales scales = quantize_piece(
                args, w, p, w.scales + turn * CHUNK_SCALES,
                [&](int i) { return reinterpret_cast<uint4 *>(from)[i]; },
                [&](int i, uint2 octet) {
                    reinterpret_cast<uint2 *>(values)[i] = octet;
                });

            fence_proxy_async_shared();
            __syncwarp();
            put_scales_bulk(args, w, scales.first, scales.count, scales.words);
            from = values;
            at /= 2;
            bytes /= 2;
            turn ^= 1;
        } else if (args.scales_ride && p.chunk == 0) {
            put_scales_bulk(args, w, 0, args.num_scales,
                            reinterpret_cast<uint32_t *>(
                                from + round_up(args.chunk_bytes, ALIGN)));
        }
        for (int k = w.lane; k < topk; k += 32) {
            cuda_route_t route = w.routes[k];

            if (route.rank >= 0) {
                bulk_store(w.targets[route.rank].x +
                               route.row * args.row_bytes + at,
                           from, bytes);
            }
        }
        bulk_commit();
        if (p.chunk == 0) {
            put_companions(args, w, p.token);
        }
        stage = stage + 1 == args.num_stages ? 0 : stage + 1;
        parity ^= stage == 0;
        int64_t next = item_taken(taken);
        items[0] = items[1];
        items[1] = args.num_stages == 2 ? next : items[2];
        items[2] = next;
    }
    bulk_wait_written();
}

#endif

// Rows that pad an expert to the alignment: zero, and from no token.
__device__ void
clear_row(const cuda_dispatch_args_t &args, const worker &w, const target &own,
          uint64_t row)
{
    for (uint64_t at = 16 * w.lane; at < args.row_bytes; at += 16 * 32) {
        *reinterpret_cast<uint4 *>(own.x + row * args.row_bytes + at) =
            make_uint4(0, 0, 0, 0);
    }
    for (int64_t j = w.lane; j < args.num_scales; j += 32) {
        scales_at(args, own, row)[j * own.scale_stride] = 0;
    }
    if (w.lane == 0 && own.topk_weights != nullptr) {
        own.topk_weights[row] = 0.0f;
    }
    if (w.lane == 0 && own.src_token != nullptr) {
        own.src_token[row] = -1;
    }
}

__device__ void
clear_padding(const cuda_dispatch_args_t &args, const worker &w)
{
    const target &own = w.targets[args.view.rank];

    if (args.plan.key.layout != EPX_LAYOUT_EXPERT_MAJOR || own.x == nullptr) {
        return;
    }
    for (int e = 0; e < args.plan.num_local; e++) {
        int64_t begin = args.plan.expert_offsets[e] + args.plan.expert_rows[e];

        for (int64_t row = begin + (w.index + e) % w.count;
             row < args.plan.expert_offsets[e + 1]; row += w.count) {
            clear_row(args, w, own, row);
        }
    }
}

template <bool BULK, bool QUANTIZE>
__device__ void
send_rows(const cuda_dispatch_args_t &args, char *shared)
{
    worker w = worker_make(args, shared, BULK);

#if EPX__HAS_BULK
    if (BULK) {
        send_bulk<QUANTIZE>(args, w);
    } else
#endif
    {
        send_plain<QUANTIZE>(args, w);
    }
    clear_padding(args, w);
    for (int e = blockIdx.x == 0 ? threadIdx.x : args.plan.num_local;
         args.recv_expert_counts != nullptr && e < args.plan.num_local;
         e += blockDim.x) {
        args.recv_expert_counts[e] = (int32_t)args.plan.expert_rows[e];
    }
}

template <bool BULK, bool QUANTIZE>
__global__ void __launch_bounds__(256, 1)
    dispatch_kernel(const __grid_constant__ cuda_dispatch_args_t args)
{
    extern __shared__ __align__(128) char shared[];
    __shared__ epx__post_t post;
    const cuda_view_t &view = args.view;
    uint64_t step = step_now(view);
    bool works = !is_broken(view) && args.plan.routing->failed == 0;

    if (threadIdx.x == 0) {
        post = args.post;
        post.step = step;
        post.signature.plan_id = args.plan.routing->plan_id;
    }
    // A plan that was refused was so on every rank: nobody takes this step.
    if (!__syncthreads_and(works)) {
        return;
    }
    if (blockIdx.x == 0) {
        post_all(view, step, post);
    }
    target *targets = reinterpret_cast<target *>(shared);
    bool ok = posts_wait(view, step, CUDA_IN_DISPATCH, post.signature,
                         [&](int r, const epx__post_t &theirs) {
                             return target_open(args, r, theirs, &targets[r]);
                         });
    if (ok) {
        send_rows<BULK, QUANTIZE>(args, shared);
    }
    if (last_block(view)) {
        if (!is_broken(view)) {
            signal_all(view, step, EPX__GATE_DONE);
            if (!args.is_send_only) {
                wait_all(view, step, EPX__GATE_DONE, CUDA_IN_DISPATCH);
            }
        }
        if (threadIdx.x == 0) {
            args.plan.routing->open_step = step;
        }
        step_end(view, step);
    }
}

// The end of a send-only dispatch.
__global__ void
wait_kernel(const __grid_constant__ cuda_wait_args_t args)
{
    const cuda_view_t &view = args.view;
    bool works = !is_broken(view) && args.plan.routing->failed == 0;

    if (__syncthreads_and(works)) {
        wait_all(view, args.plan.routing->open_step, EPX__GATE_DONE,
                 CUDA_IN_DISPATCH);
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
    cudaFuncAttributes attributes;
    cudaError_t error = cudaFuncGetAttributes(&attributes, wait_kernel);

    for (int i = 0; i < 4 && error == cudaSuccess; i++) {
        error = cudaFuncSetAttribute(
            kernel_of((cuda_mover_t)(i / 2), i % 2 != 0),
            cudaFuncAttributeMaxDynamicSharedMemorySize, (int)max_shared);
    }
    return error;
}

void
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
    // Scales that a bulk copy can take, and that are not more than a row.
    args->scales_ride =
        mover == CUDA_MOVER_BULK && args->scales != nullptr &&
        args->scale_stride == 1 && args->num_scales % 4 == 0 &&
        args->scale_token_stride % 4 == 0 &&
        reinterpret_cast<uintptr_t>(args->scales) % 16 == 0 &&
        args->num_scales * sizeof(uint32_t) <= args->chunk_bytes;
    // Quantising keeps the warps busy: more of them, with fewer rows ahead.
    args->num_stages = mover != CUDA_MOVER_BULK ? 0 : quantizes ? 2 : 3;
    args->num_warps = 8;
    while (args->num_warps > 1 &&
           shared_make(*args, mover == CUDA_MOVER_BULK).end > max_shared) {
        args->num_warps--;
    }
}

cudaError_t
cuda_dispatch_launch(const cuda_dispatch_args_t *args, cuda_mover_t mover,
                     int num_blocks, cudaStream_t stream)
{
    kernel_t kernel = kernel_of(mover, args->quantize != EPX_QUANTIZE_NONE);
    size_t shared = shared_make(*args, mover == CUDA_MOVER_BULK).end;

    kernel<<<num_blocks, args->num_warps * 32, shared, stream>>>(*args);
    return cudaGetLastError();
}

cudaError_t
cuda_wait_launch(const cuda_wait_args_t *args, cudaStream_t stream)
{
    wait_kernel<<<1, 128, 0, stream>>>(*args);
    return cudaGetLastError();
}
