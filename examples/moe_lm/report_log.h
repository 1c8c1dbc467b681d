/* SPDX-License-Identifier: MIT */
/* Reads the log of a training; train.h has its format. */
#ifndef MOE_LM_REPORT_LOG_H
#define MOE_LM_REPORT_LOG_H

#include <stdint.h>

#define LOG_MAX_STAGES  8
#define LOG_MAX_LAYERS  4
#define LOG_MAX_EXPERTS 64

typedef struct report_log {
    int32_t num_ranks;
    double unigram_bits;
    int64_t num_steps;
    double *loss; /* [num_steps] in nats */
    int32_t num_layers, num_experts;
    int64_t load[LOG_MAX_LAYERS][LOG_MAX_EXPERTS]; /* tokens */
    int32_t num_stages;
    struct {
        char name[32];
        double seconds;
    } stages[LOG_MAX_STAGES];
} report_log_t;

/* Prints one sentence and returns -1 when the file is not a whole log. */
int report_log_read(const char *path, report_log_t *log);
void report_log_free(report_log_t *log);

#endif
