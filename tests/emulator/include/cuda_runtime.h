/* SPDX-License-Identifier: MIT */
/* CUDA C++ as the emulator has it, which the kernels are compiled with.  A
 * block is an OS thread, whose threads are fibers: see emulator/block.h. */
#ifndef EMULATOR_CUDA_RUNTIME_H
#define EMULATOR_CUDA_RUNTIME_H

#include "emulator/block.h"
#include "emulator/stream.h"

#include <cuda_runtime_api.h>
#include <math.h>
#include <string.h>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __noinline__    __attribute__((noinline))
#define __shared__      static __thread

#define threadIdx (emulator::self->index)
#define blockIdx  (emulator::self->block->index)
#define blockDim  (emulator::self->block->launch->block_dim)
#define gridDim   (emulator::self->block->launch->grid_dim)

/* ---- vectors, which lie as those of CUDA ---- */

struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

static inline uint2
make_uint2(unsigned x, unsigned y)
{
    return { x, y };
}

static inline uint4
make_uint4(unsigned x, unsigned y, unsigned z, unsigned w)
{
    return { x, y, z, w };
}

/* ---- arithmetic ---- */

template <typename A, typename B>
constexpr std::common_type_t<A, B>
min(A a, B b)
{
    std::common_type_t<A, B> x = a, y = b;

    return y < x ? y : x;
}

template <typename A, typename B>
constexpr std::common_type_t<A, B>
max(A a, B b)
{
    std::common_type_t<A, B> x = a, y = b;

    return x < y ? y : x;
}

static inline int
__popc(unsigned value)
{
    return __builtin_popcount(value);
}

static inline int
__ffs(int value)
{
    return __builtin_ffs(value);
}

static inline uint64_t
__umul64hi(uint64_t a, uint64_t b)
{
    return (uint64_t)((unsigned __int128)a * b >> 64);
}

static inline float
__fadd_rn(float a, float b)
{
    return a + b;
}

static inline float
__fmaf_rn(float a, float b, float c)
{
    return fmaf(a, b, c);
}

template <typename Half>
static inline uint32_t
max_of_halves(uint32_t a, uint32_t b)
{
    Half low = max((Half)a, (Half)b);
    Half high = max((Half)(a >> 16), (Half)(b >> 16));

    return (uint32_t)(uint16_t)high << 16 | (uint16_t)low;
}

static inline uint32_t
__vmaxs2(uint32_t a, uint32_t b)
{
    return max_of_halves<int16_t>(a, b);
}

static inline uint32_t
__vmaxu2(uint32_t a, uint32_t b)
{
    return max_of_halves<uint16_t>(a, b);
}

/* ---- memory ---- */

template <typename T>
static inline T
__ldcg(const T *from)
{
    T value;

    emulator::look_at(from);
    __atomic_load(from, &value, __ATOMIC_RELAXED);
    return value;
}

template <typename T>
static inline T
atomicAdd(T *to, std::common_type_t<T> value)
{
    return __atomic_fetch_add(to, value, __ATOMIC_RELAXED);
}

template <typename T>
static inline T
atomicCAS(T *to, std::common_type_t<T> expected, std::common_type_t<T> value)
{
    (void)__atomic_compare_exchange_n(to, &expected, value, false,
                                      __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return expected;
}

template <typename T>
static inline T
atomicMin(T *to, std::common_type_t<T> value)
{
    T old = __atomic_load_n(to, __ATOMIC_RELAXED);

    while (value < old &&
           !__atomic_compare_exchange_n(to, &old, value, false,
                                        __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return old;
}

template <typename T>
static inline T
atomicMax(T *to, std::common_type_t<T> value)
{
    T old = __atomic_load_n(to, __ATOMIC_RELAXED);

    while (value > old &&
           !__atomic_compare_exchange_n(to, &old, value, false,
                                        __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return old;
}

/* ---- threads that meet ---- */

static inline void
__syncthreads()
{
    (void)emulator::meet_block("__syncthreads", true);
}

static inline int
__syncthreads_and(int value)
{
    return emulator::meet_block("__syncthreads_and", value != 0).all;
}

static inline int
__syncthreads_or(int value)
{
    return emulator::meet_block("__syncthreads_or", value != 0).any;
}

static inline void
__syncwarp()
{
    (void)emulator::meet_warp("__syncwarp", ~0u, 0);
}

static inline uint32_t
__ballot_sync(uint32_t mask, int value)
{
    const uint64_t *values =
        emulator::meet_warp("__ballot_sync", mask, value != 0);
    uint32_t bits = 0;

    for (int lane = 0; lane < 32; lane++) {
        bits |= (uint32_t)values[lane] << lane;
    }
    return bits;
}

static inline int
__any_sync(uint32_t mask, int value)
{
    return __ballot_sync(mask, value) != 0;
}

static inline int
__all_sync(uint32_t mask, int value)
{
    return __ballot_sync(mask, value) == ~0u;
}

static inline uint32_t
__match_any_sync(uint32_t mask, int value)
{
    const uint64_t *values =
        emulator::meet_warp("__match_any_sync", mask, (uint32_t)value);
    uint32_t bits = 0;

    for (int lane = 0; lane < 32; lane++) {
        bits |= (uint32_t)(values[lane] == (uint32_t)value) << lane;
    }
    return bits;
}

/* Of the lane that `from` says, by its own number. */
template <typename T, typename From>
static inline T
shuffle(const char *name, uint32_t mask, T value, From from)
{
    uint64_t word = 0;

    static_assert(sizeof(T) <= sizeof(word), "CUDA's have at most 8 bytes");
    memcpy(&word, &value, sizeof(T));
    const uint64_t *values = emulator::meet_warp(name, mask, word);
    memcpy(&value, &values[from((int)threadIdx.x % 32)], sizeof(T));
    return value;
}

template <typename T>
static inline T
__shfl_sync(uint32_t mask, T value, int lane)
{
    return shuffle("__shfl_sync", mask, value, [=](int) { return lane % 32; });
}

template <typename T>
static inline T
__shfl_up_sync(uint32_t mask, T value, unsigned by)
{
    return shuffle("__shfl_up_sync", mask, value, [=](int lane) {
        return lane < (int)by ? lane : lane - (int)by;
    });
}

template <typename T>
static inline T
__shfl_xor_sync(uint32_t mask, T value, int bits)
{
    return shuffle("__shfl_xor_sync", mask, value,
                   [=](int lane) { return (lane ^ bits) % 32; });
}

/* ---- launches ---- */

enum cudaLaunchAttributeID {
    cudaLaunchAttributeProgrammaticStreamSerialization = 6
};

struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    struct {
        int programmaticStreamSerializationAllowed;
    } val;
};

struct cudaLaunchConfig_t {
    dim3 grid, block; // CUDA's names are macros here
    size_t shared_bytes;
    cudaStream_t stream;
    cudaLaunchAttribute *attrs;
    unsigned numAttrs;
};

template <typename Args>
static inline cudaError_t
cudaLaunchKernelEx(const cudaLaunchConfig_t *config, void (*kernel)(const Args),
                   const Args &args)
{
    return emulator::launch((const void *)kernel, [=]() { kernel(args); },
                            config->grid, config->block, config->shared_bytes,
                            config->stream);
}

struct cudaFuncAttributes {
    int ptxVersion;
};

template <typename Kernel>
static inline cudaError_t
cudaFuncGetAttributes(cudaFuncAttributes *attributes, Kernel *)
{
    attributes->ptxVersion = 90;
    return cudaSuccess;
}

template <typename Kernel>
static inline cudaError_t
cudaFuncSetAttribute(Kernel *kernel, cudaFuncAttribute attribute, int value)
{
    return emulator::wish_shared((const void *)kernel, attribute, value);
}

#endif
