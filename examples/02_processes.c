/* SPDX-License-Identifier: MIT */
/*
 * Expert parallelism over processes, in the layout for grouped matrix products:
 *
 *     epx-run -n 4 02_processes
 *
 * In EXPERT_MAJOR the rows of an expert lie together, one for each token that
 * chose it, and combine multiplies each answer by its weight.  It adds in the
 * order of k, so the result has the same bits on any number of ranks.  Expert e
 * here answers (e + 1) * x, which makes the sum easy to check.
 */
#include <epx/epx.h>

#include <stdio.h>
#include <stdlib.h>

enum { EXPERTS = 10, TOPK = 3, TOKENS = 32, HIDDEN = 64 };

#define CHECK(call)                                        \
    do {                                                   \
        if ((call) != EPX_OK) {                            \
            fprintf(stderr, "02: %s\n", epx_last_error()); \
            exit(EXIT_FAILURE);                            \
        }                                                  \
    } while (0)

/* This rank's tokens, and what a router might have said about them. */
typedef struct batch {
    float x[TOKENS][HIDDEN], out[TOKENS][HIDDEN];
    int64_t expert[TOKENS][TOPK];
    float weight[TOKENS][TOPK];
} batch_t;

static void
fill(int32_t rank, batch_t *batch)
{
    for (int t = 0; t < TOKENS; t++) {
        for (int h = 0; h < HIDDEN; h++) {
            batch->x[t][h] = (float)(rank - t + h);
        }
        for (int k = 0; k < TOPK; k++) {
            batch->expert[t][k] = (rank + 2 * t + 3 * k) % EXPERTS;
            batch->weight[t][k] = 1 / (float)(2 << k);
        }
        /* A token may use fewer experts than K. */
        if (t % 5 == 0) {
            batch->expert[t][1] = -1;
        }
    }
}

/* Expert e owns rows offsets[e] .. offsets[e] + rows[e] - 1. */
static void
run_experts(const epx_plan_counts_t *counts, float *x)
{
    for (int32_t e = 0; e < counts->num_local_experts; e++) {
        float *first = x + counts->expert_offsets[e] * HIDDEN;
        float factor = (float)(counts->first_expert + e + 1);
        for (int64_t i = 0; i < counts->expert_rows[e] * HIDDEN; i++) {
            first[i] *= factor;
        }
    }
}

/* These numbers are small enough for float32 to be exact. */
static void
verify(const batch_t *batch)
{
    for (int t = 0; t < TOKENS; t++) {
        float factor = 0;
        for (int k = 0; k < TOPK; k++) {
            if (batch->expert[t][k] >= 0) {
                factor +=
                    batch->weight[t][k] * (float)(batch->expert[t][k] + 1);
            }
        }
        for (int h = 0; h < HIDDEN; h++) {
            float wanted = factor * batch->x[t][h];
            if (batch->out[t][h] != wanted) {
                fprintf(stderr, "02: element %d of token %d is %g, not %g\n", h,
                        t, (double)batch->out[t][h], (double)wanted);
                exit(EXIT_FAILURE);
            }
        }
    }
}

int
main(void)
{
    epx_group_config_t config = EPX_GROUP_CONFIG_INIT;
    epx_group_info_t info = EPX_GROUP_INFO_INIT;
    epx_plan_args_t routing = EPX_PLAN_ARGS_INIT;
    epx_plan_counts_t counts = EPX_PLAN_COUNTS_INIT;
    epx_dispatch_args_t dispatch = EPX_DISPATCH_ARGS_INIT;
    epx_combine_args_t combine = EPX_COMBINE_ARGS_INIT;
    epx_group_t *group;
    epx_plan_t *plan;
    void *rows;
    static batch_t batch;

    /* Without a bootstrap, the launcher's environment says who the ranks are.
     */
    CHECK(epx_group_create(&config, &group));
    CHECK(epx_group_query(group, &info));
    fill(info.rank, &batch);

    routing.layout = EPX_LAYOUT_EXPERT_MAJOR;
    routing.num_experts = EXPERTS; /* need not be a multiple of the ranks */
    routing.topk = TOPK;
    routing.num_tokens = TOKENS;
    routing.topk_idx = batch.expert;
    routing.expert_alignment = 8; /* padding rows arrive as zeros */
    CHECK(epx_plan_create(group, &routing, NULL, &plan));
    CHECK(epx_plan_counts(plan, &counts));
    CHECK(epx_mem_alloc(
        group, (uint64_t)counts.num_rows * HIDDEN * sizeof(float), &rows));

    dispatch.x = batch.x;
    dispatch.hidden = HIDDEN;
    dispatch.dtype = EPX_F32;
    dispatch.recv_x = rows;
    dispatch.recv_rows = counts.num_rows;
    CHECK(epx_dispatch(plan, &dispatch, NULL));

    run_experts(&counts, rows);

    combine.x = rows;
    combine.num_rows = counts.num_rows;
    combine.hidden = HIDDEN;
    combine.dtype = EPX_F32;
    combine.topk_weights = &batch.weight[0][0];
    combine.out = batch.out;
    CHECK(epx_combine(plan, &combine, NULL));
    verify(&batch);

    printf(
        "rank %d of %d: experts %d to %d got %lld rows; every sum is right\n",
        info.rank, info.num_ranks, counts.first_expert,
        counts.first_expert + counts.num_local_experts - 1,
        (long long)counts.num_recv_rows);
    CHECK(epx_mem_free(group, rows));
    CHECK(epx_plan_destroy(plan));
    CHECK(epx_group_destroy(group));
    return EXIT_SUCCESS;
}
