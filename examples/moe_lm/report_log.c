/* SPDX-License-Identifier: MIT */
#include "report_log.h"

#include <stdio.h>
#include <stdlib.h>

/* Steps come in order, without gaps. */
static int
add_loss(report_log_t *log, long long step, double loss)
{
    double *grown;

    if (step != log->num_steps) {
        return -1;
    }
    grown = realloc(log->loss, (size_t)(step + 1) * sizeof(*grown));
    if (grown == NULL) {
        return -1;
    }
    log->loss = grown;
    log->loss[log->num_steps++] = loss;
    return 0;
}

static int
add_load(report_log_t *log, int layer, int expert, long long tokens)
{
    if (layer < 0 || layer >= LOG_MAX_LAYERS || expert < 0 ||
        expert >= LOG_MAX_EXPERTS || tokens < 0) {
        return -1;
    }
    log->load[layer][expert] = tokens;
    log->num_layers = layer >= log->num_layers ? layer + 1 : log->num_layers;
    log->num_experts =
        expert >= log->num_experts ? expert + 1 : log->num_experts;
    return 0;
}

static int
add_line(report_log_t *log, const char *line)
{
    long long number;
    double value;
    int layer, expert;
    char name[32];

    if (sscanf(line, "loss,%lld,%lf", &number, &value) == 2) {
        return add_loss(log, number, value);
    }
    if (sscanf(line, "load,%d,%d,%lld", &layer, &expert, &number) == 3) {
        return add_load(log, layer, expert, number);
    }
    if (sscanf(line, "seconds,%31[^,],%lf", name, &value) == 2 &&
        log->num_stages < LOG_MAX_STAGES) {
        int32_t i = log->num_stages++;
        snprintf(log->stages[i].name, sizeof(name), "%s", name);
        log->stages[i].seconds = value;
        return 0;
    }
    if (sscanf(line, "ranks,%d", &log->num_ranks) == 1 ||
        sscanf(line, "unigram_bits,%lf", &log->unigram_bits) == 1) {
        return 0;
    }
    return -1;
}

int
report_log_read(const char *path, report_log_t *log)
{
    char line[256];
    int line_number = 0;
    FILE *file = fopen(path, "r");

    *log = (report_log_t){ 0 };
    if (file == NULL) {
        fprintf(stderr, "moe_lm_report: cannot read %s: %m\n", path);
        return -1;
    }
    while (fgets(line, sizeof(line), file) != NULL) {
        line_number++;
        if (add_line(log, line) != 0) {
            fprintf(stderr, "moe_lm_report: %s:%d is not a line of a log\n",
                    path, line_number);
            goto fail;
        }
    }
    /* The seconds come last. */
    if (log->num_steps == 0 || log->num_layers == 0 || log->num_stages == 0) {
        fprintf(stderr, "moe_lm_report: %s ends before the training does\n",
                path);
        goto fail;
    }
    fclose(file);
    return 0;

fail:
    fclose(file);
    report_log_free(log);
    return -1;
}

void
report_log_free(report_log_t *log)
{
    free(log->loss);
    *log = (report_log_t){ 0 };
}
