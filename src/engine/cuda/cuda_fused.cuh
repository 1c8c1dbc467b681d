// SPDX-License-Identifier: MIT
//
// The first half of cuda_fused.cu: what a block works with, how it counts the
// routing and tells the peers, and how it loads rows.
//
// Shared memory of a block, u32 unless said otherwise:
//     targets [R]          struct target; not with slots
//     before  [R + E]      rows of the tokens before this block's, then of
//                          those before the round's; by rank and by expert
//     total   [R + E]      of the rank
//     local   [L]          rows that arrive for this rank's experts
//     ranks   [E]          of the experts
//     own     [round][K]   struct own_entry
//     tile    [TILE]       i32 experts of the routing, while it is counted
//     pieces               of the round that warps have taken to quantise
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

    __device__ int first_of(int rank) const
    {
        return rank * quotient + min(rank, extra);
    }
    __device__ int count_of(int rank) const
    {
        return quotient + (rank < extra);
    }
};

struct block {
    target *targets;
    uint32_t *before, *total, *local;
    int32_t *ranks;
    own_entry *own;
    int32_t *tile;
    char *stages;
    char *raw; // where bulk copies bring rows of x
    size_t raw_stride;
    uint64_t *barrier; // of those
    uint32_t *pieces;
    bool loads_bulk;
    uint32_t first, end; // the block's tokens
    placement experts;
};

struct block_map {
    size_t before, total, local, ranks, own, tile, barrier, pieces, stages, raw,
        end;
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
    map.ranks = map.local + (size_t)move.plan.num_local * sizeof(uint32_t);
    map.own = map.ranks + move.plan.key.num_experts * sizeof(int32_t);
    map.tile = map.own + round * move.plan.key.topk * sizeof(own_entry);
    map.barrier = round_up(map.tile + TILE * sizeof(int32_t), 8);
    map.pieces = map.barrier + sizeof(uint64_t);
    map.stages = round_up(map.pieces + sizeof(uint32_t), ALIGN);
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
    b.ranks = reinterpret_cast<int32_t *>(shared + map.ranks);
    b.own = reinterpret_cast<own_entry *>(shared + map.own);
    b.tile = reinterpret_cast<int32_t *>(shared + map.tile);
    b.stages = shared + map.stages;
    b.barrier = reinterpret_cast<uint64_t *>(shared + map.barrier);
    b.pieces = reinterpret_cast<uint32_t *>(shared + map.pieces);
    if (args.move.quantize != EPX_QUANTIZE_NONE) {
        b.raw = shared + map.raw;
        b.raw_stride = round_up(args.move.in_bytes, ALIGN);
    } else {
        b.raw = b.stages;
        b.raw_stride = fused_stage_bytes(args.move);
    }
    b.loads_bulk = is_bulk && args.move.x_is_aligned != 0;
    uint32_t mover = min(blockIdx.x, args.num_movers);
    b.first = (uint32_t)(tokens * mover / args.num_movers);
    b.end =
        (uint32_t)(tokens * min(mover + 1, args.num_movers) / args.num_movers);
    b.experts.quotient =
        (int)args.move.plan.key.num_experts / args.move.view.num_ranks;
    b.experts.extra = (int)args.move.plan.key.num_experts -
                      b.experts.quotient * args.move.view.num_ranks;
    return b;
}

// ---- 1. counting ----

// An element of topk_idx, as it is given.
__device__ int64_t
index_at(const cuda_fused_args_t &args, uint32_t i)
{
    return args.idx_is_i64 ? static_cast<const int64_t *>(args.topk_idx)[i]
                           : static_cast<const int32_t *>(args.topk_idx)[i];
}

// COUNT entries of the routing, from number `at` on, a thread's on their way
// from memory: no load waits for another one.  There is at least one entry.
template <int COUNT> struct entries_load {
    int64_t values[COUNT];

    __device__ void start(const cuda_fused_args_t &args, uint32_t at)
    {
        uint32_t last =
            (uint32_t)args.move.num_tokens * args.move.plan.key.topk - 1;

        if (args.idx_is_i64) {
            start_of<int64_t>(args, at, last);
        } else {
            start_of<int32_t>(args, at, last);
        }
    }
    // The expert; -1 for none.
    __device__ int32_t expert(const cuda_fused_args_t &args, int i) const
    {
        int64_t least = args.is_new ? -1 : CUDA_EXPERT_DROPPED;

        return values[i] < least || values[i] >= args.move.plan.key.num_experts
                   ? BAD_EXPERT
                   : (int32_t)values[i];
    }

  private:
    template <typename Index>
    __device__ void start_of(const cuda_fused_args_t &args, uint32_t at,
                             uint32_t last)
    {
        const Index *from = static_cast<const Index *>(args.topk_idx);

#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            values[i] = from[min(at + i * THREADS + threadIdx.x, last)];
        }
    }
};

// What an entry's token shows before it.
struct placed {
    bool leads; // the first for its rank
    bool repeats;
};

// Entry number k of its token, after which at(j) is the j-th one back.
template <typename At>
__device__ placed
place_entry(const block &b, int32_t expert, int32_t rank, uint32_t k, At at)
{
    int first = b.experts.first_of(rank);
    uint32_t count = b.experts.count_of(rank);
    placed p = { true, false };
    auto compare = [&](int32_t other) {
        p.repeats |= other == expert;
        p.leads &= (uint32_t)(other - first) >= count;
    };

    // The first ones at a time; -1 is no expert.
#pragma unroll
    for (uint32_t j = 1; j < 8; j++) {
        compare(j <= k ? at(j) : -1);
    }
    for (uint32_t j = 8; j <= k; j++) {
        compare(at(j));
    }
    return p;
}

// A thread's part of the entries at hand, which a block has in shared memory,
// too.
struct tile_part {
    int32_t experts[TILE_EACH];

    // `count` entries that have been loaded.
    __device__ void take(const cuda_fused_args_t &args,
                         const entries_load<TILE_EACH> &load, uint32_t count)
    {
#pragma unroll
        for (int u = 0; u < TILE_EACH; u++) {
            experts[u] =
                u * THREADS + threadIdx.x < count ? load.expert(args, u) : -1;
        }
    }
    __device__ void share(const block &b) const
    {
#pragma unroll
        for (int u = 0; u < TILE_EACH; u++) {
            b.tile[u * THREADS + threadIdx.x] = experts[u];
        }
    }
};

// A tile of entries from number `at` on, which is in shared memory: all that
// the peers are told of it; and with BY_RANK what lies before this block's
// tokens by rank, too.
template <bool BY_RANK>
__device__ void
count_tile(const cuda_fused_args_t &args, const block &b, const tile_part &tile,
           uint32_t at, unsigned long long *bad_entry)
{
    uint32_t topk = args.move.plan.key.topk;
    uint32_t own = b.first * topk; // the first entry of this block
    uint32_t k = threadIdx.x % topk, turn = THREADS % topk;
    int num_ranks = args.move.view.num_ranks;

#pragma unroll
    for (int u = 0; u < TILE_EACH; u++) {
        uint32_t n = u * THREADS + threadIdx.x;
        const int32_t *entry = b.tile + n;
        int32_t expert = tile.experts[u];
        bool is_before = at + n < own;

        // For none, too, so that no entry waits for another one's branch.
        int32_t rank = b.ranks[max(expert, 0)];
        placed p = place_entry(b, expert, rank, k,
                               [&](uint32_t j) { return entry[-(int)j]; });
        bool is_taken = expert >= 0 && rank >= 0;

        if (expert == BAD_EXPERT || (expert >= 0 && p.repeats)) {
            atomicMin(bad_entry, (unsigned long long)(at + n) + 1);
        }
        if (is_taken) {
            atomicAdd(&b.total[num_ranks + expert], 1u);
        }
        if (is_taken && p.leads) {
            atomicAdd(&b.total[rank], 1u);
        }
        if (is_taken && is_before) {
            atomicAdd(&b.before[num_ranks + expert], 1u);
        }
        if (BY_RANK && is_taken && p.leads && is_before) {
            atomicAdd(&b.before[rank], 1u);
        }
        k += turn;
        k -= k >= topk ? topk : 0;
    }
}

// Just the rows for each expert that lie before this block's tokens.
__device__ void
count_before(const cuda_fused_args_t &args, const block &b,
             const tile_part &tile, uint32_t at)
{
    uint32_t own = b.first * args.move.plan.key.topk;
    uint32_t *before = b.before + args.move.view.num_ranks;

#pragma unroll
    for (int u = 0; u < TILE_EACH; u++) {
        if (at + u * THREADS + threadIdx.x < own && tile.experts[u] >= 0) {
            atomicAdd(&before[tile.experts[u]], 1u);
        }
    }
}

// The routing, of which the first tile is in shared memory: what this block
// needs of it.
template <bool SLOTS>
__device__ void
count_all(const cuda_fused_args_t &args, const block &b, tile_part &tile,
          uint32_t per_tile, bool tells, unsigned long long *bad_entry)
{
    uint32_t topk = args.move.plan.key.topk;
    bool counts_all = SLOTS || tells;
    uint32_t count =
        counts_all ? (uint32_t)args.move.num_tokens * topk : b.first * topk;

    for (uint32_t at = 0; at < count; at += per_tile) {
        if (at != 0) {
            entries_load<TILE_EACH> load;

            load.start(args, at);
            tile.take(args, load, min(per_tile, count - at));
        }
        if (at != 0 && counts_all) {
            __syncthreads();
            tile.share(b);
            __syncthreads();
        }
        if (counts_all) {
            count_tile<SLOTS>(args, b, tile, at, bad_entry);
        } else {
            count_before(args, b, tile, at);
        }
    }
}

// The round's own entries on their way from memory, a thread's first one; there
// may be more of them than threads.
struct own_load {
    entries_load<1> entry;
    float weight;

    __device__ void start(const cuda_fused_args_t &args, uint32_t first,
                          uint32_t count)
    {
        const float *weights = args.move.topk_weights;

        if (count > 0) {
            entry.start(args, first);
            weight = weights == nullptr
                         ? 0.0f
                         : weights[first + min(threadIdx.x, count - 1)];
        }
    }
    __device__ void share(const cuda_fused_args_t &args, const block &b,
                          uint32_t first, uint32_t count) const
    {
        if (threadIdx.x < count) {
            b.own[threadIdx.x] = { entry.expert(args, 0), -1, 0, NONE, weight };
        }
        for (uint32_t i = threadIdx.x + THREADS; i < count; i += THREADS) {
            own_load more;

            more.start(args, first + i - threadIdx.x, count - i + threadIdx.x);
            b.own[i] = { more.entry.expert(args, 0), -1, 0, NONE, more.weight };
        }
    }
};

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
        int32_t rank = b.ranks[e->expert];
        if (rank < 0) {
            e->expert = CUDA_EXPERT_DROPPED; // as far as its token goes, too
            continue;
        }
        e->rank = rank;
        if (args.to_slots) {
            placed p =
                place_entry(b, e->expert, rank, i % key.topk,
                            [&](uint32_t j) { return e[-(int)j].expert; });

            e->slot = p.leads ? 0 : NONE;
        } else {
            e->row =
                (uint32_t)(e->expert - b.experts.first_of(rank)) * per_expert;
        }
    }
}

// One warp: the number of each own entry among this rank's rows for its expert
// and, where it leads to a slot, for its rank, once all before this block are
// counted.
__device__ void
own_number(const cuda_fused_args_t &args, const block &b, uint32_t count)
{
    int num_ranks = args.move.view.num_ranks;

    for (uint32_t i = threadIdx.x % 32; i - threadIdx.x % 32 < count; i += 32) {
        own_entry *e = &b.own[i];
        bool is_there = i < count && e->expert >= 0;
        bool leads = is_there && e->slot != NONE;
        uint32_t row = number(b.before, is_there ? num_ranks + e->expert : -1);

        if (is_there) {
            atomicAdd(&e->row, row);
        }
        if (args.to_slots) {
            uint32_t slot = number(b.before, leads ? e->rank : -1);

            if (leads) {
                e->slot = slot;
            }
        }
    }
}

// ---- 2. telling ----

// One warp: the head, but for an entry that is found to be bad; begun and ended
// as a post is.
__device__ void
head_begin(const cuda_fused_args_t &args, head *told)
{
    post_begin(args.move.post, &told->post);
    for (int i = POST_WORDS + threadIdx.x % 32; i < HEAD_WORDS; i += 32) {
        reinterpret_cast<uint32_t *>(told)[i] = 0;
    }
}

__device__ void
head_end(const cuda_fused_args_t &args, const start &now, uint64_t step,
         head *told)
{
    post_end(now, step, gridDim.x, &told->post);
    if (threadIdx.x % 32 == 0) {
        told->post.slot_parity = now.routing.num_sends & 1;
        told->row.step = step;
        told->row.key.num_experts = args.move.plan.key.num_experts;
        told->row.num_tokens = args.move.num_tokens;
    }
}

// The first peer that this block tells, as a neighbour; beyond them: none.
__device__ int
first_told()
{
    return (int)(gridDim.x - 1 - blockIdx.x);
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

    for (int r = first_told(); r < view.num_ranks; r += gridDim.x) {
        if (!is_told(view, neighbour(view, r))) {
            continue;
        }
        if (r != first_told()) {
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

// Before a round is quantised, and a barrier.
__device__ void
begin_pieces(const cuda_fused_args_t &args, const block &b, uint32_t count)
{
    const cuda_dispatch_args_t &move = args.move;
    uint32_t num_scales = (uint32_t)move.num_scales;

    if (threadIdx.x == 0) {
        *b.pieces = 0;
    }
    if (move.quantize != EPX_QUANTIZE_F8E4M3_UE8M0) {
        return;
    }
    // Scales that are packed are put into words of zero.
    for (uint32_t i = threadIdx.x; i < count * num_scales; i += THREADS) {
        uint32_t t = i / num_scales;

        stage_scales(args, b.stages + t * fused_stage_bytes(
                                              move))[i - t * num_scales] = 0;
    }
}

// One warp: the next piece of the round that none has taken.
__device__ uint32_t
take_piece(const block &b)
{
    uint32_t piece = threadIdx.x % 32 == 0 ? atomicAdd(b.pieces, 1u) : 0;

    return __shfl_sync(~0u, piece, 0);
}

// The same, quantised, by warps that take pieces, from `piece` on: half a warp
// to a block of channels, four of them on their way from memory at a time.
__device__ void
quantize_rows(const cuda_fused_args_t &args, const block &b, uint32_t token,
              uint32_t count, uint32_t piece)
{
    constexpr uint32_t PIECE = 2 * QUANTIZE_AHEAD; // blocks
    const cuda_dispatch_args_t &move = args.move;
    uint32_t octets = (uint32_t)(move.in_bytes / 16);
    uint32_t blocks = (octets + 15) / 16;
    size_t stride = fused_stage_bytes(move);

    // Both halves of a warp come along.
    for (; piece * PIECE < count * blocks; piece = take_piece(b)) {
        uint4 values[QUANTIZE_AHEAD];
        uint32_t tokens[QUANTIZE_AHEAD], channels[QUANTIZE_AHEAD];

#pragma unroll
        for (int u = 0; u < QUANTIZE_AHEAD; u++) {
            uint32_t i = piece * PIECE + u * 2 + threadIdx.x / 16 % 2;

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
