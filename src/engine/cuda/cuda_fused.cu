// SPDX-License-Identifier: MIT
//
// Dispatch that counts its own routing, for decode: few tokens, where launches
// and exchanges are what costs.  Every block
//     1. counts all of the rank's routing by itself
//     2. tells some of the peers the counts, and where this rank wants its rows
//     3. loads its own tokens' rows, quantised if asked, into shared memory
//     4. waits for what the peers tell, and with it places its tokens' rows
//     5. stores the rows, and announces that to every rank
// and block 0 waits for the blocks of all ranks.
//
// With receive slots it waits for nobody: instead of 4, rows go into this
// rank's slots on each rank that wants the token, to be placed by cuda_unpack.
#include "engine/cuda/cuda_fused.cuh"

namespace
{

// ---- 4. placing ----

// The round's entries, each with its number among the rank's rows for its
// expert and, where it leads, for its rank.
__device__ void
number_entries(const cuda_fused_args_t &args, const block &b, uint32_t token,
               uint32_t count)
{
    uint32_t topk = args.move.plan.key.topk;
    int num_ranks = args.move.view.num_ranks;
    int lane = threadIdx.x % 32;

    for (uint32_t i = threadIdx.x; i < count * topk; i += THREADS) {
        routed e = entry_at(args, token * topk + i, i % topk);
        const float *weights = args.move.topk_weights;

        b.own[i] = { e.expert, e.rank, NONE, e.leads ? 0 : NONE,
                     weights == nullptr ? 0.0f : weights[token * topk + i] };
    }
    __syncthreads();
    for (uint32_t at = 0; threadIdx.x < 32 && at < count * topk; at += 32) {
        own_entry *e = &b.own[at + lane];
        bool is_there = at + lane < count * topk && e->expert >= 0;
        bool leads = is_there && e->slot != NONE;
        uint32_t row = number(b.before, is_there ? num_ranks + e->expert : -1);
        uint32_t slot = number(b.before, leads ? e->rank : -1);

        if (is_there) {
            e->row = row;
            e->slot = slot;
        }
    }
    __syncthreads();
}

// Where the rows of this rank begin, by what the ranks before it have told.
__device__ bool
place_entries(const cuda_fused_args_t &args, const block &b, uint64_t step,
              uint32_t count)
{
    const cuda_view_t &view = args.move.view;
    uint32_t sources = (uint32_t)view.rank;
    uint32_t most = (uint32_t)args.move.plan.key.max_tokens_per_rank;
    int num_experts = (int)args.move.plan.key.num_experts;
    bool ok = true;

    for (uint32_t i = threadIdx.x; i < count * sources && ok; i += THREADS) {
        own_entry *e = &b.own[i / sources];
        uint32_t rows = 0;

        if (e->expert < 0) {
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
    ok = __syncthreads_and(ok) != 0;
    for (uint32_t i = threadIdx.x; i < count && ok; i += THREADS) {
        own_entry *e = &b.own[i];

        if (e->expert >= 0) {
            int local = e->expert -
                        epx__first_expert(num_experts, view.num_ranks, e->rank);

            e->row += (uint32_t)local * most * view.num_ranks;
        }
    }
    __syncthreads();
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
            store_row<BULK>(b.targets[e.rank].x + e.row * move.row_bytes,
                            b.stages + i / topk * stride, move.row_bytes);
        }
    });
    for (uint32_t i = threadIdx.x; i < count; i += THREADS) {
        own_entry e = b.own[i];

        if (e.expert < 0) {
            continue;
        }
        const target &to = b.targets[e.rank];
        if (to.src_token != nullptr) {
            to.src_token[e.row] = (int32_t)(token + i / topk);
        }
        if (to.topk_weights != nullptr) {
            to.topk_weights[e.row] = e.weight;
        }
    }
    for (uint32_t i = threadIdx.x; i < count * num_scales; i += THREADS) {
        uint32_t at = i / num_scales, j = i - at * num_scales;
        own_entry e = b.own[at];

        if (e.expert >= 0) {
            const target &to = b.targets[e.rank];

            scales_at(move, to, e.row)[j * to.scale_stride] =
                stage_scales(args, b.stages + at / topk * stride)[j];
        }
    }
}

// This rank's slot on a peer for the slot-th token that goes there.
__device__ char *
slot_at(const cuda_fused_args_t &args, uint64_t parity, int peer, uint32_t slot)
{
    const cuda_view_t &view = args.move.view;
    uint64_t most = args.move.plan.key.max_tokens_per_rank;
    uint64_t index = (parity * view.num_ranks + view.rank) * most + slot;

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
    const cuda_dispatch_args_t &move = args.move;
    uint32_t count = token < b.end ? min(args.round_tokens, b.end - token) : 0;

    if (!b.loads_bulk || count == 0) {
        return;
    }
    if (threadIdx.x == 0) {
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

// Waits for a round's rows, and makes them what is sent; numbers its entries.
template <bool QUANTIZE>
__device__ void
open_round(const cuda_fused_args_t &args, const block &b, uint32_t token,
           uint32_t count)
{
#if EPX__HAS_BULK
    if (b.loads_bulk) {
        mbarrier_wait(b.barrier, (token - b.first) / args.round_tokens % 2);
    }
#endif
    if (QUANTIZE) {
        quantize_rows(args, b, token, count);
    } else {
        load_rows(args, b, token, count);
    }
#if EPX__HAS_BULK
    fence_proxy_async_shared();
#endif
    number_entries(args, b, token, count);
}

// Before shared memory that bulk copies read is written again.
__device__ void
close_round()
{
#if EPX__HAS_BULK
    bulk_commit();
    bulk_wait_read<0>();
#endif
    __syncthreads();
}

// 3 to 5, for tokens that go to their places, the first round but for its rows.
template <bool BULK, bool QUANTIZE>
__device__ bool
send_rounds(const cuda_fused_args_t &args, const block &b, uint64_t step)
{
    uint32_t topk = args.move.plan.key.topk;
    bool ok = true;

    for (uint32_t token = b.first; token < b.end && ok;
         token += args.round_tokens) {
        uint32_t count = min(args.round_tokens, b.end - token);

        if (token != b.first) {
            close_round();
            load_round(args, b, token);
            open_round<QUANTIZE>(args, b, token, count);
        }
        ok = place_entries(args, b, step, count * topk);
        if (ok) {
            store_rows<BULK>(args, b, token, count * topk);
            keep_routes(args, b, token, count * topk);
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

        if (token != b.first) {
            close_round();
            load_round(args, b, token);
        }
        open_round<QUANTIZE>(args, b, token, count);
        if (!args.is_new) {
            take_places(args, b, token, count * topk);
        }
        store_slots<BULK>(args, b, parity, token, count * topk);
        if (args.is_new) {
            keep_routes(args, b, token, count * topk);
        }
    }
}

// Wait for what the peers tell; a rank whose routing is bad is noted.
__device__ bool
wait_heads(const cuda_fused_args_t &args, const block &b, uint64_t step,
           const epx__signature_t &mine, int *refused_by)
{
    const cuda_dispatch_args_t &move = args.move;

    return posts_wait<head, false>(
        move.view, step, CUDA_IN_DISPATCH, mine, move.plan.rank_rows,
        blockIdx.x == 0 ? move.wait_ns : nullptr,
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

template <bool BULK, bool QUANTIZE>
__device__ void
fused_places(const cuda_fused_args_t &args, const block &b, uint64_t step,
             const head &told, char *segment)
{
    __shared__ int refused_by;
    const cuda_view_t &view = args.move.view;
    uint32_t count = min(args.round_tokens, b.end - b.first);
    cuda_refusal_t refusal = {};
    bool ok = true;

    if (threadIdx.x == 0) {
        refused_by = INT32_MAX;
    }
    if (count > 0) {
        open_round<QUANTIZE>(args, b, b.first, count);
    }
    __syncthreads();
    if (count > 0 || blockIdx.x == 0) {
        ok = wait_heads(args, b, step, told.post.signature, &refused_by);
    }
    if (ok && refused_by == INT32_MAX) {
        ok = send_rounds<BULK, QUANTIZE>(args, b, step);
    }
#if EPX__HAS_BULK
    bulk_commit();
    bulk_wait_written();
#endif
    if (!ok) {
        return;
    }
    arrive_all<true>(view, step, segment);
    if (blockIdx.x != 0) {
        return;
    }
    if (refused_by != INT32_MAX) {
        refusal = refusal_of(view, step, refused_by);
    }
    if (!receive_counts(args.move, b.local, step, refusal.status != 0)) {
        return;
    }
    if (threadIdx.x / 32 == WARPS - 1) {
        tell_slots(args.move, args.told, b.local, step, refusal);
    }
    if (arrivals_wait_all(view, step, CUDA_IN_DISPATCH, b.targets, false,
                          args.move.wait_ns)) {
        step_end(view, step, told.post.arrivals);
    }
}

template <bool BULK, bool QUANTIZE>
__device__ void
fused_slots(const cuda_fused_args_t &args, const block &b, uint64_t step,
            const head &told, char *segment)
{
    const cuda_view_t &view = args.move.view;
    cuda_routing_t *routing = args.move.plan.routing;

    if (told.row.bad_entry == 0) {
        send_slots<BULK, QUANTIZE>(args, b, told.post.slot_parity);
    }
#if EPX__HAS_BULK
    if (told.row.bad_entry != 0 && b.loads_bulk && b.first < b.end) {
        mbarrier_wait(b.barrier, 0); // what was loaded in vain
    }
    bulk_commit();
    bulk_wait_written();
#endif
    arrive_all<true>(view, step, segment);
    if (blockIdx.x == 0 && threadIdx.x == 0 &&
        arrivals_wait(view, step, CUDA_IN_DISPATCH, view.rank,
                      told.post.arrivals)) {
        routing->open_step = step;
        routing->num_sends++;
        step_end(view, step, told.post.arrivals);
    }
}

template <bool BULK, bool QUANTIZE, bool SLOTS>
__global__ void
__launch_bounds__(THREADS, 1)
    fused_kernel(const __grid_constant__ cuda_fused_args_t args)
{
    extern __shared__ __align__(128) char shared[];
    __shared__ head told;
    __shared__ unsigned long long bad_entry;
    const cuda_dispatch_args_t &move = args.move;
    const cuda_view_t &view = move.view;
    cuda_routing_t *routing = move.plan.routing;
    block b = block_make(args, shared, BULK);
    int keys = view.num_ranks + (int)move.plan.key.num_experts;
    char *segment = first_segment(view);
    uint64_t step = step_now(view);
    bool works = !is_broken(view) && (args.is_new || routing->failed == 0);

    for (int i = threadIdx.x; i < 2 * keys + move.plan.num_local;
         i += THREADS) {
        b.before[i] = 0; // and total, and local
    }
    if (threadIdx.x == 0) {
        bad_entry = ~0ull;
        told = {};
        told.post = move.post;
        told.post.step = step;
        told.post.signature.plan_id = routing->plan_id;
        told.post.slot_parity = routing->num_sends & 1;
        told.post.arrivals = *arrivals_sum(view, step) + gridDim.x;
        told.row.step = step;
        told.row.num_tokens = move.num_tokens;
    }
    // Without new routing, one that was refused was so on every rank: nobody
    // takes this step.
    if (!__syncthreads_and(works)) {
        return;
    }
    load_round(args, b, b.first);
    count_all(args, b, &bad_entry);
    __syncthreads();
    if (threadIdx.x == 0 && bad_entry != ~0ull) {
        told.row.bad_entry = bad_entry;
        told.row.bad_expert = index_at(args, (uint32_t)bad_entry - 1);
    }
    __syncthreads();
    tell_some(args, b, step, told);
    if (SLOTS) {
        fused_slots<BULK, QUANTIZE>(args, b, step, told, segment);
    } else {
        fused_places<BULK, QUANTIZE>(args, b, step, told, segment);
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
        error = cudaFuncSetAttribute(
            kernel_of((cuda_mover_t)(i / 4), i / 2 % 2 != 0, i % 2 != 0),
            cudaFuncAttributeMaxDynamicSharedMemorySize, (int)max_shared);
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

    kernel<<<num_blocks, THREADS, shared, stream>>>(*args);
    return cudaGetLastError();
}
