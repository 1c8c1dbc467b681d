/* SPDX-License-Identifier: MIT */
/* The peer that does the same work over MPI, in a run of its own. */
#ifndef EPX_BENCH_PEER_H
#define EPX_BENCH_PEER_H

#include "bench_run.h"

struct bench_peer {
    bool ran;
    struct bench_times dispatch;
    struct bench_times combine;
};

/* Runs it to its end.  False when there is no such peer here or it has failed;
 * the sentence is in *error. */
bool bench_peer_run(const struct bench_run *run, struct bench_peer *peer,
                    struct bench_error *error);

#endif
