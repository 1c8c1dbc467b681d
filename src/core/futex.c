/* SPDX-License-Identifier: MIT */
#include "core/atomic.h"
#include "core/clock.h"

#include <limits.h>
#include <linux/futex.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <unistd.h>

void
epx__futex_wait(uint32_t *word, uint32_t value, int64_t timeout_ns)
{
    struct timespec timeout = {
        .tv_sec = timeout_ns / EPX__NS_PER_SEC,
        .tv_nsec = timeout_ns % EPX__NS_PER_SEC,
    };

    /* Every outcome (woken, changed, signal, timeout) sends the caller back to
     * look at its condition, so the result says nothing of use. */
    if (timeout_ns > 0) {
        (void)syscall(SYS_futex, word, FUTEX_WAIT, value, &timeout, NULL, 0);
    }
}

void
epx__futex_wake_all(uint32_t *word)
{
    (void)syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}
