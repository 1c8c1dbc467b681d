/* SPDX-License-Identifier: MIT */
#include "bench_shape.h"

#include <stdlib.h>
#include <string.h>

/* All heaps are mapped by every process; this leaves most of a 47-bit address
 * space to the rest. */
#define MAX_MAPPED_BYTES 0x1p45
/* For the library's own tables, and what the sizes below round away. */
#define SPARE_BYTES           ((uint64_t)64 << 20)
#define SPARE_BYTES_PER_ENTRY 64u

const char *
bench_op_name(enum bench_op op)
{
    static const char *const names[BENCH_NUM_OPS] = {
        [BENCH_PLAN] = "plan",
        [BENCH_PLAN_DEVICE] = "plan-device",
        [BENCH_DISPATCH] = "dispatch",
        [BENCH_DISPATCH_SEND] = "dispatch-send",
        [BENCH_DISPATCH_HOOK] = "dispatch-hook",
        [BENCH_COMBINE] = "combine",
        [BENCH_COMBINE_SEND] = "combine-send",
        [BENCH_COMBINE_HOOK] = "combine-hook",
        [BENCH_LAYER] = "layer",
        [BENCH_SIGNALS] = "signals",
    };
    return names[op];
}

bool
bench_op_active(enum bench_op op, const struct bench_options *options)
{
    switch (op) {
    case BENCH_PLAN:
        return true;
    case BENCH_PLAN_DEVICE:
        return options->device == EPX_DEVICE_CUDA;
    case BENCH_LAYER:
        return options->graph;
    case BENCH_SIGNALS:
        return options->signals;
    case BENCH_NCCL_DISPATCH:
    case BENCH_NCCL_COMBINE:
        return options->vs_nccl;
    case BENCH_DISPATCH:
    case BENCH_COMBINE:
        return !options->send_only;
    default:
        return options->send_only;
    }
}

bool
bench_op_moves(enum bench_op op)
{
    return op != BENCH_PLAN && op != BENCH_PLAN_DEVICE && op != BENCH_LAYER &&
           op != BENCH_SIGNALS;
}

bool
bench_op_is_hook(enum bench_op op)
{
    return op == BENCH_DISPATCH_HOOK || op == BENCH_COMBINE_HOOK;
}

static void
set_formats(struct bench_shape *shape, const struct bench_options *o)
{
    int32_t blocks =
        (int32_t)((o->hidden + EPX_SCALE_BLOCK - 1) / EPX_SCALE_BLOCK);
    bool narrow = o->dtype == EPX_F8E4M3 || o->quantize;
    shape->sent_dtype = narrow ? EPX_F8E4M3 : o->dtype;
    shape->combine_dtype = narrow ? EPX_BF16 : o->dtype;
    shape->given_scales = o->dtype == EPX_F8E4M3 ? blocks : 0;
    shape->sent_scales = o->quantize == EPX_QUANTIZE_F8E4M3_UE8M0
                             ? (blocks + 3) / 4
                         : narrow ? blocks
                                  : 0;
    shape->x_bytes = (size_t)o->hidden * epx_dtype_size(o->dtype);
    shape->sent_bytes = (size_t)o->hidden * epx_dtype_size(shape->sent_dtype);
    shape->combine_bytes =
        (size_t)o->hidden * epx_dtype_size(shape->combine_dtype);
}

/* Adds to rows[R] how many a rank sends every other in a round. */
static bool
add_sent(const struct bench_routing *routing, int32_t rank, uint64_t round,
         int64_t *rows)
{
    size_t cells = (size_t)routing->max_tokens * (size_t)routing->topk;
    int64_t *idx = malloc(cells * sizeof *idx);
    float *weights = malloc(cells * sizeof *weights);
    bool good = idx && weights &&
                bench_routing_fill(routing, rank, round, idx, weights);
    if (good) {
        bench_routing_arrivals(routing, bench_routing_tokens(routing, rank),
                               idx, rows);
    }
    free(weights);
    free(idx);
    return good;
}

/* The most rows that a rank receives in the rounds that are run. */
static bool
rows_needed(const struct bench_routing *routing, int64_t *rows_p)
{
    const struct bench_options *o = routing->options;
    int64_t *rows = malloc((size_t)o->ranks * sizeof *rows);
    bool good = rows != NULL;
    *rows_p = 1;
    for (int32_t round = 0; good && round <= (o->check ? o->iters : 0);
         round++) {
        memset(rows, 0, (size_t)o->ranks * sizeof *rows);
        for (int32_t r = 0; good && r < o->ranks; r++) {
            good = add_sent(routing, r, (uint64_t)round, rows);
        }
        for (int32_t r = 0; good && r < o->ranks; r++) {
            *rows_p = rows[r] > *rows_p ? rows[r] : *rows_p;
        }
    }
    free(rows);
    return good;
}

bool
bench_shape_rows(const struct bench_routing *routing, int32_t rank, int64_t *to,
                 int64_t *from)
{
    int32_t ranks = routing->options->ranks;
    int64_t *rows = malloc((size_t)ranks * sizeof *rows);
    bool good = rows != NULL;
    for (int32_t r = 0; good && r < ranks; r++) {
        memset(rows, 0, (size_t)ranks * sizeof *rows);
        good = add_sent(routing, r, 0, rows);
        from[r] = rows[rank];
        if (r == rank) {
            memcpy(to, rows, (size_t)ranks * sizeof *rows);
        }
    }
    free(rows);
    return good;
}

/* Rows that suffice whatever the routing is: memory of the host is taken as it
 * is touched, so room that stays unused costs nothing. */
static int64_t
most_rows(const struct bench_routing *routing)
{
    const struct bench_options *o = routing->options;
    int64_t tokens = o->ranks * routing->max_tokens;
    int64_t local = (o->experts + o->ranks - 1) / o->ranks;
    if (o->layout == EPX_LAYOUT_RANK_MAJOR) {
        return tokens;
    }
    if (o->layout == EPX_LAYOUT_EXPERT_MAJOR && local > routing->topk) {
        return tokens * routing->topk;
    }
    return tokens * local;
}

bool
bench_shape_make(struct bench_shape *shape, const struct bench_routing *routing,
                 struct bench_error *error)
{
    const struct bench_options *o = routing->options;
    double ranks = o->ranks;
    *shape = (struct bench_shape){ 0 };
    set_formats(shape, o);
    shape->recv_rows = most_rows(routing);
    /* Memory of a card is taken at once. */
    if (o->device == EPX_DEVICE_CUDA && o->layout != EPX_LAYOUT_EXPERT_SLOTS &&
        !rows_needed(routing, &shape->recv_rows)) {
        return bench_fail(error, "no memory for the routing");
    }
    /* idx and weights of a received row, in the largest case. */
    double meta = (double)routing->topk * (sizeof(int64_t) + sizeof(float));
    double scales = 4.0 * shape->sent_scales;
    double bytes =
        (double)shape->recv_rows * ((double)shape->sent_bytes + scales + meta +
                                    (double)shape->combine_bytes) +
        (double)routing->max_tokens *
            ((double)(shape->x_bytes + shape->combine_bytes) + scales + meta);
    if (o->send_only) {
        bytes +=
            2 * ranks * (double)routing->max_tokens *
            ((double)shape->sent_bytes + scales + meta + 4 * routing->topk);
    }
    bytes += SPARE_BYTES_PER_ENTRY *
             (ranks * o->experts +
              (double)routing->max_tokens * (routing->topk + ranks));
    if (bytes * ranks > MAX_MAPPED_BYTES) {
        return bench_fail(error,
                          "the buffers of %d ranks would take up to %.1f TB "
                          "of addresses; allowed: %.1f TB",
                          o->ranks, bytes * ranks / 1e12,
                          MAX_MAPPED_BYTES / 1e12);
    }
    shape->heap_bytes = (uint64_t)bytes + SPARE_BYTES;
    return true;
}

uint64_t
bench_shape_row_bytes(const struct bench_shape *shape, bool combine)
{
    return combine ? shape->combine_bytes
                   : shape->sent_bytes + 4u * (uint64_t)shape->sent_scales;
}

static void
add_bytes(const struct bench_shape *shape, const struct bench_routing *routing,
          const struct bench_traffic *n, uint64_t bytes[BENCH_NUM_OPS])
{
    bool by_rank = routing->options->layout == EPX_LAYOUT_RANK_MAJOR;
    uint64_t topk = (uint64_t)routing->topk;
    uint64_t rows = (uint64_t)(by_rank ? n->rank_pairs : n->expert_pairs);
    uint64_t tokens = (uint64_t)n->tokens;
    uint64_t sent_row = bench_shape_row_bytes(shape, false);
    uint64_t meta = by_rank ? topk * (sizeof(int64_t) + sizeof(float))
                            : topk * sizeof(float);
    uint64_t row_meta = by_rank ? meta : sizeof(float);
    uint64_t read = (uint64_t)n->tokens_sent *
                        (shape->x_bytes + 4u * (uint64_t)shape->given_scales) +
                    tokens * meta;
    uint64_t write = rows * (sent_row + row_meta);
    /* A split dispatch crosses once per destination rank, then is placed. */
    uint64_t crossing = (uint64_t)n->rank_pairs * (sent_row + meta);
    uint64_t combine = (rows + tokens) * shape->combine_bytes;
    if (!by_rank) {
        combine += tokens * topk * sizeof(float);
    }
    bytes[BENCH_DISPATCH] += read + write;
    if (routing->options->device == EPX_DEVICE_CUDA) { /* places rows at once */
        bytes[BENCH_DISPATCH_SEND] += read + write;
    } else {
        bytes[BENCH_DISPATCH_SEND] += read + crossing;
        bytes[BENCH_DISPATCH_HOOK] += crossing + write;
    }
    bytes[BENCH_COMBINE] += combine;
    bytes[BENCH_COMBINE_HOOK] += combine;
    bytes[BENCH_LAYER] += read + write + combine;
}

bool
bench_shape_bytes(const struct bench_shape *shape,
                  const struct bench_routing *routing,
                  uint64_t bytes[BENCH_NUM_OPS])
{
    size_t cells = (size_t)routing->max_tokens * (size_t)routing->topk;
    int64_t *idx = malloc(cells * sizeof *idx);
    float *weights = malloc(cells * sizeof *weights);
    bool good = idx && weights;
    for (int op = 0; op < BENCH_NUM_OPS; op++) {
        bytes[op] = 0;
    }
    for (int32_t r = 0; good && r < routing->options->ranks; r++) {
        int64_t tokens = bench_routing_tokens(routing, r);
        good = bench_routing_fill(routing, r, 0, idx, weights);
        if (good) {
            struct bench_traffic n = bench_routing_count(routing, tokens, idx);
            add_bytes(shape, routing, &n, bytes);
        }
    }
    free(idx);
    free(weights);
    return good;
}
