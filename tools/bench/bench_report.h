/* SPDX-License-Identifier: MIT */
#ifndef EPX_BENCH_REPORT_H
#define EPX_BENCH_REPORT_H

#include "bench_peer.h"

/* One line: an operation beside one peer.  NAN and 0 are "not measured". */
struct bench_line {
    const char *op;
    struct bench_times times;
    uint64_t bytes_moved;
    double sms; /* that its kernels hold */
    double gbps;
    double ceiling_gbps;
    double ratio_ceiling;
    const char *peer; /* or NULL */
    double peer_p50;
    double ratio_peer;
};

/* Writes all lines, as a table or, with --json, as one object each.  False
 * when memory has run out. */
bool bench_report_write(FILE *file, const struct bench_run *run,
                        const struct bench_peer *mpi);

/* One object, with its line end. */
void bench_report_json(FILE *file, const struct bench_run *run,
                       const struct bench_line *line);

#endif
