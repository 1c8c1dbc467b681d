/* SPDX-License-Identifier: MIT */
/* A whole layer (dispatch, experts, weighted combine) gives the same bits
 * however many ranks its experts are spread over. */
#include "conformance/rng.h"
#include "conformance/world.h"
#include "oracle/oracle.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TOKENS = 61, EXPERTS = 21, TOPK = 5, HIDDEN = 72 };

typedef struct layer {
    epx_layout_t layout;
    epx_dtype_t dtype;
    uint64_t seed;
    int64_t idx[TOKENS * TOPK];
    float weights[TOKENS * TOPK];
    uint8_t x[TOKENS * HIDDEN * sizeof(float)];
} layer_t;

static size_t
row_bytes(const layer_t *layer)
{
    return HIDDEN * epx_dtype_size(layer->dtype);
}

static void
draw_layer(layer_t *layer)
{
    rng_t rng =
        rng_of(layer->seed, (uint64_t)layer->layout, (uint64_t)layer->dtype);

    rng_fill(&rng, layer->dtype, layer->x, TOKENS * HIDDEN, false);
    rng_fill(&rng, EPX_F32, layer->weights, TOKENS * TOPK, false);
    for (int t = 0; t < TOKENS; t++) {
        int64_t *idx = layer->idx + t * TOPK;
        int64_t step = rng_int(&rng, 1, 3); /* 5 experts, 1 to 3 apart */
        int64_t first = rng_int(&rng, 0, EXPERTS - 1);

        for (int k = 0; k < TOPK; k++) {
            bool none = rng_one_in(&rng, 12);

            idx[k] = none ? -1 : (first + k * step) % EXPERTS;
        }
    }
}

static float
get(epx_dtype_t dtype, const void *data, int64_t i)
{
    float value;

    if (dtype == EPX_F32) {
        memcpy(&value, (const uint8_t *)data + i * 4, 4);
        return value;
    }
    return dtype == EPX_F16 ? oracle_from_f16(((const uint16_t *)data)[i])
                            : oracle_from_bf16(((const uint16_t *)data)[i]);
}

static void
put(epx_dtype_t dtype, void *data, int64_t i, float value)
{
    if (dtype == EPX_F32) {
        memcpy((uint8_t *)data + i * 4, &value, 4);
    } else if (dtype == EPX_F16) {
        ((uint16_t *)data)[i] = oracle_to_f16(value);
    } else {
        ((uint16_t *)data)[i] = oracle_to_bf16(value);
    }
}

/* What expert `expert` makes of one row. */
static void
apply_expert(const layer_t *layer, int64_t expert, const void *x, void *y)
{
    float scale = 1.0f / (float)(expert + 3);

    for (int64_t h = 0; h < HIDDEN; h++) {
        float value = get(layer->dtype, x, h) * scale;

        put(layer->dtype, y, h, value + (float)(expert - h) * 0.37f);
    }
}

/* The layer on one machine, in a few lines. */
static void
direct(const layer_t *layer, uint8_t *out)
{
    uint8_t y[HIDDEN * sizeof(float)];

    for (int64_t t = 0; t < TOKENS; t++) {
        float acc[HIDDEN] = { 0 };
        uint8_t *row = out + (size_t)t * row_bytes(layer);

        for (int k = 0; k < TOPK; k++) {
            int64_t expert = layer->idx[t * TOPK + k];

            if (expert < 0) {
                continue;
            }
            apply_expert(layer, expert, layer->x + (size_t)t * row_bytes(layer),
                         y);
            for (int64_t h = 0; h < HIDDEN; h++) {
                acc[h] = fmaf(layer->weights[t * TOPK + k],
                              get(layer->dtype, y, h), acc[h]);
            }
        }
        for (int64_t h = 0; h < HIDDEN; h++) {
            put(layer->dtype, row, h, acc[h]);
        }
    }
}

/* ---- one rank ---- */

typedef struct layer_run {
    world_rank_t *self;
    const layer_t *layer;
    int64_t first; /* of this rank's tokens */
    int64_t tokens;
    epx_group_t *group;
    epx_plan_t *plan;
    epx_plan_counts_t counts;
    uint8_t *received;
    uint8_t *computed;
} layer_run_t;

static bool
make_plan(layer_run_t *run)
{
    epx_plan_args_t args = EPX_PLAN_ARGS_INIT;

    args.layout = run->layer->layout;
    args.num_experts = EXPERTS;
    args.topk = TOPK;
    args.idx_dtype = EPX_I64;
    args.num_tokens = run->tokens;
    args.topk_idx = run->layer->idx + run->first * TOPK;
    args.expert_alignment = args.layout == EPX_LAYOUT_EXPERT_MAJOR ? 4 : 0;
    args.max_tokens_per_rank = TOKENS;
    run->counts = (epx_plan_counts_t)EPX_PLAN_COUNTS_INIT;
    return !world_failed(run->self,
                         epx_plan_create(run->group, &args, NULL, &run->plan),
                         "epx_plan_create") &&
           !world_failed(run->self, epx_plan_counts(run->plan, &run->counts),
                         "epx_plan_counts");
}

static bool
dispatch(layer_run_t *run)
{
    epx_dispatch_args_t args = EPX_DISPATCH_ARGS_INIT;
    uint64_t bytes =
        (uint64_t)(run->counts.num_rows + 1) * row_bytes(run->layer);

    if (world_failed(run->self,
                     epx_mem_alloc(run->group, bytes, (void **)&run->received),
                     "epx_mem_alloc") ||
        world_failed(run->self,
                     epx_mem_alloc(run->group, bytes, (void **)&run->computed),
                     "epx_mem_alloc")) {
        return false;
    }
    args.x = run->layer->x + (size_t)run->first * row_bytes(run->layer);
    args.hidden = HIDDEN;
    args.dtype = run->layer->dtype;
    args.recv_x = run->received;
    args.recv_rows = run->counts.num_rows;
    return !world_failed(run->self, epx_dispatch(run->plan, &args, NULL),
                         "epx_dispatch");
}

static void
compute(const layer_run_t *run)
{
    for (int32_t e = 0; e < run->counts.num_local_experts; e++) {
        for (int64_t i = 0; i < run->counts.expert_rows[e]; i++) {
            size_t at = (size_t)(run->counts.expert_offsets[e] + i) *
                        row_bytes(run->layer);

            apply_expert(run->layer, run->counts.first_expert + e,
                         run->received + at, run->computed + at);
        }
    }
}

static void
combine(layer_run_t *run)
{
    epx_combine_args_t args = EPX_COMBINE_ARGS_INIT;

    args.x = run->computed;
    args.num_rows = run->counts.num_rows;
    args.hidden = HIDDEN;
    args.dtype = run->layer->dtype;
    args.topk_weights = run->layer->weights + run->first * TOPK;
    args.out = (uint8_t *)run->self->shared +
               (size_t)run->first * row_bytes(run->layer);
    world_failed(run->self, epx_combine(run->plan, &args, NULL), "epx_combine");
}

static void
layer_rank(world_rank_t *self, void *layer)
{
    epx_group_config_t config = EPX_GROUP_CONFIG_INIT;
    layer_run_t run = { .self = self, .layer = layer };

    run.first = TOKENS * self->rank / self->num_ranks;
    run.tokens = TOKENS * (self->rank + 1) / self->num_ranks - run.first;
    config.bootstrap = self->bootstrap;
    config.heap_bytes = UINT64_C(64) << 20;
    config.num_workers = 1 + self->rank % 3;
    if (world_failed(self, epx_group_create(&config, &run.group),
                     "epx_group_create")) {
        return;
    }
    if (make_plan(&run) && dispatch(&run)) {
        compute(&run);
        combine(&run);
    }
    world_failed(self, epx_plan_destroy(run.plan), "epx_plan_destroy");
    world_failed(self, epx_group_destroy(run.group), "epx_group_destroy");
}

/* ---- all sizes ---- */

static bool
check_size(world_kind_t kind, int32_t num_ranks, layer_t *layer,
           const uint8_t *want)
{
    char text[2048];
    void *got;
    size_t bytes = TOKENS * row_bytes(layer);
    bool ok = world_run(kind, num_ranks, num_ranks % 2 == 0, bytes, layer_rank,
                        layer, &got, text, sizeof(text));
    int64_t at =
        ok ? oracle_difference(layer->dtype, want, got, TOKENS * HIDDEN) : -1;

    if (at >= 0) {
        snprintf(text, sizeof(text),
                 "  token %lld, element %lld: expected %.9g, got %.9g\n",
                 (long long)(at / HIDDEN), (long long)(at % HIDDEN),
                 (double)get(layer->dtype, want, at),
                 (double)get(layer->dtype, got, at));
    }
    if (!ok || at >= 0) {
        printf("FAILED: %s, layout %d, dtype %d, seed %llu, %d ranks\n%s",
               world_name(kind), (int)layer->layout, (int)layer->dtype,
               (unsigned long long)layer->seed, num_ranks, text);
    }
    world_release(got, bytes);
    return ok && at < 0;
}

static int
check_layer(layer_t *layer)
{
    static const int32_t sizes[] = { 1, 2, 3, 4, 7, 8 };
    uint8_t *want = malloc(TOKENS * HIDDEN * sizeof(float));
    int failures = 0;

    if (!want) {
        perror("ep_size");
        abort();
    }
    draw_layer(layer);
    direct(layer, want);
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        failures += !check_size(WORLD_THREAD, sizes[i], layer, want);
        failures += !check_size(WORLD_SHM, sizes[i], layer, want);
    }
    free(want);
    return failures;
}

int
main(void)
{
    static layer_t layer;
    int failures = 0;

    for (int layout = EPX_LAYOUT_EXPERT_MAJOR;
         layout <= EPX_LAYOUT_EXPERT_SLOTS; layout++) {
        for (int dtype = EPX_F32; dtype <= EPX_BF16; dtype++) {
            for (uint64_t seed = 1; seed <= 3; seed++) {
                layer = (layer_t){ .layout = (epx_layout_t)layout,
                                   .dtype = (epx_dtype_t)dtype,
                                   .seed = seed };
                failures += check_layer(&layer);
            }
        }
    }
    printf("1, 2, 3, 4, 7 and 8 ranks: %d of 216 runs differ\n", failures);
    return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
