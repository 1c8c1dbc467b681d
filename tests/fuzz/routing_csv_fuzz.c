/* SPDX-License-Identifier: MIT */
/* The parser of recorded routings: any bytes give a table that keeps its
 * promises or a sentence, and nothing in between. */
#include "routing_csv.h"

#include <epx/epx.h>
#include <math.h>
#include <stdlib.h>

/* Small, so that a fuzzer finds both sides of the bound. */
#define NUM_EXPERTS 60

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void
require(bool condition)
{
    if (!condition) {
        abort();
    }
}

static void
check_row(const struct routing_table *table, int64_t token)
{
    const int64_t *experts = &table->experts[token * table->topk];
    for (int32_t k = 0; k < table->topk; k++) {
        require(experts[k] >= -1 && experts[k] < NUM_EXPERTS);
        require(isfinite(table->weights[token * table->topk + k]));
        for (int32_t j = 0; j < k; j++) {
            require(experts[k] < 0 || experts[k] != experts[j]);
        }
    }
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct bench_error error = { "" };
    struct routing_table table;
    if (!routing_csv_parse((const char *)data, size, NUM_EXPERTS, &table,
                           &error)) {
        require(error.text[0] != '\0');
        require(!table.experts && !table.weights && !table.num_tokens);
        return 0;
    }
    require(table.topk >= 1 && table.topk <= EPX_MAX_TOPK);
    require(table.num_tokens >= 1);
    for (int64_t t = 0; t < table.num_tokens; t++) {
        check_row(&table, t);
    }
    routing_table_release(&table);
    return 0;
}
