// SPDX-License-Identifier: MIT
// The instructions that CUDA C++ has no words for.  Names give order and scope;
// the manual is NVIDIA's "PTX ISA", sections 9.7.9 (memory), 9.7.13 (barriers).
#ifndef EPX_ENGINE_CUDA_PTX_CUH
#define EPX_ENGINE_CUDA_PTX_CUH

#include <stdint.h>

#define EPX__DEVICE static __device__ __forceinline__

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define EPX__HAS_BULK     1
#define EPX__STARTS_EARLY 1
#else
#define EPX__HAS_BULK     0
#define EPX__STARTS_EARLY 0
#endif

// The shared memory that the launch has asked for.
EPX__DEVICE char *
dynamic_shared()
{
    extern __shared__ __align__(128) char shared[];

    return shared;
}

EPX__DEVICE uint64_t
global_timer_ns()
{
    uint64_t now;

    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
}

EPX__DEVICE uint64_t
ld_acquire_sys(const uint64_t *word)
{
    uint64_t value;

    asm volatile("ld.acquire.sys.global.u64 %0, [%1];"
                 : "=l"(value)
                 : "l"(word)
                 : "memory");
    return value;
}

EPX__DEVICE uint64_t
ld_relaxed_sys(const uint64_t *word)
{
    uint64_t value;

    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];"
                 : "=l"(value)
                 : "l"(word)
                 : "memory");
    return value;
}

EPX__DEVICE uint32_t
ld_relaxed_gpu(const uint32_t *word)
{
    uint32_t value;

    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];"
                 : "=r"(value)
                 : "l"(word)
                 : "memory");
    return value;
}

EPX__DEVICE uint32_t
ld_acquire_gpu(const uint32_t *word)
{
    uint32_t value;

    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                 : "=r"(value)
                 : "l"(word)
                 : "memory");
    return value;
}

EPX__DEVICE void
st_release_sys(uint32_t *word, uint32_t value)
{
    asm volatile("st.release.sys.global.u32 [%0], %1;"
                 :
                 : "l"(word), "r"(value)
                 : "memory");
}

EPX__DEVICE void
st_relaxed_sys(uint64_t *word, uint64_t value)
{
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;"
                 :
                 : "l"(word), "l"(value)
                 : "memory");
}

EPX__DEVICE void
red_add_relaxed_sys(uint64_t *word, uint64_t value)
{
    asm volatile("red.relaxed.sys.global.add.u64 [%0], %1;"
                 :
                 : "l"(word), "l"(value)
                 : "memory");
}

EPX__DEVICE void
red_add_release_gpu(uint32_t *word, uint32_t value)
{
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;"
                 :
                 : "l"(word), "r"(value)
                 : "memory");
}

// *word = *word >= limit ? 0 : *word + 1; returns what it was.
EPX__DEVICE uint32_t
atom_inc_acq_rel_gpu(uint32_t *word, uint32_t limit)
{
    uint32_t old;

    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
                 : "=r"(old)
                 : "l"(word), "r"(limit)
                 : "memory");
    return old;
}

EPX__DEVICE void
fence_acq_rel_gpu()
{
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
}

EPX__DEVICE void
fence_acq_rel_sys()
{
    asm volatile("fence.acq_rel.sys;" ::: "memory");
}

// The larger ones of two pairs of halves.
EPX__DEVICE uint32_t
max_u16x2(uint32_t a, uint32_t b)
{
#if __CUDA_ARCH__ >= 900
    uint32_t max;

    asm("max.u16x2 %0, %1, %2;" : "=r"(max) : "r"(a), "r"(b));
    return max;
#else
    return __vmaxu2(a, b);
#endif
}

// Until what comes before this kernel in its stream has ended, and all that it
// has written can be seen: see cuda_launch.cuh.
EPX__DEVICE void
grid_wait()
{
#if EPX__STARTS_EARLY
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// What comes after this kernel may be launched, once all of its blocks have
// called this or have ended.
EPX__DEVICE void
grid_release()
{
#if EPX__STARTS_EARLY
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Rows are read once and written once: they need not stay in the caches.
EPX__DEVICE uint4
ld_stream(const void *from)
{
    uint4 v;

    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from)
                 : "memory");
    return v;
}

// 16 bytes that need not be aligned.
EPX__DEVICE uint4
load_16(const char *from, bool is_aligned)
{
    uint4 value;

    if (is_aligned) {
        return ld_stream(from);
    }
    for (int i = 0; i < 16; i++) {
        reinterpret_cast<char *>(&value)[i] = from[i];
    }
    return value;
}

#if EPX__HAS_BULK

EPX__DEVICE uint32_t
shared_address(const void *pointer)
{
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

EPX__DEVICE void
mbarrier_init(uint64_t *barrier, uint32_t arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;"
                 :
                 : "r"(shared_address(barrier)), "r"(arrivals)
                 : "memory");
}

// Makes initialised barriers visible to the bulk copies.
EPX__DEVICE void
fence_mbarrier_init()
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

EPX__DEVICE void
mbarrier_arrive_expect(uint64_t *barrier, uint32_t bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 :
                 : "r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

// The bulk loads waited for come from this device's or a peer's memory and end
// without anybody's help, so that this wait needs no deadline.
EPX__DEVICE void
mbarrier_wait(uint64_t *barrier, uint32_t parity)
{
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n"
                 "}"
                 :
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
}

// Addresses and sizes are multiples of 16 bytes.
EPX__DEVICE void
bulk_load(void *to_shared, const void *from, uint32_t bytes, uint64_t *barrier)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::"
                 "complete_tx::bytes [%0], [%1], %2, [%3];"
                 :
                 : "r"(shared_address(to_shared)), "l"(from), "r"(bytes),
                   "r"(shared_address(barrier))
                 : "memory");
}

EPX__DEVICE void
bulk_store(void *to, const void *from_shared, uint32_t bytes)
{
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;"
                 :
                 : "l"(to), "r"(shared_address(from_shared)), "r"(bytes)
                 : "memory");
}

// Whether what a bulk store has written should leave the L2 cache first.
EPX__DEVICE uint64_t
bulk_policy(bool leaves_first)
{
    uint64_t policy;

    if (leaves_first) {
        asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;"
                     : "=l"(policy));
    } else {
        asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;"
                     : "=l"(policy));
    }
    return policy;
}

EPX__DEVICE void
bulk_store(void *to, const void *from_shared, uint32_t bytes, uint64_t policy)
{
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint "
                 "[%0], [%1], %2, %3;"
                 :
                 : "l"(to), "r"(shared_address(from_shared)), "r"(bytes),
                   "l"(policy)
                 : "memory");
}

EPX__DEVICE void
bulk_commit()
{
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// All but the last N groups of this thread have read their shared memory.
template <int N>
EPX__DEVICE void
bulk_wait_read()
{
    asm volatile("cp.async.bulk.wait_group.read %0;" : : "n"(N) : "memory");
}

// All groups of this thread have written what they had to.
EPX__DEVICE void
bulk_wait_written()
{
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// Between ordinary accesses to shared memory and bulk copies of it.
EPX__DEVICE void
fence_proxy_async_shared()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Between an acquired signal and bulk loads of what it announced.
EPX__DEVICE void
fence_proxy_async_global()
{
    asm volatile("fence.proxy.async.global;" ::: "memory");
}

#endif
#endif
