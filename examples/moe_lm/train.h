/* SPDX-License-Identifier: MIT */
/*
 * The training loop, and its log: a CSV file that moe_lm_report reads.  The
 * first field of a line says what it holds:
 *
 *     ranks,R
 *     unigram_bits,B                    of the text
 *     loss,STEP,NATS                    mean cross entropy of the step's batch,
 *                                       with digits enough for every bit
 *     load,LAYER,EXPERT,TOKENS          over the whole training
 *     seconds,STAGE,S                   on rank 0, waiting for others included
 */
#ifndef MOE_LM_TRAIN_H
#define MOE_LM_TRAIN_H

#include "text.h"

#include <epx/epx.h>

#include <stdio.h>

/* Rank 0 prints ten lines of progress and writes to log, unless that is NULL.
 * Collective. */
void train(epx_group_t *group, const config_t *config, const text_t *text,
           int64_t steps, FILE *log);

#endif
