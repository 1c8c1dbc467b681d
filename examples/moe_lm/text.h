/* SPDX-License-Identifier: MIT */
/* The training text. */
#ifndef MOE_LM_TEXT_H
#define MOE_LM_TEXT_H

#include "config.h"

typedef struct text {
    uint8_t *bytes;
    int64_t length;
    char error[512]; /* why it could not be loaded, in one sentence */
} text_t;

/* Reads a file, or the regular files of a directory in the order of their names
 * (links are skipped); least is how many bytes there must be.  Returns -1 on
 * failure. */
int text_load(const char *path, int64_t least, text_t *text);

void text_free(text_t *text);

/* Bits per byte that a model needs which knows only how often each byte
 * occurs: what a language model has to beat. */
double text_unigram_bits(const text_t *text);

/* Sequences first .. first + count - 1 of the batch of one training step: each
 * is seq_len + 1 bytes from a random place of the text. */
void text_batch(const text_t *text, const config_t *config, int64_t step,
                int64_t first, int64_t count, uint8_t *bytes);

#endif
