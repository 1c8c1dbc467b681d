// SPDX-License-Identifier: MIT
// A step between nodes, as its kernels share it with the proxy: cuda_rail.h.
#ifndef EPX_ENGINE_CUDA_TRIP_CUH
#define EPX_ENGINE_CUDA_TRIP_CUH

#include "engine/cuda/cuda_step.cuh"

EPX__DEVICE cuda_trip_t *
trip_at(const cuda_view_t &view, uint64_t step)
{
    return &view.nodes.relay->trips[epx__slot(step)];
}

// The deadline is past: the proxy knows for whom.  A rank that has not begun
// the step may keep others from sending.
static __device__ __noinline__ void
report_trip(const cuda_view_t &view, uint64_t step, const cuda_trip_t *trip,
            int lane)
{
    uint64_t any = 0;

    if (!report_claim(view)) {
        return;
    }
    for (int i = 0; i < EPX_MAX_RANKS / 64; i++) {
        any |= ld_relaxed_sys(&trip->absent[i]);
    }
    for (int i = 0; i < EPX_MAX_RANKS / 64; i++) {
        view.report->missing[i] =
            ld_relaxed_sys(any != 0 ? &trip->absent[i] : &trip->owing[lane][i]);
    }
    report_publish(view, CUDA_IN_RAIL, step, EPX_ERR_TIMEOUT);
}

// How long a wait takes for each rank of another node.
struct trip_watch {
    int64_t *wait_ns; // null: nobody wants to know
    uint64_t start;
    uint64_t owing[EPX_MAX_RANKS / 64];
};

EPX__DEVICE void
watch_start(const cuda_view_t &view, int64_t *wait_ns, trip_watch *watch)
{
    watch->wait_ns = wait_ns;
    if (wait_ns == nullptr) {
        return;
    }
    watch->start = global_timer_ns();
    for (int i = 0; i * 64 < view.num_ranks; i++) {
        watch->owing[i] = 0; // what the proxy has told, or will soon
    }
}

// Note those that have come since the last look; at the end, all others.
EPX__DEVICE void
watch_look(const cuda_view_t &view, const cuda_trip_t *trip, int lane,
           bool is_end, trip_watch *watch)
{
    if (watch->wait_ns == nullptr) {
        return;
    }
    for (int i = 0; i * 64 < view.num_ranks; i++) {
        uint64_t now = is_end ? 0 : ld_relaxed_sys(&trip->owing[lane][i]);
        uint64_t came = watch->owing[i] & ~now;

        watch->owing[i] = (watch->owing[i] | now) & ~came;
        for (int bit = 0; came != 0 && bit < 64; bit++) {
            if ((came >> bit & 1) != 0) {
                watch->wait_ns[i * 64 + bit] +=
                    (int64_t)(global_timer_ns() - watch->start);
            }
        }
    }
}

// One thread: wait until all of a lane has come; acquires it.  False: the group
// is broken.
EPX__DEVICE bool
trip_wait(const cuda_view_t &view, uint64_t step, const cuda_trip_t *trip,
          int lane, int64_t *wait_ns)
{
    cuda_deadline deadline = {};
    trip_watch watch;
    bool late;

    watch_start(view, wait_ns, &watch);
    // Looks that acquire would cost whoever shares the SM its L1.
    while (ld_relaxed_sys(&trip->came[lane]) != step) {
        watch_look(view, trip, lane, false, &watch);
        if (!deadline_holds(view, &deadline, &late)) {
            if (late) {
                report_trip(view, step, trip, lane);
            }
            return false;
        }
    }
    (void)ld_acquire_sys(&trip->came[lane]); // released by the proxy
    watch_look(view, trip, lane, true, &watch);
    return true;
}

#endif
