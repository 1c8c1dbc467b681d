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

// The step that this kernel is.  All of its blocks come here before the last
// one leaves, which then records it.
EPX__DEVICE uint64_t
step_now(const cuda_view_t &view)
{
    return *(const volatile uint64_t *)&view.state->step + 1;
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

static __device__ __noinline__ void
report_rank(const cuda_view_t &view, cuda_what_t what, uint64_t step,
            epx_status_t status, int32_t rank)
{
    if (report_claim(view)) {
        view.report->rank[0] = rank;
        view.report->rank[1] = rank;
        view.report->posts[0] =
            *epx__map_post(&view.map, own_segment(view), step, rank);
        report_publish(view, what, step, status);
    }
}

static __device__ __noinline__ void
report_timeout(const cuda_view_t &view, cuda_what_t what, uint64_t step,
               epx__gate_t gate)
{
    if (!report_claim(view)) {
        return;
    }
    for (int word = 0; word < EPX_MAX_RANKS / 64; word++) {
        uint64_t missing = 0;

        for (int bit = 0; bit < 64; bit++) {
            int rank = word * 64 + bit;

            if (rank < view.num_ranks &&
                ld_acquire_sys(epx__map_arrival(&view.map, own_segment(view),
                                                step, gate, rank)) < step) {
                missing |= UINT64_C(1) << bit;
            }
        }
        view.report->missing[word] = missing;
    }
    report_publish(view, what, step, EPX_ERR_TIMEOUT);
}

// A thread's own wait, with the group's deadline.
struct cuda_deadline {
    uint64_t start;
    uint32_t looks;
};

// False once the deadline is past, or the group broken.
EPX__DEVICE bool
deadline_holds(const cuda_view_t &view, cuda_deadline *deadline, bool *late)
{
    *late = false;
    if (++deadline->looks % 64 != 0) {
        return true;
    }
    uint64_t now = global_timer_ns();
    if (deadline->start == 0) {
        deadline->start = now;
    }
    if (is_broken(view)) {
        return false;
    }
    *late = now - deadline->start > view.timeout_ns;
    return !*late;
}

// One thread: wait until a rank has signalled this gate; acquires what came
// before its signal.  False: the group is broken.
EPX__DEVICE bool
wait_rank(const cuda_view_t &view, uint64_t step, epx__gate_t gate,
          cuda_what_t what, int rank)
{
    const uint64_t *word =
        epx__map_arrival(&view.map, own_segment(view), step, gate, rank);
    cuda_deadline deadline = {};
    uint64_t seen;
    bool late;

    // Looking is cheap; only the look that sees the signal must acquire.
    while (ld_relaxed_sys(word) < step) {
        if (!deadline_holds(view, &deadline, &late)) {
            if (late) {
                report_timeout(view, what, step, gate);
            }
            return false;
        }
    }
    seen = ld_acquire_sys(word);
    // No signal of a step can be ahead of one that is open here.
    if (seen != step) {
        report_rank(view, what, step, EPX_ERR_PEER_DATA, rank);
    }
    return seen == step;
}

// The same for all ranks and the whole block.
EPX__DEVICE bool
wait_all(const cuda_view_t &view, uint64_t step, epx__gate_t gate,
         cuda_what_t what)
{
    bool ok = true;

    for (int r = threadIdx.x; r < view.num_ranks && ok; r += blockDim.x) {
        ok = wait_rank(view, step, gate, what, r);
    }
    return __syncthreads_and(ok) != 0;
}

// Tell every rank that what belongs to this gate is in place: a release of all
// that this block has written or acquired (see wait_all).
EPX__DEVICE void
signal_all(const cuda_view_t &view, uint64_t step, epx__gate_t gate)
{
    __syncthreads();
    for (int i = threadIdx.x; i < view.num_ranks; i += blockDim.x) {
        int peer = (view.rank + 1 + i) % view.num_ranks;

        st_release_sys(epx__map_arrival(&view.map, view.segments[peer], step,
                                        gate, view.rank),
                       step);
    }
}

// The end of a block's work: true in the block that is the last one, for which
// all that the others have written is then visible.  The scope of the device
// suffices: what the last block goes on to release to peers includes it.
EPX__DEVICE bool
last_block(const cuda_view_t &view)
{
    bool last = false;

    __syncthreads();
    if (threadIdx.x == 0) {
        last = atom_inc_acq_rel_gpu(&view.state->exited, gridDim.x - 1) ==
               gridDim.x - 1;
    }
    return __syncthreads_or(last) != 0;
}

// The last block: the step has been made.
EPX__DEVICE void
step_end(const cuda_view_t &view, uint64_t step)
{
    if (threadIdx.x == 0) {
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

// Write this rank's post to every peer and signal READY: one block.
EPX__DEVICE void
post_all(const cuda_view_t &view, uint64_t step, const epx__post_t &post)
{
    constexpr int WORDS = sizeof(epx__post_t) / sizeof(uint64_t);
    static_assert(sizeof(epx__post_t) % sizeof(uint64_t) == 0, "words");
    const uint64_t *from = reinterpret_cast<const uint64_t *>(&post);

    for (int i = threadIdx.x; i < view.num_ranks * WORDS; i += blockDim.x) {
        uint64_t *to = reinterpret_cast<uint64_t *>(epx__map_post(
            &view.map, view.segments[i / WORDS], step, view.rank));

        to[i % WORDS] = from[i % WORDS];
    }
    signal_all(view, step, EPX__GATE_READY);
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

// One thread: which two ranks disagree, for the report.
static __device__ __noinline__ void
report_disagreement(const cuda_view_t &view, uint64_t step, cuda_what_t what)
{
    int first = 0;

    if (!report_claim(view)) {
        return;
    }
    while (first < view.num_ranks - 1 &&
           (epx__map_post(&view.map, own_segment(view), step, first)
                ->signature.arrays &
            EPX__ARRAYS_ANY) != 0) {
        first++;
    }
    const epx__post_t *a =
        epx__map_post(&view.map, own_segment(view), step, first);
    for (int r = 0; r < view.num_ranks; r++) {
        const epx__post_t *b =
            epx__map_post(&view.map, own_segment(view), step, r);

        view.report->rank[0] = first;
        view.report->rank[1] = r;
        view.report->posts[0] = *a;
        view.report->posts[1] = *b;
        if (b->step != step || !same_signature(a->signature, b->signature)) {
            break;
        }
    }
    report_publish(view, what, step, EPX_ERR_MISMATCH);
}

// Wait for every rank's post, copy it, compare them all (`mine` is this rank's)
// and open what each is about: open(rank, post) says whether it can be.
template <typename Open>
EPX__DEVICE bool
posts_wait(const cuda_view_t &view, uint64_t step, cuda_what_t what,
           const epx__signature_t &mine, Open open)
{
    bool waited = true, agrees = true, opened = true;
    uint32_t with = 0, without = 0;

    for (int r = threadIdx.x; r < view.num_ranks && waited; r += blockDim.x) {
        waited = wait_rank(view, step, EPX__GATE_READY, what, r);
        if (!waited) {
            break;
        }
        const epx__post_t post =
            *epx__map_post(&view.map, own_segment(view), step, r);
        uint32_t arrays = post.signature.arrays;

        agrees =
            agrees && post.step == step && same_signature(mine, post.signature);
        with |= (arrays & EPX__ARRAYS_ANY) == 0 && arrays != 0;
        without |= arrays == 0;
        opened = agrees && open(r, post) && opened;
    }
    // The report needs everybody's posts.
    if (!__syncthreads_and(waited)) {
        return false;
    }
    with = __syncthreads_or(with);
    without = __syncthreads_or(without);
    agrees = __syncthreads_and(agrees) != 0 && (with == 0 || without == 0);
    if (!agrees && threadIdx.x == 0) {
        report_disagreement(view, step, what);
    }
    return __syncthreads_and(agrees && opened) != 0;
}

// Whether rows of a peer's array lie in its heap, aligned.
EPX__DEVICE bool
extent_fits(const cuda_view_t &view, int rank, uint64_t offset, uint64_t rows,
            uint64_t row_bytes, uint64_t alignment)
{
    uint64_t end = view.segment_bytes[rank];

    return offset >= view.map.heap && offset <= end &&
           offset % alignment == 0 && __umul64hi(rows, row_bytes) == 0 &&
           rows * row_bytes <= end - offset;
}

#endif
