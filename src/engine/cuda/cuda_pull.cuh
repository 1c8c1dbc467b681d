// SPDX-License-Identifier: MIT
//
// How a kernel adds up the rows of tokens, wherever they lie: each warp takes
// chunks of tokens, pulls the chunk of every row of the token, a batch at a
// time, adds them up in the order of the routes, rounds once and writes once.
//
// Shared memory of a block, with S sources: the ranks, and with several nodes
// the nodes behind them:
//     sources  [S]
//     weights  [warps][stages][batch]
// and with bulk copies
//     barriers [warps][stages]
//     counts   [warps][stages]       rows of the unit in a stage
//     stages   [warps][stages][batch][chunk]
//     outs     [warps][2][chunk]     sums on their way out
// Of a warp's ROWS chunks, tokens with few rows make more stages.
#ifndef EPX_ENGINE_CUDA_PULL_CUH
#define EPX_ENGINE_CUDA_PULL_CUH

#include "engine/cuda/cuda_element.cuh"
#include "engine/cuda/cuda_logfmt.cuh"
#include "engine/cuda/cuda_step.cuh"

namespace
{

constexpr int CHUNK = CUDA_COMBINE_CHUNK;
constexpr int WARPS = CUDA_COMBINE_WARPS;
constexpr int ROWS = CUDA_COMBINE_ROWS;  // chunks in a warp's shared memory
constexpr int VECTORS = CHUNK / 16 / 32; // of 16 bytes, for each lane

// Where a rank keeps its outputs, or what has come from a node.
struct source {
    const char *x;
    const float *topk_weights;
    uint64_t num_rows;
    uint64_t arrivals; // see epx__post_t
};

struct shared_map {
    size_t weights, barriers, counts, stages, outs, end;
};

__host__ __device__ shared_map
shared_make(const cuda_view_t &view, bool is_bulk)
{
    shared_map map;

    map.weights = (size_t)cuda_num_places(&view) * sizeof(source);
    map.barriers = map.weights + WARPS * ROWS * sizeof(float);
    map.counts = map.barriers + WARPS * ROWS * sizeof(uint64_t);
    map.stages = (map.counts + WARPS * ROWS * sizeof(int) + 127) / 128 * 128;
    map.outs = map.stages + (is_bulk ? (size_t)WARPS * ROWS * CHUNK : 0);
    map.end = map.outs + (is_bulk ? (size_t)WARPS * 2 * CHUNK : 0);
    return map;
}

struct worker {
    const source *sources;
    float *weights;     // [stages][batch]
    uint64_t *barriers; // [stages]
    int *counts;        // [stages]
    char *stages;       // [stages][batch][chunk]
    char *outs;         // [2][chunk]

    int64_t index, count;
    int lane;
};

__device__ worker
worker_make(const cuda_combine_args_t &args, char *shared, bool is_bulk)
{
    shared_map map = shared_make(args.view, is_bulk);
    int first = threadIdx.x / 32 * ROWS; // of this warp
    worker w;

    w.sources = reinterpret_cast<source *>(shared);
    w.weights = reinterpret_cast<float *>(shared + map.weights) + first;
    w.barriers = reinterpret_cast<uint64_t *>(shared + map.barriers) + first;
    w.counts = reinterpret_cast<int *>(shared + map.counts) + first;
    w.stages = shared + map.stages + (size_t)first * CHUNK;

    w.outs = shared + map.outs + (size_t)threadIdx.x / 32 * 2 * CHUNK;
    w.index = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32;
    w.count = (int64_t)gridDim.x * WARPS;
    w.lane = threadIdx.x % 32;
    return w;
}

// 2. Where one rank's outputs are, by its post, whose numbers are checked.
__device__ bool
source_open(const cuda_combine_args_t &args, int r, const epx__post_t &post,
            const peer &p, source *to)
{
    const cuda_view_t &view = args.view;
    uint64_t rows = p.rows;
    bool by_rank = args.plan.key.layout == EPX_LAYOUT_RANK_MAJOR;
    uint64_t weight_bytes = by_rank ? args.plan.key.topk * 4 : 4;
    uint64_t x = post.offset[EPX__ARRAY_X];
    uint64_t weights = post.offset[EPX__ARRAY_TOPK_WEIGHTS];
    bool needs_weights = args.out_topk_weights != nullptr;
    bool ok = rows == 0 ||
              (post.num_rows >= rows &&
               extent_fits(view, p, x, rows, args.row_bytes, EPX_ROW_ALIGN) &&
               (!needs_weights ||
                extent_fits(view, p, weights, rows, weight_bytes, 4)));

    to->num_rows = rows;
    to->arrivals = post.arrivals;
    to->x = p.segment + x;
    to->topk_weights = reinterpret_cast<const float *>(p.segment + weights);
    if (!ok) {
        report_rank(view, CUDA_IN_COMBINE, post.step, EPX_ERR_PEER_DATA, r);
    }
    return ok;
}

// What a warp adds up at a time: a chunk of a batch of a token's rows.  Units
// follow each other by batches, then by the warps' share of all chunks.
struct unit {
    int64_t token;
    uint32_t chunk, batch, stage;
};

// A warp's way from one chunk to its next.
struct stride {
    int64_t tokens;
    uint32_t chunks;
};

__device__ stride
stride_make(const cuda_combine_args_t &args, const worker &w)
{
    stride s;

    s.tokens = w.count / args.num_chunks;
    s.chunks = (uint32_t)(w.count - s.tokens * args.num_chunks);
    return s;
}

__device__ unit
unit_first(const cuda_combine_args_t &args, const worker &w)
{
    unit u = {};

    u.token = w.index / args.num_chunks;
    u.chunk = (uint32_t)(w.index - u.token * args.num_chunks);
    return u;
}

__device__ void
unit_next(const cuda_combine_args_t &args, const stride &by, unit *u)
{
    u->stage = u->stage + 1 == args.num_stages ? 0 : u->stage + 1;
    u->batch++;
    if (u->batch < args.num_batches) {
        return;
    }
    u->batch = 0;
    u->token += by.tokens;
    u->chunk += by.chunks;
    if (u->chunk >= args.num_chunks) {
        u->chunk -= args.num_chunks;
        u->token++;
    }
}

__device__ uint32_t
unit_bytes(const cuda_combine_args_t &args, const unit &u)
{
    return (uint32_t)min((uint64_t)args.chunk_bytes,
                         args.row_bytes - (uint64_t)u.chunk * args.chunk_bytes);
}

// A row of a unit, each of its lanes one, on its way from memory: until its
// unit comes nothing may look at it, not even to choose between it and
// something else.
struct route_load {
    cuda_route_t route;
    float weight;
    bool is_sum; // of another node, which has no weight
};

__device__ route_load
load_route(const cuda_combine_args_t &args, const worker &w, const unit &u)
{
    int topk = (int)args.plan.key.topk;
    int k = (int)(u.batch * args.batch_rows) + w.lane;
    int64_t first = u.token * topk;
    route_load load = { { -1, 0 }, 0.0f, false };

    if (w.lane < args.batch_rows && k < topk && u.token < args.num_tokens) {
        load.route = args.plan.routes[first + k];
        if (args.topk_weights != nullptr) {
            int from =
                args.plan.pull_ks == nullptr ? k : args.plan.pull_ks[first + k];

            load.weight = args.topk_weights[first + max(from, 0)];
            load.is_sum = from < 0;
        }
    }
    return load;
}

__device__ float
weight_of(const route_load &load)
{
    return load.is_sum ? 1.0f : load.weight;
}

// Whether there is a row at a route, which a peer may have sent.
__device__ bool
has_row(const cuda_combine_args_t &args, const source *sources,
        cuda_route_t route)
{
    uint32_t places = args.is_partial ? (uint32_t)args.view.num_ranks
                                      : (uint32_t)cuda_num_places(&args.view);

    return (uint32_t)route.rank < places &&
           route.row < sources[route.rank].num_rows;
}

// Where the lane's row of a unit lies; null for none.
__device__ const char *
row_of(const cuda_combine_args_t &args, const worker &w, const unit &u,
       cuda_route_t route)
{
    if (!has_row(args, w.sources, route)) {
        return nullptr;
    }
    return w.sources[route.rank].x + route.row * args.row_bytes +
           (uint64_t)u.chunk * args.chunk_bytes;
}

// A lane's part of a chunk's sums.
template <epx_dtype_t DTYPE> struct sums {
    float of[VECTORS][element<DTYPE>::PER_VECTOR];

    __device__ void clear()
    {
#pragma unroll
        for (int v = 0; v < VECTORS; v++) {
#pragma unroll
            for (int i = 0; i < element<DTYPE>::PER_VECTOR; i++) {
                of[v][i] = 0.0f;
            }
        }
    }

    __device__ void add(int v, const uint4 &vector)
    {
        float terms[element<DTYPE>::PER_VECTOR];

        element<DTYPE>::load(vector, terms);
#pragma unroll
        for (int i = 0; i < element<DTYPE>::PER_VECTOR; i++) {
            of[v][i] = __fadd_rn(of[v][i], terms[i]);
        }
    }

    __device__ void add_weighted(int v, const uint4 &vector, float weight)
    {
        float terms[element<DTYPE>::PER_VECTOR];

        element<DTYPE>::load(vector, terms);
        add_terms(v, terms, weight);
    }

    __device__ void add_terms(int v, const float *terms, float weight)
    {
#pragma unroll
        for (int i = 0; i < element<DTYPE>::PER_VECTOR; i++) {
            of[v][i] = __fmaf_rn(weight, terms[i], of[v][i]);
        }
    }
};

// 16 bytes of this rank's own output, which need not be aligned.
__device__ void
store_own(char *to, const uint4 &value, bool is_aligned)
{
    if (is_aligned) {
        *reinterpret_cast<uint4 *>(to) = value;
        return;
    }
    for (int i = 0; i < 16; i++) {
        to[i] = reinterpret_cast<const char *>(&value)[i];
    }
}

// Before a chunk's first batch.
template <epx_dtype_t DTYPE>
__device__ void
begin_sums(const cuda_combine_args_t &args, const worker &w, const unit &u,
           sums<DTYPE> *sum)
{
    sum->clear();
    for (int b = 0; b < EPX_MAX_BIAS; b++) {
        if (args.bias[b] == nullptr) {
            continue;
        }
        const char *bias = args.bias[b] + u.token * args.row_bytes +
                           (uint64_t)u.chunk * args.chunk_bytes;
#pragma unroll
        for (int v = 0; v < VECTORS; v++) {
            uint32_t at = 16 * (v * 32 + w.lane);

            if (at < unit_bytes(args, u)) {
                sum->add(v, load_16(bias + at, args.own_is_aligned != 0));
            }
        }
    }
}

// After its last.
template <epx_dtype_t DTYPE>
__device__ void
end_sums(const cuda_combine_args_t &args, const worker &w, const unit &u,
         const sums<DTYPE> &sum)
{
    char *out = args.out + u.token * args.row_bytes +
                (uint64_t)u.chunk * args.chunk_bytes;

#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
        uint32_t at = 16 * (v * 32 + w.lane);

        if (at < unit_bytes(args, u)) {
            store_own(out + at, element<DTYPE>::round(sum.of[v]),
                      args.own_is_aligned != 0);
        }
    }
}

// Rows that get(r, at) gives, 16 bytes at a time; lanes past the end, where
// `bytes` is, add what nobody reads.
template <epx_dtype_t DTYPE, bool WEIGHTED, typename Get>
__device__ void
add_rows(sums<DTYPE> *sum, int count, const float *weights, int lane,
         uint32_t bytes, Get get)
{
    for (int r = 0; r < count; r++) {
#pragma unroll
        for (int v = 0; v < VECTORS; v++) {
            uint32_t at = 16 * (v * 32 + lane);
            uint4 vector = get(r, at);

            if constexpr (DTYPE == LOGFMT) {
                float terms[element<DTYPE>::PER_VECTOR];

                logfmt_octet(at < bytes ? vector : make_uint4(0, 0, 0, 0),
                             terms);
                sum->add_terms(v, terms, WEIGHTED ? weights[r] : 1.0f);
            } else if (WEIGHTED) {
                sum->add_weighted(v, vector, weights[r]);
            } else {
                sum->add(v, vector);
            }
        }
    }
}

// 3, with loads and stores.
template <epx_dtype_t DTYPE, bool WEIGHTED>
__device__ void
pull_plain(const cuda_combine_args_t &args, const worker &w,
           const route_load &first)
{
    stride by = stride_make(args, w);
    route_load load = first;
    sums<DTYPE> sum;

    for (unit u = unit_first(args, w), next = u; u.token < args.num_tokens;
         u = next, load = load_route(args, w, u)) {
        const char *row = row_of(args, w, u, load.route);
        uint32_t present = __ballot_sync(~0u, row != nullptr);
        uint32_t bytes = unit_bytes(args, u);

        unit_next(args, by, &next);
        if (u.batch == 0) {
            begin_sums(args, w, u, &sum);
        }
        while (present != 0) {
            int from = __ffs(present) - 1;
            const char *at = reinterpret_cast<const char *>(__shfl_sync(
                ~0u, reinterpret_cast<unsigned long long>(row), from));
            float weight = __shfl_sync(~0u, weight_of(load), from);

            present &= present - 1;
            add_rows<DTYPE, WEIGHTED>(
                &sum, 1, &weight, w.lane, bytes, [&](int, uint32_t offset) {
                    return offset < bytes ? ld_stream(at + offset)
                                          : make_uint4(0, 0, 0, 0);
                });
        }
        if (u.batch + 1 == args.num_batches) {
            end_sums(args, w, u, sum);
        }
    }
}

#if EPX__HAS_BULK

// Start loading a unit, if there is one.
__device__ void
load_unit(const cuda_combine_args_t &args, const worker &w, const unit &u,
          const route_load &load)
{
    if (u.token >= args.num_tokens) {
        return;
    }
    const char *row = row_of(args, w, u, load.route);
    uint32_t present = __ballot_sync(~0u, row != nullptr);
    int slot =
        u.stage * args.batch_rows + __popc(present & ((1u << w.lane) - 1));
    uint32_t bytes = unit_bytes(args, u);

    if (w.lane == 0) {
        w.counts[u.stage] = __popc(present);
        mbarrier_arrive_expect(&w.barriers[u.stage], __popc(present) * bytes);
    }
    __syncwarp();
    if (row != nullptr) {
        w.weights[slot] = weight_of(load);
        bulk_load(w.stages + slot * CHUNK, row, bytes, &w.barriers[u.stage]);
    }
}

// The same by a bulk store, which leaves the warp free; *turn_p is the half of
// outs to use.
template <epx_dtype_t DTYPE>
__device__ void
end_sums_bulk(const cuda_combine_args_t &args, const worker &w, const unit &u,
              const sums<DTYPE> &sum, uint32_t *turn_p)
{
    char *from = w.outs + *turn_p * CHUNK;

    // This half was read when all stores but the last one were.
    bulk_wait_read<1>();
    __syncwarp();
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
        *reinterpret_cast<uint4 *>(from + 16 * (v * 32 + w.lane)) =
            element<DTYPE>::round(sum.of[v]);
    }
    fence_proxy_async_shared();
    __syncwarp();
    if (w.lane == 0) {
        bulk_store(args.out + u.token * args.row_bytes +
                       (uint64_t)u.chunk * args.chunk_bytes,
                   from, unit_bytes(args, u));
    }
    bulk_commit();
    *turn_p ^= 1;
}

// 3, with bulk loads: num_stages - 1 units ahead, and routes one more.
template <epx_dtype_t DTYPE, bool WEIGHTED>
__device__ void
pull_bulk(const cuda_combine_args_t &args, const worker &w,
          const route_load &first)
{
    stride by = stride_make(args, w);
    unit u = unit_first(args, w), ahead = u;
    route_load load = first;
    uint32_t parity = 0, turn = 0;
    sums<DTYPE> sum;

    auto load_next = [&]() {
        unit now = ahead;
        route_load loaded = load;

        unit_next(args, by, &ahead);
        load = load_route(args, w, ahead);
        load_unit(args, w, now, loaded);
    };
    if (w.lane == 0) {
        for (uint32_t s = 0; s < args.num_stages; s++) {
            mbarrier_init(&w.barriers[s], 1);
        }
        fence_mbarrier_init();
    }
    __syncwarp();
    for (uint32_t s = 0; s + 1 < args.num_stages; s++) {
        load_next();
    }
    while (u.token < args.num_tokens) {
        int first = u.stage * args.batch_rows;
        const char *rows = w.stages + first * CHUNK;

        // The stage to load has been read by all lanes.
        __syncwarp();
        load_next();
        if (u.batch == 0) {
            begin_sums(args, w, u, &sum);
        }
        mbarrier_wait(&w.barriers[u.stage], parity);
        __syncwarp(); // for counts and weights
        add_rows<DTYPE, WEIGHTED>(&sum, w.counts[u.stage], w.weights + first,
                                  w.lane, unit_bytes(args, u),
                                  [&](int r, uint32_t offset) {
                                      return *reinterpret_cast<const uint4 *>(
                                          rows + r * CHUNK + offset);
                                  });
        if (u.batch + 1 == args.num_batches && args.own_is_aligned) {
            end_sums_bulk(args, w, u, sum, &turn);
        } else if (u.batch + 1 == args.num_batches) {
            end_sums(args, w, u, sum);
        }
        unit_next(args, by, &u);
        parity ^= u.stage == 0;
    }
    bulk_wait_written();
}

#endif

// out_topk_weights, a thread to each.
__device__ void
pull_weights(const cuda_combine_args_t &args, const worker &w)
{
    int topk = (int)args.plan.key.topk;
    bool by_rank = args.plan.key.layout == EPX_LAYOUT_RANK_MAJOR;
    int64_t count = args.num_tokens * topk;
    int64_t threads = (int64_t)gridDim.x * blockDim.x;

    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count;
         i += threads) {
        int64_t k = i % topk;
        int64_t first = by_rank ? i - k : i;
        float sum = 0.0f;

        for (int64_t j = first; j < (by_rank ? first + topk : first + 1); j++) {
            cuda_route_t route = args.plan.routes[j];

            if (!has_row(args, w.sources, route)) {
                continue;
            }
            const float *from = w.sources[route.rank].topk_weights;
            // An element that is passed on keeps its bits, -0 too.
            sum = by_rank ? __fadd_rn(sum, from[(uint64_t)route.row * topk + k])
                          : from[route.row];
        }
        args.out_topk_weights[i] = sum;
    }
}

template <epx_dtype_t DTYPE, bool BULK>
__device__ void
pull_rows(const cuda_combine_args_t &args, const worker &w,
          const route_load &first)
{
#if EPX__HAS_BULK
    if constexpr (BULK) {
        if (args.topk_weights != nullptr) {
            pull_bulk<DTYPE, true>(args, w, first);
        } else {
            pull_bulk<DTYPE, false>(args, w, first);
        }
        return;
    }
#endif
    if (args.topk_weights != nullptr) {
        pull_plain<DTYPE, true>(args, w, first);
    } else {
        pull_plain<DTYPE, false>(args, w, first);
    }
}

// 2. Every block: wait for the posts of this rank's node, and open the sources.
__device__ bool
sources_wait(const cuda_combine_args_t &args, const epx__post_t &post,
             source *sources)
{
    return posts_wait<epx__post_t, true>(
        args.view, post.step, CUDA_IN_COMBINE, post.signature,
        args.plan.rank_rows, blockIdx.x == 0 ? args.wait_ns : nullptr,
        [&](int r, const epx__post_t &theirs, const peer &p) {
            return threadIdx.x % 32 != 0 ||
                   source_open(args, r, theirs, p, &sources[r]);
        });
}

// 2 and 3.
template <epx_dtype_t DTYPE, bool BULK>
__device__ bool
pull(const cuda_combine_args_t &args, const epx__post_t &post, char *shared,
     bool sums_weights)
{
    worker w = worker_make(args, shared, BULK);
    route_load first = load_route(args, w, unit_first(args, w));

    if (!sources_wait(args, post, reinterpret_cast<source *>(shared))) {
        return false;
    }
#if EPX__HAS_BULK
    fence_proxy_async_global();
#endif
    pull_rows<DTYPE, BULK>(args, w, first);
    if (sums_weights) {
        pull_weights(args, w);
    }
    return true;
}

// ---- a kernel for each dtype ----

using kernel_t = void (*)(const cuda_combine_args_t);

// KERNELS<dtype, bulk>::kernel is the one for those; LOGFMT counts as a dtype.
template <template <epx_dtype_t, bool> class KERNELS>
kernel_t
kernel_of(epx_dtype_t dtype, cuda_mover_t mover)
{
    bool is_bulk = mover == CUDA_MOVER_BULK;

    if (dtype == LOGFMT) {
        return is_bulk ? KERNELS<LOGFMT, true>::kernel
                       : KERNELS<LOGFMT, false>::kernel;
    }
    switch (dtype) {
    case EPX_F32:
        return is_bulk ? KERNELS<EPX_F32, true>::kernel
                       : KERNELS<EPX_F32, false>::kernel;
    case EPX_F16:
        return is_bulk ? KERNELS<EPX_F16, true>::kernel
                       : KERNELS<EPX_F16, false>::kernel;
    default:
        return is_bulk ? KERNELS<EPX_BF16, true>::kernel
                       : KERNELS<EPX_BF16, false>::kernel;
    }
}

// Let all of them have so many bytes of shared memory.
template <template <epx_dtype_t, bool> class KERNELS>
cudaError_t
kernels_load(size_t max_shared)
{
    const epx_dtype_t dtypes[] = { EPX_F32, EPX_F16, EPX_BF16, LOGFMT };
    cudaError_t error = cudaSuccess;

    for (int i = 0; i < 8 && error == cudaSuccess; i++) {
        error = load(kernel_of<KERNELS>(dtypes[i / 2], (cuda_mover_t)(i % 2)),
                     max_shared);
    }
    return error;
}

} // namespace

#endif
