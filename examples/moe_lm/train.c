/* SPDX-License-Identifier: MIT */
#include "train.h"
#include "adam.h"
#include "check.h"
#include "model.h"
#include "ops.h"

#include <math.h>

#define LEARNING_RATE 6e-3f
#define WARMUP_STEPS  20

typedef struct trainer {
    epx_group_info_t info;
    const text_t *text;
    int64_t steps;
    FILE *log;
    model_t model;
    adam_t adam;                    /* of the replicated parameters */
    adam_t expert_adam[MAX_LAYERS]; /* of the rank's experts */
    uint8_t *bytes;                 /* this rank's part of the batch */
    int64_t *load;                  /* [num_layers, E] */
    double start;
} trainer_t;

static void
trainer_create(epx_group_t *group, const config_t *config, trainer_t *tr)
{
    const int64_t shard_seqs = config->num_seqs / config->num_shards;

    tr->info = (epx_group_info_t)EPX_GROUP_INFO_INIT;
    CHECK(epx_group_query(group, &tr->info));
    model_create(group, config, &tr->model);
    adam_create(tr->model.num_params, &tr->adam);
    for (int32_t l = 0; l < config->num_layers; l++) {
        adam_create(tr->model.layer[l].moe.num_params, &tr->expert_adam[l]);
    }
    tr->bytes =
        ops_alloc(tr->model.num_shards * shard_seqs * (config->seq_len + 1), 1);
    tr->load =
        ops_alloc(config->num_layers * config->num_experts, sizeof(*tr->load));
}

static void
trainer_destroy(trainer_t *tr)
{
    for (int32_t l = 0; l < tr->model.config.num_layers; l++) {
        adam_destroy(&tr->expert_adam[l]);
    }
    adam_destroy(&tr->adam);
    model_destroy(&tr->model);
    free(tr->bytes);
    free(tr->load);
}

/* Up for a few steps, then down to a tenth. */
static float
learning_rate(int64_t step, int64_t steps)
{
    float warmup = fminf((float)(step + 1) / WARMUP_STEPS, 1);

    return LEARNING_RATE * warmup * (1 - 0.9f * (float)step / (float)steps);
}

/* Returns the loss before the update. */
static float
train_step(trainer_t *tr, int64_t step)
{
    model_t *model = &tr->model;
    const config_t *c = &model->config;
    const int64_t shard_seqs = c->num_seqs / c->num_shards;
    const float rate = learning_rate(step, tr->steps);

    text_batch(tr->text, c, step, model->first_shard * shard_seqs,
               model->num_shards * shard_seqs, tr->bytes);
    model_gradients(model, tr->bytes);

    /* The replicated gradients are the same everywhere, and so is the update;
     * an expert's gradients are already those of the whole batch. */
    params_t sum = model_grads(model, 0);
    adam_step(&tr->adam, rate, gradient_sum_vector(&model->grads, 0),
              model->param_array);
    for (int32_t l = 0; l < c->num_layers; l++) {
        moe_layer_t *moe = &model->layer[l].moe;
        adam_step(&tr->expert_adam[l], rate, moe->grads, moe->params);
    }
    for (int32_t i = 0; i < c->num_layers * c->num_experts; i++) {
        tr->load[i] += (int64_t)sum.load[i];
    }
    return *sum.loss;
}

static void
print_progress(const trainer_t *tr, int64_t step, float loss)
{
    const config_t *c = &tr->model.config;
    const double tokens = (double)(step + 1) * c->num_seqs * c->seq_len;

    printf("step %4lld/%lld  %.3f bits/byte  %.0f tokens/s\n",
           (long long)step + 1, (long long)tr->steps, (double)loss / log(2),
           tokens / (ops_seconds() - tr->start));
    fflush(stdout);
}

static void
write_totals(const trainer_t *tr)
{
    const config_t *c = &tr->model.config;
    const moe_seconds_t *moe = &tr->model.moe_seconds;
    const double total = ops_seconds() - tr->start;
    const double sum = tr->model.sum_seconds;
    const double rest =
        total - moe->plan - moe->dispatch - moe->experts - moe->combine - sum;

    for (int32_t l = 0; l < c->num_layers; l++) {
        for (int32_t e = 0; e < c->num_experts; e++) {
            fprintf(tr->log, "load,%d,%d,%lld\n", l, e,
                    (long long)tr->load[l * c->num_experts + e]);
        }
    }
    fprintf(tr->log, "seconds,plan,%.6f\n", moe->plan);
    fprintf(tr->log, "seconds,dispatch,%.6f\n", moe->dispatch);
    fprintf(tr->log, "seconds,experts,%.6f\n", moe->experts);
    fprintf(tr->log, "seconds,combine,%.6f\n", moe->combine);
    fprintf(tr->log, "seconds,gradient sum,%.6f\n", sum);
    fprintf(tr->log, "seconds,the rest,%.6f\n", rest);
}

void
train(epx_group_t *group, const config_t *config, const text_t *text,
      int64_t steps, FILE *log)
{
    trainer_t tr = { .text = text, .steps = steps, .log = log };

    trainer_create(group, config, &tr);
    const int leader = tr.info.rank == 0;
    if (leader && log != NULL) {
        fprintf(log, "ranks,%d\n", tr.info.num_ranks);
        fprintf(log, "unigram_bits,%.6f\n", text_unigram_bits(text));
    }
    tr.start = ops_seconds();
    for (int64_t step = 0; step < steps; step++) {
        float loss = train_step(&tr, step);
        if (leader && log != NULL) {
            fprintf(log, "loss,%lld,%.9g\n", (long long)step, (double)loss);
        }
        if (leader && (step + 1) * 10 / steps != step * 10 / steps) {
            print_progress(&tr, step, loss);
        }
    }
    if (leader && log != NULL) {
        write_totals(&tr);
    }
    trainer_destroy(&tr);
}
