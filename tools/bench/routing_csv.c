/* SPDX-License-Identifier: MIT */
#include "routing_csv.h"

#include <epx/epx.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* A larger file is a mistake, not a routing. */
#define MAX_FILE_BYTES ((size_t)1 << 30)
/* Longer than any number that is worth writing. */
#define MAX_FIELD_BYTES 63

struct span {
    const char *at;
    size_t bytes;
};

struct reader {
    struct span rest; /* what follows the current line */
    int64_t line;     /* number of the current line, from 1 */
    struct bench_error *error;
};

/* Splits the next line off, without its end. */
static bool
next_line(struct reader *reader, struct span *line)
{
    struct span *rest = &reader->rest;
    if (!rest->bytes) {
        return false;
    }
    const char *end = memchr(rest->at, '\n', rest->bytes);
    size_t bytes = end ? (size_t)(end - rest->at) : rest->bytes;
    size_t taken = end ? bytes + 1 : bytes;
    *line = (struct span){ rest->at, bytes };
    if (bytes && line->at[bytes - 1] == '\r') {
        line->bytes--;
    }
    rest->at += taken;
    rest->bytes -= taken;
    reader->line++;
    return true;
}

/* Splits the next field off a line; false after the last one. */
static bool
next_field(struct span *line, struct span *field)
{
    if (!line->at) {
        return false;
    }
    const char *comma = line->bytes ? memchr(line->at, ',', line->bytes) : NULL;
    size_t bytes = comma ? (size_t)(comma - line->at) : line->bytes;
    *field = (struct span){ line->at, bytes };
    if (comma) {
        line->at += bytes + 1;
        line->bytes -= bytes + 1;
    } else {
        line->at = NULL;
    }
    return true;
}

/* For sentences: no more of a field than fits in them. */
static int
shown(const struct span *field)
{
    return (int)(field->bytes < 40 ? field->bytes : 40);
}

static bool
parse_expert(const struct reader *reader, const struct span *field,
             int32_t num_experts, int64_t *value_p)
{
    int64_t value = 0;
    bool none = field->bytes == 2 && !memcmp(field->at, "-1", 2);
    bool good = field->bytes > 0 && field->bytes <= 10;
    for (size_t i = 0; good && !none && i < field->bytes; i++) {
        unsigned digit = (unsigned)(field->at[i] - '0');
        good = digit <= 9;
        value = value * 10 + (int64_t)digit;
    }
    if (!none && (!good || value >= num_experts)) {
        return bench_fail(
            reader->error, "line %lld: the expert is '%.*s'; allowed: -1 to %d",
            (long long)reader->line, shown(field), field->at, num_experts - 1);
    }
    *value_p = none ? -1 : value;
    return true;
}

static bool
parse_weight(const struct reader *reader, const struct span *field,
             float *value_p)
{
    static const char allowed[] = "0123456789.eE+-";
    char text[MAX_FIELD_BYTES + 1];
    char *end = text;
    bool good = field->bytes > 0 && field->bytes <= MAX_FIELD_BYTES;
    if (good) {
        memcpy(text, field->at, field->bytes);
        text[field->bytes] = '\0';
        *value_p = strtof(text, &end);
        good = end == text + field->bytes && isfinite(*value_p) &&
               strspn(text, allowed) == field->bytes;
    }
    return good || bench_fail(reader->error,
                              "line %lld: the weight is '%.*s'; allowed: a "
                              "finite decimal number",
                              (long long)reader->line, shown(field), field->at);
}

/* expert0..expertK-1,weight0..weightK-1 */
static bool
parse_header(const struct reader *reader, struct span line, int32_t *topk_p)
{
    struct span copy = line;
    struct span field;
    int32_t columns = 0;
    while (next_field(&copy, &field)) {
        columns++;
    }
    int32_t topk = columns / 2;
    bool good = columns % 2 == 0 && topk >= 1 && topk <= EPX_MAX_TOPK;
    for (int32_t i = 0; good && next_field(&line, &field); i++) {
        char name[32];
        int length = snprintf(name, sizeof name, "%s%d",
                              i < topk ? "expert" : "weight", i % topk);
        good = field.bytes == (size_t)length &&
               !memcmp(field.at, name, field.bytes);
    }
    *topk_p = topk;
    return good ||
           bench_fail(reader->error,
                      "line %lld: the columns must be expert0.. and then as "
                      "many of weight0.., 1 to %d of each",
                      (long long)reader->line, EPX_MAX_TOPK);
}

static bool
check_distinct(const struct reader *reader, const int64_t *experts,
               int32_t topk)
{
    for (int32_t k = 1; k < topk; k++) {
        for (int32_t j = 0; j < k; j++) {
            if (experts[k] >= 0 && experts[k] == experts[j]) {
                return bench_fail(
                    reader->error, "line %lld: expert %lld stands there twice",
                    (long long)reader->line, (long long)experts[k]);
            }
        }
    }
    return true;
}

static bool
parse_row(const struct reader *reader, struct span line, int32_t num_experts,
          int32_t topk, int64_t *experts, float *weights)
{
    struct span field;
    int32_t column = 0;
    for (; next_field(&line, &field); column++) {
        if (column < topk &&
            !parse_expert(reader, &field, num_experts, &experts[column])) {
            return false;
        }
        if (column >= topk && column < 2 * topk &&
            !parse_weight(reader, &field, &weights[column - topk])) {
            return false;
        }
    }
    if (column != 2 * topk) {
        return bench_fail(reader->error,
                          "line %lld has %d columns; the header has %d",
                          (long long)reader->line, column, 2 * topk);
    }
    return check_distinct(reader, experts, topk);
}

static int64_t
count_lines(struct reader reader)
{
    struct span line;
    int64_t count = 0;
    while (next_line(&reader, &line)) {
        count++;
    }
    return count;
}

static bool
parse_rows(struct reader *reader, int32_t num_experts,
           struct routing_table *table)
{
    /* Never more than the bytes of the text, so nothing can overflow. */
    size_t lines = (size_t)count_lines(*reader);
    size_t cells = lines * (size_t)table->topk;
    struct span line;
    if (!cells) {
        return bench_fail(reader->error,
                          "line %lld: no token follows the columns",
                          (long long)reader->line);
    }
    table->experts = malloc(cells * sizeof *table->experts);
    table->weights = malloc(cells * sizeof *table->weights);
    if (!table->experts || !table->weights) {
        return bench_fail(reader->error, "no memory for %zu tokens", lines);
    }
    while (next_line(reader, &line)) {
        int64_t first = table->num_tokens * table->topk;
        if (!parse_row(reader, line, num_experts, table->topk,
                       &table->experts[first], &table->weights[first])) {
            return false;
        }
        table->num_tokens++;
    }
    return true;
}

bool
routing_csv_parse(const char *text, size_t bytes, int32_t num_experts,
                  struct routing_table *table, struct bench_error *error)
{
    struct reader reader = { .rest = { text, bytes }, .error = error };
    struct span line;
    bool found;
    *table = (struct routing_table){ 0 };
    do {
        found = next_line(&reader, &line);
    } while (found && line.bytes && line.at[0] == '#');
    if (!found) {
        return bench_fail(error, "there is no line of columns");
    }
    if (!parse_header(&reader, line, &table->topk) ||
        !parse_rows(&reader, num_experts, table)) {
        routing_table_release(table);
        return false;
    }
    return true;
}

/* The whole file, in *text_p; the caller frees it, even on failure. */
static bool
read_file(const char *path, char **text_p, size_t *bytes_p,
          struct bench_error *error)
{
    FILE *file = fopen(path, "rbe");
    char *text = NULL;
    size_t capacity = 0;
    size_t bytes = 0;
    bool good = true;
    if (!file) {
        return bench_fail(error, "%s: %s", path, strerror(errno));
    }
    while (bytes == capacity) {
        capacity = capacity ? 2 * capacity : 1 << 16;
        char *larger =
            capacity <= MAX_FILE_BYTES ? realloc(text, capacity) : NULL;
        if (!larger) {
            good = bench_fail(error, "%s: more than %zu bytes", path, bytes);
            break;
        }
        text = larger;
        bytes += fread(text + bytes, 1, capacity - bytes, file);
    }
    if (good && ferror(file)) {
        good = bench_fail(error, "%s: cannot be read", path);
    }
    fclose(file);
    *text_p = text;
    *bytes_p = bytes;
    return good;
}

bool
routing_csv_read(const char *path, int32_t num_experts,
                 struct routing_table *table, struct bench_error *error)
{
    struct bench_error inner;
    char *text = NULL;
    size_t bytes = 0;
    *table = (struct routing_table){ 0 };
    bool good = read_file(path, &text, &bytes, error);
    if (good && !routing_csv_parse(text, bytes, num_experts, table, &inner)) {
        good = bench_fail(error, "%.200s, %.300s", path, inner.text);
    }
    free(text);
    return good;
}

void
routing_table_release(struct routing_table *table)
{
    free(table->experts);
    free(table->weights);
    *table = (struct routing_table){ 0 };
}
