/* SPDX-License-Identifier: MIT */
/*
 * Expert parallelism in one process: four ranks, each a thread.
 *
 * Every token chooses two of eight experts, and each rank holds two experts.
 * The tokens are dispatched to the ranks of their experts, the experts work,
 * and combine sums their answers.  The experts here answer with what they were
 * given, so every token must come back as it left.
 */
#include <epx/epx.h>

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { RANKS = 4, EXPERTS = 8, TOPK = 2, TOKENS = 16, HIDDEN = 32 };

/* A call that fails leaves one sentence that says what was wrong. */
#define CHECK(call)                                        \
    do {                                                   \
        if ((call) != EPX_OK) {                            \
            fprintf(stderr, "01: %s\n", epx_last_error()); \
            exit(EXIT_FAILURE);                            \
        }                                                  \
    } while (0)

/* One rank's tokens, and what a router might have said about them. */
typedef struct batch {
    float x[TOKENS * HIDDEN], out[TOKENS * HIDDEN];
    int32_t expert[TOKENS * TOPK];
    float weight[TOKENS * TOPK];
} batch_t;

static void
fill(int32_t rank, batch_t *batch)
{
    for (int i = 0; i < TOKENS * HIDDEN; i++) {
        batch->x[i] = (float)(1000 * rank + i);
    }
    for (int t = 0; t < TOKENS; t++) {
        batch->expert[t * TOPK] = (t + rank) % EXPERTS;
        batch->expert[t * TOPK + 1] = (3 * t + rank + 1) % EXPERTS;
        batch->weight[t * TOPK] = 0.75f;
        batch->weight[t * TOPK + 1] = 0.25f;
    }
}

/* A token comes once to each rank that has experts for it, with a weight for
 * each of them, and 0 for experts elsewhere (recv_topk_idx would name them).
 * The row becomes the weighted sum of the local experts' answers. */
static void
run_experts(int64_t num_rows, float *rows, const float *weight)
{
    for (int64_t row = 0; row < num_rows; row++) {
        float sum = weight[row * TOPK] + weight[row * TOPK + 1];
        for (int h = 0; h < HIDDEN; h++) {
            rows[row * HIDDEN + h] *= sum;
        }
    }
}

/* Dispatch, experts, combine.  `rows` is in EPX memory, where peers write and
 * read in place; other arrays may lie anywhere. */
static void
exchange(epx_plan_t *plan, int64_t num_rows, float *rows, batch_t *batch)
{
    epx_dispatch_args_t dispatch = EPX_DISPATCH_ARGS_INIT;
    epx_combine_args_t combine = EPX_COMBINE_ARGS_INIT;
    float weight[RANKS * TOKENS * TOPK];

    dispatch.x = batch->x;
    dispatch.hidden = HIDDEN;
    dispatch.dtype = EPX_F32;
    dispatch.topk_weights = batch->weight;
    dispatch.recv_x = rows;
    dispatch.recv_rows = num_rows;
    dispatch.recv_topk_weights = weight;
    CHECK(epx_dispatch(plan, &dispatch, NULL));

    run_experts(num_rows, rows, weight);
    combine.x = rows;
    combine.num_rows = num_rows;
    combine.hidden = HIDDEN;
    combine.dtype = EPX_F32;
    combine.out = batch->out;
    CHECK(epx_combine(plan, &combine, NULL));
}

static void *
run_rank(void *bootstrap)
{
    epx_group_config_t config = EPX_GROUP_CONFIG_INIT;
    epx_plan_args_t routing = EPX_PLAN_ARGS_INIT;
    epx_plan_counts_t counts = EPX_PLAN_COUNTS_INIT;
    epx_group_t *group;
    epx_plan_t *plan;
    void *rows;
    batch_t batch;

    config.bootstrap = bootstrap;
    CHECK(epx_group_create(&config, &group));
    fill(config.bootstrap->rank, &batch);

    /* The plan says who sends which token where; its counts, how much comes. */
    routing.layout = EPX_LAYOUT_RANK_MAJOR;
    routing.num_experts = EXPERTS;
    routing.topk = TOPK;
    routing.idx_dtype = EPX_I32;
    routing.num_tokens = TOKENS;
    routing.topk_idx = batch.expert;
    CHECK(epx_plan_create(group, &routing, NULL, &plan));
    CHECK(epx_plan_counts(plan, &counts));

    CHECK(epx_mem_alloc(group, (uint64_t)counts.num_rows * HIDDEN * 4, &rows));
    exchange(plan, counts.num_rows, rows, &batch);

    if (memcmp(batch.out, batch.x, sizeof(batch.x)) != 0) {
        fprintf(stderr, "01: a token came back changed\n");
        exit(EXIT_FAILURE);
    }
    printf("rank %d: %d rows came, and every token is back\n",
           config.bootstrap->rank, (int)counts.num_rows);
    CHECK(epx_mem_free(group, rows));
    CHECK(epx_plan_destroy(plan));
    CHECK(epx_group_destroy(group));
    return NULL;
}

int
main(void)
{
    epx_bootstrap_t *bootstraps[RANKS];
    pthread_t threads[RANKS];

    CHECK(epx_bootstrap_threads_create(RANKS, bootstraps));
    for (int r = 0; r < RANKS; r++) {
        if (pthread_create(&threads[r], NULL, run_rank, bootstraps[r]) != 0) {
            return EXIT_FAILURE;
        }
    }
    for (int r = 0; r < RANKS; r++) {
        pthread_join(threads[r], NULL);
        epx_bootstrap_destroy(bootstraps[r]);
    }
    return EXIT_SUCCESS;
}
