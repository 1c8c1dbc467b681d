/* SPDX-License-Identifier: MIT */
#include "bench_check.h"

#include <oracle/oracle.h>
#include <stdlib.h>
#include <string.h>

struct bench_check {
    const struct bench_rank *rank;
    uint64_t round;
    oracle_t *oracle;
    float **weights; /* [R], each [T, K] */
};

static void *
get(const struct bench_rank *rank, size_t count, size_t bytes)
{
    void *ptr = calloc(count ? count : 1, bytes);
    if (!ptr) {
        bench_rank_fail(rank->run, rank->rank,
                        "no memory for the reference of --check");
    }
    return ptr;
}

struct bench_check *
bench_check_open(const struct bench_rank *rank, uint64_t round)
{
    const struct bench_routing *routing = rank->run->routing;
    size_t ranks = (size_t)rank->run->options->ranks;
    struct bench_check *self = get(rank, 1, sizeof *self);
    epx_plan_args_t *args = get(rank, ranks, sizeof *args);
    int64_t **idx = get(rank, ranks, sizeof *idx);
    int32_t *hosts = get(rank, ranks, sizeof *hosts);
    self->rank = rank;
    self->round = round;
    self->weights = get(rank, ranks, sizeof *self->weights);
    for (size_t r = 0; r < ranks; r++) {
        int64_t tokens = bench_routing_tokens(routing, (int32_t)r);
        size_t cells = (size_t)tokens * (size_t)routing->topk;
        idx[r] = get(rank, cells, sizeof **idx);
        self->weights[r] = get(rank, cells, sizeof **self->weights);
        if (!bench_routing_fill(routing, (int32_t)r, round, idx[r],
                                self->weights[r])) {
            bench_rank_fail(rank->run, rank->rank, "no memory for the routing");
        }
        args[r] = bench_rank_plan_args(rank);
        args[r].num_tokens = tokens;
        args[r].topk_idx = idx[r];
    }
    self->oracle = oracle_create((int32_t)ranks, args);
    for (size_t r = 0; r < ranks; r++) {
        hosts[r] = bench_host_of(rank->run->options, (int32_t)r);
    }
    oracle_set_nodes(self->oracle, hosts);
    free(hosts);
    for (size_t r = 0; r < ranks; r++) {
        free(idx[r]);
    }
    free(idx);
    free(args);
    return self;
}

void
bench_check_close(struct bench_check *check)
{
    for (int32_t r = 0; r < check->rank->run->options->ranks; r++) {
        free(check->weights[r]);
    }
    free(check->weights);
    oracle_destroy(check->oracle);
    free(check);
}

epx_plan_counts_t
bench_check_counts(const struct bench_check *check)
{
    return oracle_counts(check->oracle, check->rank->rank);
}

static void
compare(const struct bench_check *check, const char *what, const char *name,
        int64_t expected, int64_t actual)
{
    if (expected != actual) {
        bench_rank_fail(check->rank->run, check->rank->rank,
                        "%s: the plan's %s is %lld; it must be %lld", what,
                        name, (long long)actual, (long long)expected);
    }
}

void
bench_check_plan(const struct bench_check *check,
                 const epx_plan_counts_t *counts, const char *what)
{
    epx_plan_counts_t want = bench_check_counts(check);
    compare(check, what, "num_rows", want.num_rows, counts->num_rows);
    compare(check, what, "num_recv_tokens", want.num_recv_tokens,
            counts->num_recv_tokens);
    compare(check, what, "num_recv_rows", want.num_recv_rows,
            counts->num_recv_rows);
    compare(check, what, "first_expert", want.first_expert,
            counts->first_expert);
    compare(check, what, "num_local_experts", want.num_local_experts,
            counts->num_local_experts);
    for (int32_t r = 0; r < check->rank->run->options->ranks; r++) {
        compare(check, what, "rank_tokens", want.rank_tokens[r],
                counts->rank_tokens[r]);
    }
    for (int32_t e = 0; e < want.num_local_experts; e++) {
        compare(check, what, "expert_rows", want.expert_rows[e],
                counts->expert_rows[e]);
    }
    for (int32_t e = 0; e <= want.num_local_experts; e++) {
        compare(check, what, "expert_offsets", want.expert_offsets[e],
                counts->expert_offsets[e]);
    }
}

/* Any rank's inputs, made anew. */
static void
tell_token(void *context, int32_t rank, int64_t token, void *row,
           uint32_t *scales, float *weights)
{
    const struct bench_check *check = context;
    size_t topk = (size_t)check->rank->run->routing->topk;
    bench_data_token(check->rank->run, rank, check->round, token, row, scales);
    if (weights) {
        memcpy(weights, check->weights[rank] + (size_t)token * topk,
               topk * sizeof *weights);
    }
}

static void
tell_output(void *context, int32_t rank, int64_t row, void *x, float *weights)
{
    const struct bench_check *check = context;
    (void)weights; /* never reduced here */
    bench_data_output(check->rank->run, rank, check->round, row, x);
}

void
bench_check_results(const struct bench_check *check, const char *what)
{
    const struct bench_rank *rank = check->rank;
    epx_dispatch_args_t dispatch = bench_rank_dispatch_args_on_host(rank);
    epx_combine_args_t combine = bench_rank_combine_args_on_host(rank);
    epx_plan_counts_t counts = bench_check_counts(check);
    struct bench_check context = *check;
    char text[384];
    bench_rank_fetch(rank, &counts);
    if (!oracle_check_dispatch(check->oracle, rank->rank, tell_token, &context,
                               &dispatch, text, sizeof text)) {
        bench_rank_fail(rank->run, rank->rank, "%s: dispatch differs: %s", what,
                        text);
    }
    if (!oracle_check_combine(check->oracle, rank->rank, tell_output, &context,
                              &combine, text, sizeof text)) {
        bench_rank_fail(rank->run, rank->rank, "%s: combine differs: %s", what,
                        text);
    }
}
