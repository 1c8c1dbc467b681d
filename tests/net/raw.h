/* SPDX-License-Identifier: MIT */
/* UCX's active messages and nothing around them: one thread that polls, the
 * same settings and header size as the net's. */
#ifndef EPX_TESTS_NET_RAW_H
#define EPX_TESTS_NET_RAW_H

#include "world.h"

typedef struct raw raw_t;

/* Between ranks 0 and 1, which both call everything. */
raw_t *raw_open(rank_t *rank);
void raw_close(raw_t *raw);

/* Seconds of a message of so many bytes, one way. */
double raw_latency(raw_t *raw, size_t bytes, int trips, bool rendezvous);
/* Bytes per second from rank 0 to rank 1, so many messages under way; each rank
 * returns what it saw. */
double raw_bandwidth(raw_t *raw, size_t bytes, int messages, int under_way,
                     bool rendezvous);

#endif
