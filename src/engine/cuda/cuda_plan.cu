// SPDX-License-Identifier: MIT
//
// Taking in a routing, in one kernel:
//     1. each warp counts its tokens, and numbers their rows as it goes
//     2. blocks exchange their totals, and see where their rows begin
//     3. the rank's totals go to every peer; theirs come in
//     4. with all counts, the first row of every (source, rank or expert)
//     5. each row's place: its rank or expert's first, its block's, its warp's
//        and its own number added up
//
// A key is a rank, or num_ranks plus an expert.  RANK_MAJOR numbers a token's
// rows by rank, the first entry of each rank standing for all (the leader);
// the expert layouts number them by expert.
//
// Shared memory of a block, u32 each:
//     hist [warps][keys]   rows counted by each warp; then those before it
//     base [keys]          rows before this block's; then from all ranks
//     total [keys]         of this rank; then of all
//     ranks [E]            of the experts
//     rounds [warps][3][ROUND]  entries at hand: experts, ranks, leaders' ranks
#include "engine/cuda/cuda_count.cuh"
#include "engine/cuda/cuda_launch.cuh"

namespace
{

// A round is the tokens whose entries fit ROUND words of shared memory, of
// which each warp has its own.
constexpr int ROUND = 64;
static_assert(EPX_MAX_TOPK <= ROUND, "a token to a round, at least");

constexpr int BAD_VALUE = -2;      // of topk_idx
constexpr uint32_t ENDS = 1u << 8; // beyond EPX_MAX_TOPK

struct histograms {
    uint32_t *hist, *base, *total;
    int *ranks;
    int *rounds;
    int keys;
};

__device__ histograms
histograms_make(const cuda_plan_args_t &args)
{
    uint32_t *words = reinterpret_cast<uint32_t *>(dynamic_shared());
    histograms h;

    h.keys = args.view.num_ranks + (int)args.plan.key.num_experts;
    h.base = words;
    h.total = words + h.keys;
    h.hist = words + 2 * h.keys;
    h.ranks = reinterpret_cast<int *>(h.hist) + args.num_warps * h.keys;
    h.rounds = h.ranks + args.plan.key.num_experts;
    return h;
}

__device__ int64_t
index_at(const cuda_plan_args_t &args, int64_t i)
{
    return args.plan.key.idx_dtype == EPX_I64
               ? static_cast<const int64_t *>(args.topk_idx)[i]
               : static_cast<const int32_t *>(args.topk_idx)[i];
}

// What a warp keeps of an entry between its two passes.
struct note {
    uint32_t ordinal; // among the warp's rows for its key; NONE for no row
    uint32_t place;   // RANK_MAJOR: among the token's routes, and ENDS
};

// The tokens of this warp: neighbours, in the order of warps.
struct span {
    int64_t begin, end; // entries
};

__device__ span
span_of_warp(const cuda_plan_args_t &args)
{
    int64_t warp = blockIdx.x * args.num_warps + threadIdx.x / 32;
    int64_t num_warps = (int64_t)gridDim.x * args.num_warps;
    int64_t topk = args.plan.key.topk;
    int64_t begin = args.num_tokens * warp / num_warps;
    int64_t end = args.num_tokens * (warp + 1) / num_warps;

    return { begin * topk, end * topk };
}

// An entry of a round.
struct entry {
    int expert;     // -1: none; CUDA_EXPERT_DROPPED
    int rank;       // of the expert; -1: none that takes it
    bool is_leader; // the first of its token for that rank
    bool is_bad;    // not an expert, or there already
};

// experts and ranks are those of the entry's token, of which it is number k.
__device__ entry
entry_make(const int *experts, const int *ranks, int k)
{
    entry e = { experts[k], ranks[k], false, experts[k] == BAD_VALUE };

    if (e.expert < 0) {
        return { -1, -1, false, e.is_bad };
    }
    e.is_leader = true;
#pragma unroll 4
    for (int j = 0; j < k; j++) {
        e.is_bad |= experts[j] == e.expert;
        e.is_leader &= ranks[j] != e.rank;
    }
    return e.is_bad     ? entry{ -1, -1, false, true }
           : e.rank < 0 ? entry{ CUDA_EXPERT_DROPPED, -1, false, false }
                        : e;
}

// Where a token's row for this entry's rank stands among its routes, which are
// in the order of ranks; and whether the route of the entry's own number is
// beyond them.  leaders are the ranks of those that lead, else -1.
__device__ uint32_t
place_of(const entry &e, const int *leaders, int topk, int k)
{
    int lower = 0, count = 0;

#pragma unroll 4
    for (int j = 0; j < topk; j++) {
        int rank = leaders[j];

        count += rank >= 0;
        lower += rank >= 0 && rank < e.rank;
    }
    return lower | (k >= count ? ENDS : 0);
}

// 1. Count this warp's entries; returns 1 + the first bad one, or UINT64_MAX.
__device__ uint64_t
count_entries(const cuda_plan_args_t &args, const histograms &h)
{
    int *experts = h.rounds + threadIdx.x / 32 * 3 * ROUND;
    int *ranks = experts + ROUND;
    int *leaders = ranks + ROUND;
    bool by_rank = args.plan.key.layout == EPX_LAYOUT_RANK_MAJOR;
    uint32_t *hist = h.hist + (size_t)(threadIdx.x / 32) * h.keys;
    int lane = threadIdx.x % 32;
    int topk = (int)args.plan.key.topk;
    int per_round = ROUND / topk * topk;
    int k[2] = { lane % topk, (lane + 32) % topk };
    span entries = span_of_warp(args);
    uint64_t bad = UINT64_MAX;
    int64_t next[2];

#pragma unroll
    for (int half = 0; half < 2; half++) {
        int64_t i = entries.begin + half * 32 + lane;

        next[half] = i < entries.end ? index_at(args, i) : -1;
    }
    for (int64_t at = entries.begin; at < entries.end; at += per_round) {
        int count = (int)min((int64_t)per_round, entries.end - at);
        entry mine[2];

#pragma unroll
        for (int half = 0; half < 2; half++) {
            int n = half * 32 + lane;
            int64_t value = next[half], i = at + per_round + n;
            bool fits = value >= -1 && value < args.plan.key.num_experts;

            experts[n] = fits ? (int)value : BAD_VALUE;
            ranks[n] = fits && value >= 0 ? h.ranks[value] : -1;
            next[half] = i < entries.end ? index_at(args, i) : -1;
        }
        __syncwarp();
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int n = half * 32 + lane;

            mine[half] = n < count ? entry_make(experts + n - k[half],
                                                ranks + n - k[half], k[half])
                                   : entry{ -1, -1, false, false };
            leaders[n] = mine[half].is_leader ? mine[half].rank : -1;
        }
        __syncwarp();
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const entry &e = mine[half];
            int n = half * 32 + lane;
            int rank_key = e.is_leader ? e.rank : -1;
            int expert_key = e.expert < 0 ? -1 : args.view.num_ranks + e.expert;
            int counted = by_rank ? expert_key : rank_key;
            note kept;

            kept.ordinal = number(hist, by_rank ? rank_key : expert_key);
            if (counted >= 0) {
                atomicAdd(&hist[counted], 1u);
            }
            __syncwarp();
            if (n >= count) {
                continue;
            }
            if (e.is_bad && bad == UINT64_MAX) {
                bad = at + n + 1;
            }
            kept.place =
                by_rank ? place_of(e, leaders + n - k[half], topk, k[half]) : 0;
            args.plan.experts[at + n] = e.expert;
            *reinterpret_cast<uint2 *>(&args.notes[2 * (at + n)]) =
                make_uint2(kept.ordinal, kept.place);
        }
        __syncwarp();
    }
    for (int step = 16; step > 0; step /= 2) {
        uint64_t other = __shfl_xor_sync(~0u, bad, step);

        bad = other < bad ? other : bad;
    }
    return bad;
}

// 2a. Rows before each warp within the block; the block's totals to everybody.
__device__ void
sum_warps(const cuda_plan_args_t &args, const histograms &h)
{
    uint32_t *totals = args.block_totals + (size_t)blockIdx.x * h.keys;

    for (int key = threadIdx.x; key < h.keys; key += blockDim.x) {
        uint32_t sum = 0;

        for (int w = 0; w < args.num_warps; w++) {
            uint32_t count = h.hist[(size_t)w * h.keys + key];

            h.hist[(size_t)w * h.keys + key] = sum;
            sum += count;
        }
        totals[key] = sum;
    }
}

// 2b. Rows before this block, and of the rank.
__device__ void
sum_blocks(const cuda_plan_args_t &args, const histograms &h)
{
    for (int key = threadIdx.x; key < h.keys; key += blockDim.x) {
        uint32_t before = 0, sum = 0;

#pragma unroll 8
        for (int b = 0; b < gridDim.x; b++) {
            // Not through the first-level cache, which may be older.
            uint32_t count =
                __ldcg(args.block_totals + (size_t)b * h.keys + key);

            before += b < blockIdx.x ? count : 0;
            sum += count;
        }
        h.base[key] = before;
        h.total[key] = sum;
    }
    __syncthreads();
}

// 3. Each block tells some of the peers.
__device__ void
send_counts(const cuda_plan_args_t &args, const histograms &h, uint64_t step,
            uint64_t plan_id, uint64_t bad_entry)
{
    constexpr int COUNT = sizeof(epx__count_row_t) / sizeof(uint32_t);
    const cuda_view_t &view = args.view;
    __shared__ epx__count_row_t row;

    if (threadIdx.x == 0) {
        row.step = step;
        row.key = args.plan.key;
        row.key.plan_id = plan_id;
        row.num_tokens = args.num_tokens;
        row.slots_offset = args.slots_offset;
        row.bad_entry = bad_entry;
        row.bad_expert = bad_entry == 0 ? 0 : index_at(args, bad_entry - 1);
    }
    __syncthreads();
    for (int r = blockIdx.x; r < view.num_ranks; r += gridDim.x) {
        int peer = (view.rank + 1 + r) % view.num_ranks;
        if (!is_told(view, peer)) {
            continue;
        }
        uint64_t *words = words_at(view, peer, step, view.rank) + POST_WORDS;
        const uint32_t *from = reinterpret_cast<const uint32_t *>(&row);

        for (int i = threadIdx.x; i < COUNT + h.keys; i += blockDim.x) {
            word_put(words + i, step, i < COUNT ? from[i] : h.total[i - COUNT]);
        }
    }
}

// Whether counts can be those of tokens: each goes to a rank once, and there to
// 1 to K experts, to each of them once.
__device__ bool
counts_are_possible(const cuda_plan_args_t &args, const uint64_t *words, int r)
{
    int num_experts = (int)args.plan.key.num_experts;
    int num_ranks = args.view.num_ranks;
    int end = epx__first_expert(num_experts, num_ranks, r + 1);
    uint64_t tokens = count_read(words, r);
    uint64_t sum = 0;
    bool ok = true;

#pragma unroll 8
    for (int e = epx__first_expert(num_experts, num_ranks, r); e < end; e++) {
        uint64_t count = count_read(words, num_ranks + e);

        ok = ok && count <= tokens;
        sum += count;
    }
    return ok && tokens <= sum && sum <= tokens * args.plan.key.topk;
}

// What is wrong with one rank's count row by itself; 0: nothing.
__device__ uint32_t
check_row(const cuda_plan_args_t &args, const epx__count_row_t &row,
          uint64_t step, uint64_t plan_id)
{
    uint64_t limit = args.plan.key.max_tokens_per_rank == 0
                         ? INT32_MAX
                         : args.plan.key.max_tokens_per_rank;
    epx__plan_key_t mine = args.plan.key;

    mine.plan_id = plan_id;
    return row.step != step || !same_key(row.key, mine)
               ? (uint32_t)-EPX_ERR_MISMATCH
           : row.bad_entry != 0     ? (uint32_t)-EPX_ERR_EXPERT
           : row.num_tokens > limit ? (uint32_t)-EPX_ERR_PEER_DATA
                                    : 0;
}

// One thread: where a rank's receive slots begin.
__device__ bool
keep_slots(const cuda_plan_args_t &args, const epx__count_row_t &row, int r)
{
    uint64_t count = 2 * args.plan.key.max_tokens_per_rank;

    peer p = { args.view.segments[r], args.view.segment_bytes[r], 0 };

    if (!is_near(args.view, r)) {
        return true;
    }
    if (!extent_fits(args.view, p, row.slots_offset,
                     count * args.view.num_ranks, args.slot_bytes,
                     EPX_ROW_ALIGN)) {
        report_rank(args.view, CUDA_IN_COUNTS, row.step, EPX_ERR_PEER_DATA, r);
        return false;
    }
    if (blockIdx.x == 0) {
        args.plan.slots[r] = row.slots_offset;
    }
    return true;
}

// 3b. Wait for the count rows of all ranks and see whether they can be used.
// Every block comes to the same verdict, and names the lowest rank.  False: the
// group is broken.
__device__ bool
check_rows(const cuda_plan_args_t &args, uint64_t step, uint64_t plan_id,
           cuda_refusal_t *refusal)
{
    __shared__ epx__count_row_t rows[CUDA_PLAN_WARPS];
    const cuda_view_t &view = args.view;
    epx__count_row_t *row = &rows[threadIdx.x / 32];
    int64_t *wait_ns = blockIdx.x == 0 ? args.wait_ns : nullptr;
    uint64_t start = wait_ns == nullptr ? 0 : global_timer_ns();
    bool ok = true;

    for (int r = threadIdx.x / 32; r < view.num_ranks && ok;
         r += args.num_warps) {
        if (is_masked(view, r)) {
            continue;
        }
        __syncwarp();
        ok = words_wait<false>(view, step, CUDA_IN_COUNTS, r, POST_WORDS, row);
        __syncwarp();
        if (wait_ns != nullptr && threadIdx.x % 32 == 0 && r != view.rank) {
            wait_ns[r] += (int64_t)(global_timer_ns() - start);
        }
        if (ok && threadIdx.x % 32 == 0 &&
            check_row(args, *row, step, plan_id) != 0) {
            atomicMin(&refusal->rank, r);
        }
        if (ok && args.slot_bytes > 0) {
            ok = __any_sync(~0u, threadIdx.x % 32 == 0 &&
                                     keep_slots(args, *row, r)) != 0;
        }
    }
    if (!__syncthreads_and(ok)) {
        return false;
    }
    if (refusal->rank != INT32_MAX && threadIdx.x == 0) {
        epx__count_row_t bad =
            words_read<epx__count_row_t>(view, step, refusal->rank, POST_WORDS);
        uint32_t why = check_row(args, bad, step, plan_id);

        if (bad.step == step) {
            refusal->key = bad.key;
        }
        refusal->own_plan_id = plan_id;
        refusal->bad_entry = bad.bad_entry;
        refusal->bad_expert = bad.bad_expert;
        // A peer may have changed it meanwhile.
        refusal->status = why != 0 ? why : (uint32_t)-EPX_ERR_PEER_DATA;
    }
    __syncthreads();
    return true;
}

// 4a. Add up the sources: rows of the ranks before this one go into base, those
// of all into total.  False: the group is broken.
__device__ bool
sum_sources(const cuda_plan_args_t &args, const histograms &h, uint64_t step)
{
    const cuda_view_t &view = args.view;
    int num_ranks = view.num_ranks;
    bool ok = true;

    for (int key = threadIdx.x; key < h.keys && ok; key += blockDim.x) {
        uint32_t before = 0, after = 0;

#pragma unroll 8
        for (int s = 0; s < num_ranks; s++) {
            uint64_t word = ld_relaxed_sys(words_at(view, view.rank, step, s) +
                                           HEAD_WORDS + key);
            uint32_t count = (uint32_t)word;

            if (is_masked(view, s)) {
                count = 0;
            } else if (!word_is_of(word, step)) {
                ok = ok && word_wait(view, step, CUDA_IN_COUNTS, s,
                                     HEAD_WORDS + key, &count);
            }
            before += s < view.rank ? count : 0;
            after += s > view.rank ? count : 0;
        }
        h.base[key] += before;
        // Ours not from memory that peers can write.
        h.total[key] += before + after;
    }
    if (!__syncthreads_and(ok)) {
        return false;
    }
    for (int i = threadIdx.x; i < num_ranks * num_ranks; i += blockDim.x) {
        int source = i / num_ranks;

        if (!is_masked(view, source) &&
            !counts_are_possible(args, words_at(view, view.rank, step, source),
                                 i % num_ranks)) {
            report_rank(view, CUDA_IN_COUNTS, step, EPX_ERR_PEER_DATA, source);
            ok = false;
        }
    }
    return __syncthreads_and(ok) != 0;
}

// Rows from an expert's start to the next one's.
__device__ uint64_t
expert_stride(const cuda_plan_args_t &args, uint64_t rows)
{
    uint64_t alignment = args.plan.key.expert_alignment;

    return args.plan.key.layout == EPX_LAYOUT_EXPERT_SLOTS
               ? args.plan.key.max_tokens_per_rank * args.view.num_ranks
               : (rows + alignment - 1) / alignment * alignment;
}

// 4b. Where each expert begins in its rank's buffer, a warp to a rank; block 0
// keeps what later kernels need.
__device__ void
place_experts(const cuda_plan_args_t &args, const histograms &h,
              cuda_refusal_t *refusal)
{
    const cuda_view_t &view = args.view;
    int num_experts = (int)args.plan.key.num_experts;
    int lane = threadIdx.x % 32;
    bool by_rank = args.plan.key.layout == EPX_LAYOUT_RANK_MAJOR;

    for (int r = threadIdx.x / 32; r < view.num_ranks; r += args.num_warps) {
        int first = epx__first_expert(num_experts, view.num_ranks, r);
        int count =
            epx__first_expert(num_experts, view.num_ranks, r + 1) - first;
        uint64_t offset = 0;
        bool keep = blockIdx.x == 0 && r == view.rank;

        for (int at = 0; at < count; at += 32) {
            int key = view.num_ranks + first + at + lane;
            uint64_t rows = at + lane < count ? h.total[key] : 0;
            uint64_t stride = at + lane < count ? expert_stride(args, rows) : 0;
            uint64_t end = stride;

            for (int step = 1; step < 32; step *= 2) {
                uint64_t below = __shfl_up_sync(~0u, end, step);

                end += lane >= step ? below : 0;
            }
            if (at + lane < count) {
                uint64_t begin = by_rank ? 0 : offset + end - stride;

                h.base[key] += (uint32_t)begin;
                if (keep) {
                    args.plan.expert_rows[at + lane] = rows;
                    args.plan.expert_offsets[at + lane] = begin;
                }
            }
            offset += __shfl_sync(~0u, end, 31);
        }
        uint64_t rows = by_rank ? h.total[r] : offset;
        uint64_t capacity = args.plan.key.recv_capacity;
        if (lane == 0 &&
            (rows > UINT32_MAX || (capacity > 0 && rows > capacity))) {
            // The lowest rank is the one to name; blocks agree on it.
            atomicMin(&refusal->rank, r);
            refusal->status = (uint32_t)-EPX_ERR_CAPACITY;
        }
        if (lane == 0 && blockIdx.x == 0) {
            args.plan.rank_rows[r] = rows;
        }
        if (lane == 0 && keep) {
            args.plan.expert_offsets[count] = by_rank ? 0 : offset;
        }
    }
    __syncthreads();
}

// 5. The final routes of this warp's tokens.
__device__ void
write_routes(const cuda_plan_args_t &args, const histograms &h)
{
    bool by_rank = args.plan.key.layout == EPX_LAYOUT_RANK_MAJOR;
    const uint32_t *hist = h.hist + (size_t)(threadIdx.x / 32) * h.keys;
    int topk = (int)args.plan.key.topk;
    int lane = threadIdx.x % 32, k = lane % topk, turn = 32 % topk;
    span entries = span_of_warp(args);

#pragma unroll 4
    for (int64_t i = entries.begin + lane; i < entries.end; i += 32) {
        int expert = args.plan.experts[i];
        uint2 kept = *reinterpret_cast<const uint2 *>(&args.notes[2 * i]);
        int rank = expert < 0 ? -1 : h.ranks[expert];
        int key = by_rank ? rank : args.view.num_ranks + expert;

        if (kept.x != NONE) {
            args.plan.routes[by_rank ? i - k + (kept.y & ~ENDS) : i] = {
                rank, h.base[key] + hist[key] + kept.x
            };
        }
        if (by_rank ? (kept.y & ENDS) != 0 : kept.x == NONE) {
            args.plan.routes[i] = { -1, 0 };
        }
        k += turn;
        k -= k >= topk ? topk : 0;
    }
}

// Block 0: the most tokens that any rank has, for which regions have room.
__device__ void
tell_most_tokens(const cuda_plan_args_t &args, uint64_t step,
                 uint64_t generation)
{
    __shared__ uint32_t most;
    const cuda_view_t &view = args.view;

    if (threadIdx.x == 0) {
        most = 0;
    }
    __syncthreads();
    for (int r = threadIdx.x; r < view.num_ranks; r += blockDim.x) {
        if (!is_masked(view, r)) {
            atomicMax(&most, (uint32_t)words_read<epx__count_row_t>(
                                 view, step, r, POST_WORDS)
                                 .num_tokens);
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        word_put(args.told.record->words + 1 + view.num_ranks +
                     args.plan.num_local,
                 generation, most);
    }
}

// Block 0: what later kernels and the host are told.
__device__ void
tell_routing(const cuda_plan_args_t &args, const histograms &h, uint64_t step,
             uint64_t plan_id, cuda_refusal_t &refusal)
{
    const cuda_view_t &view = args.view;
    uint64_t generation = args.told.generation;
    int first = epx__first_expert((int)args.plan.key.num_experts,
                                  view.num_ranks, view.rank);

    if (generation == 0) {
        generation = args.is_new ? 1 : args.plan.routing->generation;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        if (refusal.status == (uint32_t)-EPX_ERR_CAPACITY) {
            refusal.rows = args.plan.rank_rows[refusal.rank];
        }
        args.plan.routing->plan_id = plan_id;
        tell_verdict(args.told, args.plan.routing, generation, refusal);
    }
    if (refusal.status != 0) {
        return;
    }
    // Tokens of each rank, then rows of each local expert.
    for (int i = threadIdx.x; i < view.num_ranks + args.plan.num_local;
         i += blockDim.x) {
        uint32_t count =
            i >= view.num_ranks ? h.total[first + i]
            : is_masked(view, i)
                ? 0
                : count_read(words_at(view, view.rank, step, i), view.rank);

        word_put(args.told.record->words + 1 + i, generation, count);
    }
    if (view.nodes.num_nodes > 1 && args.plan.key.max_tokens_per_rank == 0) {
        tell_most_tokens(args, step, generation);
    }
}

__global__ void
__launch_bounds__(CUDA_PLAN_WARPS * 32, 1)
    plan_kernel(const __grid_constant__ cuda_plan_args_t args)
{
    grid_wait();
    __shared__ cuda_refusal_t refusal;
    __shared__ unsigned long long bad_entry;
    const cuda_view_t &view = args.view;
    histograms h = histograms_make(args);
    uint64_t step = step_now(view);
    uint64_t plan_id = args.is_new ? step : args.plan.routing->plan_id;
    bool ok = __syncthreads_and(!is_broken(view)) != 0;

    if (!ok) {
        return;
    }
    if (threadIdx.x == 0) {
        bad_entry = ~0ull;
        refusal = {};
        refusal.rank = INT32_MAX;
    }
    for (int i = threadIdx.x; i < args.num_warps * h.keys; i += blockDim.x) {
        h.hist[i] = 0;
    }
    for (int e = threadIdx.x; e < args.plan.key.num_experts; e += blockDim.x) {
        h.ranks[e] = taking_rank(args.view, (int)args.plan.key.num_experts, e);
    }
    __syncthreads();

    // 1. Count.
    uint64_t bad = count_entries(args, h);
    if (threadIdx.x % 32 == 0) {
        atomicMin(&bad_entry, (unsigned long long)bad);
    }
    __syncthreads();

    // 2. The rank's totals.
    sum_warps(args, h);
    uint32_t *bads = args.block_totals + (size_t)gridDim.x * h.keys;
    if (threadIdx.x == 0) {
        bads[blockIdx.x] = bad_entry == ~0ull ? NONE : (uint32_t)bad_entry;
    }
    ok = grid_barrier(view, step);
    if (ok) {
        uint32_t first_bad = NONE;

        sum_blocks(args, h);
        for (int b = 0; b < gridDim.x; b++) {
            first_bad = min(first_bad, __ldcg(bads + b));
        }
        // 3. Exchange them.
        send_counts(args, h, step, plan_id, first_bad == NONE ? 0 : first_bad);
        ok = check_rows(args, step, plan_id, &refusal) &&
             (refusal.status != 0 || sum_sources(args, h, step));
    }
    if (ok) {
        // 4. Place everybody's rows.
        ok = refusal.status == 0;
        if (ok) {
            place_experts(args, h, &refusal);
            ok = refusal.status == 0;
        }
        if (blockIdx.x == 0) {
            tell_routing(args, h, step, plan_id, refusal);
        }
    }
    if (ok) {
        // 5. Write the routes.
        write_routes(args, h);
    }
    // All blocks know the step's number since the barrier.
    if (blockIdx.x == 0 && !is_broken(view)) {
        step_end(view, step, *arrivals_sum(view, step));
    }
}

} // namespace

size_t
cuda_plan_shared_bytes(const cuda_plan_args_t *args)
{
    size_t keys = (size_t)args->view.num_ranks + args->plan.key.num_experts;

    return (keys * (args->num_warps + 2) + args->plan.key.num_experts +
            args->num_warps * 3 * ROUND) *
           sizeof(uint32_t);
}

cudaError_t
cuda_plan_load(size_t max_shared)
{
    return load(plan_kernel, max_shared);
}

cudaError_t
cuda_plan_launch(const cuda_plan_args_t *args, int num_blocks,
                 cudaStream_t stream)
{
    return launch(plan_kernel, num_blocks, args->num_warps * 32,
                  cuda_plan_shared_bytes(args), *args, stream);
}
