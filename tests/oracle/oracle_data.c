/* SPDX-License-Identifier: MIT */
/* Dispatch and combine, one row at a time. */
#include "oracle/oracle_internal.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- dispatch ---- */

size_t
oracle_sent_bytes(const epx_dispatch_args_t *args)
{
    return (size_t)args->hidden *
           (args->quantize ? 1 : oracle_elem_size(args->dtype));
}

int32_t
oracle_sent_scales(const epx_dispatch_args_t *args)
{
    int64_t blocks = (args->hidden + EPX_SCALE_BLOCK - 1) / EPX_SCALE_BLOCK;

    if (args->quantize == EPX_QUANTIZE_F8E4M3_UE8M0) {
        return (int32_t)((blocks + 3) / 4);
    }
    if (args->quantize) {
        return (int32_t)blocks;
    }
    return args->scales ? args->num_scales : 0;
}

void
oracle_token_of_arrays(void *context, int32_t rank, int64_t token, void *row,
                       uint32_t *scales, float *weights)
{
    const oracle_arrays_t *arrays = context;
    const epx_dispatch_args_t *args = &arrays->args[rank];
    size_t row_bytes = (size_t)args->hidden * oracle_elem_size(args->dtype);
    bool packed = args->scale_token_stride == 0 && args->scale_stride == 0;

    memcpy(row, (const uint8_t *)args->x + (size_t)token * row_bytes,
           row_bytes);
    for (int32_t j = 0; scales && j < args->num_scales; j++) {
        int64_t at =
            packed ? token * args->num_scales + j
                   : token * args->scale_token_stride + j * args->scale_stride;

        scales[j] = ((const uint32_t *)args->scales)[at];
    }
    if (weights) {
        memcpy(weights, args->topk_weights + token * arrays->topk,
               (size_t)arrays->topk * sizeof(float));
    }
}

/* Everything that one received row consists of. */
typedef struct expected {
    uint8_t *x;
    uint32_t *scales;
    int64_t idx[EPX_MAX_TOPK];
    float weights[EPX_MAX_TOPK]; /* in the expert layouts only the first */
} expected_t;

/* The payload and scales as sent, from the token's inputs. */
static void
expect_payload(const epx_dispatch_args_t *args, const void *x,
               const uint32_t *scales, expected_t *e)
{
    if (args->quantize) {
        oracle_quantize(args->quantize, x, args->hidden, e->x, e->scales);
        return;
    }
    memcpy(e->x, x, oracle_sent_bytes(args));
    if (args->scales) {
        memcpy(e->scales, scales, (size_t)args->num_scales * 4);
    }
}

static void
expect_routing(const oracle_t *o, int32_t rank, const oracle_row_t *row,
               const float *weights, expected_t *e)
{
    const epx_plan_counts_t *counts = &o->views[rank].counts;

    if (o->common.layout != EPX_LAYOUT_RANK_MAJOR) {
        e->weights[0] = weights[row->k];
        return;
    }
    for (int32_t k = 0; k < o->common.topk; k++) {
        int64_t local = oracle_expert(o, row->src_rank, row->token, k) -
                        counts->first_expert;
        bool here = local >= 0 && local < counts->num_local_experts;

        e->idx[k] = here ? local : -1;
        e->weights[k] = here ? weights[k] : 0.0f;
    }
}

static void
expect_row(const oracle_t *o, int32_t rank, const oracle_row_t *row,
           oracle_token_fn *token, void *context,
           const epx_dispatch_args_t *args, expected_t *e)
{
    float weights[EPX_MAX_TOPK] = { 0 };
    int32_t given = args->scales && !args->quantize ? args->num_scales : 0;
    void *x = oracle_alloc(args->hidden, oracle_elem_size(args->dtype));
    uint32_t *scales = oracle_alloc(given, sizeof(uint32_t));

    memset(e, 0, sizeof(*e));
    e->x = oracle_alloc((int64_t)oracle_sent_bytes(args), 1);
    e->scales = oracle_alloc(oracle_sent_scales(args), sizeof(uint32_t));
    if (row->src_rank >= 0) { /* padding stays zero */
        token(context, row->src_rank, row->token, x, given ? scales : NULL,
              args->topk_weights ? weights : NULL);
        expect_payload(args, x, scales, e);
        expect_routing(o, rank, row, weights, e);
    }
    free(x);
    free(scales);
}

static void
expected_free(expected_t *e)
{
    free(e->x);
    free(e->scales);
}

/* Element (row, j) of recv_scales, by the comment of its strides. */
static int64_t
scale_index(const oracle_t *o, const oracle_row_t *row,
            const epx_dispatch_args_t *args, int32_t j)
{
    if (args->recv_scale_row_stride == 0 && args->recv_scale_stride == 0) {
        return row->row * oracle_sent_scales(args) + j;
    }
    if (o->common.layout == EPX_LAYOUT_EXPERT_SLOTS) {
        return row->expert * args->recv_scale_expert_stride +
               row->in_expert * args->recv_scale_row_stride +
               j * args->recv_scale_stride;
    }
    return row->row * args->recv_scale_row_stride + j * args->recv_scale_stride;
}

/* Weights in one received row. */
static int32_t
row_weights(const oracle_t *o)
{
    return o->common.layout == EPX_LAYOUT_RANK_MAJOR ? o->common.topk : 1;
}

static void
put_idx(const oracle_t *o, const oracle_row_t *row, const expected_t *e,
        void *recv_topk_idx)
{
    for (int32_t k = 0; k < o->common.topk; k++) {
        int64_t at = row->row * o->common.topk + k;

        if (o->common.idx_dtype == EPX_I64) {
            ((int64_t *)recv_topk_idx)[at] = e->idx[k];
        } else {
            ((int32_t *)recv_topk_idx)[at] = (int32_t)e->idx[k];
        }
    }
}

void
oracle_dispatch_row(const oracle_t *o, int32_t rank, const oracle_row_t *row,
                    oracle_token_fn *token, void *context,
                    const epx_dispatch_args_t *args)
{
    size_t bytes = oracle_sent_bytes(args);
    int32_t n = row_weights(o);
    expected_t e;

    expect_row(o, rank, row, token, context, args, &e);
    memcpy((uint8_t *)args->recv_x + (size_t)row->row * bytes, e.x, bytes);
    for (int32_t j = 0; j < oracle_sent_scales(args); j++) {
        int64_t at = scale_index(o, row, args, j);

        ((uint32_t *)args->recv_scales)[at] = e.scales[j];
    }
    if (args->recv_topk_idx) {
        put_idx(o, row, &e, args->recv_topk_idx);
    }
    if (args->topk_weights) {
        memcpy(args->recv_topk_weights + row->row * n, e.weights,
               (size_t)n * sizeof(float));
    }
    if (args->recv_src_token) {
        args->recv_src_token[row->row] = (int32_t)row->token;
    }
    expected_free(&e);
}

void
oracle_dispatch(const oracle_t *o, int32_t rank, oracle_token_fn *token,
                void *context, const epx_dispatch_args_t *args)
{
    const struct oracle_view *view = &o->views[rank];

    for (int64_t i = 0; i < view->num_rows; i++) {
        oracle_dispatch_row(o, rank, &view->rows[i], token, context, args);
    }
    for (int32_t e = 0;
         args->recv_expert_counts && e < view->counts.num_local_experts; e++) {
        args->recv_expert_counts[e] = (int32_t)view->expert_rows[e];
    }
}

/* ---- comparing ---- */

typedef struct report {
    char *text;
    size_t bytes;
    const char *where; /* of the row */
} report_t;

/* False, with the sentence, when an element differs. */
static bool
same(const report_t *report, const char *array, epx_dtype_t dtype,
     const void *expected, const void *actual, int64_t count)
{
    int64_t i = oracle_difference(dtype, expected, actual, count);
    size_t size = oracle_elem_size(dtype);
    uint64_t want = 0;
    uint64_t got = 0;

    if (i < 0) {
        return true;
    }
    memcpy(&want, (const uint8_t *)expected + (size_t)i * size, size);
    memcpy(&got, (const uint8_t *)actual + (size_t)i * size, size);
    snprintf(report->text, report->bytes,
             "%s %s element %lld: expected 0x%0*llx, got 0x%0*llx", array,
             report->where, (long long)i, (int)(2 * size),
             (unsigned long long)want, (int)(2 * size),
             (unsigned long long)got);
    return false;
}

static bool
check_scales(const oracle_t *o, const oracle_row_t *row, const expected_t *e,
             const epx_dispatch_args_t *args, const report_t *report)
{
    int32_t count = oracle_sent_scales(args);
    uint32_t *got = oracle_alloc(count, sizeof(*got));
    bool ok;

    for (int32_t j = 0; j < count; j++) {
        int64_t at = scale_index(o, row, args, j);

        got[j] = ((const uint32_t *)args->recv_scales)[at];
    }
    ok = same(report, "recv_scales", EPX_I32, e->scales, got, count);
    free(got);
    return ok;
}

static bool
check_idx(const oracle_t *o, const oracle_row_t *row, const expected_t *e,
          const epx_dispatch_args_t *args, const report_t *report)
{
    int64_t got[EPX_MAX_TOPK];

    for (int32_t k = 0; k < o->common.topk; k++) {
        int64_t at = row->row * o->common.topk + k;

        got[k] = o->common.idx_dtype == EPX_I64
                     ? ((const int64_t *)args->recv_topk_idx)[at]
                     : ((const int32_t *)args->recv_topk_idx)[at];
    }
    return same(report, "recv_topk_idx", EPX_I64, e->idx, got, o->common.topk);
}

bool
oracle_check_dispatch_row(const oracle_t *o, int32_t rank,
                          const oracle_row_t *row, oracle_token_fn *token,
                          void *context, const epx_dispatch_args_t *args,
                          char *text, size_t text_bytes)
{
    size_t bytes = oracle_sent_bytes(args);
    int32_t n = row_weights(o);
    int32_t src_token = (int32_t)row->token;
    char where[96];
    report_t report = { text, text_bytes, where };
    expected_t e;
    bool ok;

    snprintf(where, sizeof(where), "row %lld (rank %d's token %lld)",
             (long long)row->row, row->src_rank, (long long)row->token);
    expect_row(o, rank, row, token, context, args, &e);
    ok = same(&report, "recv_x", args->quantize ? EPX_F8E4M3 : EPX_BYTES, e.x,
              (const uint8_t *)args->recv_x + (size_t)row->row * bytes,
              (int64_t)bytes) &&
         check_scales(o, row, &e, args, &report);
    if (ok && args->recv_topk_idx) {
        ok = check_idx(o, row, &e, args, &report);
    }
    if (ok && args->topk_weights) {
        ok = same(&report, "recv_topk_weights", EPX_I32, e.weights,
                  args->recv_topk_weights + row->row * n, n);
    }
    if (ok && args->recv_src_token) {
        ok = same(&report, "recv_src_token", EPX_I32, &src_token,
                  args->recv_src_token + row->row, 1);
    }
    expected_free(&e);
    return ok;
}

bool
oracle_check_dispatch(const oracle_t *o, int32_t rank, oracle_token_fn *token,
                      void *context, const epx_dispatch_args_t *args,
                      char *text, size_t text_bytes)
{
    const struct oracle_view *view = &o->views[rank];
    report_t report = { text, text_bytes, "" };

    for (int32_t e = 0;
         args->recv_expert_counts && e < view->counts.num_local_experts; e++) {
        int32_t count = (int32_t)view->expert_rows[e];

        if (!same(&report, "recv_expert_counts", EPX_I32, &count,
                  &args->recv_expert_counts[e], 1)) {
            return false;
        }
    }
    for (int64_t i = 0; i < view->num_rows; i++) {
        if (!oracle_check_dispatch_row(o, rank, &view->rows[i], token, context,
                                       args, text, text_bytes)) {
            return false;
        }
    }
    return true;
}

/* ---- combine ---- */

void
oracle_output_of_arrays(void *context, int32_t rank, int64_t row, void *x,
                        float *weights)
{
    const oracle_outputs_t *outputs = context;
    const epx_combine_args_t *args = &outputs->args[rank];
    size_t row_bytes = (size_t)args->hidden * oracle_elem_size(args->dtype);

    memcpy(x, (const uint8_t *)args->x + (size_t)row * row_bytes, row_bytes);
    if (weights) {
        memcpy(weights, args->recv_topk_weights + row * outputs->row_weights,
               (size_t)outputs->row_weights * sizeof(float));
    }
}

/* The sum of one token so far. */
typedef struct sum {
    const epx_combine_args_t *args;
    oracle_output_fn *output;
    void *context;
    float *acc;     /* [H] */
    void *x;        /* [H] of dtype: one term */
    float *terms;   /* [H]: the same in float32 */
    float *weights; /* one term's, NULL when they are not reduced */
} sum_t;

static void
add_bias(const sum_t *sum, int64_t token)
{
    int64_t hidden = sum->args->hidden;

    for (int32_t b = 0; b < EPX_MAX_BIAS; b++) {
        for (int64_t h = 0; sum->args->bias[b] && h < hidden; h++) {
            sum->acc[h] += oracle_to_float(sum->args->dtype, sum->args->bias[b],
                                           token * hidden + h);
        }
    }
}

/* x as it is added. */
static void
to_terms(const sum_t *sum, const void *x)
{
    int64_t hidden = sum->args->hidden;

    if (sum->args->quantize) {
        uint16_t *codes = oracle_alloc(hidden, sizeof(*codes));

        oracle_logfmt(x, hidden, codes, sum->terms);
        free(codes);
        return;
    }
    for (int64_t h = 0; h < hidden; h++) {
        sum->terms[h] = oracle_to_float(sum->args->dtype, x, h);
    }
}

/* weight is NULL in an unweighted sum. */
static void
add_term(const sum_t *sum, int32_t rank, int64_t row, const float *weight)
{
    sum->output(sum->context, rank, row, sum->x, sum->weights);
    to_terms(sum, sum->x);
    for (int64_t h = 0; h < sum->args->hidden; h++) {
        float term = sum->terms[h];

        sum->acc[h] =
            weight ? fmaf(*weight, term, sum->acc[h]) : sum->acc[h] + term;
    }
}

/* RANK_MAJOR: every rank of the node that the token went to, ascending. */
static bool
sum_over_ranks(const oracle_t *o, int32_t rank, int64_t token, int32_t node,
               const sum_t *sum, float *out_weights)
{
    bool any = false;
    int32_t topk = o->common.topk;

    for (int32_t from = 0; from < o->num_ranks; from++) {
        int64_t row = -1;

        for (int32_t k = 0; k < topk; k++) {
            int32_t there;
            int64_t at = oracle_row_of(o, rank, token, k, &there);

            row = there == from ? at : row;
        }
        if (row < 0 || o->node_of[from] != node) {
            continue;
        }
        any = true;
        add_term(sum, from, row, NULL);
        for (int32_t k = 0; sum->weights && k < topk; k++) {
            out_weights[k] += sum->weights[k];
        }
    }
    return any;
}

static bool
sum_over_k(const oracle_t *o, int32_t rank, int64_t token, int32_t node,
           const sum_t *sum, float *out_weights)
{
    const float *weights = sum->args->topk_weights;
    bool any = false;

    for (int32_t k = 0; k < o->common.topk; k++) {
        int32_t from;
        int64_t row = oracle_row_of(o, rank, token, k, &from);

        if (row < 0 || o->node_of[from] != node) {
            continue;
        }
        any = true;
        add_term(sum, from, row,
                 weights ? &weights[token * o->common.topk + k] : NULL);
        if (sum->weights) {
            out_weights[k] = sum->weights[0];
        }
    }
    return any;
}

/* What the ranks of a node make of the token; false: nothing. */
static bool
sum_over_node(const oracle_t *o, int32_t rank, int64_t token, int32_t node,
              const sum_t *sum, float *out_weights)
{
    return o->common.layout == EPX_LAYOUT_RANK_MAJOR
               ? sum_over_ranks(o, rank, token, node, sum, out_weights)
               : sum_over_k(o, rank, token, node, sum, out_weights);
}

/* A node that is not the token's sums by itself, and rounds. */
static void
add_other_node(const oracle_t *o, int32_t rank, int64_t token, int32_t node,
               const sum_t *sum, float *out_weights)
{
    bool by_rank = o->common.layout == EPX_LAYOUT_RANK_MAJOR;
    float partial_weights[EPX_MAX_TOPK] = { 0 };
    int64_t hidden = sum->args->hidden;
    epx_dtype_t dtype = sum->args->dtype;
    sum_t partial = *sum;
    void *rounded = oracle_alloc(hidden, sizeof(float));

    partial.acc = oracle_alloc(hidden, sizeof(float));
    /* By expert, each has a weight of its own: those are no sums. */
    if (sum_over_node(o, rank, token, node, &partial,
                      by_rank ? partial_weights : out_weights)) {
        for (int64_t h = 0; h < hidden; h++) {
            oracle_put_float(dtype, rounded, h, partial.acc[h]);
        }
        to_terms(sum, rounded);
        for (int64_t h = 0; h < hidden; h++) {
            sum->acc[h] += sum->terms[h];
        }
        for (int32_t k = 0; by_rank && k < o->common.topk; k++) {
            out_weights[k] += partial_weights[k];
        }
    }
    free(partial.acc);
    free(rounded);
}

/* The sum in float32 and the reduced weights. */
static void
expect_sum(const oracle_t *o, int32_t rank, int64_t token,
           oracle_output_fn *output, void *context,
           const epx_combine_args_t *args, float *acc, float *out_weights)
{
    float term_weights[EPX_MAX_TOPK];
    sum_t sum = { args,
                  output,
                  context,
                  acc,
                  oracle_alloc(args->hidden, oracle_elem_size(args->dtype)),
                  oracle_alloc(args->hidden, sizeof(float)),
                  args->out_topk_weights ? term_weights : NULL };

    for (int64_t h = 0; h < args->hidden; h++) {
        acc[h] = 0.0f;
    }
    for (int32_t k = 0; k < o->common.topk; k++) {
        out_weights[k] = 0.0f;
    }
    add_bias(&sum, token);
    /* Nodes in the order of their lowest ranks. */
    for (int32_t r = 0; r < o->num_ranks; r++) {
        int32_t node = o->node_of[r];
        bool is_lowest = true;

        for (int32_t before = 0; before < r; before++) {
            is_lowest = is_lowest && o->node_of[before] != node;
        }
        if (is_lowest && node == o->node_of[rank]) {
            sum_over_node(o, rank, token, node, &sum, out_weights);
        } else if (is_lowest) {
            add_other_node(o, rank, token, node, &sum, out_weights);
        }
    }
    free(sum.x);
    free(sum.terms);
}

void
oracle_combine_row(const oracle_t *o, int32_t rank, int64_t token,
                   oracle_output_fn *output, void *context,
                   const epx_combine_args_t *args)
{
    float out_weights[EPX_MAX_TOPK];
    float *acc = oracle_alloc(args->hidden, sizeof(float));

    expect_sum(o, rank, token, output, context, args, acc, out_weights);
    for (int64_t h = 0; h < args->hidden; h++) {
        oracle_put_float(args->dtype, args->out, token * args->hidden + h,
                         acc[h]);
    }
    if (args->out_topk_weights) {
        memcpy(args->out_topk_weights + token * o->common.topk, out_weights,
               (size_t)o->common.topk * sizeof(float));
    }
    free(acc);
}

void
oracle_combine(const oracle_t *o, int32_t rank, oracle_output_fn *output,
               void *context, const epx_combine_args_t *args)
{
    for (int64_t t = 0; t < o->num_tokens[rank]; t++) {
        oracle_combine_row(o, rank, t, output, context, args);
    }
}

bool
oracle_check_combine_row(const oracle_t *o, int32_t rank, int64_t token,
                         oracle_output_fn *output, void *context,
                         const epx_combine_args_t *args, char *text,
                         size_t text_bytes)
{
    size_t row_bytes = (size_t)args->hidden * oracle_elem_size(args->dtype);
    float out_weights[EPX_MAX_TOPK];
    float *acc = oracle_alloc(args->hidden, sizeof(float));
    void *want = oracle_alloc(args->hidden, sizeof(float));
    char where[64];
    report_t report = { text, text_bytes, where };
    bool ok;

    snprintf(where, sizeof(where), "token %lld", (long long)token);
    expect_sum(o, rank, token, output, context, args, acc, out_weights);
    for (int64_t h = 0; h < args->hidden; h++) {
        oracle_put_float(args->dtype, want, h, acc[h]);
    }
    ok = same(&report, "out", args->dtype, want,
              (const uint8_t *)args->out + (size_t)token * row_bytes,
              args->hidden);
    if (ok && args->out_topk_weights) {
        ok = same(&report, "out_topk_weights", EPX_F32, out_weights,
                  args->out_topk_weights + token * o->common.topk,
                  o->common.topk);
    }
    free(acc);
    free(want);
    return ok;
}

bool
oracle_check_combine(const oracle_t *o, int32_t rank, oracle_output_fn *output,
                     void *context, const epx_combine_args_t *args, char *text,
                     size_t text_bytes)
{
    for (int64_t t = 0; t < o->num_tokens[rank]; t++) {
        if (!oracle_check_combine_row(o, rank, t, output, context, args, text,
                                      text_bytes)) {
            return false;
        }
    }
    return true;
}
