// SPDX-License-Identifier: MIT
//
// Dispatch that counts its own routing, for decode: few tokens, where launches
// and exchanges are what costs.  Every block
//     1. counts all of the rank's routing by itself
//     2. tells some of the peers the counts, and where this rank wants its rows
//     3. loads its own tokens' rows, quantised if asked, into shared memory
//     4. waits for what the peers tell, and with it places its tokens' rows
//     5. stores the rows, and announces that to every rank
// and the last block tells the host what has come, and waits for the blocks of
// all ranks.  Loads are asked for as early as can be: each takes longer than
// most of what is done with it.
//
// With receive slots it waits for nobody: instead of 4, rows go into this
// rank's slots on each rank that wants the token, to be placed by cuda_unpack.
#include "engine/cuda/cuda_fused.cuh"
#include "engine/cuda/cuda_launch.cuh"

namespace
{

// ---- 4. placing ----

// The block's last num_threads threads: add to the rows of own entries what the
// ranks before this one have told.
__device__ bool
wait_places(const cuda_fused_args_t &args, const block &b, uint64_t step,
            uint32_t count, uint32_t num_threads)
{
    const cuda_view_t &view = args.move.view;
    uint32_t sources = (uint32_t)view.rank;
    uint32_t most = (uint32_t)args.move.plan.key.max_tokens_per_rank;
    bool ok = true;

    for (uint32_t i = THREADS - 1 - threadIdx.x; i < count * sources && ok;
         i += num_threads) {
        own_entry *e = &b.own[i / sources];
        uint32_t rows = 0;

        if (e->expert < 0 || is_masked(view, i % sources)) {
            continue;
        }
        ok = word_wait(view, step, CUDA_IN_DISPATCH, i % sources,
                       HEAD_WORDS + view.num_ranks + e->expert, &rows);
        if (ok && rows > most) {
            report_rank(view, CUDA_IN_DISPATCH, step, EPX_ERR_PEER_DATA,
                        i % sources);
            ok = false;
        }
        atomicAdd(&e->row, rows);
    }
    return ok;
}

// With slots: the places that the plan has given, if its routing is not new.
__device__ void
take_places(const cuda_fused_args_t &args, const block &b, uint32_t token,
            uint32_t count)
{
    const cuda_plan_view_t &plan = args.move.plan;
    uint32_t topk = plan.key.topk;
    bool by_rank = plan.key.layout == EPX_LAYOUT_RANK_MAJOR;

    for (uint32_t i = threadIdx.x; i < count; i += THREADS) {
        const cuda_route_t *routes = plan.routes + token * topk;
        own_entry *e = &b.own[i];
        uint32_t at = by_rank ? i / topk * topk : i;

        if (e->expert < 0) {
            continue;
        }
        while (by_rank && routes[at].rank != e->rank) {
            at++;
        }
        e->row = routes[at].row;
    }
    __syncthreads();
}

// What later kernels need.
__device__ void
keep_routes(const cuda_fused_args_t &args, const block &b, uint32_t token,
            uint32_t count)
{
    uint32_t first = token * args.move.plan.key.topk;

    for (uint32_t i = threadIdx.x; i < count; i += THREADS) {
        own_entry e = b.own[i];

        args.move.plan.experts[first + i] = e.expert;
        args.move.plan.routes[first + i] = { e.rank, e.row };
    }
}

// ---- 5. storing ----

// An entry to a thread, neighbours in different warps.
__device__ uint32_t
spread_thread()
{
    return threadIdx.x % 32 * WARPS + threadIdx.x / 32;
}

template <bool BULK>
__device__ void
store_row(char *to, const char *from, uint64_t bytes)
{
#if EPX__HAS_BULK
    if constexpr (BULK) {
        bulk_store(to, from, (uint32_t)bytes);
    } else
#endif
    {
        for (uint64_t at = 16 * (threadIdx.x % 32); at < bytes; at += 16 * 32) {
            *reinterpret_cast<uint4 *>(to + at) =
                *reinterpret_cast<const uint4 *>(from + at);
        }
    }
}

// Runs body(i) for each entry: by one thread with bulk copies, else by a warp.
template <bool BULK, typename Body>
__device__ void
for_entries(uint32_t count, Body body)
{
    for (uint32_t i = BULK ? spread_thread() : threadIdx.x / 32; i < count;
         i += BULK ? THREADS : WARPS) {
        body(i);
    }
}

// Whether a row's scales can go as its payload does.
template <bool BULK>
__device__ bool
scales_go_bulk(const cuda_dispatch_args_t &move, const target &to)
{
    return BULK && to.takes_bulk_scales && move.num_scales > 0 &&
           move.num_scales % 4 == 0;
}

template <bool BULK>
__device__ void
store_rows(const cuda_fused_args_t &args, const block &b, uint32_t token,
           uint32_t count)
{
    const cuda_dispatch_args_t &move = args.move;
    uint32_t topk = move.plan.key.topk;
    uint32_t num_scales = (uint32_t)move.num_scales;
    size_t stride = fused_stage_bytes(move);

    for_entries<BULK>(count, [&](uint32_t i) {
        own_entry e = b.own[i];

        if (e.expert >= 0) {
            const target &to = b.targets[e.rank];
            char *stage = b.stages + i / topk * stride;

            store_row<BULK>(to.x() + e.row * move.row_bytes, stage,
                            move.row_bytes);
            if (scales_go_bulk<BULK>(move, to)) {
                store_row<BULK>(
                    reinterpret_cast<char *>(scales_at(move, to, e.row)),
                    reinterpret_cast<char *>(stage_scales(args, stage)),
                    num_scales * sizeof(uint32_t));
            }
        }
    });
    for (uint32_t i = threadIdx.x; i < count; i += THREADS) {
        own_entry e = b.own[i];

        if (e.expert < 0) {
            continue;
        }
        const target &to = b.targets[e.rank];
        if (to.src_token() != nullptr) {
            to.src_token()[e.row] = (int32_t)(token + i / topk);
        }
        if (to.topk_weights() != nullptr) {
            to.topk_weights()[e.row] = e.weight;
        }
    }
    for (uint32_t i = threadIdx.x; i < count * num_scales; i += THREADS) {
        uint32_t at = i / num_scales, j = i - at * num_scales;
        own_entry e = b.own[at];

        if (e.expert >= 0 && !scales_go_bulk<BULK>(move, b.targets[e.rank])) {
            const target &to = b.targets[e.rank];

            scales_at(move, to, e.row)[j * to.scale_stride] =
                stage_scales(args, b.stages + at / topk * stride)[j];
        }
    }
}

// With several nodes: the heads of what goes to ranks of others.
__device__ void
put_heads(const cuda_fused_args_t &args, const block &b, uint64_t step,
          bool is_bad)
{
    const cuda_view_t &view = args.move.view;

    for (int r = threadIdx.x; r < view.num_ranks; r += THREADS) {
        if (is_near(view, r) || is_masked(view, r)) {
            continue;
        }
        cuda_parcel_head_t *head = reinterpret_cast<cuda_parcel_head_t *>(
            cuda_region(&args.move.rail.by_node[EPX__LANE_OUT],
                        view.nodes.far_index[r]));

        head->step = step;
        head->count = is_bad ? 0 : b.total[r];
        head->has_weights = 0;
    }
}

// This rank's slot on a peer for the slot-th token that goes there.
__device__ char *
slot_at(const cuda_fused_args_t &args, uint64_t parity, int peer, uint32_t slot)
{
    const cuda_view_t &view = args.move.view;
    uint64_t most = args.move.plan.key.max_tokens_per_rank;
    uint64_t index = (parity * view.num_ranks + view.rank) * most + slot;

    if (!is_near(view, peer)) {
        return far_slots(view, args.move.rail.by_node[EPX__LANE_OUT], peer) +
               slot * args.slots.slot_bytes;
    }
    return view.segments[peer] + args.move.plan.slots[peer] +
           index * args.slots.slot_bytes;
}

template <bool BULK>
__device__ void
store_slots(const cuda_fused_args_t &args, const block &b, uint64_t parity,
            uint32_t token, uint32_t count)
{
    const cuda_dispatch_args_t &move = args.move;
    uint32_t topk = move.plan.key.topk;
    size_t stride = fused_stage_bytes(move);
    int lane = threadIdx.x % 32;

    for_entries<BULK>(count, [&](uint32_t i) {
        own_entry e = b.own[i];

        if (e.slot != NONE) {
            store_row<BULK>(slot_at(args, parity, e.rank, e.slot) +
                                args.slots.payload_at,
                            b.stages + i / topk * stride, move.row_bytes);
        }
    });
    // The rest of a slot, by a warp.
    for (uint32_t i = threadIdx.x / 32; i < count; i += WARPS) {
        own_entry e = b.own[i];

        if (e.slot == NONE) {
            continue;
        }
        char *to = slot_at(args, parity, e.rank, e.slot);
        const uint32_t *scales =
            stage_scales(args, b.stages + i / topk * stride);
        if (lane == 0) {
            *reinterpret_cast<uint32_t *>(to) = token + i / topk;
        }
        for (uint32_t k = lane; k < topk; k += 32) {
            own_entry other = b.own[i / topk * topk + k];

            reinterpret_cast<int32_t *>(to)[4 + k] = other.expert;
            reinterpret_cast<uint32_t *>(to + args.slots.rows_at)[k] =
                other.row;
            reinterpret_cast<float *>(to + args.slots.weights_at)[k] =
                other.weight;
        }
        for (int64_t j = lane; j < move.num_scales; j += 32) {
            reinterpret_cast<uint32_t *>(to + args.slots.scales_at)[j] =
                scales[j];
        }
    }
}

// ---- all of it ----

// Start loading a round's rows, if there are any: all threads, once what they
// replace is no longer in use.
__device__ void
load_round(const cuda_fused_args_t &args, const block &b, uint32_t token)
{
#if EPX__HAS_BULK
    constexpr int LOADER = 32; // a thread of a warp that has not much to do
    const cuda_dispatch_args_t &move = args.move;
    uint32_t count = token < b.end ? min(args.round_tokens, b.end - token) : 0;

    if (!b.loads_bulk || count == 0) {
        return;
    }
    if (threadIdx.x == LOADER) {
        if (token == b.first) {
            mbarrier_init(b.barrier, 1);
            fence_mbarrier_init();
        }
        mbarrier_arrive_expect(b.barrier, count * (uint32_t)move.in_bytes);
        for (uint32_t t = 0; t < count; t++) {
            bulk_load(b.raw + t * b.raw_stride,
                      move.x + (token + t) * move.in_bytes,
                      (uint32_t)move.in_bytes, b.barrier);
        }
    }
#endif
}

// Waits for a round's rows, and makes them what is sent.
template <bool QUANTIZE>
__device__ void
open_round(const cuda_fused_args_t &args, const block &b, uint32_t token,
           uint32_t count)
{
    uint32_t piece = QUANTIZE ? take_piece(b) : 0;

#if EPX__HAS_BULK
    if (b.loads_bulk) {
        mbarrier_wait(b.barrier, (token - b.first) / args.round_tokens % 2);
    }
#endif
    if (QUANTIZE) {
        quantize_rows(args, b, token, count, piece);
    } else {
        load_rows(args, b, token, count);
    }
#if EPX__HAS_BULK
    fence_proxy_async_shared();
#endif
}

// Nothing may be on its way to shared memory when a block ends.
__device__ void
drop_round(const block &b)
{
#if EPX__HAS_BULK
    if (b.loads_bulk && b.first < b.end) {
        mbarrier_wait(b.barrier, 0);
    }
#endif
}

// The next round, for which shared memory that bulk copies read is written
// again; a barrier must follow.
template <bool QUANTIZE>
__device__ void
next_round(const cuda_fused_args_t &args, const block &b, uint32_t token,
           uint32_t count)
{
#if EPX__HAS_BULK
    bulk_commit();
    bulk_wait_read<0>();
#endif
    __syncthreads();
    own_load own;
    uint32_t topk = args.move.plan.key.topk;

    own.start(args, token * topk, count * topk);
    load_round(args, b, token);
    own.share(args, b, token * topk, count * topk);
    begin_pieces(args, b, count);
    __syncthreads();
    own_place(args, b, count);
    __syncthreads();
    if (threadIdx.x / 32 == WARPS - 1) {
        own_number(args, b, count * topk);
    }
    open_round<QUANTIZE>(args, b, token, count);
}

// 5, for tokens that go to their places, the first round of which is open.
template <bool BULK, bool QUANTIZE>
__device__ bool
send_rounds(const cuda_fused_args_t &args, const block &b, uint64_t step)
{
    uint32_t topk = args.move.plan.key.topk;
    uint32_t token = b.first;
    bool ok = true;

    while (token < b.end && ok) {
        uint32_t count = min(args.round_tokens, b.end - token);

        store_rows<BULK>(args, b, token, count * topk);
        keep_routes(args, b, token, count * topk);
        token += count;
        count = min(args.round_tokens, b.end - token);
        if (count > 0) {
            next_round<QUANTIZE>(args, b, token, count);
            ok = __syncthreads_and(
                     wait_places(args, b, step, count * topk, THREADS)) != 0;
        }
    }
    return ok;
}

template <bool BULK, bool QUANTIZE>
__device__ void
send_slots(const cuda_fused_args_t &args, const block &b, uint64_t parity)
{
    uint32_t topk = args.move.plan.key.topk;

    for (uint32_t token = b.first; token < b.end; token += args.round_tokens) {
        uint32_t count = min(args.round_tokens, b.end - token);

        if (token == b.first) {
            open_round<QUANTIZE>(args, b, token, count);
        } else {
            next_round<QUANTIZE>(args, b, token, count);
        }
        __syncthreads();
        if (!args.is_new) {
            take_places(args, b, token, count * topk);
        }
        store_slots<BULK>(args, b, parity, token, count * topk);
        if (args.is_new) {
            keep_routes(args, b, token, count * topk);
        }
    }
}

// All bulk stores of this thread are in place.
__device__ void
end_stores()
{
#if EPX__HAS_BULK
    bulk_commit();
    bulk_wait_written();
#endif
}

// The block that does what is done once: the last one, which has the fewest
// tokens.
__device__ bool
is_clerk()
{
    return blockIdx.x == gridDim.x - 1;
}

// The last num_warps warps: what the peers tell; a rank whose routing is bad is
// noted.
__device__ posts_seen
look_at_heads(const cuda_fused_args_t &args, const block &b, uint64_t step,
              const epx__signature_t &mine, int num_warps, int *refused_by)
{
    const cuda_dispatch_args_t &move = args.move;

    return posts_look<head, false>(
        move.view, step, CUDA_IN_DISPATCH, mine, move.plan.rank_rows, num_warps,
        is_clerk() ? move.wait_ns : nullptr,
        [&](int r, const head &h, const peer &p) {
            if (h.row.bad_entry != 0) {
                atomicMin(refused_by, r);
            }
            if (h.row.num_tokens > move.plan.key.max_tokens_per_rank) {
                report_rank(move.view, CUDA_IN_DISPATCH, step,
                            EPX_ERR_PEER_DATA, r);
                return false;
            }
            return target_open(move, r, h.post, p, &b.targets[r]);
        });
}

// How many warps of a block wait for the peers.  Without bulk copies all load
// rows first.
__device__ int
num_lookers(const cuda_fused_args_t &args, const block &b)
{
    return b.loads_bulk ? min(args.move.view.num_ranks, WARPS / 2) : WARPS;
}

template <bool BULK, bool QUANTIZE>
__device__ void
fused_places(const cuda_fused_args_t &args, const block &b, const start &now,
             uint64_t step, int *refused_by, char *segment)
{
    const cuda_view_t &view = args.move.view;
    uint32_t count = min(args.round_tokens, b.end - b.first);
    uint64_t generation = generation_of(args.told, now.routing);
    epx__signature_t mine = args.move.post.signature;
    posts_seen seen = { true, true, true, 0, 0 };
    int lookers = num_lookers(args, b);
    bool looks = count > 0 || is_clerk(), has_places = true;

    looks = looks && threadIdx.x / 32 >= WARPS - lookers;
    mine.plan_id = now.routing.plan_id;
    if (count > 0 && !b.loads_bulk) {
        open_round<QUANTIZE>(args, b, b.first, count);
    }
    if (looks) {
        seen = look_at_heads(args, b, step, mine, lookers, refused_by);
        has_places = wait_places(args, b, step, count * args.move.plan.key.topk,
                                 lookers * 32);
    }
    // The others quantise meanwhile, and who is early does more of it.
    if (count > 0 && b.loads_bulk) {
        open_round<QUANTIZE>(args, b, b.first, count);
    }
    bool ok = posts_agree(view, step, CUDA_IN_DISPATCH, mine, seen, has_places);
    bool is_refused = *refused_by != INT32_MAX;
    if (ok && !is_refused) {
        ok = send_rounds<BULK, QUANTIZE>(args, b, step);
    }
    // While the rows are on their way.
    if (ok && is_clerk()) {
        cuda_refusal_t refusal = {};

        if (is_refused) {
            refusal = refusal_of(view, step, *refused_by);
        }
        ok = receive_counts(args.move, args.told, generation, b.local, step,
                            refusal);
    }
    end_stores();
    if (!ok) {
        return;
    }
    arrive_all<true>(view, step, segment);
    if (is_clerk() && arrivals_wait_all(view, step, CUDA_IN_DISPATCH, b.targets,
                                        false, args.move.wait_ns)) {
        grid_release();
        step_end(view, step, now.state.arrivals[epx__slot(step)] + gridDim.x);
    }
}

template <bool BULK, bool QUANTIZE>
__device__ void
fused_slots(const cuda_fused_args_t &args, const block &b, const start &now,
            uint64_t step, bool is_bad, char *segment)
{
    const cuda_view_t &view = args.move.view;
    cuda_routing_t *routing = args.move.plan.routing;
    uint64_t arrivals = now.state.arrivals[epx__slot(step)] + gridDim.x;

    if (is_bad) {
        drop_round(b);
    } else {
        send_slots<BULK, QUANTIZE>(args, b, now.routing.num_sends & 1);
    }
    if (view.nodes.num_nodes > 1 && is_clerk()) {
        put_heads(args, b, step, is_bad);
    }
    end_stores();
    arrive_all<true>(view, step, segment);
    if (is_clerk() && threadIdx.x == 0 &&
        arrivals_wait(view, step, CUDA_IN_DISPATCH, view.rank, arrivals)) {
        routing->open_step = step;
        routing->num_sends = now.routing.num_sends + 1;
        step_end(view, step, arrivals);
    }
}

template <bool BULK, bool QUANTIZE, bool SLOTS>
__global__ void
__launch_bounds__(THREADS, 1)
    fused_kernel(const __grid_constant__ cuda_fused_args_t args)
{
    grid_wait();
    char *shared = dynamic_shared();
    __shared__ start now;
    __shared__ head told;
    __shared__ unsigned long long bad_entry;
    __shared__ int refused_by;
    const cuda_view_t &view = args.move.view;
    uint32_t topk = args.move.plan.key.topk;
    uint32_t per_tile = TILE / topk * topk;
    int warp = threadIdx.x / 32;
    block b = block_make(args, shared, BULK);
    uint32_t count = min(args.round_tokens, b.end - b.first);
    int keys = view.num_ranks + (int)args.move.plan.key.num_experts;
    bool tells = first_told() < view.num_ranks;
    uint32_t num_entries = (uint32_t)args.move.num_tokens * topk;
    entries_load<TILE_EACH> entries;
    own_load own;
    uint64_t word = 0;

    // Ask memory for all that can be asked for before anything is known.
    if (warp == 0) {
        word = start_load(view, args.move.plan.routing);
    }
    if (num_entries > 0) {
        entries.start(args, 0);
    }
    own.start(args, b.first * topk, count * topk);
    char *segment = first_segment(view);
    char *listener = view.segments[neighbour(view, first_told())];
    load_round(args, b, b.first);
    if (warp == WARPS / 2 && tells) {
        head_begin(args, &told);
    }
    for (int i = threadIdx.x; i < 2 * keys + args.move.plan.num_local;
         i += THREADS) {
        b.before[i] = 0; // and total, and local
    }
    for (int e = threadIdx.x; e < args.move.plan.key.num_experts;
         e += THREADS) {
        b.ranks[e] = taking_rank(view, (int)args.move.plan.key.num_experts, e);
    }
    begin_pieces(args, b, count);
    if (threadIdx.x == THREADS - 1) {
        bad_entry = ~0ull;
        refused_by = INT32_MAX;
    }
    tile_part tile;
    tile.take(args, entries, min(per_tile, num_entries));
    tile.share(b);
    own.share(args, b, b.first * topk, count * topk);
    if (warp == 0) {
        start_keep(word, &now);
    }
    __syncthreads();
    uint64_t step = now.state.step + 1;
    // Without new routing, one that was refused was so on every rank: nobody
    // takes this step.
    if (now.state.broken != 0 || (!args.is_new && now.routing.failed != 0)) {
        drop_round(b);
        return;
    }
    if (warp == WARPS / 2 && tells) {
        head_end(args, now, step, &told);
    }
    own_place(args, b, count);
    count_all<SLOTS>(args, b, tile, per_tile, tells, &bad_entry);
    __syncthreads();
    bool is_bad = bad_entry != ~0ull;
    if (is_bad) {
        if (threadIdx.x == 0) {
            told.row.bad_entry = bad_entry;
            told.row.bad_expert = index_at(args, (uint32_t)bad_entry - 1);
        }
        __syncthreads();
    }
    tell_some(args, b, step, told, listener);
    // By a warp that does not look at what the peers tell.
    if (warp == 0) {
        own_number(args, b, count * topk);
    }
    if (SLOTS) {
        fused_slots<BULK, QUANTIZE>(args, b, now, step, is_bad, segment);
    } else {
        fused_places<BULK, QUANTIZE>(args, b, now, step, &refused_by, segment);
    }
}

using kernel_t = void (*)(const cuda_fused_args_t);

kernel_t
kernel_of(cuda_mover_t mover, bool quantizes, bool to_slots)
{
    if (mover == CUDA_MOVER_BULK) {
        return quantizes ? (to_slots ? fused_kernel<true, true, true>
                                     : fused_kernel<true, true, false>)
                         : (to_slots ? fused_kernel<true, false, true>
                                     : fused_kernel<true, false, false>);
    }
    return quantizes ? (to_slots ? fused_kernel<false, true, true>
                                 : fused_kernel<false, true, false>)
                     : (to_slots ? fused_kernel<false, false, true>
                                 : fused_kernel<false, false, false>);
}

} // namespace

cudaError_t
cuda_fused_load(size_t max_shared)
{
    cudaError_t error = cudaSuccess;

    for (int i = 0; i < 8 && error == cudaSuccess; i++) {
        error =
            load(kernel_of((cuda_mover_t)(i / 4), i / 2 % 2 != 0, i % 2 != 0),
                 max_shared);
    }
    return error;
}

size_t
cuda_fused_shape(cuda_fused_args_t *args, int num_blocks, size_t max_shared)
{
    uint64_t most = ((uint64_t)args->move.num_tokens + num_blocks - 1) /
                    (uint64_t)num_blocks;

    args->round_tokens = most > MOST_ROUND ? MOST_ROUND : (uint32_t)most;
    args->round_tokens += args->round_tokens == 0;
    while (args->round_tokens > 1 &&
           block_map_make(*args, args->round_tokens).end > max_shared) {
        args->round_tokens--;
    }
    return block_map_make(*args, args->round_tokens).end;
}

cudaError_t
cuda_fused_launch(const cuda_fused_args_t *args, cuda_mover_t mover,
                  int num_blocks, cudaStream_t stream)
{
    kernel_t kernel = kernel_of(mover, args->move.quantize != EPX_QUANTIZE_NONE,
                                args->to_slots != 0);
    size_t shared = block_map_make(*args, args->round_tokens).end;

    return launch(kernel, num_blocks, THREADS, shared, *args, stream);
}
