/* SPDX-License-Identifier: MIT */
/*
 * What the receive hook saves: two micro-batches, first one after the other,
 * then taking turns.
 *
 *     epx-run -n 4 04_overlap
 *
 * Ranks never have equally much to do.  Where a dispatch or combine is one
 * call, all of them wait for the slowest at each of the four exchanges of a
 * step:
 *
 *     batch 0   attention [dispatch] experts [combine]
 *     batch 1                                         attention [dispatch] ...
 *
 * In two halves, a send and a hook, a rank computes on the other batch before
 * it comes to wait, and the others' rows are there by then; what one batch has
 * more of, the other makes good:
 *
 *     batch 0   attention send            experts send            receive
 *     batch 1             attention send               experts send  receive
 *
 * Attention and experts stand for an accelerator's work: they take time, and no
 * core of this host.  The same schedule on a card, with hooks from deep_ep, is
 * examples/python/decode_overlap.py.
 */
#define _POSIX_C_SOURCE 200809L

#include <epx/epx.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { EXPERTS = 8, TOPK = 2, MAX_TOKENS = 24, HIDDEN = 256, STEPS = 21 };
enum { ATTENTION_US = 40, EXPERT_US = 20 }; /* for a token, for a row */

#define CHECK(call)                                        \
    do {                                                   \
        if ((call) != EPX_OK) {                            \
            fprintf(stderr, "04: %s\n", epx_last_error()); \
            exit(EXIT_FAILURE);                            \
        }                                                  \
    } while (0)

typedef struct micro_batch {
    epx_plan_t *plan;
    int64_t num_tokens;
    float x[MAX_TOKENS][HIDDEN], out[MAX_TOKENS][HIDDEN];
    int64_t expert[MAX_TOKENS][TOPK];
    float weight[MAX_TOKENS][TOPK];
    /* The slots: [local experts, ranks * MAX_TOKENS] rows, which the experts
     * change in place. */
    int64_t num_rows, rows_per_expert;
    float *rows;
    int32_t counts[EXPERTS]; /* rows that each local expert got */
} micro_batch_t;

static void
compute(int64_t us)
{
    struct timespec time = { us / 1000000, us % 1000000 * 1000 };

    nanosleep(&time, NULL);
}

static double
now_ms(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e3 + (double)now.tv_nsec * 1e-6;
}

static void
create_batch(epx_group_t *group, micro_batch_t *batch)
{
    epx_plan_args_t args = EPX_PLAN_ARGS_INIT;
    epx_plan_counts_t counts = EPX_PLAN_COUNTS_INIT;
    epx_group_info_t info = EPX_GROUP_INFO_INIT;
    void *rows;

    CHECK(epx_group_query(group, &info));
    args.layout = EPX_LAYOUT_EXPERT_SLOTS;
    args.num_experts = EXPERTS;
    args.topk = TOPK;
    args.max_tokens_per_rank = MAX_TOKENS;
    args.send_only_row_bytes = HIDDEN * sizeof(float); /* sends wait for none */
    CHECK(epx_plan_create(group, &args, NULL, &batch->plan));
    CHECK(epx_plan_counts(batch->plan, &counts));
    batch->num_rows = counts.num_rows;
    batch->rows_per_expert = info.num_ranks * MAX_TOKENS;
    CHECK(epx_mem_alloc(
        group, (uint64_t)batch->num_rows * HIDDEN * sizeof(float), &rows));
    batch->rows = rows;
}

/* What comes before a layer of experts.  How many tokens a rank has varies from
 * batch to batch. */
static void
attention(int32_t rank, int step, int which, micro_batch_t *batch)
{
    int64_t chance = (step * 2 + which) * 7 + rank * 11;

    batch->num_tokens = 1 + chance * chance % MAX_TOKENS;
    for (int t = 0; t < batch->num_tokens; t++) {
        for (int h = 0; h < HIDDEN; h++) {
            batch->x[t][h] = (float)(step + rank - t + h);
        }
        batch->expert[t][0] = (step + rank + t) % EXPERTS;
        batch->expert[t][1] = (batch->expert[t][0] + 1 + t % 5) % EXPERTS;
        batch->weight[t][0] = 0.75f;
        batch->weight[t][1] = 0.25f;
    }
    compute(batch->num_tokens * ATTENTION_US);
}

static void
dispatch(micro_batch_t *batch, uint32_t flags)
{
    epx_dispatch_args_t args = EPX_DISPATCH_ARGS_INIT;

    args.x = batch->x;
    args.hidden = HIDDEN;
    args.dtype = EPX_F32;
    args.recv_x = batch->rows;
    args.recv_rows = batch->num_rows;
    args.recv_expert_counts = batch->counts;
    args.flags = EPX_NEW_ROUTING | flags;
    args.num_tokens = batch->num_tokens;
    args.topk_idx = batch->expert;
    CHECK(epx_dispatch(batch->plan, &args, NULL));
}

/* The experts negate their rows, which are packed at the front of the slots. */
static void
run_experts(int32_t num_local, micro_batch_t *batch)
{
    int64_t count = 0;

    for (int32_t e = 0; e < num_local; e++) {
        float *rows = batch->rows + e * batch->rows_per_expert * HIDDEN;

        for (int64_t i = 0; i < (int64_t)batch->counts[e] * HIDDEN; i++) {
            rows[i] = -rows[i];
        }
        count += batch->counts[e];
    }
    compute(count * EXPERT_US);
}

static void
combine(micro_batch_t *batch, uint32_t flags)
{
    epx_combine_args_t args = EPX_COMBINE_ARGS_INIT;

    args.x = batch->rows;
    args.num_rows = batch->num_rows;
    args.hidden = HIDDEN;
    args.dtype = EPX_F32;
    args.topk_weights = &batch->weight[0][0];
    args.out = batch->out;
    args.flags = flags;
    CHECK(epx_combine(batch->plan, &args, NULL));
}

/* The weights add up to 1, and these numbers are exact. */
static void
verify(const micro_batch_t *batch)
{
    for (int t = 0; t < batch->num_tokens; t++) {
        for (int h = 0; h < HIDDEN; h++) {
            if (batch->out[t][h] != -batch->x[t][h]) {
                fprintf(stderr, "04: element %d of token %d is %g, not %g\n", h,
                        t, (double)batch->out[t][h], (double)-batch->x[t][h]);
                exit(EXIT_FAILURE);
            }
        }
    }
}

static void
one_after_the_other(int32_t rank, int32_t num_local, int step,
                    micro_batch_t *batch)
{
    for (int b = 0; b < 2; b++) {
        attention(rank, step, b, &batch[b]);
        dispatch(&batch[b], 0);
        run_experts(num_local, &batch[b]);
        combine(&batch[b], 0);
    }
}

static void
taking_turns(int32_t rank, int32_t num_local, int step, micro_batch_t *batch)
{
    for (int b = 0; b < 2; b++) {
        attention(rank, step, b, &batch[b]); /* 0's tokens travel */
        dispatch(&batch[b], EPX_SEND_ONLY);
    }
    for (int b = 0; b < 2; b++) {
        CHECK(epx_complete(batch[b].plan, NULL));
        run_experts(num_local, &batch[b]); /* the other's rows travel */
        combine(&batch[b], EPX_SEND_ONLY);
    }
    for (int b = 0; b < 2; b++) {
        CHECK(epx_complete(batch[b].plan, NULL));
    }
}

int
main(void)
{
    epx_group_config_t config = EPX_GROUP_CONFIG_INIT;
    epx_group_info_t info = EPX_GROUP_INFO_INIT;
    epx_group_t *group;
    int32_t first_expert, num_local;
    double ms[2];
    static micro_batch_t batch[2];

    CHECK(epx_group_create(&config, &group));
    CHECK(epx_group_query(group, &info));
    CHECK(epx_local_experts(EXPERTS, info.num_ranks, info.rank, &first_expert,
                            &num_local));
    create_batch(group, &batch[0]);
    create_batch(group, &batch[1]);
    for (int turns = 0; turns < 2; turns++) {
        double start = 0;

        for (int step = 0; step < STEPS; step++) {
            start = step == 1 ? now_ms() : start; /* the first one warms up */
            (turns ? taking_turns : one_after_the_other)(info.rank, num_local,
                                                         step, batch);
            verify(&batch[0]);
            verify(&batch[1]);
        }
        ms[turns] = now_ms() - start;
    }
    if (info.rank == 0) {
        printf("2 micro-batches, %d steps: %.1f ms one after the other, %.1f "
               "ms taking turns; every sum as it should be\n",
               STEPS - 1, ms[0], ms[1]);
    }
    CHECK(epx_plan_destroy(batch[0].plan));
    CHECK(epx_plan_destroy(batch[1].plan));
    CHECK(epx_group_destroy(group)); /* and with it all its memory */
    return EXIT_SUCCESS;
}
