/* SPDX-License-Identifier: MIT */
/* Routing: which rows each rank receives, and where. */
#include "oracle/oracle_internal.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void *
oracle_alloc(int64_t count, size_t size)
{
    void *block = calloc(count > 0 ? (size_t)count : 1, size);

    if (!block) {
        perror("oracle");
        abort();
    }
    return block;
}

static void
local_experts(const oracle_t *o, int32_t rank, int32_t *first_p,
              int32_t *count_p)
{
    int32_t each = o->common.num_experts / o->num_ranks;
    int32_t more = o->common.num_experts % o->num_ranks;
    int32_t first = 0;

    for (int32_t r = 0; r < rank; r++) {
        first += each + (r < more);
    }
    *first_p = first;
    *count_p = each + (rank < more);
}

int64_t
oracle_expert(const oracle_t *o, int32_t src_rank, int64_t token, int32_t k)
{
    return o->expert_idx[(o->base[src_rank] + token) * o->common.topk + k];
}

int32_t
oracle_rank_of_expert(const oracle_t *o, int64_t expert)
{
    for (int32_t r = 0; r < o->num_ranks && expert >= 0; r++) {
        const epx_plan_counts_t *counts = &o->views[r].counts;

        if (expert < counts->first_expert + counts->num_local_experts) {
            return r;
        }
    }
    return -1;
}

static void
add_row(struct oracle_view *view, oracle_row_t row)
{
    if (view->num_rows == view->max_rows) {
        view->max_rows = view->max_rows * 2 + 16;
        view->rows =
            realloc(view->rows, (size_t)view->max_rows * sizeof(*view->rows));
        if (!view->rows) {
            perror("oracle");
            abort();
        }
    }
    view->rows[view->num_rows++] = row;
}

/* RANK_MAJOR: every token with an expert here, by source rank, then token. */
static void
place_by_rank(oracle_t *o, struct oracle_view *view)
{
    int32_t first = view->counts.first_expert;
    int32_t end = first + view->counts.num_local_experts;
    int64_t next = 0;

    for (int32_t src = 0; src < o->num_ranks; src++) {
        for (int64_t t = 0; t < o->num_tokens[src]; t++) {
            bool here = false;

            for (int32_t k = 0; k < o->common.topk; k++) {
                int64_t expert = oracle_expert(o, src, t, k);

                if (expert >= first && expert < end) {
                    int64_t at = (o->base[src] + t) * o->common.topk + k;

                    o->row_of[at] = next;
                    view->expert_rows[expert - first]++;
                    here = true;
                }
            }
            if (here) {
                add_row(view, (oracle_row_t){ next, t, src, -1, -1, 0 });
                view->rank_tokens[src]++;
                next++;
            }
        }
    }
    view->counts.num_recv_tokens = next;
    view->counts.num_recv_rows = next;
    view->counts.num_rows = next;
}

/* The rows of one local expert, from row `start`, by source rank, then token.
 */
static int64_t
place_expert(oracle_t *o, struct oracle_view *view, int32_t local,
             int64_t start)
{
    int64_t expert = view->counts.first_expert + local;
    int32_t n = 0;

    for (int32_t src = 0; src < o->num_ranks; src++) {
        for (int64_t t = 0; t < o->num_tokens[src]; t++) {
            for (int32_t k = 0; k < o->common.topk; k++) {
                if (oracle_expert(o, src, t, k) == expert) {
                    int64_t at = (o->base[src] + t) * o->common.topk + k;

                    o->row_of[at] = start + n;
                    add_row(view,
                            (oracle_row_t){ start + n, t, src, k, local, n });
                    n++;
                }
            }
        }
    }
    view->expert_rows[local] = n;
    return start + n;
}

static void
place_by_expert(oracle_t *o, struct oracle_view *view)
{
    int64_t align = o->common.expert_alignment ? o->common.expert_alignment : 1;
    int64_t next = 0;

    for (int32_t e = 0; e < view->counts.num_local_experts; e++) {
        int64_t end = place_expert(o, view, e, next);

        view->expert_offsets[e] = next;
        view->counts.num_recv_rows += end - next;
        if (o->common.layout == EPX_LAYOUT_EXPERT_SLOTS) {
            next += o->num_ranks * o->common.max_tokens_per_rank;
            continue;
        }
        for (int32_t n = (int32_t)(end - next); end % align; end++, n++) {
            add_row(view, (oracle_row_t){ end, -1, -1, -1, e, n });
        }
        next = end;
    }
    view->expert_offsets[view->counts.num_local_experts] = next;
    view->counts.num_rows = next;
}

/* Tokens that have at least one expert here, each once. */
static void
count_tokens(const oracle_t *o, struct oracle_view *view)
{
    int32_t first = view->counts.first_expert;
    int32_t end = first + view->counts.num_local_experts;

    memset(view->rank_tokens, 0, (size_t)o->num_ranks * sizeof(int64_t));
    view->counts.num_recv_tokens = 0;
    for (int32_t src = 0; src < o->num_ranks; src++) {
        for (int64_t t = 0; t < o->num_tokens[src]; t++) {
            bool here = false;

            for (int32_t k = 0; k < o->common.topk; k++) {
                int64_t expert = oracle_expert(o, src, t, k);

                here = here || (expert >= first && expert < end);
            }
            view->rank_tokens[src] += here;
            view->counts.num_recv_tokens += here;
        }
    }
}

static void
open_view(oracle_t *o, int32_t rank)
{
    struct oracle_view *view = &o->views[rank];
    epx_plan_counts_t *counts = &view->counts;

    *counts = (epx_plan_counts_t)EPX_PLAN_COUNTS_INIT;
    local_experts(o, rank, &counts->first_expert, &counts->num_local_experts);
    view->rank_tokens = oracle_alloc(o->num_ranks, sizeof(int64_t));
    view->expert_rows =
        oracle_alloc(counts->num_local_experts, sizeof(int64_t));
    view->expert_offsets =
        oracle_alloc(counts->num_local_experts + 1, sizeof(int64_t));
    counts->rank_tokens = view->rank_tokens;
    counts->expert_rows = view->expert_rows;
    counts->expert_offsets = view->expert_offsets;
}

static void
make_view(oracle_t *o, int32_t rank)
{
    struct oracle_view *view = &o->views[rank];

    if (o->common.layout == EPX_LAYOUT_RANK_MAJOR) {
        place_by_rank(o, view);
    } else {
        place_by_expert(o, view);
    }
    count_tokens(o, view);
}

static void
gather_idx(oracle_t *o, int32_t rank, const epx_plan_args_t *args)
{
    int64_t *to = o->expert_idx + o->base[rank] * args->topk;

    for (int64_t i = 0; i < o->num_tokens[rank] * args->topk; i++) {
        to[i] = args->idx_dtype == EPX_I64
                    ? ((const int64_t *)args->topk_idx)[i]
                    : ((const int32_t *)args->topk_idx)[i];
    }
}

/* The entries of `rank` for experts of masked ranks. */
static void
drop_idx(oracle_t *o, int32_t rank, const bool *masked)
{
    epx_plan_counts_t *counts = &o->views[rank].counts;

    for (int64_t t = 0; t < o->num_tokens[rank]; t++) {
        for (int32_t k = 0; k < o->common.topk; k++) {
            int64_t at = (o->base[rank] + t) * o->common.topk + k;
            int32_t to = oracle_rank_of_expert(o, o->expert_idx[at]);

            if (to >= 0 && masked[to]) {
                o->expert_idx[at] = -1;
                o->is_dropped[at] = true;
                counts->num_dropped++;
            }
        }
    }
}

oracle_t *
oracle_create(int32_t num_ranks, const epx_plan_args_t *args)
{
    bool *masked = oracle_alloc(num_ranks, sizeof(*masked));
    oracle_t *o = oracle_create_masked(num_ranks, args, masked);

    free(masked);
    return o;
}

oracle_t *
oracle_create_masked(int32_t num_ranks, const epx_plan_args_t *args,
                     const bool *masked)
{
    oracle_t *o = oracle_alloc(1, sizeof(*o));
    int64_t total = 0;

    o->num_ranks = num_ranks;
    o->common = args[0];
    o->common.topk_idx = NULL;
    o->num_tokens = oracle_alloc(num_ranks, sizeof(int64_t));
    o->node_of = oracle_alloc(num_ranks, sizeof(int32_t));
    o->base = oracle_alloc(num_ranks, sizeof(int64_t));
    o->views = oracle_alloc(num_ranks, sizeof(*o->views));
    for (int32_t r = 0; r < num_ranks; r++) {
        o->base[r] = total;
        o->num_tokens[r] = masked[r] ? 0 : args[r].num_tokens;
        total += o->num_tokens[r];
    }
    o->expert_idx = oracle_alloc(total * args[0].topk, sizeof(int64_t));
    o->is_dropped = oracle_alloc(total * args[0].topk, sizeof(bool));
    o->row_of = oracle_alloc(total * args[0].topk, sizeof(int64_t));
    for (int64_t i = 0; i < total * args[0].topk; i++) {
        o->row_of[i] = -1;
    }
    for (int32_t r = 0; r < num_ranks; r++) {
        gather_idx(o, r, &args[r]);
        open_view(o, r);
    }
    for (int32_t r = 0; r < num_ranks; r++) {
        drop_idx(o, r, masked);
    }
    for (int32_t r = 0; r < num_ranks; r++) {
        make_view(o, r);
    }
    return o;
}

void
oracle_set_nodes(oracle_t *o, const int32_t *node_of)
{
    for (int32_t r = 0; r < o->num_ranks; r++) {
        o->node_of[r] = node_of[r];
    }
}

void
oracle_destroy(oracle_t *o)
{
    for (int32_t r = 0; o && r < o->num_ranks; r++) {
        free(o->views[r].rank_tokens);
        free(o->views[r].expert_rows);
        free(o->views[r].expert_offsets);
        free(o->views[r].rows);
    }
    if (o) {
        free(o->views);
        free(o->num_tokens);
        free(o->node_of);
        free(o->base);
        free(o->expert_idx);
        free(o->is_dropped);
        free(o->row_of);
        free(o);
    }
}

epx_plan_counts_t
oracle_counts(const oracle_t *o, int32_t rank)
{
    epx_plan_counts_t counts = o->views[rank].counts;

    if (o->common.recv_capacity) {
        counts.num_rows = o->common.recv_capacity;
    }
    return counts;
}

int64_t
oracle_most_rows(const oracle_t *o)
{
    int64_t most = 0;

    for (int32_t r = 0; r < o->num_ranks; r++) {
        if (o->views[r].counts.num_rows > most) {
            most = o->views[r].counts.num_rows;
        }
    }
    return most;
}

const oracle_row_t *
oracle_rows(const oracle_t *o, int32_t rank, int64_t *count_p)
{
    *count_p = o->views[rank].num_rows;
    return o->views[rank].rows;
}

int64_t
oracle_row_of(const oracle_t *o, int32_t src_rank, int64_t token, int32_t k,
              int32_t *rank_p)
{
    *rank_p = oracle_rank_of_expert(o, oracle_expert(o, src_rank, token, k));
    return o->row_of[(o->base[src_rank] + token) * o->common.topk + k];
}

bool
oracle_is_dropped(const oracle_t *o, int32_t src_rank, int64_t token, int32_t k)
{
    return o->is_dropped[(o->base[src_rank] + token) * o->common.topk + k];
}
