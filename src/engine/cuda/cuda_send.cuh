// SPDX-License-Identifier: MIT
//
// How the warps of a kernel move rows: each takes tokens, loads a row once and
// stores it to its final place on every rank that wants it.
//
// Where rows come from is a Source:
//     int64_t num_tokens
//     const char *row(token)          its payload
//     const uint32_t *scales(token)   given ones, scale_stride apart
//     token_load load(w, token)       its routes and entries
#ifndef EPX_ENGINE_CUDA_SEND_CUH
#define EPX_ENGINE_CUDA_SEND_CUH

#include "engine/cuda/cuda_quantize.cuh"
#include "engine/cuda/cuda_rows.cuh"

namespace
{

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
template <bool QUANTIZE, typename Source>
__device__ void
send_plain(const cuda_dispatch_args_t &args, const worker &w,
           const Source &source)
{
    int64_t num_items = source.num_tokens * args.num_chunks;
    int topk = (int)args.plan.key.topk;
    bool is_aligned = args.x_is_aligned != 0;

    for (int64_t item = w.index; item < num_items; item += w.count) {
        piece p = piece_make(args, item);
        const char *from = source.row(p.token) + p.offset;

        take_token(args, w, source.load(w, p.token));
        if (p.chunk == 0) {
            put_companions(args, w, source.scales(p.token));
        }
        auto load = [&](int i) { return load_16(from + 16 * i, is_aligned); };
        auto store = [&](uint64_t at, auto value) {
            for (int k = 0; k < topk; k++) {
                cuda_route_t route = w.routes[k];

                if (route.rank >= 0) {
                    *reinterpret_cast<decltype(value) *>(
                        w.targets[route.rank].x() + route.row * args.row_bytes +
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
template <typename Source>
__device__ void
load_piece(const cuda_dispatch_args_t &args, const worker &w,
           const Source &source, int64_t item, uint32_t stage)
{
    piece p = piece_make(args, item);
    char *to = w.stages + stage * stage_bytes(args);
    bool has_scales = args.scales_ride && p.chunk == 0;
    uint32_t scale_bytes =
        has_scales ? (uint32_t)(args.num_scales * sizeof(uint32_t)) : 0;

    mbarrier_arrive_expect(&w.barriers[stage], p.bytes + scale_bytes);
    bulk_load(to, source.row(p.token) + p.offset, p.bytes, &w.barriers[stage]);
    if (has_scales) {
        bulk_load(to + round_up(args.chunk_bytes, ALIGN),
                  source.scales(p.token), scale_bytes, &w.barriers[stage]);
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

// The first num_stages pieces of each warp go without asking.
__device__ int64_t
item_taken(const cuda_dispatch_args_t &args, const worker &w, uint32_t taken)
{
    return args.num_stages * w.count + __shfl_sync(~0u, taken, 0);
}

constexpr int MAX_STAGES = 3;

// 1b. Load the first pieces, before anybody's post is there.
template <typename Source>
__device__ void
load_first(const cuda_dispatch_args_t &args, const worker &w,
           const Source &source)
{
    int64_t num_items = source.num_tokens * args.num_chunks;

    if (w.lane != 0) {
        return;
    }
    for (uint32_t s = 0; s < args.num_stages; s++) {
        mbarrier_init(&w.barriers[s], 1);
    }
    fence_mbarrier_init();
    for (uint32_t s = 0; s + 1 < args.num_stages; s++) {
        if (w.index + s * w.count < num_items) {
            load_piece(args, w, source, w.index + s * w.count, s);
        }
    }
}

// Let them land, when they will not be sent: their shared memory may soon be
// another block's.
template <typename Source>
__device__ void
drop_first(const cuda_dispatch_args_t &args, const worker &w,
           const Source &source)
{
    int64_t num_items = source.num_tokens * args.num_chunks;

    for (uint32_t s = 0; s + 1 < args.num_stages; s++) {
        if (w.index + s * w.count < num_items) {
            mbarrier_wait(&w.barriers[s], 0);
        }
    }
}

// 3, with bulk copies: loads run num_stages - 1 pieces ahead.
template <bool QUANTIZE, bool SHARED, typename Source>
__device__ void
send_bulk(const cuda_dispatch_args_t &args, const worker &w,
          const Source &source)
{
    int64_t num_items = source.num_tokens * args.num_chunks;
    int64_t items[MAX_STAGES]; // the piece at hand, and those ahead
    size_t stride = stage_bytes(args);
    int topk = (int)args.plan.key.topk;
    uint32_t stage = 0, parity = 0, turn = 0;
    uint64_t policy = bulk_policy(args.passes_cache != 0);
    int64_t turns = 0;

#pragma unroll
    for (int s = 0; s < MAX_STAGES; s++) {
        items[s] = w.index + s * w.count;
    }
    token_load token = source.load(w, piece_make(args, items[0]).token);
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
            load_piece(args, w, source, last,
                       stage == 0 ? args.num_stages - 1 : stage - 1);
        }
        uint32_t taken = SHARED ? take_item(args, w) : 0;
        take_token(args, w, token);
        token = source.load(w, piece_make(args, items[1]).token);
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
                bulk_store(w.targets[route.rank].x() +
                               route.row * args.row_bytes + at,
                           from, bytes, policy);
            }
        }
        bulk_commit();
        if (p.chunk == 0) {
            put_companions(args, w, source.scales(p.token));
        }
        turns++;
        int64_t next = SHARED
                           ? item_taken(args, w, taken)
                           : w.index + (args.num_stages + turns - 1) * w.count;
        items[0] = items[1];
        items[1] = args.num_stages == 2 ? next : items[2];
        items[2] = next;
        stage = stage + 1 == args.num_stages ? 0 : stage + 1;
        parity ^= stage == 0;
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
        *reinterpret_cast<uint4 *>(own.x() + row * args.row_bytes + at) =
            make_uint4(0, 0, 0, 0);
    }
    for (int64_t j = w.lane; j < args.num_scales; j += 32) {
        scales_at(args, own, row)[j * own.scale_stride] = 0;
    }
    if (w.lane == 0 && own.topk_weights() != nullptr) {
        own.topk_weights()[row] = 0.0f;
    }
    if (w.lane == 0 && own.src_token() != nullptr) {
        own.src_token()[row] = -1;
    }
}

__device__ void
clear_padding(const cuda_dispatch_args_t &args, const worker &w)
{
    const target &own = w.targets[args.view.rank];

    if (args.plan.key.layout != EPX_LAYOUT_EXPERT_MAJOR || own.x() == nullptr) {
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

// SHARED: with bulk copies, warps take tokens from one heap of work.
template <bool BULK, bool QUANTIZE, bool SHARED, typename Source>
__device__ void
send_rows(const cuda_dispatch_args_t &args, const worker &w,
          const Source &source)
{
#if EPX__HAS_BULK
    if constexpr (BULK) {
        send_bulk<QUANTIZE, SHARED>(args, w, source);
    } else
#endif
    {
        send_plain<QUANTIZE>(args, w, source);
    }
}

} // namespace

#endif
