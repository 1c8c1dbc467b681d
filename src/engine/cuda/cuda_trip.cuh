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

// The deadline is past: the proxy knows for whom.
static __device__ __noinline__ void
report_trip(const cuda_view_t &view, uint64_t step, const cuda_trip_t *trip)
{
    if (!report_claim(view)) {
        return;
    }
    for (int i = 0; i < EPX_MAX_RANKS / 64; i++) {
        view.report->missing[i] = ld_relaxed_sys(&trip->missing[i]);
    }
    report_publish(view, CUDA_IN_RAIL, step, EPX_ERR_TIMEOUT);
}

// One thread: wait until all of a lane has come; acquires it.  False: the group
// is broken.
EPX__DEVICE bool
trip_wait(const cuda_view_t &view, uint64_t step, const cuda_trip_t *trip,
          int lane)
{
    cuda_deadline deadline = {};
    bool late;

    // Released by the proxy.
    while (ld_acquire_sys(&trip->came[lane]) != step) {
        if (!deadline_holds(view, &deadline, &late)) {
            if (late) {
                report_trip(view, step, trip);
            }
            return false;
        }
    }
    return true;
}

#endif
