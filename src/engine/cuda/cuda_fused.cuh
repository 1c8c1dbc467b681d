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
//     tile    [TILE]       i32 experts of the routing, while it is counted
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
constexpr int TILE_EACH = 2;        // entries counted at a time, by a thread
constexpr int TILE = THREADS * TILE_EACH;
constexpr int32_t BAD_EXPERT = -2; // of topk_idx

// An entry of one of the block's tokens.
struct own_entry {
    int32_t expert; // negative: none
    int32_t rank;   // of the expert
    uint32_t row;   // its place there, which is added up as it gets known; with
                    // slots and new routing, its number among this rank's rows
                    // for the expert
    uint32_t slot;  // NONE unless it is the token's first for that rank: the
                    // number of the token among those for the rank
    float weight;
};

// How experts lie on the ranks: see epx__first_expert.
struct placement {
    int quotient, extra;

    __device__ int rank_of(int expert) const
    {
        int wide = extra * (quotient + 1);

        return expert < wide ? expert / (quotient + 1)
                             : extra + (expert - wide) / quotient;
    }
    __device__ int first_of(int rank) const
    {
        return rank * quotient + min(rank, extra);
    }
};

struct block {
    target *targets;
    uint32_t *before, *total, *local;
    own_entry *own;
    int32_t *tile;
    char *stages;
    char *raw; // where bulk copies bring rows of x
    size_t raw_stride;
    uint64_t *barrier; // of those
    bool loads_bulk;
    uint32_t first, end; // the block's tokens
    placement experts;
};

struct block_map {
    size_t before, total, local, own, tile, barrier, stages, raw, end;
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
    map.tile = map.own + round * move.plan.key.topk * sizeof(own_entry);
    map.barrier = round_up(map.tile + TILE * sizeof(int32_t), 8);
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
    b.tile = reinterpret_cast<int32_t *>(shared + map.tile);
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
    b.experts.quotient =
        (int)args.move.plan.key.num_experts / args.move.view.num_ranks;
    b.experts.extra = (int)args.move.plan.key.num_experts -
                      b.experts.quotient * args.move.view.num_ranks;
    return b;
}

// ---- 1. counting ----

// Entry i of the routing, as it is given.
__device__ int64_t
index_at(const cuda_fused_args_t &args, uint32_t i)
{
    return args.idx_is_i64 ? static_cast<const int64_t *>(args.topk_idx)[i]
                           : static_cast<const int32_t *>(args.topk_idx)[i];
}

__device__ int32_t
expert_at(const cuda_fused_args_t &args, uint32_t i)
{
    int64_t value = index_at(args, i);

    return value < -1 || value >= args.move.plan.key.num_experts
               ? BAD_EXPERT
               : (int32_t)value;
}

// Where an entry's expert is, as its token's entries before it show.
struct placed {
    int32_t rank;
    bool leads; // the first of its token for the rank
    bool repeats;
};

// Entry number k of its token, after which at(j) is the j-th one back.
template <typename At>
__device__ placed
place_entry(const block &b, int32_t expert, uint32_t k, At at)
{
    placed p = { b.experts.rank_of(expert), true, false };
    int first = b.experts.first_of(p.rank);
    int end = b.experts.first_of(p.rank + 1);

#pragma unroll 8
    for (uint32_t j = 1; j <= k; j++) {
        int32_t other = at(j);

        p.repeats |= other == expert;
        p.leads &= other < first || other >= end;
    }
    return p;
}

// Some of the routing's entries on their way from memory, a token to none but
// one tile.
struct tile_load {
    int32_t experts[TILE_EACH];

    __device__ void start(const cuda_fused_args_t &args, uint32_t at,
                          uint32_t count)
    {
#pragma unroll
        for (int u = 0; u < TILE_EACH; u++) {
            uint32_t n = u * THREADS + threadIdx.x;

            experts[u] = n < count ? expert_at(args, at + n) : -1;
        }
    }
    __device__ void keep(const block &b) const
    {
#pragma unroll
        for (int u = 0; u < TILE_EACH; u++) {
            b.tile[u * THREADS + threadIdx.x] = experts[u];
        }
    }
};

// The tile of `count` entries from number `at` on, which is in shared memory.
__device__ void
count_tile(const cuda_fused_args_t &args, const block &b, uint32_t at,
           uint32_t count, unsigned long long *bad_entry)
{
    uint32_t topk = args.move.plan.key.topk;
    uint32_t own = b.first * topk; // the first entry of this block
    int num_ranks = args.move.view.num_ranks;

    for (uint32_t n = threadIdx.x; n < count; n += THREADS) {
        const int32_t *entry = b.tile + n;
        int32_t expert = *entry;
        bool is_before = at + n < own;

        if (expert == BAD_EXPERT) {
            atomicMin(bad_entry, (unsigned long long)(at + n) + 1);
        }
        if (expert < 0) {
            continue;
        }
        placed p = place_entry(b, expert, n % topk,
                               [&](uint32_t j) { return entry[-(int)j]; });
        if (p.repeats) {
            atomicMin(bad_entry, (unsigned long long)(at + n) + 1);
        }
        atomicAdd(&b.total[num_ranks + expert], 1u);
        if (is_before) {
            atomicAdd(&b.before[num_ranks + expert], 1u);
        }
        if (p.leads) {
            atomicAdd(&b.total[p.rank], 1u);
        }
        if (p.leads && is_before) {
            atomicAdd(&b.before[p.rank], 1u);
        }
    }
}

// All of the routing, of which the first tile is in shared memory.
__device__ void
count_all(const cuda_fused_args_t &args, const block &b, uint32_t per_tile,
          unsigned long long *bad_entry)
{
    uint32_t count = (uint32_t)args.move.num_tokens * args.move.plan.key.topk;

    for (uint32_t at = 0; at < count; at += per_tile) {
        uint32_t part = min(per_tile, count - at);

        if (at != 0) {
            tile_load load;

            load.start(args, at, part);
            __syncthreads();
            load.keep(b);
            __syncthreads();
        }
        count_tile(args, b, at, part, bad_entry);
    }
}

// The round's own entries, in two steps with a barrier between.
__device__ void
own_read(const cuda_fused_args_t &args, const block &b, uint32_t token,
         uint32_t count)
{
    uint32_t topk = args.move.plan.key.topk;
    const float *weights = args.move.topk_weights;

    for (uint32_t i = threadIdx.x; i < count * topk; i += THREADS) {
        uint32_t at = token * topk + i;

        b.own[i] = { expert_at(args, at), -1, 0, NONE,
                     weights == nullptr ? 0.0f : weights[at] };
    }
}

__device__ void
own_place(const cuda_fused_args_t &args, const block &b, uint32_t count)
{
    const epx__plan_key_t &key = args.move.plan.key;
    uint32_t per_expert =
        (uint32_t)key.max_tokens_per_rank * (uint32_t)args.move.view.num_ranks;

    for (uint32_t i = threadIdx.x; i < count * key.topk; i += THREADS) {
        own_entry *e = b.own + i;

        if (e->expert < 0) {
            continue;
        }
        placed p = place_entry(b, e->expert, i % key.topk,
                               [&](uint32_t j) { return e[-(int)j].expert; });
        e->rank = p.rank;
        e->slot = p.leads ? 0 : NONE;
        if (!args.to_slots) {
            e->row =
                (uint32_t)(e->expert - b.experts.first_of(p.rank)) * per_expert;
        }
    }
}

// One warp: the number of each own entry among this rank's rows for its expert
// and, where it leads, for its rank, once all before this block are counted.
__device__ void
own_number(const cuda_fused_args_t &args, const block &b, uint32_t count)
{
    int num_ranks = args.move.view.num_ranks;

    for (uint32_t i = threadIdx.x % 32; i - threadIdx.x % 32 < count; i += 32) {
        own_entry *e = &b.own[i];
        bool is_there = i < count && e->expert >= 0;
        bool leads = is_there && e->slot != NONE;
        uint32_t row = number(b.before, is_there ? num_ranks + e->expert : -1);
        uint32_t slot = number(b.before, leads ? e->rank : -1);

        if (is_there) {
            atomicAdd(&e->row, row);
            e->slot = slot;
        }
    }
}

// ---- 2. telling ----

// One warp: the head, but for an entry that is found to be bad.
__device__ void
head_make(const cuda_fused_args_t &args, const start &now, uint64_t step,
          head *told)
{
    const cuda_dispatch_args_t &move = args.move;
    const uint32_t *post = reinterpret_cast<const uint32_t *>(&move.post);

    for (int i = threadIdx.x % 32; i < HEAD_WORDS; i += 32) {
        reinterpret_cast<uint32_t *>(told)[i] = i < POST_WORDS ? post[i] : 0;
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
        told->post.step = step;
        told->post.signature.plan_id = now.routing.plan_id;
        told->post.slot_parity = now.routing.num_sends & 1;
        told->post.arrivals = now.state.arrivals[epx__slot(step)] + gridDim.x;
        told->row.step = step;
        told->row.num_tokens = move.num_tokens;
    }
}

// The peers that this block tells; the first one's segment is known.
__device__ void
tell_some(const cuda_fused_args_t &args, const block &b, uint64_t step,
          const head &told, char *segment)
{
    const cuda_view_t &view = args.move.view;
    const uint32_t *from = reinterpret_cast<const uint32_t *>(&told);
    int count =
        HEAD_WORDS + view.num_ranks + (int)args.move.plan.key.num_experts;

    for (int r = blockIdx.x; r < view.num_ranks; r += gridDim.x) {
        if (r != blockIdx.x) {
            segment = view.segments[neighbour(view, r)];
        }
        uint64_t *words = epx__map_words(&view.map, segment, step, view.rank);

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
