// SPDX-License-Identifier: MIT
// src/engine/cuda/cuda_ptx.cuh, emulated: it is found before that one.  Scopes
// are all the same here, and orders those of C++.
#ifndef EMULATOR_CUDA_PTX_CUH
#define EMULATOR_CUDA_PTX_CUH

#include "emulator/copies.h"

#include <stdint.h>
#include <time.h>

#define EPX__DEVICE   static inline
#define EPX__HAS_BULK 1

// A stream's kernels follow each other.
EPX__DEVICE void
grid_wait()
{
}

EPX__DEVICE void
grid_release()
{
}

EPX__DEVICE char *
dynamic_shared()
{
    return emulator::dynamic_shared();
}

EPX__DEVICE uint64_t
global_timer_ns()
{
    struct timespec now;

    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

EPX__DEVICE uint64_t
ld_acquire_sys(const uint64_t *word)
{
    emulator::look_at(word);
    return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

EPX__DEVICE uint64_t
ld_relaxed_sys(const uint64_t *word)
{
    emulator::look_at(word);
    return __atomic_load_n(word, __ATOMIC_RELAXED);
}

EPX__DEVICE uint32_t
ld_relaxed_gpu(const uint32_t *word)
{
    emulator::look_at(word);
    return __atomic_load_n(word, __ATOMIC_RELAXED);
}

EPX__DEVICE uint32_t
ld_acquire_gpu(const uint32_t *word)
{
    emulator::look_at(word);
    return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

EPX__DEVICE void
st_release_sys(uint32_t *word, uint32_t value)
{
    emulator::fence();
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
}

EPX__DEVICE void
st_relaxed_sys(uint64_t *word, uint64_t value)
{
    emulator::put_relaxed(word, value, false);
}

EPX__DEVICE void
red_add_relaxed_sys(uint64_t *word, uint64_t value)
{
    emulator::put_relaxed(word, value, true);
}

EPX__DEVICE void
red_add_release_gpu(uint32_t *word, uint32_t value)
{
    emulator::fence();
    (void)__atomic_fetch_add(word, value, __ATOMIC_RELEASE);
}

EPX__DEVICE uint32_t
atom_inc_acq_rel_gpu(uint32_t *word, uint32_t limit)
{
    uint32_t old;

    emulator::fence();
    old = __atomic_load_n(word, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(word, &old, old >= limit ? 0 : old + 1,
                                        false, __ATOMIC_ACQ_REL,
                                        __ATOMIC_RELAXED)) {
    }
    return old;
}

EPX__DEVICE void
fence_acq_rel_gpu()
{
    emulator::fence();
}

EPX__DEVICE void
fence_acq_rel_sys()
{
    emulator::fence();
}

EPX__DEVICE uint32_t
max_u16x2(uint32_t a, uint32_t b)
{
    return __vmaxu2(a, b);
}

EPX__DEVICE uint4
ld_stream(const void *from)
{
    return *static_cast<const uint4 *>(from);
}

EPX__DEVICE uint4
load_16(const char *from, bool is_aligned)
{
    uint4 value;

    if (is_aligned) {
        return ld_stream(from);
    }
    memcpy(&value, from, sizeof(value));
    return value;
}

EPX__DEVICE void
mbarrier_init(uint64_t *barrier, uint32_t arrivals)
{
    emulator::barrier_init(barrier, arrivals);
}

EPX__DEVICE void
fence_mbarrier_init()
{
}

EPX__DEVICE void
mbarrier_arrive_expect(uint64_t *barrier, uint32_t bytes)
{
    emulator::barrier_arrive_expect(barrier, bytes);
}

EPX__DEVICE void
mbarrier_wait(uint64_t *barrier, uint32_t parity)
{
    emulator::barrier_wait(barrier, parity);
}

EPX__DEVICE void
bulk_load(void *to_shared, const void *from, uint32_t bytes, uint64_t *barrier)
{
    emulator::start_load(to_shared, from, bytes, barrier);
}

EPX__DEVICE void
bulk_store(void *to, const void *from_shared, uint32_t bytes)
{
    emulator::start_store(to, from_shared, bytes);
}

EPX__DEVICE uint64_t
bulk_policy(bool leaves_first)
{
    return leaves_first;
}

EPX__DEVICE void
bulk_store(void *to, const void *from_shared, uint32_t bytes, uint64_t)
{
    emulator::start_store(to, from_shared, bytes);
}

EPX__DEVICE void
bulk_commit()
{
    emulator::commit_stores();
}

template <int N>
EPX__DEVICE void
bulk_wait_read()
{
    emulator::wait_stores(N, false);
}

EPX__DEVICE void
bulk_wait_written()
{
    emulator::wait_stores(0, true);
}

EPX__DEVICE void
fence_proxy_async_shared()
{
}

EPX__DEVICE void
fence_proxy_async_global()
{
}

#endif
