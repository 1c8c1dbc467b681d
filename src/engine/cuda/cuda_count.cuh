// SPDX-License-Identifier: MIT
// Counting a routing's rows, and telling what has been counted.
#ifndef EPX_ENGINE_CUDA_COUNT_CUH
#define EPX_ENGINE_CUDA_COUNT_CUH

#include "engine/cuda/cuda_step.cuh"

namespace
{

constexpr uint32_t NONE = 0xffffffffu;

__device__ int
expert_rank(int num_experts, int num_ranks, int expert)
{
    int quotient = num_experts / num_ranks;
    int extra = num_experts % num_ranks;
    int wide = extra * (quotient + 1);

    return expert < wide ? expert / (quotient + 1)
                         : extra + (expert - wide) / quotient;
}

// Number an entry among the warp's for the same key: all lanes.
__device__ uint32_t
number(uint32_t *hist, int key)
{
    uint32_t same = __match_any_sync(~0u, key);
    uint32_t before = __popc(same & ((1u << threadIdx.x % 32) - 1));
    uint32_t ordinal = key < 0 ? NONE : hist[key] + before;

    __syncwarp();
    if (key >= 0 && before == 0) {
        hist[key] += __popc(same);
    }
    return ordinal;
}

// Counts of a source that are known to be there: tokens[R], then rows[E].
__device__ uint32_t
count_read(const uint64_t *words, int key)
{
    return (uint32_t)__ldcg(
        reinterpret_cast<const unsigned long long *>(words + HEAD_WORDS + key));
}

// One thread: why a rank's routing is refused, as it has told.
__device__ cuda_refusal_t
refusal_of(const cuda_view_t &view, uint64_t step, int rank)
{
    epx__count_row_t row =
        words_read<epx__count_row_t>(view, step, rank, POST_WORDS);
    cuda_refusal_t refusal = {};

    refusal.status = (uint32_t)-EPX_ERR_EXPERT;
    refusal.rank = rank;
    refusal.bad_entry = row.bad_entry;
    refusal.bad_expert = row.bad_expert;
    return refusal;
}

// EXPERT_SLOTS, block 0: wait for the counts of this rank's experts and note
// them, unless the routing is refused; local[L] is zero before.  False: the
// group is broken.
__device__ bool
receive_counts(const cuda_dispatch_args_t &move, uint32_t *local, uint64_t step,
               bool is_refused)
{
    const cuda_view_t &view = move.view;
    const cuda_plan_view_t &plan = move.plan;
    int first =
        epx__first_expert((int)plan.key.num_experts, view.num_ranks, view.rank);
    bool ok = true;

    // A row of each expert, and one of tokens.
    for (int i = threadIdx.x; i < (plan.num_local + 1) * view.num_ranks && ok;
         i += blockDim.x) {
        int e = i / view.num_ranks, source = i % view.num_ranks;
        bool is_expert = e < plan.num_local;
        uint32_t count = 0;

        ok = word_wait(view, step, CUDA_IN_DISPATCH, source,
                       HEAD_WORDS +
                           (is_expert ? view.num_ranks + first + e : view.rank),
                       &count);
        if (ok && count > plan.key.max_tokens_per_rank) {
            report_rank(view, CUDA_IN_DISPATCH, step, EPX_ERR_PEER_DATA,
                        source);
            ok = false;
        }
        if (is_expert) {
            atomicAdd(&local[e], count);
        }
    }
    if (!__syncthreads_and(ok)) {
        return false;
    }
    for (int e = threadIdx.x; e < plan.num_local && !is_refused;
         e += blockDim.x) {
        plan.expert_rows[e] = local[e];
    }
    return true;
}

// EXPERT_SLOTS, one warp: what the host is told, and the caller's counts, after
// receive_counts.  It takes as long as the host's memory, which the other warps
// need not wait for.
__device__ void
tell_slots(const cuda_dispatch_args_t &move, const cuda_told_t &told,
           const uint32_t *local, uint64_t step, const cuda_refusal_t &refusal)
{
    const cuda_view_t &view = move.view;
    const cuda_plan_view_t &plan = move.plan;
    cuda_routing_t *routing = plan.routing;
    int64_t *tokens = cuda_record_rank_tokens(told.record);
    int64_t *rows = tokens + view.num_ranks;
    bool ok = refusal.status == 0;
    int lane = threadIdx.x % 32;
    uint32_t received = 0;

    for (int r = lane; ok && r < view.num_ranks; r += 32) {
        tokens[r] = count_read(words_at(view, view.rank, step, r), view.rank);
    }
    for (int e = lane; ok && e < plan.num_local; e += 32) {
        rows[e] = local[e];
        received += local[e];
        if (move.recv_expert_counts != nullptr) {
            move.recv_expert_counts[e] = (int32_t)local[e];
        }
        if (move.recv_expert_totals != nullptr) {
            move.recv_expert_totals[e] += (int32_t)local[e];
        }
    }
    received = __reduce_add_sync(~0u, received);
    if (lane == 0) {
        told.record->refusal = refusal;
        told.record->num_recv_rows = received;
        routing->failed = !ok;
        // What runs in a graph is not counted, but told of.
        if (told.generation != 0) {
            routing->generation = told.generation;
        }
    }
    // Each lane's own writes before the word that the host waits for.
    fence_acq_rel_sys();
    __syncwarp();
    if (lane == 0) {
        // Acquired by the host, in epx_plan_counts.
        st_release_sys(&told.record->generation, routing->generation);
    }
}

// Block 0: the counts that the caller wants.
__device__ void
give_counts(const cuda_dispatch_args_t &move)
{
    for (int e = threadIdx.x; e < move.plan.num_local; e += blockDim.x) {
        if (move.recv_expert_counts != nullptr) {
            move.recv_expert_counts[e] = (int32_t)move.plan.expert_rows[e];
        }
        if (move.recv_expert_totals != nullptr) {
            move.recv_expert_totals[e] += (int32_t)move.plan.expert_rows[e];
        }
    }
}

// Block 0: what the host, and later kernels, are told, once the plan's counts
// are in place and those of all ranks have been waited for.
__device__ void
tell_counts(const cuda_view_t &view, const cuda_plan_view_t &plan,
            const cuda_told_t &told, bool is_new, uint64_t step,
            uint64_t plan_id, const cuda_refusal_t &refusal)
{
    bool by_rank = plan.key.layout == EPX_LAYOUT_RANK_MAJOR;
    int num_local = plan.num_local;
    bool ok = refusal.status == 0;
    int64_t *tokens = cuda_record_rank_tokens(told.record);
    int64_t *rows = tokens + view.num_ranks;
    int64_t *offsets = rows + num_local;

    for (int r = threadIdx.x; ok && r < view.num_ranks; r += blockDim.x) {
        tokens[r] = count_read(words_at(view, view.rank, step, r), view.rank);
    }
    for (int e = threadIdx.x; ok && e <= num_local; e += blockDim.x) {
        if (e < num_local) {
            rows[e] = plan.expert_rows[e];
        }
        offsets[e] = plan.expert_offsets[e];
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        uint64_t own = plan.rank_rows[view.rank];
        cuda_routing_t *routing = plan.routing;
        int64_t received = 0;

        for (int e = 0; ok && e < num_local; e++) {
            received += plan.expert_rows[e];
        }
        told.record->refusal = refusal;
        if (refusal.status == (uint32_t)-EPX_ERR_CAPACITY) {
            told.record->refusal.rows = plan.rank_rows[refusal.rank];
        }
        told.record->num_rows =
            plan.key.recv_capacity > 0 ? plan.key.recv_capacity : own;
        told.record->num_recv_rows = by_rank ? own : received;
        routing->plan_id = plan_id;
        routing->failed = !ok;
        // What runs in a graph is not counted, but told of.
        if (told.generation != 0) {
            routing->generation = told.generation;
        } else if (is_new) {
            routing->generation = 1;
        }
        fence_acq_rel_sys();
        // Acquired by the host, in epx_plan_counts.
        st_release_sys(&told.record->generation, routing->generation);
    }
}

} // namespace

#endif
