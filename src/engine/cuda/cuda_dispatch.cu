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

// The first num_stages pieces of each warp go without asking.
__device__ int64_t
item_taken(const cuda_dispatch_args_t &args, const worker &w, uint32_t taken)
{
    return args.num_stages * w.count + __shfl_sync(~0u, taken, 0);
}

constexpr int MAX_STAGES = 3;

// 1b. Load the first pieces, before anybody's post is there.
__device__ void
load_first(const cuda_dispatch_args_t &args, const worker &w)
{
    int64_t num_items = args.num_tokens * args.num_chunks;

    if (w.lane != 0) {
        return;
    }
    for (uint32_t s = 0; s < args.num_stages; s++) {
        mbarrier_init(&w.barriers[s], 1);
    }
    fence_mbarrier_init();
    for (uint32_t s = 0; s + 1 < args.num_stages; s++) {
        if (w.index + s * w.count < num_items) {
            load_piece(args, w, w.index + s * w.count, s);
        }
    }
}

// Let them land, when they will not be sent: their shared memory may soon be
// another block's.
__device__ void
drop_first(const cuda_dispatch_args_t &args, const worker &w)
{
    int64_t num_items = args.num_tokens * args.num_chunks;

    for (uint32_t s = 0; s + 1 < args.num_stages; s++) {
        if (w.index + s * w.count < num_items) {
            mbarrier_wait(&w.barriers[s], 0);
        }
    }
}

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

#pragma unroll
    for (int s = 0; s < MAX_STAGES; s++) {
        items[s] = w.index + s * w.count;
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
        int64_t next = item_taken(args, w, taken);
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
send_rows(const cuda_dispatch_args_t &args, const worker &w)
{
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
    worker w = worker_make(args, shared, BULK);
#if EPX__HAS_BULK
    if (BULK) {
        load_first(args, w);
    }
#endif
    target *targets = reinterpret_cast<target *>(shared);
    bool ok = posts_wait(view, step, CUDA_IN_DISPATCH, post.signature,
                         [&](int r, const epx__post_t &theirs) {
                             return target_open(args, r, theirs, &targets[r]);
                         });
    if (ok) {
        send_rows<BULK, QUANTIZE>(args, w);
    }
#if EPX__HAS_BULK
    if (BULK && !ok) {
        drop_first(args, w);
    }
#endif
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

size_t
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
    // Copying does not, and a few warps leave the memory in better order.
    args->num_stages = mover != CUDA_MOVER_BULK ? 0 : quantizes ? 2 : 3;
    size_t most_shared =
        quantizes || max_shared < COPY_SHARED ? max_shared : COPY_SHARED;

    args->num_warps = 8;
    while (args->num_warps > 1 &&
           shared_make(*args, mover == CUDA_MOVER_BULK).end > most_shared) {
        args->num_warps--;
    }
    return shared_make(*args, mover == CUDA_MOVER_BULK).end;
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
