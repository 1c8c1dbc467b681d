/* SPDX-License-Identifier: MIT */
#include "bench_barrier.h"

#include "bench_times.h"

#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define SPIN_NS 200000

void
bench_barrier_init(struct bench_barrier *barrier, int32_t parties,
                   int32_t cores)
{
    atomic_init(&barrier->arrived, 0);
    atomic_init(&barrier->round, 0);
    atomic_init(&barrier->sleepers, 0);
    barrier->parties = (uint32_t)parties;
    barrier->spin = parties <= cores;
}

static void
relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Sleeps while the round is `seen`, at most until the deadline.  Whoever ends
 * the round changes it first and looks at `sleepers` then, so it either counts
 * this one or the kernel finds the round changed and does not sleep. */
static void
sleep_in_round(struct bench_barrier *barrier, uint32_t seen,
               int64_t deadline_ns)
{
    struct timespec until = { deadline_ns / 1000000000,
                              deadline_ns % 1000000000 };
    atomic_fetch_add(&barrier->sleepers, 1);
    syscall(SYS_futex, &barrier->round, FUTEX_WAIT_BITSET, seen,
            deadline_ns == BENCH_NO_DEADLINE ? NULL : &until, NULL,
            FUTEX_BITSET_MATCH_ANY);
    atomic_fetch_sub(&barrier->sleepers, 1);
}

bool
bench_barrier_wait(struct bench_barrier *barrier, int64_t deadline_ns)
{
    uint32_t round = atomic_load(&barrier->round);
    if (atomic_fetch_add(&barrier->arrived, 1) + 1 == barrier->parties) {
        /* Nobody can arrive for the next round before `round` changes. */
        atomic_store(&barrier->arrived, 0);
        atomic_store(&barrier->round, round + 1);
        if (atomic_load(&barrier->sleepers)) {
            syscall(SYS_futex, &barrier->round, FUTEX_WAKE, INT_MAX, NULL, NULL,
                    0);
        }
        return true;
    }
    int64_t spin_end = barrier->spin ? bench_now_ns() + SPIN_NS : 0;
    while (atomic_load(&barrier->round) == round) {
        int64_t now = bench_now_ns();
        if (now >= deadline_ns) {
            return false;
        }
        if (now < spin_end) {
            relax();
        } else {
            sleep_in_round(barrier, round, deadline_ns);
        }
    }
    return true;
}
