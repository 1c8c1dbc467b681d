/* SPDX-License-Identifier: MIT */
#include "fault.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

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

/* Turns alternate between two sets of blocks: who writes the next but one has
 * seen that everybody has read. */
static epx_status_t
gather(void *context, const void *send, void *recv, size_t bytes,
       int64_t deadline_ns)
{
    const fault_seat_t *seat = context;
    fault_meeting_t *meeting = seat->meeting;
    int32_t turn = meeting->turns[seat->rank] + 1;

    if (bytes > FAULT_MEETING_BYTES) {
        return EPX_ERR_TOO_SMALL;
    }
    memcpy(meeting->data[turn % 2][seat->rank], send, bytes);
    __atomic_store_n(&meeting->turns[seat->rank], turn, __ATOMIC_SEQ_CST);
    for (int32_t r = 0; r < seat->num_ranks; r++) {
        while (__atomic_load_n(&meeting->turns[r], __ATOMIC_SEQ_CST) < turn) {
            if (fault_now_ns() > deadline_ns) {
                return EPX_ERR_TIMEOUT;
            }
            (void)usleep(50);
        }
        memcpy((char *)recv + (size_t)r * bytes, meeting->data[turn % 2][r],
               bytes);
    }
    return EPX_OK;
}

epx_bootstrap_t
fault_bootstrap(fault_seat_t *seat)
{
    epx_bootstrap_t bootstrap = EPX_BOOTSTRAP_INIT;

    bootstrap.rank = seat->rank;
    bootstrap.num_ranks = seat->num_ranks;
    bootstrap.allgather = gather;
    bootstrap.context = seat;
    return bootstrap;
}
