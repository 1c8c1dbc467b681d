/* SPDX-License-Identifier: MIT */
#ifndef EPX_CORE_CLOCK_H
#define EPX_CORE_CLOCK_H

#include <stdint.h>
#include <time.h>

#define EPX__NS_PER_SEC INT64_C(1000000000)
#define EPX__NS_PER_MS  INT64_C(1000000)

/* Nanoseconds of CLOCK_MONOTONIC: the clock of every deadline. */
static inline int64_t
epx__now_ns(void)
{
    struct timespec ts;

    (void)clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * EPX__NS_PER_SEC + ts.tv_nsec;
}

/* now + duration, held below the end of time. */
static inline int64_t
epx__deadline_ns(uint64_t duration_ns)
{
    int64_t now = epx__now_ns();

    return duration_ns > (uint64_t)(INT64_MAX - now)
               ? INT64_MAX
               : now + (int64_t)duration_ns;
}

#endif
