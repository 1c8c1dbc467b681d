/* SPDX-License-Identifier: MIT */
/*
 * The oracle: what every rank must end up with, computed the slow, direct way
 * from the inputs of all ranks.  It shares no code with the library, only its
 * public header, and aborts when memory runs out.
 *
 * Small shapes, everything in arrays:
 *
 *     oracle_t *o = oracle_create(R, plan_args);        plan_args[R]
 *     oracle_counts(o, rank)                            against epx_plan_counts
 *     oracle_arrays_t in = { dispatch_args, K };        dispatch_args[R]
 *     oracle_dispatch(o, rank, oracle_token_of_arrays, &in, &expected);
 *     ... compare expected.recv_* with what arrived ...
 *
 * Large shapes, without holding anything twice:
 *
 *     oracle_check_dispatch(o, rank, my_token_fn, my_context, &args, text, n)
 *     oracle_check_combine(o, rank, my_output_fn, my_context, &args, text, n)
 *
 * compare row by row; they return false and describe the first difference in
 * `text`.  The *_row functions do one row, so that the work can be spread over
 * threads or sampled.  An oracle_t is never changed once made.
 */
#ifndef TESTS_ORACLE_ORACLE_H
#define TESTS_ORACLE_ORACLE_H

#include <epx/epx.h>
#include <stdbool.h>

/* ---- routing ---- */

typedef struct oracle oracle_t;

/* One row of a receive buffer. */
typedef struct oracle_row {
    int64_t row;       /* index in the recv_* arrays */
    int64_t token;     /* at its source; -1 for padding */
    int32_t src_rank;  /* -1 for padding */
    int32_t k;         /* which of the token's experts; -1 in RANK_MAJOR */
    int32_t expert;    /* local expert; -1 in RANK_MAJOR */
    int32_t in_expert; /* index among the rows of its expert; 0 in RANK_MAJOR */
} oracle_row_t;

/* args[num_ranks] as each rank gives them to epx_plan_create; they must be
 * right.  topk_idx is read only here. */
oracle_t *oracle_create(int32_t num_ranks, const epx_plan_args_t *args);
/* The same when the ranks of masked, [num_ranks], are: they have no tokens, and
 * entries for their experts count as -1. */
oracle_t *oracle_create_masked(int32_t num_ranks, const epx_plan_args_t *args,
                               const bool *masked);
void oracle_destroy(oracle_t *oracle);
/* Which node each rank is on, [R]; without this all are on one. */
void oracle_set_nodes(oracle_t *oracle, const int32_t *node_of);

/* What epx_plan_counts must say on `rank`. */
epx_plan_counts_t oracle_counts(const oracle_t *oracle, int32_t rank);

/* Rows that some rank needs at most, whatever the capacity. */
int64_t oracle_most_rows(const oracle_t *oracle);

/* Rows that must be written on `rank`, ascending, padding among them. */
const oracle_row_t *oracle_rows(const oracle_t *oracle, int32_t rank,
                                int64_t *count_p);

/* Where (src_rank, token, k) goes: the row, and the rank in *rank_p; -1 and -1
 * when the entry is -1.  In RANK_MAJOR several k share a row. */
int64_t oracle_row_of(const oracle_t *oracle, int32_t src_rank, int64_t token,
                      int32_t k, int32_t *rank_p);

/* Whether (src_rank, token, k) counts as -1 for its expert's rank is masked. */
bool oracle_is_dropped(const oracle_t *oracle, int32_t src_rank, int64_t token,
                       int32_t k);

/* ---- dispatch ---- */

/*
 * Tells the inputs of one token: fills row (H elements of the dispatch's
 * dtype), scales (S words; NULL when none are given) and weights (K; NULL when
 * none are given).
 */
typedef void oracle_token_fn(void *context, int32_t rank, int64_t token,
                             void *row, uint32_t *scales, float *weights);

/* The context of oracle_token_of_arrays: every rank's own call. */
typedef struct oracle_arrays {
    const epx_dispatch_args_t *args; /* [R] */
    int32_t topk;
} oracle_arrays_t;

oracle_token_fn oracle_token_of_arrays;

/* Bytes and scales of a row as it is sent. */
size_t oracle_sent_bytes(const epx_dispatch_args_t *args);
int32_t oracle_sent_scales(const epx_dispatch_args_t *args);

/* Writes what `rank` must receive into args->recv_*, and nothing else.  Of the
 * inputs in args only the shapes are used. */
void oracle_dispatch_row(const oracle_t *oracle, int32_t rank,
                         const oracle_row_t *row, oracle_token_fn *token,
                         void *context, const epx_dispatch_args_t *args);
void oracle_dispatch(const oracle_t *oracle, int32_t rank,
                     oracle_token_fn *token, void *context,
                     const epx_dispatch_args_t *args);

/* Compares args->recv_* with what `rank` must have received (not with what
 * must have been left alone). */
bool oracle_check_dispatch_row(const oracle_t *oracle, int32_t rank,
                               const oracle_row_t *row, oracle_token_fn *token,
                               void *context, const epx_dispatch_args_t *args,
                               char *text, size_t text_bytes);
bool oracle_check_dispatch(const oracle_t *oracle, int32_t rank,
                           oracle_token_fn *token, void *context,
                           const epx_dispatch_args_t *args, char *text,
                           size_t text_bytes);

/* One row, quantised: q[hidden], scales as they are sent. */
void oracle_quantize(epx_quantize_t kind, const uint16_t *bf16, int64_t hidden,
                     uint8_t *q, uint32_t *scales);

/* One row in LogFMT-10: the codes of docs/formats.md, and what they decode to;
 * both [hidden]. */
void oracle_logfmt(const uint16_t *bf16, int64_t hidden, uint16_t *codes,
                   float *decoded);

/* ---- combine ---- */

/*
 * Tells one row of an expert rank: fills x (H elements) and, when the weights
 * are reduced, weights (RANK_MAJOR: K, else 1; NULL otherwise).
 */
typedef void oracle_output_fn(void *context, int32_t rank, int64_t row, void *x,
                              float *weights);

/* The context of oracle_output_of_arrays: every rank's own call. */
typedef struct oracle_outputs {
    const epx_combine_args_t *args; /* [R] */
    int32_t row_weights;            /* RANK_MAJOR: K, else 1 */
} oracle_outputs_t;

oracle_output_fn oracle_output_of_arrays;

/* Writes args->out and out_topk_weights of `rank`, whose biases and
 * topk_weights are in args. */
void oracle_combine_row(const oracle_t *oracle, int32_t rank, int64_t token,
                        oracle_output_fn *output, void *context,
                        const epx_combine_args_t *args);
void oracle_combine(const oracle_t *oracle, int32_t rank,
                    oracle_output_fn *output, void *context,
                    const epx_combine_args_t *args);

bool oracle_check_combine_row(const oracle_t *oracle, int32_t rank,
                              int64_t token, oracle_output_fn *output,
                              void *context, const epx_combine_args_t *args,
                              char *text, size_t text_bytes);
bool oracle_check_combine(const oracle_t *oracle, int32_t rank,
                          oracle_output_fn *output, void *context,
                          const epx_combine_args_t *args, char *text,
                          size_t text_bytes);

/* ---- element types ---- */

float oracle_from_f16(uint16_t bits);
float oracle_from_bf16(uint16_t bits);
float oracle_from_e4m3(uint8_t bits);
/* To nearest even; a NaN stays one.  e4m3 saturates. */
uint16_t oracle_to_f16(float value);
uint16_t oracle_to_bf16(float value);
uint8_t oracle_to_e4m3(float value);

/* Index of the first element that differs, -1 if none does.  Elements of a
 * float type that are NaN in both are equal whatever their payload. */
int64_t oracle_difference(epx_dtype_t dtype, const void *expected,
                          const void *actual, int64_t count);

#endif
