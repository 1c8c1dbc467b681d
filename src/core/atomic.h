/* SPDX-License-Identifier: MIT */
/*
 * Signals in memory that other ranks write: naturally aligned plain words that
 * are only ever touched through these.  (Plain words, not _Atomic ones, so that
 * CUDA code can share the structs.)  Each release names its acquire where it is
 * used.
 */
#ifndef EPX_CORE_ATOMIC_H
#define EPX_CORE_ATOMIC_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

static inline uint64_t
epx__load_acquire_u64(const uint64_t *word)
{
    return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

static inline void
epx__store_release_u64(uint64_t *word, uint64_t value)
{
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
}

static inline uint32_t
epx__load_u32(const uint32_t *word)
{
    return __atomic_load_n(word, __ATOMIC_SEQ_CST);
}

static inline void
epx__store_u32(uint32_t *word, uint32_t value)
{
    __atomic_store_n(word, value, __ATOMIC_SEQ_CST);
}

static inline uint32_t
epx__add_u32(uint32_t *word, uint32_t value)
{
    return __atomic_add_fetch(word, value, __ATOMIC_SEQ_CST);
}

/* Earlier loads, also plain ones, come before later ones. */
static inline void
epx__fence_acquire(void)
{
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
}

/* Whether *word was *expected_p and has become `value`; else *expected_p is
 * what it is. */
static inline bool
epx__swap_u32(uint32_t *word, uint32_t *expected_p, uint32_t value)
{
    return __atomic_compare_exchange_n(word, expected_p, value, false,
                                       __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

static inline uint16_t
epx__load_u16(const uint16_t *word)
{
    return __atomic_load_n(word, __ATOMIC_SEQ_CST);
}

/* Whether *word was 0 and has become `value`. */
static inline bool
epx__claim_u16(uint16_t *word, uint16_t value)
{
    uint16_t free = 0;

    return __atomic_compare_exchange_n(word, &free, value, false,
                                       __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

/* Copy what a peer may be changing to memory of our own, once: the compiler may
 * not read the original again for later uses. */
static inline void
epx__copy_in(void *to, const void *from, size_t bytes)
{
    memcpy(to, from, bytes);
    __asm__ __volatile__("" ::"r"(to) : "memory");
}

/* Tell the core that this is a spin loop. */
static inline void
epx__pause(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

/* Sleep while *word is `value`, at most until woken or for timeout_ns.  May
 * return early.  Works across processes. */
void epx__futex_wait(uint32_t *word, uint32_t value, int64_t timeout_ns);
void epx__futex_wake_all(uint32_t *word);

#endif
