/* SPDX-License-Identifier: MIT */
/* A line of --json: its keys, their order, null, and text that needs escapes.
 */
#include "bench_report.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static struct bench_shared shared = { .engine = "cpu", .fabric = "shm" };
static const struct bench_options options = {
    .ranks = 8,
    .layout = EPX_LAYOUT_EXPERT_MAJOR,
    .hidden = 7168,
    .experts = 256,
    .dtype = EPX_BF16,
    .quantize = EPX_QUANTIZE_F8E4M3_POW2,
    .logfmt = true,
    .routing_text = "a\"b\\c\n.csv",
    .workers = 1,
    .iters = 50,
    .in_a_row = 1,
    .hosts = 1,
};
static const struct bench_routing routing = { .options = &options,
                                              .topk = 8,
                                              .max_tokens = 4096 };

static void
expect(const struct bench_run *run, const struct bench_line *line,
       const char *expected)
{
    char *text = NULL;
    size_t bytes = 0;
    FILE *file = open_memstream(&text, &bytes);
    assert_non_null(file);
    bench_report_json(file, run, line);
    fclose(file);
    assert_string_equal(text, expected);
    free(text);
}

static void
test_json(void **state)
{
    const struct bench_run run = { .options = &options,
                                   .routing = &routing,
                                   .shared = &shared };
    struct bench_line line = { .op = "dispatch",
                               .times = { 1.5, 2, 3.25 },
                               .bytes_moved = UINT64_C(12345678901),
                               .gbps = 40.5,
                               .ceiling_gbps = 45,
                               .ratio_ceiling = 0.9,
                               .peer = "mpi",
                               .peer_p50 = 8,
                               .ratio_peer = 4,
                               .sms = 66,
                               .peer_way = "put",
                               .net_bytes = 1000,
                               .wire_bytes = 1050 };
    (void)state;
    expect(&run, &line,
           "{\"op\": \"dispatch\", \"engine\": \"cpu\", \"fabric\": \"shm\", "
           "\"mode\": \"ht\", \"ranks\": 8, \"tokens\": 4096, "
           "\"hidden\": 7168, \"topk\": 8, \"experts\": 256, "
           "\"dtype\": \"bf16\", \"workers\": 1, \"iters\": 50, "
           "\"min_us\": 1.500, \"p50_us\": 2.000, \"p99_us\": 3.250, "
           "\"bytes_moved\": 12345678901, \"gbps\": 40.500, "
           "\"ceiling_gbps\": 45.000, \"ratio_ceiling\": 0.9000, "
           "\"peer\": \"mpi\", \"peer_p50_us\": 8.000, "
           "\"ratio_peer\": 4.0000, \"layout\": \"expert\", "
           "\"quantize\": \"pow2\", \"routing\": \"a\\\"b\\\\c\\u000a.csv\", "
           "\"launch\": \"call\", \"in_a_row\": 1, \"hosts\": 1, "
           "\"sms\": 66, \"sm_us\": 132.0, "
           "\"net_bytes\": 1000, \"wire_bytes\": 1050, "
           "\"peer_way\": \"put\", "
           "\"combine_quantize\": \"logfmt10\", \"overlap_us\": 0}\n");
    line = (struct bench_line){ .op = "plan",
                                .gbps = NAN,
                                .ceiling_gbps = NAN,
                                .ratio_ceiling = NAN,
                                .peer_p50 = NAN,
                                .ratio_peer = NAN,
                                .sms = NAN };
    expect(&run, &line,
           "{\"op\": \"plan\", \"engine\": \"cpu\", \"fabric\": \"shm\", "
           "\"mode\": \"ht\", \"ranks\": 8, \"tokens\": 4096, "
           "\"hidden\": 7168, \"topk\": 8, \"experts\": 256, "
           "\"dtype\": \"bf16\", \"workers\": 1, \"iters\": 50, "
           "\"min_us\": 0.000, \"p50_us\": 0.000, \"p99_us\": 0.000, "
           "\"bytes_moved\": null, \"gbps\": null, \"ceiling_gbps\": null, "
           "\"ratio_ceiling\": null, \"peer\": null, \"peer_p50_us\": null, "
           "\"ratio_peer\": null, \"layout\": \"expert\", "
           "\"quantize\": \"pow2\", \"routing\": \"a\\\"b\\\\c\\u000a.csv\", "
           "\"launch\": \"call\", \"in_a_row\": 1, \"hosts\": 1, "
           "\"sms\": null, \"sm_us\": null, "
           "\"net_bytes\": null, \"wire_bytes\": null, "
           "\"peer_way\": null, "
           "\"combine_quantize\": \"logfmt10\", \"overlap_us\": 0}\n");
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_json),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
