/* SPDX-License-Identifier: MIT */
#include "text.h"
#include "ops.h"

#include <dirent.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define TEXT_STREAM 1 /* of ops_random */

static int
append_file(const char *path, text_t *text)
{
    struct stat status;
    uint8_t *bytes;
    FILE *file = fopen(path, "rb");

    if (file == NULL || fstat(fileno(file), &status) != 0) {
        snprintf(text->error, sizeof(text->error), "cannot read %s: %m", path);
        goto fail;
    }
    bytes = realloc(text->bytes, (size_t)(text->length + status.st_size + 1));
    if (bytes == NULL) {
        snprintf(text->error, sizeof(text->error), "no memory for %s", path);
        goto fail;
    }
    text->bytes = bytes;
    text->length +=
        (int64_t)fread(bytes + text->length, 1, (size_t)status.st_size, file);
    fclose(file);
    return 0;

fail:
    if (file != NULL) {
        fclose(file);
    }
    return -1;
}

static int
append_directory(const char *path, text_t *text)
{
    struct dirent **entries;
    int result = 0;
    int count = scandir(path, &entries, NULL, alphasort);

    if (count < 0) {
        snprintf(text->error, sizeof(text->error), "cannot list %s: %m", path);
        return -1;
    }
    for (int i = 0; i < count; i++) {
        char name[PATH_MAX + NAME_MAX + 2];
        struct stat status;
        snprintf(name, sizeof(name), "%s/%s", path, entries[i]->d_name);
        if (result == 0 && lstat(name, &status) == 0 &&
            S_ISREG(status.st_mode)) {
            result = append_file(name, text);
        }
        free(entries[i]);
    }
    free(entries);
    return result;
}

int
text_load(const char *path, int64_t least, text_t *text)
{
    struct stat status;
    int result;

    *text = (text_t){ 0 };
    if (stat(path, &status) != 0) {
        snprintf(text->error, sizeof(text->error),
                 "there is no text at %s (%m): name a file or directory with "
                 "--text",
                 path);
        return -1;
    }
    result = S_ISDIR(status.st_mode) ? append_directory(path, text)
                                     : append_file(path, text);
    if (result == 0 && text->length < least) {
        snprintf(text->error, sizeof(text->error),
                 "the text at %s has %lld bytes; it needs at least %lld", path,
                 (long long)text->length, (long long)least);
        result = -1;
    }
    return result;
}

void
text_free(text_t *text)
{
    free(text->bytes);
    *text = (text_t){ 0 };
}

double
text_unigram_bits(const text_t *text)
{
    int64_t counts[VOCABULARY] = { 0 };
    double bits = 0;

    for (int64_t i = 0; i < text->length; i++) {
        counts[text->bytes[i]]++;
    }
    for (int i = 0; i < VOCABULARY; i++) {
        if (counts[i] > 0) {
            double share = (double)counts[i] / (double)text->length;
            bits -= share * log2(share);
        }
    }
    return bits;
}

void
text_batch(const text_t *text, const config_t *config, int64_t step,
           int64_t first, int64_t count, uint8_t *bytes)
{
    const int64_t length = config->seq_len + 1;
    const uint64_t places = (uint64_t)(text->length - length + 1);

    for (int64_t i = 0; i < count; i++) {
        uint64_t draw = (uint64_t)(step * config->num_seqs + first + i);
        uint64_t place = ops_random(config->seed, TEXT_STREAM, draw) % places;
        memcpy(bytes + i * length, text->bytes + place, (size_t)length);
    }
}
