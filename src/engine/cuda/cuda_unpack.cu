// SPDX-License-Identifier: MIT
//
// The end of a dispatch that went to receive slots: once all ranks' slots have
// been filled, each warp takes some of them and brings their rows to the places
// where they belong.  Nobody waits for this rank meanwhile.
//
// With new routing a slot says which number its row has among its source's rows
// for an expert; where those begin follows from the counts of all sources.
//
// Shared memory of a block: cuda_rows.cuh's, then u32
//     begins  [R + 1]   slots before each source's
//     before  [R][L]    rows before each source's, by expert
#include "engine/cuda/cuda_count.cuh"
#include "engine/cuda/cuda_launch.cuh"
#include "engine/cuda/cuda_send.cuh"

namespace
{

struct unpack_map {
    size_t begins, before, end;
};

__host__ __device__ unpack_map
unpack_map_make(const cuda_unpack_args_t &args, bool is_bulk)
{
    size_t ranks = (size_t)args.move.view.num_ranks;
    unpack_map map;

    map.begins = round_up(shared_make(args.move, is_bulk).end, 16);
    map.before = map.begins + (ranks + 1) * sizeof(uint32_t);
    // With as many rows as the one of tokens that receive_counts adds up.
    map.end =
        map.before + (ranks + 1) * args.move.plan.num_local * sizeof(uint32_t);
    return map;
}

// The slots of all sources as one array of tokens.
struct slot_source {
    const cuda_unpack_args_t &args;
    const uint32_t *begins, *before;
    uint64_t step;
    int64_t num_tokens;

    __device__ int source_of(int64_t token) const
    {
        int low = 0, high = args.move.view.num_ranks - 1;

        while (low < high) { // the last source that does not begin after it
            int middle = (low + high + 1) / 2;

            if (begins[middle] <= token) {
                low = middle;
            } else {
                high = middle - 1;
            }
        }
        return low;
    }

    __device__ const char *slot(int64_t token) const
    {
        const cuda_view_t &view = args.move.view;
        int source = source_of(token);
        uint64_t most = args.move.plan.key.max_tokens_per_rank;

        if (!is_near(view, source)) {
            return far_slots(view, args.move.rail.by_forward[EPX__LANE_OUT],
                             source) +
                   (uint64_t)(token - begins[source]) * args.slots.slot_bytes;
        }
        uint64_t parity =
            (uint32_t)__ldcg(reinterpret_cast<const unsigned long long *>(
                words_at(view, view.rank, step, source) +
                offsetof(epx__post_t, slot_parity) / sizeof(uint32_t))) &
            1;
        uint64_t index = (parity * view.num_ranks + source) * most +
                         (uint64_t)(token - begins[source]);

        return view.segments[view.rank] + args.move.plan.slots[view.rank] +
               index * args.slots.slot_bytes;
    }

    __device__ const char *row(int64_t token) const
    {
        return slot(token) + args.slots.payload_at;
    }

    __device__ const uint32_t *scales(int64_t token) const
    {
        return args.move.scales == nullptr
                   ? nullptr
                   : reinterpret_cast<const uint32_t *>(slot(token) +
                                                        args.slots.scales_at);
    }

    // A slot's place for its entry k; rank -1 for none here.
    __device__ cuda_route_t route(const char *from, int source, int k,
                                  int expert) const
    {
        const cuda_plan_view_t &plan = args.move.plan;
        const cuda_view_t &view = args.move.view;
        int first = epx__first_expert((int)plan.key.num_experts, view.num_ranks,
                                      view.rank);
        const uint32_t *rows =
            reinterpret_cast<const uint32_t *>(from + args.slots.rows_at);
        int local = expert - first;

        if (expert < first || local >= plan.num_local) {
            return { -1, 0 };
        }
        uint32_t row = __ldcg(rows + k);
        if (args.is_new) {
            uint32_t most = (uint32_t)plan.key.max_tokens_per_rank;

            row = row < most ? row + before[source * plan.num_local + local] +
                                   local * most * view.num_ranks
                             : NONE; // which no target has
        }
        return { view.rank, row };
    }

    __device__ token_load load(const worker &w, int64_t token) const
    {
        int topk = (int)args.move.plan.key.topk;
        bool is_there = token < num_tokens;
        const char *from = is_there ? slot(token) : nullptr;
        int source = is_there ? source_of(token) : 0;
        token_load load = {};

        if (is_there) {
            load.token = __ldcg(reinterpret_cast<const int32_t *>(from));
        }
#pragma unroll
        for (int i = 0; i < EPX_MAX_TOPK / 32; i++) {
            int k = i * 32 + w.lane;

            load.routes[i] = { -1, 0 };
            load.entries[i] = { -1, 0.0f };
            if (is_there && k < topk) {
                const float *weights = reinterpret_cast<const float *>(
                    from + args.slots.weights_at);
                int expert =
                    __ldcg(reinterpret_cast<const int32_t *>(from) + 4 + k);

                load.entries[i] = { expert, __ldcg(weights + k) };
                load.routes[i] = route(from, source, k, expert);
            }
        }
        if (args.move.plan.key.layout == EPX_LAYOUT_RANK_MAJOR) {
            keep_first(w, &load);
        }
        return load;
    }

    // A token has one row here, which all of its routes name: the first of them
    // stays, in front.
    __device__ void keep_first(const worker &w, token_load *load) const
    {
        cuda_route_t first = { -1, 0 };

#pragma unroll
        for (int i = EPX_MAX_TOPK / 32 - 1; i >= 0; i--) {
            uint32_t here = __ballot_sync(~0u, load->routes[i].rank >= 0);
            uint32_t row = __shfl_sync(~0u, load->routes[i].row,
                                       here == 0 ? 0 : __ffs(here) - 1);

            if (here != 0) {
                first = { args.move.view.rank, row };
            }
            load->routes[i] = { -1, 0 };
        }
        if (w.lane == 0) {
            load->routes[0] = first;
        }
    }
};

// Every block: how many slots each source has filled, and with new routing
// where its rows begin.  False: the group is broken.
__device__ bool
count_slots(const cuda_unpack_args_t &args, uint64_t step, uint32_t *begins,
            uint32_t *before)
{
    const cuda_view_t &view = args.move.view;
    const cuda_plan_view_t &plan = args.move.plan;
    int num_ranks = view.num_ranks;
    uint32_t most = (uint32_t)plan.key.max_tokens_per_rank;
    int first =
        epx__first_expert((int)plan.key.num_experts, num_ranks, view.rank);
    bool ok = true;

    // All words are there: arrivals come after them.
    for (int s = threadIdx.x; s < num_ranks; s += blockDim.x) {
        uint32_t count =
            is_masked(view, s)
                ? 0
                : count_read(words_at(view, view.rank, step, s), view.rank);

        begins[s + 1] = count;
        if (count > most) {
            report_rank(view, CUDA_IN_DISPATCH, step, EPX_ERR_PEER_DATA, s);
            ok = false;
        }
    }
    for (int e = threadIdx.x; args.is_new && e < plan.num_local;
         e += blockDim.x) {
        uint32_t sum = 0;

        for (int s = 0; s < num_ranks; s++) {
            uint32_t count =
                is_masked(view, s)
                    ? 0
                    : count_read(words_at(view, view.rank, step, s),
                                 num_ranks + first + e);

            before[s * plan.num_local + e] = sum;
            sum += count;
            if (count > most) {
                report_rank(view, CUDA_IN_DISPATCH, step, EPX_ERR_PEER_DATA, s);
                ok = false;
            }
        }
    }
    ok = __syncthreads_and(ok) != 0;
    if (threadIdx.x == 0) {
        begins[0] = 0;
        for (int s = 0; s < num_ranks && ok; s++) {
            begins[s + 1] += begins[s];
        }
    }
    __syncthreads();
    return ok;
}

// The routes of this rank's own tokens, which so far have their number among
// its rows for an expert.
__device__ void
finish_routes(const cuda_unpack_args_t &args, uint64_t step)
{
    const cuda_view_t &view = args.move.view;
    const cuda_plan_view_t &plan = args.move.plan;
    int num_experts = (int)plan.key.num_experts;
    int64_t count = args.move.num_tokens * plan.key.topk;
    uint32_t most = (uint32_t)plan.key.max_tokens_per_rank;

    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count;
         i += (int64_t)gridDim.x * blockDim.x) {
        int expert = plan.experts[i];

        if (expert < 0) {
            continue;
        }
        int rank = plan.routes[i].rank;
        int local =
            expert - epx__first_expert(num_experts, view.num_ranks, rank);
        uint32_t row =
            plan.routes[i].row + (uint32_t)local * most * view.num_ranks;

        for (int s = 0; s < view.rank; s++) {
            if (is_masked(view, s)) {
                continue;
            }
            row += min(most, count_read(words_at(view, view.rank, step, s),
                                        view.num_ranks + expert));
        }
        plan.routes[i].row = row;
    }
}

// Wait for all ranks' posts and slots; a rank whose routing is bad is noted.
__device__ bool
wait_slots(const cuda_unpack_args_t &args, uint64_t step,
           const epx__signature_t &mine, target *targets, int *refused_by)
{
    const cuda_dispatch_args_t &move = args.move;
    const cuda_view_t &view = move.view;
    int64_t *wait_ns = blockIdx.x == 0 ? move.wait_ns : nullptr;
    bool ok = posts_wait<head, false>(
        view, step, CUDA_IN_DISPATCH, mine, move.plan.rank_rows, wait_ns,
        [&](int r, const head &h, const peer &p) {
            if (h.row.bad_entry != 0) {
                atomicMin(refused_by, r);
            }
            targets[r].arrivals = h.post.arrivals;
            return r != view.rank ||
                   target_open(move, r, h.post, p, &targets[r]);
        });

    for (int r = threadIdx.x; r < view.num_ranks && ok; r += blockDim.x) {
        if (is_near(view, r)) {
            ok = arrivals_wait_timed(view, step, CUDA_IN_DISPATCH, r,
                                     targets[r].arrivals, wait_ns);
        } else if (!is_masked(view, r) &&
                   words_read<epx__count_row_t>(view, step, r, POST_WORDS)
                           .bad_entry != 0) {
            atomicMin(refused_by, r); // its words came before its slots
        }
    }
    return __syncthreads_and(ok) != 0;
}

template <bool BULK>
__global__ void __launch_bounds__(256, 1)
    unpack_kernel(const __grid_constant__ cuda_unpack_args_t args)
{
    grid_wait();
    char *shared = dynamic_shared();
    __shared__ epx__signature_t mine;
    __shared__ int refused_by;
    const cuda_dispatch_args_t &move = args.move;
    const cuda_view_t &view = move.view;
    const cuda_routing_t *routing = move.plan.routing;
    target *targets = reinterpret_cast<target *>(shared);
    unpack_map map = unpack_map_make(args, BULK);
    uint32_t *begins = reinterpret_cast<uint32_t *>(shared + map.begins);
    uint32_t *before = reinterpret_cast<uint32_t *>(shared + map.before);
    uint64_t step = routing->open_step;
    bool works = !is_broken(view) && (args.is_new || routing->failed == 0);

    if (threadIdx.x == 0) {
        refused_by = INT32_MAX;
        mine = move.post.signature;
        mine.plan_id = routing->plan_id;
    }
    if (!__syncthreads_and(works) ||
        !wait_slots(args, step, mine, targets, &refused_by)) {
        return;
    }
#if EPX__HAS_BULK
    fence_proxy_async_global();
#endif
    bool is_refused = refused_by != INT32_MAX;
    if (!count_slots(args, step, begins, before)) {
        return;
    }
    if (!is_refused) {
        worker w = worker_make(move, shared, BULK);
        slot_source source = { args, begins, before, step,
                               begins[view.num_ranks] };

#if EPX__HAS_BULK
        if (BULK) {
            load_first(move, w, source);
            __syncwarp();
        }
#endif
        send_rows<BULK, false, false>(move, w, source);
        clear_padding(move, w);
        if (args.is_new) {
            finish_routes(args, step);
        }
    }
    if (blockIdx.x != 0) {
        return;
    }
    if (args.is_new) {
        uint32_t *local = before + view.num_ranks * move.plan.num_local;
        cuda_refusal_t refusal = {};

        __syncthreads();
        for (int e = threadIdx.x; e < move.plan.num_local; e += blockDim.x) {
            local[e] = 0;
        }
        __syncthreads();
        if (is_refused) {
            refusal = refusal_of(view, step, refused_by);
        }
        (void)receive_counts(move, args.told,
                             generation_of(args.told, *routing), local, step,
                             refusal);
    } else {
        give_counts(move);
    }
}

} // namespace

cudaError_t
cuda_unpack_load(size_t max_shared)
{
    cudaError_t error = load(unpack_kernel<true>, max_shared);

    return error == cudaSuccess ? load(unpack_kernel<false>, max_shared)
                                : error;
}

size_t
cuda_unpack_shape(cuda_unpack_args_t *args, cuda_mover_t mover,
                  size_t max_shared)
{
    bool is_bulk = mover == CUDA_MOVER_BULK;
    size_t more = unpack_map_make(*args, is_bulk).end -
                  shared_make(args->move, is_bulk).end;

    if (more >= max_shared) {
        return more + max_shared;
    }
    (void)cuda_dispatch_shape(&args->move, mover, max_shared - more);
    return unpack_map_make(*args, is_bulk).end;
}

cudaError_t
cuda_unpack_launch(const cuda_unpack_args_t *args, cuda_mover_t mover,
                   int num_blocks, cudaStream_t stream)
{
    bool is_bulk = mover == CUDA_MOVER_BULK;
    size_t shared = unpack_map_make(*args, is_bulk).end;

    return launch(is_bulk ? unpack_kernel<true> : unpack_kernel<false>,
                  num_blocks, args->move.num_warps * 32, shared, *args, stream);
}
