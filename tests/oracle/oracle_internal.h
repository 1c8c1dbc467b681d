/* SPDX-License-Identifier: MIT */
#ifndef TESTS_ORACLE_INTERNAL_H
#define TESTS_ORACLE_INTERNAL_H

#include "oracle/oracle.h"

/* Never NULL; zeroed. */
void *oracle_alloc(int64_t count, size_t size);

size_t oracle_elem_size(epx_dtype_t dtype);
float oracle_to_float(epx_dtype_t dtype, const void *data, int64_t i);
void oracle_put_float(epx_dtype_t dtype, void *data, int64_t i, float value);

/* The routing, gathered. */
struct oracle {
    int32_t num_ranks;
    epx_plan_args_t common;    /* what all ranks agree on */
    int64_t *num_tokens;       /* [R] */
    int32_t *node_of;          /* [R] */
    int64_t *base;             /* [R]: tokens of the ranks before */
    int64_t *expert_idx;       /* [all tokens, K] */
    bool *is_dropped;          /* [all tokens, K] */
    int64_t *row_of;           /* [all tokens, K] */
    struct oracle_view *views; /* [R] */
};

/* What one rank receives. */
struct oracle_view {
    epx_plan_counts_t counts;
    int64_t *rank_tokens;    /* [R] */
    int64_t *expert_rows;    /* [L] */
    int64_t *expert_offsets; /* [L + 1] */
    oracle_row_t *rows;
    int64_t num_rows;
    int64_t max_rows;
};

/* The expert of (src_rank, token, k), -1 for none. */
int64_t oracle_expert(const oracle_t *oracle, int32_t src_rank, int64_t token,
                      int32_t k);
/* The rank that holds an expert; -1 for -1. */
int32_t oracle_rank_of_expert(const oracle_t *oracle, int64_t expert);

#endif
