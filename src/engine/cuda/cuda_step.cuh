// SPDX-License-Identifier: MIT
// One step of a group on the device: core/group.h's protocol, by blocks of
// threads.  Every function here is called by all threads of a block.
#ifndef EPX_ENGINE_CUDA_STEP_CUH
#define EPX_ENGINE_CUDA_STEP_CUH

#include "engine/cuda/cuda_kernels.h"
#include "engine/cuda/cuda_ptx.cuh"

EPX__DEVICE char *
own_segment(const cuda_view_t &view)
{
    return view.segments[view.rank];
}

// Whether a rank is on this one's node, and not masked.  Those of others have
// no segment here, and are told and heard through the proxy; masked ones are
// neither told nor heard.
EPX__DEVICE bool
is_near(const cuda_view_t &view, int rank)
{
    return view.nodes.all_near || view.nodes.node_of[rank] == view.nodes.own;
}

EPX__DEVICE bool
is_masked(const cuda_view_t &view, int rank)
{
    return !view.nodes.all_near && view.nodes.node_of[rank] == CUDA_MASKED;
}

// With receive slots: those that go to a rank of another node, or have come
// from there.
EPX__DEVICE char *
far_slots(const cuda_view_t &view, const cuda_regions_t &regions, int rank)
{
    return cuda_region_rows(&regions, view.nodes.far_index[rank]);
}

// Whether this rank's words go to a rank: to one of another node, for all.
EPX__DEVICE bool
is_told(const cuda_view_t &view, int rank)
{
    return is_near(view, rank) || rank == view.nodes.far_rank;
}

// The step that this kernel is.  All of its blocks come here before the last
// one leaves, which then records it.
EPX__DEVICE uint64_t
step_now(const cuda_view_t &view)
{
    return *(const volatile uint64_t *)&view.state->step + 1;
}

// What the memory of the group and of a plan holds as a kernel begins: one
// after the other these loads would take longer than a step's exchange.
struct start {
    cuda_state_t state;
    cuda_routing_t routing;
};
constexpr int START_WORDS = sizeof(start) / 8;
static_assert(sizeof(start) % 8 == 0 && START_WORDS <= 32, "a word to a lane");

// One warp: a word to each lane, on its way, and later in shared memory.
EPX__DEVICE uint64_t
start_load(const cuda_view_t &view, const cuda_routing_t *routing)
{
    constexpr int STATE = sizeof(cuda_state_t) / 8;
    int lane = threadIdx.x % 32;
    const uint64_t *from =
        lane < STATE
            ? reinterpret_cast<const uint64_t *>(view.state) + lane
            : reinterpret_cast<const uint64_t *>(routing) + lane - STATE;

    return lane < START_WORDS ? ld_relaxed_sys(from) : 0;
}

EPX__DEVICE void
start_keep(uint64_t word, start *now)
{
    if (threadIdx.x % 32 < START_WORDS) {
        reinterpret_cast<uint64_t *>(now)[threadIdx.x % 32] = word;
    }
}

// Between what this thread, or a barrier before it, has seen or written and a
// word that tells the peers.
EPX__DEVICE void
fence_acq_rel(const cuda_view_t &view)
{
    if (view.is_one_card) {
        fence_acq_rel_gpu();
    } else {
        fence_acq_rel_sys();
    }
}

// One warp: a post as the host has drafted it, and once memory has told what it
// holds, the rest.
EPX__DEVICE void
post_begin(const epx__post_t &draft, epx__post_t *post)
{
    const uint32_t *from = reinterpret_cast<const uint32_t *>(&draft);

    for (int i = threadIdx.x % 32; i < EPX__POST_WORDS; i += 32) {
        reinterpret_cast<uint32_t *>(post)[i] = from[i];
    }
}

EPX__DEVICE void
post_end(const start &now, uint64_t step, uint32_t num_blocks,
         epx__post_t *post)
{
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
        post->step = step;
        post->signature.plan_id = now.routing.plan_id;
        post->arrivals = now.state.arrivals[epx__slot(step)] + num_blocks;
    }
}

EPX__DEVICE bool
is_broken(const cuda_view_t &view)
{
    return ld_relaxed_gpu(&view.state->broken) != 0;
}

// One thread: true for the first one ever, which fills in the report and then
// calls report_publish.
EPX__DEVICE bool
report_claim(const cuda_view_t &view)
{
    return atomicCAS(&view.state->broken, 0u, 1u) == 0u;
}

EPX__DEVICE void
report_publish(const cuda_view_t &view, cuda_what_t what, uint64_t step,
               epx_status_t status)
{
    view.report->what = what;
    view.report->step = step;
    st_release_sys(&view.report->status, (uint32_t)-status);
}

// ---- words: what a rank tells its peers at a step's start (core/control.h)
// ----

constexpr int POST_WORDS = EPX__POST_WORDS;
constexpr int HEAD_WORDS = EPX__HEAD_WORDS;

// All of it but the counts, in the order of the words.
struct head {
    epx__post_t post;
    epx__count_row_t row;
};
static_assert(sizeof(head) == HEAD_WORDS * sizeof(uint32_t), "no padding");

// Those of a rank of another node are in the mail.  Nobody looks into the
// memory of a masked rank.
EPX__DEVICE uint64_t *
words_at(const cuda_view_t &view, int owner, uint64_t step, int source)
{
    bool is_far = !is_near(view, source) && !is_masked(view, source);

    return epx__map_words(&view.map, view.segments[is_far ? source : owner],
                          step, source);
}

EPX__DEVICE bool
word_is_of(uint64_t word, uint64_t step)
{
    return (uint32_t)(word >> 32) == (uint32_t)step;
}

EPX__DEVICE void
word_put(uint64_t *word, uint64_t step, uint32_t content)
{
    st_relaxed_sys(word, step << 32 | content);
}

// One thread: what a peer has told by now, there or not, for reports.
template <typename Part>
EPX__DEVICE Part
words_read(const cuda_view_t &view, uint64_t step, int source, int first)
{
    const uint64_t *words = words_at(view, view.rank, step, source) + first;
    Part part;

    for (int i = 0; i < sizeof(Part) / sizeof(uint32_t); i++) {
        reinterpret_cast<uint32_t *>(&part)[i] =
            (uint32_t)ld_relaxed_sys(words + i);
    }
    return part;
}

// ---- reports ----

static __device__ __noinline__ void
report_rank(const cuda_view_t &view, cuda_what_t what, uint64_t step,
            epx_status_t status, int32_t rank)
{
    if (report_claim(view)) {
        view.report->rank[0] = rank;
        view.report->rank[1] = rank;
        view.report->posts[0] = words_read<epx__post_t>(view, step, rank, 0);
        report_publish(view, what, step, status);
    }
}

// Whether a rank still owes this one the word `first`, or with first < 0 some
// of its arrivals.  Those of other nodes tell counts alone.
EPX__DEVICE bool
is_missing(const cuda_view_t &view, uint64_t step, int first, int rank)
{
    if (first < POST_WORDS ? !is_near(view, rank) : is_masked(view, rank)) {
        return false;
    }
    if (first >= 0) {
        return !word_is_of(
            ld_relaxed_sys(words_at(view, view.rank, step, rank) + first),
            step);
    }
    return ld_relaxed_sys(epx__map_arrival(&view.map, own_segment(view), step,
                                           EPX__GATE_DONE, rank)) <
           words_read<epx__post_t>(view, step, rank, 0).arrivals;
}

static __device__ __noinline__ void
report_timeout(const cuda_view_t &view, cuda_what_t what, uint64_t step,
               int first)
{
    if (!report_claim(view)) {
        return;
    }
    for (int word = 0; word < EPX_MAX_RANKS / 64; word++) {
        uint64_t missing = 0;

        for (int bit = 0; bit < 64; bit++) {
            int rank = word * 64 + bit;

            if (rank < view.num_ranks && is_missing(view, step, first, rank)) {
                missing |= UINT64_C(1) << bit;
            }
        }
        view.report->missing[word] = missing;
    }
    report_publish(view, what, step, EPX_ERR_TIMEOUT);
}

// ---- waits ----

// A thread's own wait, with the group's deadline.
struct cuda_deadline {
    uint64_t start;
    uint64_t asks; // when it looks at the host's word next
    uint32_t looks;
};

// That word lies across PCIe, where many that ask would slow down what the host
// launches, and so what they wait for; whoever finds the group broken tells the
// rank's other threads.
constexpr uint64_t ASK_NS = 1000000;

// Whether the host has found the group broken, which then it is here, too.
EPX__DEVICE bool
is_halted(const cuda_view_t &view)
{
    if (ld_relaxed_sys(&view.report->halt) == 0) {
        return false;
    }
    (void)report_claim(view);
    return true;
}

// Out of line, as all that is rare in a wait: kernels run from memory, and
// their length costs time.
static __device__ __noinline__ bool
deadline_look(const cuda_view_t &view, cuda_deadline *deadline, bool *late)
{
    uint64_t now = global_timer_ns();
    if (deadline->start == 0) {
        deadline->start = now;
        deadline->asks = now + ASK_NS;
    }
    if (is_broken(view)) {
        return false;
    }
    *late = now - deadline->start > view.timeout_ns;
    if (*late || now < deadline->asks) {
        return !*late;
    }
    deadline->asks = now + ASK_NS;
    return !is_halted(view);
}

// False once the deadline is past, or the group broken.
EPX__DEVICE bool
deadline_holds(const cuda_view_t &view, cuda_deadline *deadline, bool *late)
{
    *late = false;
    return ++deadline->looks % 64 != 0 || deadline_look(view, deadline, late);
}

// One thread: look at a word until it is of the step; what it is when the group
// breaks.
static __device__ __noinline__ uint64_t
word_await(const cuda_view_t &view, uint64_t step, cuda_what_t what,
           const uint64_t *at, int index)
{
    uint64_t word = ld_relaxed_sys(at);
    cuda_deadline deadline = {};
    bool late;

    while (!word_is_of(word, step)) {
        if (!deadline_holds(view, &deadline, &late)) {
            if (late) {
                report_timeout(view, what, step, index);
            }
            break;
        }
        word = ld_relaxed_sys(at);
    }
    return word;
}

// One thread: wait for a word; false when the group is broken.
EPX__DEVICE bool
word_wait(const cuda_view_t &view, uint64_t step, cuda_what_t what, int source,
          int index, uint32_t *content)
{
    const uint64_t *at = words_at(view, view.rank, step, source) + index;
    uint64_t word = ld_relaxed_sys(at);

    if (!word_is_of(word, step)) {
        word = word_await(view, step, what, at, index);
    }
    *content = (uint32_t)word;
    return word_is_of(word, step);
}

// A warp: wait for a source's words from `first` on, as many as Part holds;
// with ACQUIRES what the source had released before it told them.
template <bool ACQUIRES, typename Part>
EPX__DEVICE bool
words_wait(const cuda_view_t &view, uint64_t step, cuda_what_t what, int source,
           int first, Part *to)
{
    constexpr int COUNT = sizeof(Part) / sizeof(uint32_t);
    constexpr int TURNS = (COUNT + 31) / 32;
    const uint64_t *from = words_at(view, view.rank, step, source) + first;
    int lane = threadIdx.x % 32;
    uint64_t words[TURNS];
    cuda_deadline deadline = {};
    bool ok = true, late = false;
    int missing;

    // All loads are on their way before the first is looked at, every time: one
    // after the other each would take as long as all.  Any word releases all
    // that the source has, so that the last one acquires it.
    do {
        missing = -1;
#pragma unroll
        for (int i = 0; i < TURNS; i++) {
            const uint64_t *word = from + min(i * 32 + lane, COUNT - 1);

            words[i] = ACQUIRES && i == TURNS - 1 ? ld_acquire_sys(word)
                                                  : ld_relaxed_sys(word);
        }
#pragma unroll
        for (int i = 0; i < TURNS; i++) {
            if (!word_is_of(words[i], step)) {
                missing = min(i * 32 + lane, COUNT - 1);
            }
        }
        ok = missing < 0 || deadline_holds(view, &deadline, &late);
    } while (missing >= 0 && ok);
    if (late) {
        report_timeout(view, what, step, first + missing);
    }
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        reinterpret_cast<uint32_t *>(to)[min(i * 32 + lane, COUNT - 1)] =
            (uint32_t)words[i];
    }
    return __all_sync(~0u, ok) != 0;
}

// What a rank's post is checked against, as this rank knows it.
struct peer {
    char *segment;
    uint64_t segment_bytes;
    uint64_t rows; // that the plan gives it
};

// One thread: wait until all that a rank does in this step has arrived, which
// target counts; acquires it.  False: the group is broken.
EPX__DEVICE bool
arrivals_wait(const cuda_view_t &view, uint64_t step, cuda_what_t what,
              int source, uint64_t target)
{
    const uint64_t *word = epx__map_arrival(&view.map, own_segment(view), step,
                                            EPX__GATE_DONE, source);
    cuda_deadline deadline = {};
    uint64_t seen;
    bool late;

    // Every look acquires: another one for that would come after the last.
    while ((seen = ld_acquire_sys(word)) < target) {
        if (!deadline_holds(view, &deadline, &late)) {
            if (late) {
                report_timeout(view, what, step, -1);
            }
            return false;
        }
    }
    // Nothing of a later step can be there while this one is open.
    if (seen != target) {
        report_rank(view, what, step, EPX_ERR_PEER_DATA, source);
    }
    return seen == target;
}

// ---- the parts of a step ----

// Where this rank keeps the sum of its arrivals in the step's slot.
EPX__DEVICE uint64_t *
arrivals_sum(const cuda_view_t &view, uint64_t step)
{
    return &view.state->arrivals[epx__slot(step)];
}

// The peers in the order in which this rank turns to them.
EPX__DEVICE int
neighbour(const cuda_view_t &view, int i)
{
    return (view.rank + 1 + i) % view.num_ranks;
}

// How many threads tell_all shares the words out to: few warps, since fences of
// several queue.
template <typename Part>
EPX__DEVICE int
num_tellers(const cuda_view_t &view)
{
    constexpr int WORDS_EACH = 8;
    int words = view.num_ranks * (int)(sizeof(Part) / sizeof(uint32_t));

    return min((int)blockDim.x, (words / WORDS_EACH + 31) / 32 * 32);
}

// Tell every peer a part of the head, from the word `first` on: one block, of
// which num_tellers have fenced what the words release.
template <typename Part>
EPX__DEVICE void
tell_all(const cuda_view_t &view, uint64_t step, int first, const Part &part)
{
    constexpr int COUNT = sizeof(Part) / sizeof(uint32_t);
    const uint32_t *from = reinterpret_cast<const uint32_t *>(&part);
    int tellers = num_tellers<Part>(view);

    for (int i = threadIdx.x;
         threadIdx.x < tellers && i < view.num_ranks * COUNT; i += tellers) {
        int to = neighbour(view, i / COUNT);

        if (!is_told(view, to)) {
            continue;
        }
        word_put(words_at(view, to, step, view.rank) + first + i % COUNT, step,
                 from[i % COUNT]);
    }
}

// A block has done its part of the step, for every rank.  With RELEASES that
// says that what it has written or acquired can be seen; without, only that it
// has read what it wanted: what has been used has been read, without a fence.
// first is first_segment's.
template <bool RELEASES>
EPX__DEVICE void
arrive_all(const cuda_view_t &view, uint64_t step, char *first)
{
    char *segment = first;

    __syncthreads();
    for (int i = threadIdx.x; i < view.num_ranks; i += blockDim.x) {
        if (!is_near(view, neighbour(view, i))) {
            continue;
        }
        if (i != threadIdx.x) {
            segment = view.segments[neighbour(view, i)];
        }
        uint64_t *word = epx__map_arrival(&view.map, segment, step,
                                          EPX__GATE_DONE, view.rank);

        if (RELEASES) {
            fence_acq_rel(view);
        }
        red_add_relaxed_sys(word, 1);
    }
}

// The segment that this thread will tell first, read early for arrive_all.
EPX__DEVICE char *
first_segment(const cuda_view_t &view)
{
    return view.segments[neighbour(view, threadIdx.x)];
}

// Block 0, when all blocks have come to know the step's number: it has been
// made, with this sum of arrivals.
EPX__DEVICE void
step_end(const cuda_view_t &view, uint64_t step, uint64_t arrivals)
{
    if (threadIdx.x == 0) {
        *arrivals_sum(view, step) = arrivals;
        view.state->step = step;
        view.state->taken = 0;
    }
}

// Until all blocks of the grid are here, which must be on the device together.
EPX__DEVICE bool
grid_barrier(const cuda_view_t &view, uint64_t step)
{
    bool ok = true;

    __syncthreads();
    if (threadIdx.x == 0 && gridDim.x > 1) {
        uint32_t passed = ld_acquire_gpu(&view.state->barrier);
        cuda_deadline deadline = {};
        bool late;

        if (atom_inc_acq_rel_gpu(&view.state->arrived, gridDim.x - 1) ==
            gridDim.x - 1) {
            red_add_release_gpu(&view.state->barrier, 1);
        }
        while (ok && ld_acquire_gpu(&view.state->barrier) == passed) {
            ok = deadline_holds(view, &deadline, &late);
            if (late) {
                report_rank(view, CUDA_IN_GRID, step, EPX_ERR_TIMEOUT,
                            view.rank);
            }
        }
    }
    return __syncthreads_and(ok) != 0;
}

EPX__DEVICE bool
same_signature(const epx__signature_t &a, const epx__signature_t &b)
{
    return a.plan_id == b.plan_id && a.kind == b.kind && a.dtype == b.dtype &&
           a.quantize == b.quantize && a.flags == b.flags &&
           a.num_scales == b.num_scales && a.hidden == b.hidden &&
           (a.arrays == b.arrays ||
            ((a.arrays | b.arrays) & EPX__ARRAYS_ANY) != 0);
}

EPX__DEVICE bool
same_key(const epx__plan_key_t &a, const epx__plan_key_t &b)
{
    return a.plan_id == b.plan_id && a.layout == b.layout &&
           a.num_experts == b.num_experts && a.topk == b.topk &&
           a.idx_dtype == b.idx_dtype &&
           a.expert_alignment == b.expert_alignment &&
           a.max_tokens_per_rank == b.max_tokens_per_rank &&
           a.recv_capacity == b.recv_capacity &&
           a.send_only_row_bytes == b.send_only_row_bytes;
}

// One thread: which two ranks disagree, for the report.
static __device__ __noinline__ void
report_disagreement(const cuda_view_t &view, uint64_t step, cuda_what_t what)
{
    int first = 0;

    if (!report_claim(view)) {
        return;
    }
    while (first < view.num_ranks - 1 &&
           (!is_near(view, first) ||
            (words_read<epx__post_t>(view, step, first, 0).signature.arrays &
             EPX__ARRAYS_ANY) != 0)) {
        first++;
    }
    first = is_near(view, first) ? first : view.rank;
    const epx__post_t a = words_read<epx__post_t>(view, step, first, 0);
    for (int r = 0; r < view.num_ranks; r++) {
        const epx__post_t b = words_read<epx__post_t>(view, step, r, 0);

        if (!is_near(view, r)) {
            continue;
        }
        view.report->rank[0] = first;
        view.report->rank[1] = r;
        view.report->posts[0] = a;
        view.report->posts[1] = b;
        if (b.step != step || !same_signature(a.signature, b.signature)) {
            break;
        }
    }
    report_publish(view, what, step, EPX_ERR_MISMATCH);
}

// What a thread has seen of the posts.
struct posts_seen {
    bool waited, agrees, opened;
    uint32_t with, without; // those that send weights, and those that do not
};

// Wait for every post of this rank's node, and with Part = head its count row,
// compare the posts (`mine` is this rank's) and open what each is about:
// open(rank, part, peer), called by a warp, says whether it can be.  Adds to
// wait_ns[r], if that is not null, how long that took.  The block's last
// num_warps warps call it, and posts_agree must follow.
template <typename Part, bool ACQUIRES, typename Open>
EPX__DEVICE posts_seen
posts_look(const cuda_view_t &view, uint64_t step, cuda_what_t what,
           const epx__signature_t &mine, const uint64_t *rank_rows,
           int num_warps, int64_t *wait_ns, Open open)
{
    constexpr int WARPS = 16;
    __shared__ Part parts[WARPS];
    posts_seen seen = { true, true, true, 0, 0 };
    int warp = (int)(blockDim.x - 1 - threadIdx.x) / 32;
    Part *part = &parts[warp];
    uint64_t start = wait_ns == nullptr ? 0 : global_timer_ns();

    for (int r = warp; r < view.num_ranks && seen.waited; r += num_warps) {
        if (!is_near(view, r)) {
            continue; // its post is the proxy's to look at
        }
        // Read while the words are on their way.
        peer p = { view.segments[r], view.segment_bytes[r], rank_rows[r] };

        __syncwarp();
        seen.waited = words_wait<ACQUIRES>(view, step, what, r, 0, part);
        __syncwarp();
        if (wait_ns != nullptr && threadIdx.x % 32 == 0 && r != view.rank) {
            wait_ns[r] += (int64_t)(global_timer_ns() - start);
        }
        if (seen.waited) {
            // A post is where its part begins.
            const epx__post_t &post =
                *reinterpret_cast<const epx__post_t *>(part);
            uint32_t arrays = post.signature.arrays;

            seen.agrees = seen.agrees && post.step == step &&
                          same_signature(mine, post.signature);
            seen.with |= (arrays & EPX__ARRAYS_ANY) == 0 && arrays != 0;
            seen.without |= arrays == 0;
            seen.opened = seen.agrees && open(r, *part, p) && seen.opened;
        }
    }
    return seen;
}

// The block's verdict on them, which is true only where all threads are `ok`.
EPX__DEVICE bool
posts_agree(const cuda_view_t &view, uint64_t step, cuda_what_t what,
            const epx__signature_t &mine, const posts_seen &seen, bool ok)
{
    ok = __syncthreads_and(ok && seen.waited && seen.agrees && seen.opened);
    // A rank that sends weights, or does not, has compared all with its own.
    if (ok && (mine.arrays & EPX__ARRAYS_ANY) == 0) {
        return true;
    }
    // The report needs everybody's posts.
    if (!__syncthreads_and(seen.waited)) {
        return false;
    }
    bool with = __syncthreads_or(seen.with) != 0;
    bool without = __syncthreads_or(seen.without) != 0;
    bool agrees = __syncthreads_and(seen.agrees) != 0 && !(with && without);
    if (!agrees && threadIdx.x == 0) {
        report_disagreement(view, step, what);
    }
    return ok && agrees;
}

// Both.
template <typename Part, bool ACQUIRES, typename Open>
EPX__DEVICE bool
posts_wait(const cuda_view_t &view, uint64_t step, cuda_what_t what,
           const epx__signature_t &mine, const uint64_t *rank_rows,
           int64_t *wait_ns, Open open)
{
    posts_seen seen = posts_look<Part, ACQUIRES>(
        view, step, what, mine, rank_rows, (int)blockDim.x / 32, wait_ns, open);

    return posts_agree(view, step, what, mine, seen, true);
}

// The same, adding to wait_ns[source], if that is not null, how long it took.
EPX__DEVICE bool
arrivals_wait_timed(const cuda_view_t &view, uint64_t step, cuda_what_t what,
                    int source, uint64_t target, int64_t *wait_ns)
{
    if (wait_ns == nullptr || source == view.rank) {
        return arrivals_wait(view, step, what, source, target);
    }
    uint64_t start = global_timer_ns();
    bool ok = arrivals_wait(view, step, what, source, target);

    wait_ns[source] += (int64_t)(global_timer_ns() - start);
    return ok;
}

// Block 0: wait until all that every rank does in this step has arrived, of
// which targets[r].arrivals is the count; with only_own just this rank's own,
// so that all of its blocks know the step's number.
template <typename Target>
EPX__DEVICE bool
arrivals_wait_all(const cuda_view_t &view, uint64_t step, cuda_what_t what,
                  const Target *targets, bool only_own, int64_t *wait_ns)
{
    bool ok = true;

    for (int r = threadIdx.x; r < view.num_ranks && ok; r += blockDim.x) {
        if (only_own ? r == view.rank : is_near(view, r)) {
            ok = arrivals_wait_timed(view, step, what, r, targets[r].arrivals,
                                     only_own ? nullptr : wait_ns);
        }
    }
    return __syncthreads_and(ok) != 0;
}

// Whether rows of a peer's array lie in its heap, aligned.
EPX__DEVICE bool
extent_fits(const cuda_view_t &view, const peer &p, uint64_t offset,
            uint64_t rows, uint64_t row_bytes, uint64_t alignment)
{
    uint64_t end = p.segment_bytes;

    return offset >= view.map.heap && offset <= end &&
           offset % alignment == 0 && __umul64hi(rows, row_bytes) == 0 &&
           rows * row_bytes <= end - offset;
}

#endif
