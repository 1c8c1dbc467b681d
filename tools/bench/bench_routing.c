/* SPDX-License-Identifier: MIT */
#include "bench_routing.h"

#include "bench_rng.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Names the sequence of random numbers; inputs have their own. */
#define ROUTING_STREAM 1u

/* Room for one token's draw: every expert with its key. */
struct draw {
    int32_t *experts;   /* [E], some order of all experts */
    double *popularity; /* [E], BENCH_ZIPF */
    double *keys;       /* [K], BENCH_ZIPF */
    int32_t *groups;    /* [G], BENCH_GROUP: some order of all groups */
    int32_t *pool;      /* [E], BENCH_GROUP */
};

bool
bench_routing_open(struct bench_routing *routing,
                   const struct bench_options *options,
                   struct bench_error *error)
{
    *routing = (struct bench_routing){ .options = options,
                                       .topk = options->topk,
                                       .max_tokens = options->tokens };
    if (options->routing != BENCH_CSV) {
        return true;
    }
    if (!routing_csv_read(options->routing_text, options->experts,
                          &routing->file, error)) {
        return false;
    }
    routing->topk = routing->file.topk;
    routing->max_tokens = bench_routing_tokens(routing, 0);
    if (options->topk && options->topk != routing->topk) {
        bench_fail(error, "--topk is %d; %.300s has %d experts a token",
                   options->topk, options->routing_text, routing->topk);
        bench_routing_close(routing);
        return false;
    }
    return true;
}

void
bench_routing_close(struct bench_routing *routing)
{
    routing_table_release(&routing->file);
}

int64_t
bench_routing_tokens(const struct bench_routing *routing, int32_t rank)
{
    const struct bench_options *o = routing->options;
    int64_t all = routing->file.num_tokens;
    if (o->tokens) {
        return o->tokens;
    }
    return all / o->ranks + (rank < all % o->ranks);
}

/* Ranks take consecutive parts of the file, each round from further on. */
static void
fill_from_file(const struct bench_routing *routing, int32_t rank,
               uint64_t round, int64_t *idx, float *weights)
{
    const struct routing_table *file = &routing->file;
    size_t topk = (size_t)file->topk;
    int64_t count = bench_routing_tokens(routing, rank);
    int64_t at = (int64_t)(round % (uint64_t)file->num_tokens);
    for (int32_t r = 0; r < rank; r++) {
        at = (at + bench_routing_tokens(routing, r)) % file->num_tokens;
    }
    for (int64_t t = 0; t < count; t++) {
        size_t to = (size_t)t * topk;
        size_t from = (size_t)at * topk;
        memcpy(&idx[to], &file->experts[from], topk * sizeof *idx);
        memcpy(&weights[to], &file->weights[from], topk * sizeof *weights);
        at = at + 1 == file->num_tokens ? 0 : at + 1;
    }
}

/* Moves `chosen` entries of the list, drawn with equal chances, to its front;
 * any order of the list serves as the start of the next draw. */
static void
draw_front(struct bench_rng *rng, int32_t *list, int32_t length, int32_t chosen)
{
    for (int32_t i = 0; i < chosen; i++) {
        uint32_t left = (uint32_t)(length - i);
        int32_t j = i + (int32_t)bench_rng_below(rng, left);
        int32_t held = list[i];
        list[i] = list[j];
        list[j] = held;
    }
}

/* Weighted draw without replacement: the K smallest of -log(u) / popularity
 * (Efraimidis and Spirakis), kept sorted as they are found. */
static void
draw_popular(struct bench_rng *rng, const struct draw *draw,
             int32_t num_experts, int32_t topk, int64_t *idx)
{
    int32_t kept = 0;
    for (int32_t e = 0; e < num_experts; e++) {
        double key = -log(bench_rng_unit(rng)) / draw->popularity[e];
        int32_t place = kept;
        if (kept == topk && key >= draw->keys[topk - 1]) {
            continue;
        }
        kept = kept < topk ? kept + 1 : topk;
        place = place < topk ? place : topk - 1;
        for (; place > 0 && draw->keys[place - 1] > key; place--) {
            draw->keys[place] = draw->keys[place - 1];
            idx[place] = idx[place - 1];
        }
        draw->keys[place] = key;
        idx[place] = e;
    }
}

/* Groups are contiguous blocks of experts, cut like those of the ranks. */
static void
draw_grouped(struct bench_rng *rng, const struct draw *draw,
             const struct bench_options *o, int32_t topk, int64_t *idx)
{
    int32_t pooled = 0;
    draw_front(rng, draw->groups, o->groups, o->groups_per_token);
    for (int32_t g = 0; g < o->groups_per_token; g++) {
        int32_t first = 0;
        int32_t count = 0;
        epx_local_experts(o->experts, o->groups, draw->groups[g], &first,
                          &count);
        for (int32_t e = 0; e < count; e++) {
            draw->pool[pooled++] = first + e;
        }
    }
    draw_front(rng, draw->pool, pooled, topk);
    for (int32_t k = 0; k < topk; k++) {
        idx[k] = draw->pool[k];
    }
}

static void
draw_token(struct bench_rng *rng, const struct draw *draw,
           const struct bench_routing *routing, int64_t *idx, float *weights)
{
    const struct bench_options *o = routing->options;
    int32_t topk = routing->topk;
    float sum = 0;
    if (o->routing == BENCH_ZIPF) {
        draw_popular(rng, draw, o->experts, topk, idx);
    } else if (o->routing == BENCH_GROUP) {
        draw_grouped(rng, draw, o, topk, idx);
    } else {
        draw_front(rng, draw->experts, o->experts, topk);
        for (int32_t k = 0; k < topk; k++) {
            idx[k] = draw->experts[k];
        }
    }
    for (int32_t k = 0; k < topk; k++) {
        weights[k] = (float)bench_rng_unit(rng);
        sum += weights[k];
    }
    for (int32_t k = 0; k < topk; k++) {
        weights[k] /= sum;
    }
}

static bool
draw_open(struct draw *draw, const struct bench_options *o, int32_t topk)
{
    size_t experts = (size_t)o->experts;
    size_t groups = (size_t)o->groups + 1; /* never an empty allocation */
    /* Which experts are popular is drawn once for all ranks and rounds. */
    struct bench_rng rng = bench_rng_make(o->seed, ROUTING_STREAM, 0, 0);
    draw->experts = calloc(experts, sizeof *draw->experts);
    draw->popularity = calloc(experts, sizeof *draw->popularity);
    draw->keys = calloc((size_t)topk, sizeof *draw->keys);
    draw->groups = calloc(groups, sizeof *draw->groups);
    draw->pool = calloc(experts, sizeof *draw->pool);
    if (!draw->experts || !draw->popularity || !draw->keys || !draw->groups ||
        !draw->pool) {
        return false;
    }
    for (int32_t e = 0; e < o->experts; e++) {
        draw->experts[e] = e;
    }
    draw_front(&rng, draw->experts, o->experts, o->experts);
    for (int32_t i = 0; i < o->experts; i++) {
        draw->popularity[draw->experts[i]] = pow(i + 1, -o->zipf_exponent);
    }
    for (int32_t g = 0; g < o->groups; g++) {
        draw->groups[g] = g;
    }
    return true;
}

static void
draw_close(struct draw *draw)
{
    free(draw->experts);
    free(draw->popularity);
    free(draw->keys);
    free(draw->groups);
    free(draw->pool);
}

bool
bench_routing_fill(const struct bench_routing *routing, int32_t rank,
                   uint64_t round, int64_t *idx, float *weights)
{
    const struct bench_options *o = routing->options;
    struct draw draw = { 0 };
    if (o->routing == BENCH_CSV) {
        fill_from_file(routing, rank, round, idx, weights);
        return true;
    }
    bool good = draw_open(&draw, o, routing->topk);
    struct bench_rng rng =
        bench_rng_make(o->seed, ROUTING_STREAM, (uint64_t)rank + 1, round);
    for (int64_t t = 0; good && t < o->tokens; t++) {
        draw_token(&rng, &draw, routing, &idx[t * routing->topk],
                   &weights[t * routing->topk]);
    }
    draw_close(&draw);
    return good;
}

/* The rank of an expert: the first E mod R ranks hold one more. */
static int32_t
rank_of(int64_t expert, int32_t num_experts, int32_t num_ranks)
{
    int64_t q = num_experts / num_ranks;
    int64_t m = num_experts % num_ranks;
    int64_t in_larger = m * (q + 1);
    return (int32_t)(expert < in_larger ? expert / (q + 1)
                                        : m + (expert - in_larger) / q);
}

/* The ranks of a token's experts, each once, in ranks; returns how many. */
static int32_t
distinct_ranks(const struct bench_routing *routing, const int64_t *idx,
               int32_t *ranks)
{
    const struct bench_options *o = routing->options;
    int32_t distinct = 0;
    for (int32_t k = 0; k < routing->topk; k++) {
        int32_t seen = 0;
        if (idx[k] < 0) {
            continue;
        }
        ranks[distinct] = rank_of(idx[k], o->experts, o->ranks);
        while (ranks[seen] != ranks[distinct]) {
            seen++;
        }
        distinct += seen == distinct;
    }
    return distinct;
}

void
bench_routing_arrivals(const struct bench_routing *routing, int64_t num_tokens,
                       const int64_t *idx, int64_t *rows)
{
    const struct bench_options *o = routing->options;
    for (int64_t t = 0; t < num_tokens; t++) {
        const int64_t *its = &idx[t * routing->topk];
        int32_t ranks[EPX_MAX_TOPK];
        int32_t distinct = distinct_ranks(routing, its, ranks);
        for (int32_t i = 0; i < distinct; i++) {
            rows[ranks[i]] += o->layout == EPX_LAYOUT_RANK_MAJOR;
        }
        for (int32_t k = 0; k < routing->topk; k++) {
            if (its[k] >= 0 && o->layout != EPX_LAYOUT_RANK_MAJOR) {
                rows[rank_of(its[k], o->experts, o->ranks)]++;
            }
        }
    }
}

void
bench_routing_by_host(const struct bench_routing *routing, int64_t num_tokens,
                      const int64_t *idx, int64_t *rows)
{
    for (int64_t t = 0; t < num_tokens; t++) {
        int32_t ranks[EPX_MAX_TOPK];
        int32_t distinct =
            distinct_ranks(routing, &idx[t * routing->topk], ranks);
        for (int32_t i = 0; i < distinct; i++) {
            int32_t host = bench_host_of(routing->options, ranks[i]);
            bool seen = false;
            for (int32_t j = 0; j < i; j++) {
                seen |= bench_host_of(routing->options, ranks[j]) == host;
            }
            rows[host] += !seen;
        }
    }
}

struct bench_traffic
bench_routing_count(const struct bench_routing *routing, int64_t num_tokens,
                    const int64_t *idx)
{
    struct bench_traffic sum = { .tokens = num_tokens };
    for (int64_t t = 0; t < num_tokens; t++) {
        const int64_t *its = &idx[t * routing->topk];
        int32_t ranks[EPX_MAX_TOPK];
        int32_t distinct = distinct_ranks(routing, its, ranks);
        for (int32_t k = 0; k < routing->topk; k++) {
            sum.expert_pairs += its[k] >= 0;
        }
        sum.rank_pairs += distinct;
        sum.tokens_sent += distinct > 0;
    }
    return sum;
}
