/* SPDX-License-Identifier: MIT */
/* Which experts each token goes to: a pure function of the options, the rank
 * and the round, so that every rank can tell the routing of all. */
#ifndef EPX_BENCH_ROUTING_H
#define EPX_BENCH_ROUTING_H

#include "bench_options.h"
#include "routing_csv.h"

struct bench_routing {
    const struct bench_options *options;
    struct routing_table file; /* all zero without BENCH_CSV */
    int32_t topk;
    int64_t max_tokens; /* of any rank */
};

bool bench_routing_open(struct bench_routing *routing,
                        const struct bench_options *options,
                        struct bench_error *error);
void bench_routing_close(struct bench_routing *routing);

/* T of a rank; the same in every round. */
int64_t bench_routing_tokens(const struct bench_routing *routing, int32_t rank);

/* Fills idx and weights, [T, K].  False when memory has run out. */
bool bench_routing_fill(const struct bench_routing *routing, int32_t rank,
                        uint64_t round, int64_t *idx, float *weights);

/* Rows that one rank's tokens make. */
struct bench_traffic {
    int64_t tokens;       /* T */
    int64_t tokens_sent;  /* those with an expert at all */
    int64_t rank_pairs;   /* (token, rank) */
    int64_t expert_pairs; /* (token, expert) */
};

/* Adds the rows that these tokens make on each rank, in the layout of the
 * options, to rows[R]. */
void bench_routing_arrivals(const struct bench_routing *routing,
                            int64_t num_tokens, const int64_t *idx,
                            int64_t *rows);

/* Adds the tokens that have experts on each of the hosts to rows[hosts]. */
void bench_routing_by_host(const struct bench_routing *routing,
                           int64_t num_tokens, const int64_t *idx,
                           int64_t *rows);

struct bench_traffic bench_routing_count(const struct bench_routing *routing,
                                         int64_t num_tokens,
                                         const int64_t *idx);

#endif
