/* SPDX-License-Identifier: MIT */
/*
 * A recorded routing:
 *
 *     # any number of comment lines
 *     expert0,expert1,weight0,weight1
 *     13,15,0.0659,0.0509
 *
 * One line per token, K experts (-1 for none, no expert twice) and then K
 * finite weights.  Lines end in LF or CRLF; nothing else may stand in them.
 */
#ifndef EPX_BENCH_ROUTING_CSV_H
#define EPX_BENCH_ROUTING_CSV_H

#include "bench_error.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct routing_table {
    int32_t topk;
    int64_t num_tokens;
    int64_t *experts; /* [num_tokens, topk], -1..num_experts-1 */
    float *weights;   /* [num_tokens, topk] */
};

/* `text` need not end in NUL.  On failure the sentence names the line. */
bool routing_csv_parse(const char *text, size_t bytes, int32_t num_experts,
                       struct routing_table *table, struct bench_error *error);

/* The same for a file. */
bool routing_csv_read(const char *path, int32_t num_experts,
                      struct routing_table *table, struct bench_error *error);

/* A table that is all zero may be released too. */
void routing_table_release(struct routing_table *table);

#endif
