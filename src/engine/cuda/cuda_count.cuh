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

// The rank of an expert; -1 when it is masked.
__device__ int
taking_rank(const cuda_view_t &view, int num_experts, int expert)
{
    int rank = expert_rank(num_experts, view.num_ranks, expert);

    return is_masked(view, rank) ? -1 : rank;
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

// Counts of a source, not masked, that are known to be there: tokens[R], then
// rows[E].
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

// The count of a local expert, where the caller wants it.
__device__ void
give_count(const cuda_dispatch_args_t &move, int e, uint32_t count)
{
    if (move.recv_expert_counts != nullptr) {
        move.recv_expert_counts[e] = (int32_t)count;
    }
    if (move.recv_expert_totals != nullptr) {
        move.recv_expert_totals[e] += (int32_t)count;
    }
}

// Block 0: all of them.
__device__ void
give_counts(const cuda_dispatch_args_t &move)
{
    for (int e = threadIdx.x; e < move.plan.num_local; e += blockDim.x) {
        give_count(move, e, (uint32_t)move.plan.expert_rows[e]);
    }
}

// ---- what the host is told: see cuda_record_t ----

// The generation of a routing that is not the plan's first.
__device__ uint64_t
generation_of(const cuda_told_t &told, const cuda_routing_t &routing)
{
    return told.generation != 0 ? told.generation : routing.generation;
}

// One thread: note the routing for later kernels, and tell the host whether
// there are counts.
__device__ void
tell_verdict(const cuda_told_t &told, cuda_routing_t *routing,
             uint64_t generation, const cuda_refusal_t &refusal)
{
    routing->generation = generation;
    routing->failed = refusal.status != 0;
    if (refusal.status != 0) {
        told.record->refusal = refusal;
        // Before the word; acquired by cuda_counts_refused.
        fence_acq_rel_sys();
    }
    word_put(told.record->words, generation, refusal.status);
}

// EXPERT_SLOTS, one block: wait for the counts of this rank's experts, and tell
// them whoever wants to know, unless the routing is refused; local[L] is zero
// before.  False: the group is broken.
__device__ bool
receive_counts(const cuda_dispatch_args_t &move, const cuda_told_t &told,
               uint64_t generation, uint32_t *local, uint64_t step,
               const cuda_refusal_t &refusal)
{
    const cuda_view_t &view = move.view;
    const cuda_plan_view_t &plan = move.plan;
    uint32_t num_ranks = (uint32_t)view.num_ranks;
    int first =
        epx__first_expert((int)plan.key.num_experts, view.num_ranks, view.rank);
    uint64_t *words = told.record->words + 1;
    bool ok = true;

    // A row of each expert, and one of tokens.
    for (uint32_t i = threadIdx.x; i < (plan.num_local + 1) * num_ranks && ok;
         i += blockDim.x) {
        uint32_t e = i / num_ranks, source = i - e * num_ranks;
        bool is_expert = e < plan.num_local;
        uint32_t count = 0;

        ok = is_masked(view, source) ||
             word_wait(view, step, CUDA_IN_DISPATCH, source,
                       HEAD_WORDS +
                           (is_expert ? num_ranks + first + e : view.rank),
                       &count);
        if (ok && count > plan.key.max_tokens_per_rank) {
            report_rank(view, CUDA_IN_DISPATCH, step, EPX_ERR_PEER_DATA,
                        source);
            ok = false;
        }
        if (is_expert) {
            atomicAdd(&local[e], count);
        } else {
            word_put(words + source, generation, count);
        }
    }
    if (!__syncthreads_and(ok)) {
        return false;
    }
    if (threadIdx.x == 0) {
        tell_verdict(told, plan.routing, generation, refusal);
    }
    for (int e = threadIdx.x; e < plan.num_local && refusal.status == 0;
         e += blockDim.x) {
        plan.expert_rows[e] = local[e];
        word_put(words + num_ranks + e, generation, local[e]);
        give_count(move, e, local[e]);
    }
    return true;
}

} // namespace

#endif
