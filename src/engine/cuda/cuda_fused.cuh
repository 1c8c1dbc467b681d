// SPDX-License-Identifier: MIT
//
// The first half of cuda_fused.cu: what a block works with, how it counts the
// routing and tells the peers, and how it loads rows.
//
// Shared memory of a block, u32 unless said otherwise:
//     targets [R]          struct target; not with slots
//     before  [R + E]      rows of the tokens before this block's, then of
//     those
//                          before the round's; by rank and by expert
//     total   [R + E]      of the rank
//     local   [L]          rows that arrive for this rank's experts
//     own     [round][K]   struct own_entry
//     stages  [round]      rows as they are sent, each with its scales
//     raw     [round]      rows of x, where they are quantised
#ifndef EPX_ENGINE_CUDA_FUSED_CUH
#define EPX_ENGINE_CUDA_FUSED_CUH

#include "engine/cuda/cuda_count.cuh"
#include "engine/cuda/cuda_quantize.cuh"
#include "engine/cuda/cuda_rows.cuh"

namespace
{

constexpr int THREADS = 512;
constexpr int WARPS = THREADS / 32;
constexpr uint32_t MOST_ROUND = 16; // tokens of a round

// An entry of one of the block's tokens.
struct own_entry {
    int32_t expert; // -1: none
    int32_t rank;   // of the expert
    uint32_t row;   // its place there; with slots and new routing, its number
                    // among this rank's rows for the expert
    uint32_t slot;  // NONE unless it is the token's first for that rank: the
                    // number of the token among those for the rank
    float weight;
};

struct block {
    target *targets;
    uint32_t *before, *total, *local;
    own_entry *own;
    char *stages;
    char *raw; // where bulk copies bring rows of x
    size_t raw_stride;
    uint64_t *barrier; // of those
    bool loads_bulk;
    uint32_t first, end; // the block's tokens
};

struct block_map {
    size_t before, total, local, own, barrier, stages, raw, end;
};

__host__ __device__ size_t
fused_stage_bytes(const cuda_dispatch_args_t &move)
{
    return round_up(move.row_bytes, ALIGN) +
           round_up((size_t)move.num_scales * sizeof(uint32_t), ALIGN);
}

__host__ __device__ block_map
block_map_make(const cuda_fused_args_t &args, uint32_t round)
{
    const cuda_dispatch_args_t &move = args.move;
    size_t keys = (size_t)move.view.num_ranks + move.plan.key.num_experts;
    size_t targets = args.to_slots ? 0 : (size_t)move.view.num_ranks;
    block_map map;

    map.before = targets * sizeof(target);
    map.total = map.before + keys * sizeof(uint32_t);
    map.local = map.total + keys * sizeof(uint32_t);
    map.own = map.local + (size_t)move.plan.num_local * sizeof(uint32_t);
    map.barrier =
        round_up(map.own + round * move.plan.key.topk * sizeof(own_entry), 8);
    map.stages = round_up(map.barrier + sizeof(uint64_t), ALIGN);
    map.raw = map.stages + round * fused_stage_bytes(move);
    map.end = map.raw + (move.quantize != EPX_QUANTIZE_NONE
                             ? round * round_up(move.in_bytes, ALIGN)
                             : 0);
    return map;
}

__device__ block
block_make(const cuda_fused_args_t &args, char *shared, bool is_bulk)
{
    block_map map = block_map_make(args, args.round_tokens);
    uint64_t tokens = (uint64_t)args.move.num_tokens;
    block b;

    b.targets = reinterpret_cast<target *>(shared);
    b.before = reinterpret_cast<uint32_t *>(shared + map.before);
    b.total = reinterpret_cast<uint32_t *>(shared + map.total);
    b.local = reinterpret_cast<uint32_t *>(shared + map.local);
    b.own = reinterpret_cast<own_entry *>(shared + map.own);
    b.stages = shared + map.stages;
    b.barrier = reinterpret_cast<uint64_t *>(shared + map.barrier);
    if (args.move.quantize != EPX_QUANTIZE_NONE) {
        b.raw = shared + map.raw;
        b.raw_stride = round_up(args.move.in_bytes, ALIGN);
    } else {
        b.raw = b.stages;
        b.raw_stride = fused_stage_bytes(args.move);
    }
    b.loads_bulk = is_bulk && args.move.x_is_aligned != 0;
    b.first = (uint32_t)(tokens * blockIdx.x / gridDim.x);
    b.end = (uint32_t)(tokens * (blockIdx.x + 1) / gridDim.x);
    return b;
}

// ---- 1. counting ----

__device__ int64_t
index_at(const cuda_fused_args_t &args, uint32_t i)
{
    return args.idx_is_i64 ? static_cast<const int64_t *>(args.topk_idx)[i]
                           : static_cast<const int32_t *>(args.topk_idx)[i];
}

struct routed {
    int32_t expert; // -1: none
    int32_t rank;
    bool leads; // the first of its token for the rank
    bool is_bad;
};

// Entry i of the routing, which is number k of its token.
__device__ routed
entry_at(const cuda_fused_args_t &args, uint32_t i, uint32_t k)
{
    int num_experts = (int)args.move.plan.key.num_experts;
    int num_ranks = args.move.view.num_ranks;
    int64_t value = index_at(args, i);
    routed e = { -1, -1, false, value < -1 || value >= num_experts };

    if (e.is_bad || value < 0) {
        return e;
    }
    int rank = expert_rank(num_experts, num_ranks, (int)value);
    int first = epx__first_expert(num_experts, num_ranks, rank);
    int end = epx__first_expert(num_experts, num_ranks, rank + 1);
    bool leads = true;
#pragma unroll 8
    for (uint32_t j = 1; j <= k; j++) {
        int64_t other = index_at(args, i - j);

        e.is_bad |= other == value;
        leads &= other < first || other >= end;
    }
    return e.is_bad ? e : routed{ (int32_t)value, rank, leads, false };
}

__device__ void
count_all(const cuda_fused_args_t &args, const block &b,
          unsigned long long *bad_entry)
{
    uint32_t topk = args.move.plan.key.topk;
    uint32_t count = (uint32_t)args.move.num_tokens * topk;
    int num_ranks = args.move.view.num_ranks;

    for (uint32_t i = threadIdx.x; i < count; i += THREADS) {
        routed e = entry_at(args, i, i % topk);
        bool is_before = i < b.first * topk;

        if (e.is_bad) {
            atomicMin(bad_entry, (unsigned long long)i + 1);
        }
        if (e.expert >= 0) {
            atomicAdd(&b.total[num_ranks + e.expert], 1u);
        }
        if (e.expert >= 0 && is_before) {
            atomicAdd(&b.before[num_ranks + e.expert], 1u);
        }
        if (e.leads) {
            atomicAdd(&b.total[e.rank], 1u);
        }
        if (e.leads && is_before) {
            atomicAdd(&b.before[e.rank], 1u);
        }
    }
}

// ---- 2. telling ----

__device__ void
tell_some(const cuda_fused_args_t &args, const block &b, uint64_t step,
          const head &told)
{
    const cuda_view_t &view = args.move.view;
    const uint32_t *from = reinterpret_cast<const uint32_t *>(&told);
    int count =
        HEAD_WORDS + view.num_ranks + (int)args.move.plan.key.num_experts;

    for (int r = blockIdx.x; r < view.num_ranks; r += gridDim.x) {
        int peer = (view.rank + 1 + r) % view.num_ranks;
        uint64_t *words = words_at(view, peer, step, view.rank);

        for (int i = threadIdx.x; i < count; i += THREADS) {
            word_put(words + i, step,
                     i < HEAD_WORDS ? from[i] : b.total[i - HEAD_WORDS]);
        }
    }
}

// ---- 3. loading ----

__device__ uint32_t *
stage_scales(const cuda_fused_args_t &args, char *stage)
{
    return reinterpret_cast<uint32_t *>(stage +
                                        round_up(args.move.row_bytes, ALIGN));
}

constexpr int COPY_AHEAD = 8;

// Rows as they are, for `count` tokens from `token` on.
__device__ void
load_rows(const cuda_fused_args_t &args, const block &b, uint32_t token,
          uint32_t count)
{
    const cuda_dispatch_args_t &move = args.move;
    uint32_t vectors = (uint32_t)(move.row_bytes / 16);
    size_t stride = fused_stage_bytes(move);

    for (uint32_t at = threadIdx.x; !b.loads_bulk && at < count * vectors;
         at += THREADS * COPY_AHEAD) {
        uint4 values[COPY_AHEAD];

#pragma unroll
        for (int u = 0; u < COPY_AHEAD; u++) {
            uint32_t i = at + u * THREADS;

            if (i < count * vectors) {
                // Rows of a rank follow each other.
                values[u] =
                    load_16(move.x + token * move.in_bytes + (uint64_t)i * 16,
                            move.x_is_aligned != 0);
            }
        }
#pragma unroll
        for (int u = 0; u < COPY_AHEAD; u++) {
            uint32_t i = at + u * THREADS, t = i / vectors;

            if (i < count * vectors) {
                *reinterpret_cast<uint4 *>(b.stages + t * stride +
                                           16 * (i - t * vectors)) = values[u];
            }
        }
    }
    for (uint32_t i = threadIdx.x; i < count * move.num_scales; i += THREADS) {
        uint32_t t = i / (uint32_t)move.num_scales;
        uint32_t j = i - t * (uint32_t)move.num_scales;

        stage_scales(args, b.stages + t * stride)[j] =
            move.scales[(token + t) * move.scale_token_stride +
                        j * move.scale_stride];
    }
}

constexpr int QUANTIZE_AHEAD = 4;

// The same, quantised: half a warp to a block of channels, four of them on
// their way from memory at a time.
__device__ void
quantize_rows(const cuda_fused_args_t &args, const block &b, uint32_t token,
              uint32_t count)
{
    constexpr uint32_t HALVES = THREADS / 16;
    const cuda_dispatch_args_t &move = args.move;
    uint32_t octets = (uint32_t)(move.in_bytes / 16);
    uint32_t blocks = (octets + 15) / 16;
    size_t stride = fused_stage_bytes(move);
    bool is_packed = move.quantize == EPX_QUANTIZE_F8E4M3_UE8M0;

    if (is_packed) {
        for (uint32_t i = threadIdx.x; i < count * move.num_scales;
             i += THREADS) {
            uint32_t t = i / (uint32_t)move.num_scales;

            stage_scales(args, b.stages + t * stride)[i - t * move.num_scales] =
                0;
        }
        __syncthreads();
    }
    // Both halves of a warp come along.
    for (uint32_t at = threadIdx.x / 32 * 2; at < count * blocks;
         at += HALVES * QUANTIZE_AHEAD) {
        uint4 values[QUANTIZE_AHEAD];
        uint32_t tokens[QUANTIZE_AHEAD], channels[QUANTIZE_AHEAD];

#pragma unroll
        for (int u = 0; u < QUANTIZE_AHEAD; u++) {
            uint32_t i = at + u * HALVES + threadIdx.x / 16 % 2;

            tokens[u] = i / blocks;
            channels[u] = (i - tokens[u] * blocks) * 16 + threadIdx.x % 16;
            values[u] = make_uint4(0, 0, 0, 0);
            if (i >= count * blocks) {
                channels[u] = octets;
            }
            if (channels[u] < octets && b.loads_bulk) {
                values[u] = reinterpret_cast<const uint4 *>(
                    b.raw + tokens[u] * b.raw_stride)[channels[u]];
            } else if (channels[u] < octets) {
                values[u] =
                    load_16(move.x + (token + tokens[u]) * move.in_bytes +
                                16 * channels[u],
                            move.x_is_aligned != 0);
            }
        }
#pragma unroll
        for (int u = 0; u < QUANTIZE_AHEAD; u++) {
            float scale;
            uint2 octet = quantize_octet(move.quantize, values[u], &scale);
            char *stage = b.stages + tokens[u] * stride;

            if (channels[u] < octets) {
                reinterpret_cast<uint2 *>(stage)[channels[u]] = octet;
            }
            if (channels[u] < octets && channels[u] % 16 == 0) {
                scale_put(move.quantize, stage_scales(args, stage),
                          (int)channels[u] / 16, scale);
            }
        }
    }
}

} // namespace

#endif
