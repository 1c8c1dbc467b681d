/* SPDX-License-Identifier: MIT */
#include "fault.h"

#include <stdarg.h>
#include <stdio.h>
#include <time.h>

int64_t
fault_now_ns(void)
{
    struct timespec ts;

    (void)clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * 1000000000 + ts.tv_nsec;
}

void
fault_complain(fault_round_t *round, int32_t rank, const char *format, ...)
{
    fault_report_t *report = &round->reports[rank];
    va_list args;

    if (!report->failed) {
        va_start(args, format);
        (void)vsnprintf(report->text, sizeof(report->text), format, args);
        va_end(args);
        report->failed = true;
    }
}
