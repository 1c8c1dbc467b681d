/* SPDX-License-Identifier: MIT */
#include "conformance/shape.h"
#include "conformance/rng.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Limits that keep a run at some tens of milliseconds, oracle included. */
enum {
    MAX_ELEMENTS = 1000000, /* of all receive buffers of one operation */
    MAX_ROUTING = 4000000,  /* experts x tokens x topk */
    MAX_HIDDEN = 8192,
};

static int64_t
least(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* 1..high, the range halved at random so that small numbers come up often. */
static int64_t
draw_spread(rng_t *rng, int64_t high)
{
    int64_t limit = high;

    for (int64_t halvings = rng_int(rng, 0, 4); halvings > 0; halvings--) {
        limit = limit / 2 > 0 ? limit / 2 : 1;
    }
    return rng_int(rng, 1, limit);
}

static int32_t
draw_ranks(rng_t *rng)
{
    static const int32_t choices[] = { 1, 2, 2, 2, 3, 3, 4, 4, 5, 6, 7, 8 };

    if (rng_one_in(rng, 40)) {
        return 16;
    }
    return choices[rng_int(rng, 0, 11)];
}

static int32_t
draw_topk(rng_t *rng)
{
    static const int32_t usual[] = { 1, 2, 4, 6, 8 };

    return rng_one_in(rng, 4) ? (int32_t)rng_int(rng, 1, EPX_MAX_TOPK)
                              : usual[rng_int(rng, 0, 4)];
}

/* Rows of all receive buffers together, at most, with so many tokens a rank. */
static int64_t
rows_in_all(const plan_shape_t *plan, int32_t num_ranks, int64_t tokens)
{
    int64_t copies = least(plan->topk, plan->layout == EPX_LAYOUT_RANK_MAJOR
                                           ? num_ranks
                                           : plan->num_experts);

    if (plan->layout == EPX_LAYOUT_EXPERT_SLOTS) {
        return plan->num_experts * num_ranks * tokens;
    }
    return num_ranks * tokens * copies +
           (plan->expert_alignment - 1) * (int64_t)plan->num_experts;
}

static int64_t
draw_most_tokens(const plan_shape_t *plan, int32_t num_ranks, rng_t *rng)
{
    int64_t most = rng_one_in(rng, 20) ? 0 : draw_spread(rng, 220);

    while (most > 1 &&
           (rows_in_all(plan, num_ranks, most) * 8 > MAX_ELEMENTS ||
            most * num_ranks * plan->num_experts * plan->topk > MAX_ROUTING)) {
        most /= 2;
    }
    return most;
}

static void
draw_tokens(plan_shape_t *plan, int32_t num_ranks, const wish_t *wish,
            rng_t *rng)
{
    int64_t most = wish->tokens < 0 ? 0
                   : wish->tokens   ? wish->tokens
                                    : draw_most_tokens(plan, num_ranks, rng);

    for (int32_t b = 0; b < plan->num_batches; b++) {
        bool same = rng_one_in(rng, 3);

        for (int32_t r = 0; r < num_ranks; r++) {
            int64_t *tokens = &plan->tokens[b][r];

            *tokens = same || wish->tokens ? most : rng_int(rng, 0, most);
            if (wish->last_rank_only && r < num_ranks - 1) {
                *tokens = 0;
            }
            if (plan->file) { /* the file's tokens, shared out in order */
                *tokens = plan->file->num_tokens * (r + 1) / num_ranks -
                          plan->file->num_tokens * r / num_ranks;
                most = *tokens > most ? *tokens : most;
            }
        }
    }
    if (plan->num_batches > 1 || plan->layout == EPX_LAYOUT_EXPERT_SLOTS ||
        rng_one_in(rng, 3)) {
        plan->max_tokens_per_rank = most + rng_int(rng, most ? 0 : 1, 3);
    }
}

static void
draw_op_kind(op_shape_t *op, const plan_shape_t *plan, rng_t *rng)
{
    static const epx_dtype_t moved[] = { EPX_F32,    EPX_F16,    EPX_BF16,
                                         EPX_F8E4M3, EPX_F8E5M2, EPX_BYTES };

    op->is_combine = rng_one_in(rng, 2);
    if (op->is_combine) {
        op->dtype = moved[rng_int(rng, 0, 2)];
        op->reduce_weights = rng_one_in(rng, 3);
        if (op->dtype == EPX_BF16 && rng_one_in(rng, 2)) {
            op->quantize = EPX_QUANTIZE_LOGFMT10;
        }
        return;
    }
    op->weights = rng_one_in(rng, 2);
    op->recv_idx = plan->layout == EPX_LAYOUT_RANK_MAJOR && rng_one_in(rng, 2);
    op->recv_src = rng_one_in(rng, 2);
    op->dtype = moved[rng_int(rng, 0, 5)];
    if (rng_one_in(rng, 3)) {
        op->dtype = EPX_BF16;
        op->quantize = (epx_quantize_t)rng_int(rng, EPX_QUANTIZE_F8E4M3_F32,
                                               EPX_QUANTIZE_F8E4M3_UE8M0);
    } else if (rng_one_in(rng, 3)) {
        op->num_scales = (int32_t)rng_int(rng, 1, 9);
    }
}

/* A row is a multiple of 16 bytes, before and after quantisation to FP8. */
static void
draw_hidden(op_shape_t *op, int64_t rows, const wish_t *wish, rng_t *rng)
{
    int64_t size = (int64_t)epx_dtype_size(op->dtype);
    bool to_f8 = op->quantize && !op->is_combine;
    int64_t unit = to_f8 ? EPX_ROW_ALIGN : EPX_ROW_ALIGN / size;
    int64_t most =
        rows > 0 ? least(MAX_ELEMENTS / rows, MAX_HIDDEN) : MAX_HIDDEN;

    op->hidden = unit * draw_spread(rng, most / unit > 1 ? most / unit : 1);
    if (op->hidden > EPX_SCALE_BLOCK && rng_one_in(rng, 3)) {
        op->hidden -= op->hidden % EPX_SCALE_BLOCK;
    }
    if (wish->row_bytes) {
        op->hidden = to_f8 ? wish->row_bytes : wish->row_bytes / size;
    }
}

static void
draw_op(op_shape_t *op, const plan_shape_t *plan, int64_t rows,
        const wish_t *wish, rng_t *rng)
{
    op->seed = rng_next(rng);
    op->special = wish->special || rng_one_in(rng, 4);
    draw_op_kind(op, plan, rng);
    draw_hidden(op, rows, wish, rng);
    op->send_only = wish->send_only == SEND_ONLY_NEVER    ? false
                    : wish->send_only == SEND_ONLY_RANDOM ? rng_one_in(rng, 3)
                                                          : true;
}

static int64_t
sent_row_bytes(const op_shape_t *op)
{
    int64_t blocks = (op->hidden + EPX_SCALE_BLOCK - 1) / EPX_SCALE_BLOCK;

    if (op->quantize == EPX_QUANTIZE_F8E4M3_UE8M0) {
        return op->hidden + (blocks + 3) / 4 * 4;
    }
    if (op->quantize) {
        return op->hidden + blocks * 4;
    }
    return op->hidden * (int64_t)epx_dtype_size(op->dtype) + op->num_scales * 4;
}

static void
draw_ops(plan_shape_t *plan, int32_t num_ranks, const wish_t *wish, rng_t *rng)
{
    bool slotted = wish->send_only == SEND_ONLY_SLOTTED ||
                   (wish->send_only == SEND_ONLY_RANDOM && rng_one_in(rng, 2));
    int64_t widest = 0;
    int64_t most = 0;

    for (int32_t b = 0; b < plan->num_batches; b++) {
        for (int32_t r = 0; r < num_ranks; r++) {
            most = plan->tokens[b][r] > most ? plan->tokens[b][r] : most;
        }
    }
    if (plan->layout == EPX_LAYOUT_EXPERT_SLOTS) {
        most = plan->max_tokens_per_rank;
    }
    for (int32_t b = 0; b < plan->num_batches; b++) {
        plan->num_ops[b] = (int32_t)rng_int(rng, 1, MAX_OPS);
        for (int32_t i = 0; i < plan->num_ops[b]; i++) {
            op_shape_t *op = &plan->ops[b][i];

            draw_op(op, plan, rows_in_all(plan, num_ranks, most), wish, rng);
            if (op->send_only && !op->is_combine &&
                sent_row_bytes(op) > widest) {
                widest = sent_row_bytes(op);
            }
        }
    }
    if (slotted && widest > 0) {
        plan->send_only_row_bytes = widest + 4 * rng_int(rng, 0, 8);
        if (plan->max_tokens_per_rank == 0) {
            plan->max_tokens_per_rank = most ? most : 1;
        }
    }
}

static capacity_t
draw_capacity(const plan_shape_t *plan, const wish_t *wish, rng_t *rng)
{
    if (plan->layout == EPX_LAYOUT_EXPERT_SLOTS) {
        return CAPACITY_EXACT;
    }
    return wish->capacity
               ? wish->capacity
               : (capacity_t)rng_int(rng, CAPACITY_EXACT, CAPACITY_LOOSE);
}

static int32_t
draw_alignment(const plan_shape_t *plan, const wish_t *wish, rng_t *rng)
{
    static const int32_t usual[] = { 1, 1, 2, 3, 8, 16, 64, 128 };
    int32_t alignment = usual[rng_int(rng, 0, 7)];

    while (alignment * plan->num_experts > 4000) {
        alignment = (alignment + 1) / 2; /* padding would be all there is */
    }
    return wish->alignment ? wish->alignment : alignment;
}

static routing_t
draw_routing(rng_t *rng)
{
    static const routing_t usual[] = {
        ROUTING_UNIFORM, ROUTING_UNIFORM,  ROUTING_UNIFORM,    ROUTING_SKEWED,
        ROUTING_SKEWED,  ROUTING_ONE_RANK, ROUTING_ONE_EXPERT, ROUTING_BLOCKS,
    };

    return rng_one_in(rng, 40) ? ROUTING_NONE : usual[rng_int(rng, 0, 7)];
}

static void
draw_plan(plan_shape_t *plan, epx_layout_t layout, int32_t num_ranks,
          const wish_t *wish, rng_t *rng)
{
    plan->seed = rng_next(rng);
    plan->layout = layout;
    plan->file = wish->file;
    plan->topk = wish->file   ? wish->file->topk
                 : wish->topk ? wish->topk
                              : draw_topk(rng);
    plan->num_experts = wish->file      ? wish->file->num_experts
                        : wish->experts ? wish->experts
                                        : (int32_t)draw_spread(rng, 300);
    plan->idx_dtype = rng_one_in(rng, 2) ? EPX_I32 : EPX_I64;
    plan->expert_alignment =
        layout == EPX_LAYOUT_EXPERT_MAJOR ? draw_alignment(plan, wish, rng) : 1;
    plan->routing = wish->file      ? ROUTING_FILE
                    : wish->routing ? wish->routing
                                    : draw_routing(rng);
    plan->none_percent = rng_one_in(rng, 2) ? 0 : (int32_t)rng_int(rng, 1, 60);
    if (wish->file) {
        plan->none_percent = 0;
    }
    plan->num_batches = wish->batches ? wish->batches
                        : rng_one_in(rng, 2)
                            ? 1
                            : (int32_t)rng_int(rng, 2, MAX_BATCHES);
    draw_tokens(plan, num_ranks, wish, rng);
    plan->capacity = draw_capacity(plan, wish, rng);
    plan->extra_capacity = rng_int(rng, 1, 40);
    draw_ops(plan, num_ranks, wish, rng);
}

void
shape_draw(shape_t *shape, uint64_t seed, epx_layout_t layout,
           const wish_t *wish, epx_device_t device)
{
    rng_t rng = rng_of(seed, (uint64_t)layout, 1);

    memset(shape, 0, sizeof(*shape));
    shape->seed = seed;
    shape->name = wish->name;
    shape->device = device;
    shape->timeout_s = 40;
    shape->max_workers = INT32_MAX;
    shape->num_ranks = wish->ranks ? wish->ranks : draw_ranks(&rng);
    shape->own_bootstrap = rng_one_in(&rng, 2);
    shape->jitter = rng_one_in(&rng, 8);
    shape->async = rng_one_in(&rng, 3);
    shape->num_plans = wish->plans ? wish->plans : rng_one_in(&rng, 4) ? 2 : 1;
    for (int32_t p = 0; p < shape->num_plans; p++) {
        /* The second plan may have any layout. */
        epx_layout_t its =
            p == 0 ? layout
                   : (epx_layout_t)rng_int(&rng, EPX_LAYOUT_RANK_MAJOR,
                                           EPX_LAYOUT_EXPERT_SLOTS);

        draw_plan(&shape->plans[p], its, shape->num_ranks, wish, &rng);
    }
}

/* ---- routing ---- */

/* The experts that a token of this batch may go to: their number, and the
 * first. */
static int32_t
draw_range(const plan_shape_t *plan, int32_t num_ranks, int32_t batch,
           int32_t *first_p)
{
    rng_t rng = rng_of(plan->seed, (uint64_t)batch, 2);
    int32_t target = (int32_t)rng_int(&rng, 0, num_ranks - 1);
    int32_t count = plan->num_experts;

    *first_p = 0;
    switch (plan->routing) {
    case ROUTING_ONE_RANK:
        epx_local_experts(plan->num_experts, num_ranks, target, first_p,
                          &count);
        return count;
    case ROUTING_ONE_EXPERT:
        *first_p = (int32_t)rng_int(&rng, 0, plan->num_experts - 1);
        return 1;
    case ROUTING_NONE:
        return 0;
    default:
        return count;
    }
}

/* Distinct experts of first..first+count-1 in idx[0..K-1], the rest -1. */
static void
draw_token(const plan_shape_t *plan, int32_t first, int32_t count, rng_t *rng,
           int64_t *idx)
{
    int64_t left = count;
    int64_t pool[1024];
    bool skip_token = plan->none_percent > 0 && rng_one_in(rng, 10);

    for (int32_t i = 0; i < count; i++) {
        pool[i] = first + i;
    }
    for (int32_t k = 0; k < plan->topk; k++) {
        /* Skewed: most choices from the front of the pool. */
        int64_t reach = plan->routing == ROUTING_SKEWED && !rng_one_in(rng, 4)
                            ? (left + 7) / 8
                            : left;
        int64_t at = left > 0 ? rng_int(rng, 0, reach - 1) : 0;

        idx[k] = -1;
        if (left > 0) {
            idx[k] = pool[at];
            pool[at] = pool[--left];
        }
        if (skip_token || rng_int(rng, 1, 100) <= plan->none_percent) {
            idx[k] = -1;
        }
    }
    for (int32_t k = plan->topk - 1; k > 0; k--) {
        int32_t other = (int32_t)rng_int(rng, 0, k);
        int64_t saved = idx[k];

        idx[k] = idx[other];
        idx[other] = saved;
    }
}

static void
token_idx(const plan_shape_t *plan, int32_t num_ranks, int32_t batch,
          int32_t rank, int64_t token, rng_t *rng, int64_t *idx)
{
    int32_t first;
    int32_t count = draw_range(plan, num_ranks, batch, &first);

    if (plan->routing == ROUTING_FILE) {
        int64_t row = plan->file->num_tokens * rank / num_ranks + token;

        for (int32_t k = 0; k < plan->topk; k++) {
            idx[k] = plan->file->topk_idx[row * plan->topk + k];
        }
    } else if (plan->routing == ROUTING_BLOCKS) {
        for (int32_t k = 0; k < plan->topk; k++) {
            idx[k] = k < plan->num_experts
                         ? (token * plan->topk + k + rank) % plan->num_experts
                         : -1;
        }
    } else {
        draw_token(plan, first, count, rng, idx);
    }
}

void *
shape_topk_idx(const plan_shape_t *plan, int32_t num_ranks, int32_t batch,
               int32_t rank)
{
    int64_t tokens = plan->tokens[batch][rank];
    size_t count = (size_t)(tokens * plan->topk);
    rng_t rng = rng_of(plan->seed, (uint64_t)batch, 1000 + (uint64_t)rank);
    int64_t *wide = malloc((count + 1) * sizeof(*wide));
    int32_t *narrow = malloc((count + 1) * sizeof(*narrow));

    if (!wide || !narrow) {
        perror("conformance");
        abort();
    }
    for (int64_t t = 0; t < tokens; t++) {
        token_idx(plan, num_ranks, batch, rank, t, &rng, wide + t * plan->topk);
    }
    for (size_t i = 0; i < count; i++) {
        narrow[i] = (int32_t)wide[i];
    }
    if (plan->idx_dtype == EPX_I64) {
        free(narrow);
        return wide;
    }
    free(wide);
    return narrow;
}

/* ---- printing ---- */

int32_t
shape_node(const shape_t *shape, int32_t rank)
{
    rng_t rng = rng_of(shape->seed, 77, (uint64_t)rank);
    int32_t nodes = shape->num_nodes;

    switch (shape->seed % 3) {
    case 0:
        return rank * nodes / shape->num_ranks;
    case 1:
        return rank % nodes;
    default:
        return (int32_t)rng_int(&rng, 0, nodes - 1);
    }
}

static bool
draw_mask(const shape_t *shape, int32_t rank)
{
    rng_t rng = rng_of(shape->seed, 78, (uint64_t)rank);

    return shape->has_masks &&
           rank != (int32_t)(shape->seed % (uint64_t)shape->num_ranks) &&
           rng_one_in(&rng, shape->num_nodes > 1 ? 2 : 3);
}

/* With several nodes most must remain. */
bool
shape_masks(const shape_t *shape, int32_t rank)
{
    int32_t count = 0;

    for (int32_t r = 0; r < rank; r++) {
        count += draw_mask(shape, r);
    }
    return draw_mask(shape, rank) &&
           (shape->num_nodes == 1 || 2 * (count + 1) < shape->num_ranks);
}

int32_t
shape_mask_batch(const shape_t *shape)
{
    rng_t rng = rng_of(shape->seed, 78, WORLD_MAX_RANKS);
    int32_t most = 0;

    for (int32_t p = 0; p < shape->num_plans; p++) {
        if (shape->plans[p].num_batches > most) {
            most = shape->plans[p].num_batches;
        }
    }
    return (int32_t)rng_int(&rng, 0, most - 1);
}

const char *
layout_name(epx_layout_t layout)
{
    switch (layout) {
    case EPX_LAYOUT_RANK_MAJOR:
        return "rank_major";
    case EPX_LAYOUT_EXPERT_MAJOR:
        return "expert_major";
    default:
        return "expert_slots";
    }
}

static void
print_op(const op_shape_t *op, FILE *stream)
{
    static const char *const dtypes[] = { "?",    "f32",  "f16",   "bf16",
                                          "e4m3", "e5m2", "bytes", "i32" };
    static const char *const kinds[] = { "", " quantize=f32", " quantize=pow2",
                                         " quantize=ue8m0", " logfmt10" };

    fprintf(stream, "      %s H=%lld %s%s%s%s",
            op->is_combine ? "combine" : "dispatch", (long long)op->hidden,
            dtypes[op->dtype], kinds[op->quantize],
            op->send_only ? " send-only" : "", op->special ? " special" : "");
    if (op->num_scales) {
        fprintf(stream, " S=%d", op->num_scales);
    }
    fprintf(stream, "%s%s%s%s\n", op->weights ? " weights" : "",
            op->recv_idx ? " topk_idx" : "", op->recv_src ? " src_token" : "",
            op->reduce_weights ? " reduce-weights" : "");
}

static void
print_plan(const plan_shape_t *plan, int32_t num_ranks, FILE *stream)
{
    static const char *const routings[] = {
        "random",     "uniform", "skewed", "one-rank",
        "one-expert", "none",    "blocks", "file",
    };
    static const char *const capacities[] = { "random", "exact", "tight",
                                              "loose" };

    fprintf(stream,
            "  plan %s E=%d K=%d idx=%s T_max=%lld capacity=%s alignment=%d "
            "send_only_row_bytes=%lld routing=%s none=%d%%\n",
            layout_name(plan->layout), plan->num_experts, plan->topk,
            plan->idx_dtype == EPX_I32 ? "i32" : "i64",
            (long long)plan->max_tokens_per_rank, capacities[plan->capacity],
            plan->expert_alignment, (long long)plan->send_only_row_bytes,
            routings[plan->routing], plan->none_percent);
    for (int32_t b = 0; b < plan->num_batches; b++) {
        fprintf(stream, "    batch %d: T=", b);
        for (int32_t r = 0; r < num_ranks; r++) {
            fprintf(stream, "%s%lld", r ? "," : "",
                    (long long)plan->tokens[b][r]);
        }
        fprintf(stream, "\n");
        for (int32_t i = 0; i < plan->num_ops[b]; i++) {
            print_op(&plan->ops[b][i], stream);
        }
    }
}

void
shape_print(const shape_t *shape, FILE *stream)
{
    fprintf(stream, "seed %llu%s%s: R=%d%s%s%s\n",
            (unsigned long long)shape->seed, shape->name ? " of " : "",
            shape->name ? shape->name : "", shape->num_ranks,
            shape->own_bootstrap ? " own-bootstrap" : "",
            shape->jitter ? " jitter" : "", shape->async ? " async" : "");
    for (int32_t r = 0; r < shape->num_ranks; r++) {
        if (shape_masks(shape, r)) {
            fprintf(stream, "  rank %d is masked before batch %d\n", r,
                    shape_mask_batch(shape));
        }
    }
    for (int32_t p = 0; p < shape->num_plans; p++) {
        print_plan(&shape->plans[p], shape->num_ranks, stream);
    }
}
