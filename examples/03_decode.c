/* SPDX-License-Identifier: MIT */
/*
 * Decoding: few tokens at a time, over and over, as fast as it goes.
 *
 *     epx-run -n 4 03_decode
 *
 * Every expert has slots for the most tokens that can come (EXPERT_SLOTS), so
 * nothing is allocated and nobody asks for counts.  Operations are only started
 * (EPX_SEND_ONLY) and finished later by the receive hook, epx_complete; what
 * lies between runs while the rows travel.  Two micro-batches take turns:
 *
 *     batch 0   attention send            experts send            receive
 *     batch 1             attention send               experts send  receive
 *
 * Batch 0 sends its tokens as BF16; batch 1 quantises them to FP8 on the way,
 * which halves the bytes.  The experts answer with what they were given.
 */
#include <epx/epx.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { EXPERTS = 8, TOPK = 2, MAX_TOKENS = 24, HIDDEN = 256, STEPS = 40 };
enum { SCALES = HIDDEN / EPX_SCALE_BLOCK };

#define CHECK(call)                                        \
    do {                                                   \
        if ((call) != EPX_OK) {                            \
            fprintf(stderr, "03: %s\n", epx_last_error()); \
            exit(EXIT_FAILURE);                            \
        }                                                  \
    } while (0)

typedef struct micro_batch {
    epx_plan_t *plan;
    int fp8;
    int64_t num_tokens;
    uint16_t x[MAX_TOKENS][HIDDEN], out[MAX_TOKENS][HIDDEN];
    int64_t expert[MAX_TOKENS][TOPK];
    float weight[MAX_TOKENS][TOPK];
    /* The slots: [local experts, ranks * MAX_TOKENS] rows.  What came, its
     * scales if quantised, and the experts' answers. */
    int64_t num_rows, rows_per_expert;
    void *recv;
    float *recv_scales;
    uint16_t *answers;
    int32_t counts[EXPERTS]; /* rows that each local expert got */
} micro_batch_t;

/* BF16 is the upper half of a float. */
static float
from_bf16(uint16_t x)
{
    uint32_t bits = (uint32_t)x << 16;
    float value;

    memcpy(&value, &bits, sizeof(value));
    return value;
}

static uint16_t
to_bf16(float x)
{
    uint32_t bits;

    memcpy(&bits, &x, sizeof(bits));
    return (uint16_t)(bits >> 16);
}

/* E4M3: a sign, 4 bits of exponent with bias 7, 3 of fraction. */
static float
from_e4m3(uint8_t x)
{
    const int exponent = x >> 3 & 15;
    const float fraction = (float)(x & 7);
    float value = exponent == 0 ? ldexpf(fraction, -9)
                                : ldexpf(8 + fraction, exponent - 10);

    return (x & 128) != 0 ? -value : value;
}

static void *
shared(epx_group_t *group, int64_t bytes)
{
    void *memory;

    CHECK(epx_mem_alloc(group, (uint64_t)bytes, &memory));
    return memory;
}

static void
create_batch(epx_group_t *group, int fp8, micro_batch_t *batch)
{
    epx_plan_args_t args = EPX_PLAN_ARGS_INIT;
    epx_plan_counts_t counts = EPX_PLAN_COUNTS_INIT;
    epx_group_info_t info = EPX_GROUP_INFO_INIT;

    CHECK(epx_group_query(group, &info));
    args.layout = EPX_LAYOUT_EXPERT_SLOTS;
    args.num_experts = EXPERTS;
    args.topk = TOPK;
    args.max_tokens_per_rank = MAX_TOKENS;
    /* With room for the widest row, a send never waits for a peer. */
    args.send_only_row_bytes =
        fp8 ? HIDDEN + SCALES * (int64_t)sizeof(float) : 2 * HIDDEN;
    CHECK(epx_plan_create(group, &args, NULL, &batch->plan));
    CHECK(epx_plan_counts(batch->plan, &counts));

    batch->fp8 = fp8;
    batch->num_rows = counts.num_rows;
    batch->rows_per_expert = info.num_ranks * MAX_TOKENS;
    batch->recv = shared(group, batch->num_rows * HIDDEN * (fp8 ? 1 : 2));
    batch->recv_scales = shared(group, batch->num_rows * SCALES * 4);
    batch->answers = shared(group, batch->num_rows * HIDDEN * 2);
}

/* Stands for all that a model does before a layer of experts: each step brings
 * another number of tokens and another routing. */
static void
attention(int32_t rank, int step, micro_batch_t *batch)
{
    batch->num_tokens = (7 * step + 5 * rank) % (MAX_TOKENS + 1);
    for (int t = 0; t < batch->num_tokens; t++) {
        for (int h = 0; h < HIDDEN; h++) {
            batch->x[t][h] = to_bf16(sinf((float)(step + rank + t * h)));
        }
        batch->expert[t][0] = (step + rank + t) % EXPERTS;
        batch->expert[t][1] = (batch->expert[t][0] + 1 + t % 5) % EXPERTS;
        batch->weight[t][0] = 0.75f;
        batch->weight[t][1] = 0.25f;
    }
}

static void
send_tokens(micro_batch_t *batch)
{
    epx_dispatch_args_t args = EPX_DISPATCH_ARGS_INIT;

    CHECK(epx_plan_update(batch->plan, batch->num_tokens, batch->expert, NULL));
    args.x = batch->x;
    args.hidden = HIDDEN;
    args.dtype = EPX_BF16;
    args.quantize = batch->fp8 ? EPX_QUANTIZE_F8E4M3_F32 : EPX_QUANTIZE_NONE;
    args.recv_x = batch->recv;
    args.recv_scales = batch->fp8 ? batch->recv_scales : NULL;
    args.recv_rows = batch->num_rows;
    args.recv_expert_counts = batch->counts;
    args.flags = EPX_SEND_ONLY;
    CHECK(epx_dispatch(batch->plan, &args, NULL));
}

/* An expert's rows are packed at the front of its slots. */
static void
run_experts(int32_t num_local, micro_batch_t *batch)
{
    for (int32_t e = 0; e < num_local; e++) {
        for (int32_t i = 0; i < batch->counts[e]; i++) {
            int64_t row = e * batch->rows_per_expert + i;
            const uint8_t *fp8 = (uint8_t *)batch->recv + row * HIDDEN;
            const uint16_t *bf16 = (uint16_t *)batch->recv + row * HIDDEN;
            const float *scale = batch->recv_scales + row * SCALES;
            uint16_t *answer = batch->answers + row * HIDDEN;
            for (int h = 0; h < HIDDEN; h++) {
                answer[h] = batch->fp8 ? to_bf16(from_e4m3(fp8[h]) *
                                                 scale[h / EPX_SCALE_BLOCK])
                                       : bf16[h];
            }
        }
    }
}

static void
send_answers(micro_batch_t *batch)
{
    epx_combine_args_t args = EPX_COMBINE_ARGS_INIT;

    args.x = batch->answers;
    args.num_rows = batch->num_rows;
    args.hidden = HIDDEN;
    args.dtype = EPX_BF16;
    args.topk_weights = &batch->weight[0][0];
    args.out = batch->out;
    args.flags = EPX_SEND_ONLY;
    CHECK(epx_combine(batch->plan, &args, NULL));
}

/* The weights add up to 1: tokens come back as they left, or, quantised, within
 * a 16th, as E4M3 has four significant bits, and a little for tiny numbers. */
static void
verify(const micro_batch_t *batch)
{
    for (int t = 0; t < batch->num_tokens; t++) {
        for (int h = 0; h < HIDDEN; h++) {
            float x = from_bf16(batch->x[t][h]);
            float out = from_bf16(batch->out[t][h]);
            float allowed = batch->fp8 ? fabsf(x) / 14 + 1e-5f : 0;
            if (!(fabsf(out - x) <= allowed)) {
                fprintf(stderr, "03: element %d of token %d is %g, not %g\n", h,
                        t, (double)out, (double)x);
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
    epx_group_t *group;
    int32_t first_expert, num_local;
    int64_t num_tokens = 0;
    static micro_batch_t batch[2];

    CHECK(epx_group_create(&config, &group));
    CHECK(epx_group_query(group, &info));
    CHECK(epx_local_experts(EXPERTS, info.num_ranks, info.rank, &first_expert,
                            &num_local));
    create_batch(group, 0, &batch[0]);
    create_batch(group, 1, &batch[1]);

    for (int step = 0; step < STEPS; step++) {
        for (int b = 0; b < 2; b++) {
            attention(info.rank, step + b, &batch[b]); /* 0's tokens travel */
            send_tokens(&batch[b]);
        }
        for (int b = 0; b < 2; b++) {
            CHECK(epx_complete(batch[b].plan, NULL));
            run_experts(num_local, &batch[b]); /* the other's rows travel */
            send_answers(&batch[b]);
        }
        for (int b = 0; b < 2; b++) {
            CHECK(epx_complete(batch[b].plan, NULL));
            verify(&batch[b]);
            num_tokens += batch[b].num_tokens;
        }
    }

    printf("rank %d: %lld tokens decoded in %d steps, all as they should be\n",
           info.rank, (long long)num_tokens, STEPS);
    for (int b = 0; b < 2; b++) {
        CHECK(epx_plan_destroy(batch[b].plan));
    }
    CHECK(epx_group_destroy(group)); /* and with it all its memory */
    return EXIT_SUCCESS;
}
