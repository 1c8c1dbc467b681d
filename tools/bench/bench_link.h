/* SPDX-License-Identifier: MIT */
/* The network between the hosts that the ranks play: where it is, what has to
 * cross it, and what did. */
#ifndef EPX_BENCH_LINK_H
#define EPX_BENCH_LINK_H

#include "bench_shape.h"

#include <net/if.h>

/* The first rank of a host; of the one behind the last: R. */
int32_t bench_link_first(const struct bench_options *o, int32_t host);

/* The other host's rank that takes in what this one sends to that host. */
int32_t bench_link_rail(const struct bench_options *o, int32_t rank,
                        int32_t host);

/* Bytes that a rank sends to each rail, [hosts], where every token's row
 * crosses once for each other host that has experts for it, and nothing but
 * rows does: tokens as dispatch sends them, or, with combine, the rows that it
 * is sent back.  False when memory has run out. */
bool bench_link_rows(const struct bench_shape *shape,
                     const struct bench_routing *routing, int32_t rank,
                     bool combine, uint64_t *bytes);

/* The same of all ranks together, 0 for operations that move no rows. */
bool bench_link_bytes(const struct bench_shape *shape,
                      const struct bench_routing *routing,
                      uint64_t bytes[BENCH_NUM_OPS]);

/* A host's name in --netns; false: it does not fit. */
bool bench_link_netns(const struct bench_options *o, int32_t host, char *name,
                      size_t bytes);

/* Moves this process, which has one thread, into the network of its host. */
bool bench_link_enter(const struct bench_options *o, int32_t rank,
                      struct bench_error *error);

/* The interface that this process' ranks are reached by, in name. */
bool bench_link_device(const struct bench_options *o, char name[IF_NAMESIZE],
                       struct bench_error *error);

/* What an interface has sent so far, frames and all; 0: that is not told. */
uint64_t bench_link_sent(const char *device);

#endif
