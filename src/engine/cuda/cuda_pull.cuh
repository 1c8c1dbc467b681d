// SPDX-License-Identifier: MIT
//
// How a kernel adds up the rows of tokens, wherever they lie: each warp takes
// chunks of tokens, pulls the chunk of every row of the token, a batch at a
// time, adds them up in the order of the routes, rounds once and writes once.
//
// Shared memory of a block, with S sources: the ranks, and with several nodes
// the nodes behind them:
//     sources  [S]
//     rows     [warps][stages][batch]
// and with bulk copies
//     barriers [warps][stages]
//     counts   [warps][stages]       rows of the unit in a stage
//     stages   [warps][stages][batch][chunk]
// Of a warp's ROOM, tokens with few rows make more stages.
#ifndef EPX_ENGINE_CUDA_PULL_CUH
#define EPX_ENGINE_CUDA_PULL_CUH

#include "engine/cuda/cuda_element.cuh"
#include "engine/cuda/cuda_logfmt.cuh"
#include "engine/cuda/cuda_step.cuh"

namespace
{

constexpr int WARPS = 12;
constexpr int MOST_ROWS = 8;    // of a batch
constexpr int SPAN = 16 * 32;   // bytes that a warp takes at once
constexpr int ROOM = 16 * 1024; // of a warp, for two batches at least
constexpr int SLOTS = ROOM / SPAN / 2;

// In the longest chunk.  With few rows much of the work is by the chunk.
__host__ __device__ constexpr int
spans_of(uint32_t batch_rows)
{
    return batch_rows <= 2 ? 4 : 2;
}

static_assert(2 * MOST_ROWS * spans_of(MOST_ROWS) * SPAN <= ROOM &&
                  2 * 2 * spans_of(2) * SPAN <= ROOM,
              "a warp's room holds two batches of any length");
static_assert(spans_of(1) >= 2 && spans_of(MOST_ROWS) >= 2,
              "no more rows than slots");

// Where a rank keeps its outputs, or what has come from a node.
struct source {
    const char *x;
    const float *topk_weights;
    uint64_t num_rows;
    uint64_t arrivals; // see epx__post_t
};

// A row of a batch.
struct row {
    const char *x;
    float weight;
};

struct shared_map {
    size_t rows, barriers, counts, stages, end;
};

__host__ __device__ shared_map
shared_make(const cuda_view_t &view, bool is_bulk)
{
    shared_map map;

    map.rows = (size_t)cuda_num_places(&view) * sizeof(source);
    map.barriers = map.rows + WARPS * SLOTS * sizeof(row);
    map.counts = map.barriers + WARPS * SLOTS * sizeof(uint64_t);
    map.stages = (map.counts + WARPS * SLOTS * sizeof(int) + 127) / 128 * 128;
    map.end = map.stages + (is_bulk ? (size_t)WARPS * ROOM : 0);
    return map;
}

struct worker {
    const source *sources;
    row *rows;          // [stages][batch]
    uint64_t *barriers; // [stages]
    int *counts;        // [stages]
    char *stages;       // [stages][batch][chunk]

    int64_t index, count;
    int lane;
};

__device__ worker
worker_make(const cuda_combine_args_t &args, char *shared, bool is_bulk)
{
    shared_map map = shared_make(args.view, is_bulk);
    int warp = threadIdx.x / 32;
    int first = warp * SLOTS;
    worker w;

    w.sources = reinterpret_cast<source *>(shared);
    w.rows = reinterpret_cast<row *>(shared + map.rows) + first;
    w.barriers = reinterpret_cast<uint64_t *>(shared + map.barriers) + first;
    w.counts = reinterpret_cast<int *>(shared + map.counts) + first;
    w.stages = shared + map.stages + (size_t)warp * ROOM;
    w.index = (int64_t)blockIdx.x * WARPS + warp;
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
    return u.chunk + 1 == args.num_chunks ? args.last_bytes : args.chunk_bytes;
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
        // Kept apart: were the address chosen first, the weight would be asked
        // for only when what is loaded here has come.
        if (args.topk_weights != nullptr && args.plan.pull_ks == nullptr) {
            load.weight = args.topk_weights[first + k];
        } else if (args.topk_weights != nullptr) {
            int from = args.plan.pull_ks[first + k];

            load.weight = args.topk_weights[first + max(from, 0)];
            load.is_sum = from < 0;
        }
    }
    return load;
}

__device__ float
weight_of(const cuda_combine_args_t &args, const route_load &load)
{
    return load.is_sum || args.topk_weights == nullptr ? 1.0f : load.weight;
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

// Where the lane's row of a unit lies; x is null for none.
__device__ row
row_of(const cuda_combine_args_t &args, const worker &w, const unit &u,
       const route_load &load)
{
    row own = { nullptr, weight_of(args, load) };

    if (has_row(args, w.sources, load.route)) {
        own.x = w.sources[load.route.rank].x + load.route.row * args.row_bytes +
                (uint64_t)u.chunk * args.chunk_bytes;
    }
    return own;
}

// A lane's part of a chunk's sums.
template <epx_dtype_t DTYPE, int SPANS> struct sums {
    float of[SPANS][element<DTYPE>::PER_VECTOR];

    __device__ void clear()
    {
#pragma unroll
        for (int v = 0; v < SPANS; v++) {
#pragma unroll
            for (int i = 0; i < element<DTYPE>::PER_VECTOR; i++) {
                of[v][i] = 0.0f;
            }
        }
    }

    __device__ void add_bias(int v, const uint4 &vector)
    {
        float terms[element<DTYPE>::PER_VECTOR];

        element<DTYPE>::load(vector, terms);
        add_terms(v, terms, 1.0f);
    }

    // All lanes at a time.
    __device__ void add_row(int v, const uint4 &vector, float weight)
    {
        float terms[element<DTYPE>::PER_VECTOR];

        if constexpr (DTYPE == LOGFMT) {
            logfmt_octet(vector, terms);
        } else {
            element<DTYPE>::load(vector, terms);
        }
        add_terms(v, terms, weight);
    }

    // With a weight of one it is the same as a sum.
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
template <epx_dtype_t DTYPE, int SPANS>
__device__ void
begin_sums(const cuda_combine_args_t &args, const worker &w, const unit &u,
           sums<DTYPE, SPANS> *sum)
{
    uint32_t bytes = unit_bytes(args, u);

    sum->clear();
    if (args.has_bias == 0) {
        return;
    }
    for (int b = 0; b < EPX_MAX_BIAS; b++) {
        if (args.bias[b] == nullptr) {
            continue;
        }
        const char *bias = args.bias[b] + u.token * args.row_bytes +
                           (uint64_t)u.chunk * args.chunk_bytes;
#pragma unroll
        for (int v = 0; v < SPANS; v++) {
            uint32_t at = v * SPAN + 16 * w.lane;

            if (at < bytes) {
                sum->add_bias(v, load_16(bias + at, args.own_is_aligned != 0));
            }
        }
    }
}

// After its last.
template <epx_dtype_t DTYPE, int SPANS>
__device__ void
end_sums(const cuda_combine_args_t &args, const worker &w, const unit &u,
         const sums<DTYPE, SPANS> &sum)
{
    uint32_t bytes = unit_bytes(args, u);
    char *out = args.out + u.token * args.row_bytes +
                (uint64_t)u.chunk * args.chunk_bytes;

#pragma unroll
    for (int v = 0; v < SPANS; v++) {
        uint32_t at = v * SPAN + 16 * w.lane;

        if (at < bytes) {
            store_own(out + at, element<DTYPE>::round(sum.of[v]),
                      args.own_is_aligned != 0);
        }
    }
}

// Rows that get(r, at) gives, 16 bytes at a time, and weight(r).  A group of
// rows is asked for before the first of them is added.  Lanes past the end of a
// chunk add what nobody reads.
template <int GROUP, epx_dtype_t DTYPE, int SPANS, typename Get,
          typename Weight>
__device__ void
add_rows(sums<DTYPE, SPANS> *sum, int count, int lane, Get get, Weight weight)
{
    for (int first = 0; first < count; first += GROUP) {
        uint4 vectors[GROUP][SPANS];

#pragma unroll
        for (int r = 0; r < GROUP; r++) {
#pragma unroll
            for (int v = 0; v < SPANS && first + r < count; v++) {
                vectors[r][v] = get(first + r, v * SPAN + 16 * lane);
            }
        }
#pragma unroll
        for (int r = 0; r < GROUP && first + r < count; r++) {
            float by = weight(first + r);

#pragma unroll
            for (int v = 0; v < SPANS; v++) {
                sum->add_row(v, vectors[r][v], by);
            }
        }
    }
}

// 3, with loads and stores.
template <epx_dtype_t DTYPE, int SPANS>
__device__ void
pull_plain(const cuda_combine_args_t &args, const worker &w,
           const route_load &first)
{
    stride by = stride_make(args, w);
    route_load load = first;
    sums<DTYPE, SPANS> sum;

    for (unit u = unit_first(args, w), next = u; u.token < args.num_tokens;
         u = next) {
        uint32_t bytes = unit_bytes(args, u);
        row own = row_of(args, w, u, load);
        uint32_t present = __ballot_sync(~0u, own.x != nullptr);

        unit_next(args, by, &next);
        load = load_route(args, w, next);
        if (own.x != nullptr) {
            w.rows[__popc(present & ((1u << w.lane) - 1))] = own;
        }
        __syncwarp();
        if (u.batch == 0) {
            begin_sums(args, w, u, &sum);
        }
        add_rows<DTYPE == LOGFMT ? 1 : 4>(
            &sum, __popc(present), w.lane,
            [&](int r, uint32_t at) {
                return at < bytes ? ld_stream(w.rows[r].x + at)
                                  : make_uint4(0, 0, 0, 0);
            },
            [&](int r) { return w.rows[r].weight; });
        if (u.batch + 1 == args.num_batches) {
            end_sums(args, w, u, sum);
        }
        __syncwarp(); // the rows have been read
    }
}

#if EPX__HAS_BULK

// Start loading a unit, if there is one.
template <int SPANS>
__device__ void
load_unit(const cuda_combine_args_t &args, const worker &w, const unit &u,
          const route_load &load)
{
    if (u.token >= args.num_tokens) {
        return;
    }
    row own = row_of(args, w, u, load);
    uint32_t present = __ballot_sync(~0u, own.x != nullptr);
    int slot =
        u.stage * args.batch_rows + __popc(present & ((1u << w.lane) - 1));
    uint32_t bytes = unit_bytes(args, u);

    if (w.lane == 0) {
        w.counts[u.stage] = __popc(present);
        mbarrier_arrive_expect(&w.barriers[u.stage], __popc(present) * bytes);
    }
    __syncwarp();
    if (own.x != nullptr) {
        w.rows[slot].weight = own.weight;
        bulk_load(w.stages + slot * (SPANS * SPAN), own.x, bytes,
                  &w.barriers[u.stage]);
    }
}

// 3, with bulk loads: num_stages - 1 units ahead, and routes one more.
template <epx_dtype_t DTYPE, int SPANS>
__device__ void
pull_bulk(const cuda_combine_args_t &args, const worker &w,
          const route_load &first)
{
    stride by = stride_make(args, w);
    unit u = unit_first(args, w), ahead = u;
    route_load load = first;
    uint32_t parity = 0;
    sums<DTYPE, SPANS> sum;

    auto load_next = [&]() {
        unit now = ahead;
        route_load loaded = load;

        unit_next(args, by, &ahead);
        load = load_route(args, w, ahead);
        load_unit<SPANS>(args, w, now, loaded);
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
        int slot = u.stage * args.batch_rows;
        const row *rows = w.rows + slot;
        const char *stage = w.stages + slot * (SPANS * SPAN);

        // The stage to load has been read by all lanes.
        __syncwarp();
        load_next();
        if (u.batch == 0) {
            begin_sums(args, w, u, &sum);
        }
        mbarrier_wait(&w.barriers[u.stage], parity);
        __syncwarp(); // for counts and weights
        add_rows<1>(
            &sum, w.counts[u.stage], w.lane,
            [&](int r, uint32_t at) {
                const uint4 *from = reinterpret_cast<const uint4 *>(
                    stage + r * (SPANS * SPAN) + at);

                // A block of LogFMT may be cut short.
                return DTYPE != LOGFMT || at < unit_bytes(args, u)
                           ? *from
                           : make_uint4(0, 0, 0, 0);
            },
            [&](int r) { return rows[r].weight; });
        if (u.batch + 1 == args.num_batches) {
            end_sums(args, w, u, sum);
        }
        unit_next(args, by, &u);
        parity ^= u.stage == 0;
    }
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

template <epx_dtype_t DTYPE, bool BULK, int SPANS>
__device__ void
pull_chunks(const cuda_combine_args_t &args, const worker &w,
            const route_load &first)
{
#if EPX__HAS_BULK
    if constexpr (BULK) {
        pull_bulk<DTYPE, SPANS>(args, w, first);
        return;
    }
#endif
    pull_plain<DTYPE, SPANS>(args, w, first);
}

template <epx_dtype_t DTYPE, bool BULK>
__device__ void
pull_rows(const cuda_combine_args_t &args, const worker &w,
          const route_load &first)
{
    if (spans_of(args.batch_rows) == spans_of(1)) {
        pull_chunks<DTYPE, BULK, spans_of(1)>(args, w, first);
    } else {
        pull_chunks<DTYPE, BULK, spans_of(MOST_ROWS)>(args, w, first);
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
