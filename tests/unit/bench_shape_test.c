/* SPDX-License-Identifier: MIT */
/* Bytes that an operation must move, worked out by hand for two tokens. */
#include "bench_run.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

/* Rank 0 of 2 has token 0 -> experts 0, 1, 3 and rank 1 has token 1 -> 2. */
static const char routing_text[] =
    "expert0,expert1,expert2,weight0,weight1,weight2\n"
    "0,1,3,.5,.25,.25\n"
    "2,-1,-1,1,0,0\n";

static void
make(struct bench_options options, struct bench_shape *shape,
     uint64_t bytes[BENCH_NUM_OPS])
{
    char path[] = P_tmpdir "/epx-bench-shape-XXXXXX.csv";
    struct bench_routing routing;
    struct bench_error error = { "" };
    int fd = mkstemps(path, 4);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, routing_text, strlen(routing_text)),
                     strlen(routing_text));
    close(fd);
    options.ranks = 2;
    options.experts = 4;
    options.hidden = 256;
    options.routing = BENCH_CSV;
    options.routing_text = path;
    if (!bench_routing_open(&routing, &options, &error) ||
        !bench_shape_make(shape, &routing, &error)) {
        fail_msg("%s", error.text);
    }
    assert_true(bench_shape_bytes(shape, &routing, bytes));
    bench_routing_close(&routing);
    unlink(path);
}

static void
test_rank_major(void **state)
{
    const struct bench_options o = { .layout = EPX_LAYOUT_RANK_MAJOR,
                                     .dtype = EPX_BF16 };
    struct bench_shape shape;
    uint64_t bytes[BENCH_NUM_OPS];
    (void)state;
    make(o, &shape, bytes);
    assert_int_equal(shape.recv_rows, 2);
    assert_int_equal(bytes[BENCH_PLAN], 0);
    /* 2 rows read, 3 written, each with 3 indices and 3 weights. */
    assert_int_equal(bytes[BENCH_DISPATCH], 5 * (512 + 3 * 12));
    /* 3 rows read, 2 written. */
    assert_int_equal(bytes[BENCH_COMBINE], 5 * 512);
}

static void
test_expert_layouts(void **state)
{
    struct bench_options o = { .layout = EPX_LAYOUT_EXPERT_MAJOR,
                               .dtype = EPX_BF16,
                               .quantize = EPX_QUANTIZE_F8E4M3_F32 };
    struct bench_shape shape;
    uint64_t bytes[BENCH_NUM_OPS];
    (void)state;
    make(o, &shape, bytes);
    assert_int_equal(shape.sent_scales, 2);
    assert_int_equal(shape.recv_rows, 2 * 2);
    /* 2 bf16 rows with 3 weights read; 4 fp8 rows with 2 scales and a weight
     * written. */
    assert_int_equal(bytes[BENCH_DISPATCH], 2 * (512 + 12) + 4 * (256 + 8 + 4));
    assert_int_equal(bytes[BENCH_COMBINE], 6 * 512 + 2 * 12);
    o.layout = EPX_LAYOUT_EXPERT_SLOTS;
    o.quantize = EPX_QUANTIZE_F8E4M3_UE8M0;
    make(o, &shape, bytes);
    assert_int_equal(shape.sent_scales, 1);
    assert_int_equal(shape.recv_rows, 2 * 2 * 1);
    assert_int_equal(bytes[BENCH_DISPATCH], 2 * (512 + 12) + 4 * (256 + 4 + 4));
}

/* Memory of a card is taken for what arrives, and a split dispatch places its
 * rows at once. */
static void
test_card(void **state)
{
    struct bench_options o = { .device = EPX_DEVICE_CUDA,
                               .layout = EPX_LAYOUT_RANK_MAJOR,
                               .dtype = EPX_BF16 };
    struct bench_shape shape;
    uint64_t bytes[BENCH_NUM_OPS];
    (void)state;
    make(o, &shape, bytes);
    assert_int_equal(shape.recv_rows, 2); /* of tokens 0 and 1, on rank 1 */
    assert_int_equal(bytes[BENCH_PLAN_DEVICE], 0);
    assert_int_equal(bytes[BENCH_DISPATCH_SEND], bytes[BENCH_DISPATCH]);
    assert_int_equal(bytes[BENCH_DISPATCH_HOOK], 0);
    assert_int_equal(bytes[BENCH_LAYER],
                     bytes[BENCH_DISPATCH] + bytes[BENCH_COMBINE]);
    o.layout = EPX_LAYOUT_EXPERT_MAJOR;
    make(o, &shape, bytes);
    assert_int_equal(shape.recv_rows, 2); /* 0 on experts 0, 1 of rank 0 */
}

static void
test_fp8(void **state)
{
    const struct bench_options o = { .layout = EPX_LAYOUT_RANK_MAJOR,
                                     .dtype = EPX_F8E4M3 };
    struct bench_shape shape;
    uint64_t bytes[BENCH_NUM_OPS];
    (void)state;
    make(o, &shape, bytes);
    assert_int_equal(shape.given_scales, 2);
    assert_int_equal(shape.combine_dtype, EPX_BF16);
    assert_int_equal(bytes[BENCH_DISPATCH], 5 * (256 + 8 + 36));
    assert_int_equal(bytes[BENCH_COMBINE], 5 * 512);
}

/* What one rank sends another receives. */
static void
test_rows(void **state)
{
    struct bench_options o = { .ranks = 3,
                               .experts = 7,
                               .topk = 4,
                               .tokens = 50,
                               .hidden = 16,
                               .layout = EPX_LAYOUT_RANK_MAJOR };
    (void)state;
    for (int turn = 0; turn < 2; turn++) {
        struct bench_routing routing;
        struct bench_error error = { "" };
        int64_t to[3][3];
        int64_t from[3][3];
        int64_t sum = 0;
        assert_true(bench_routing_open(&routing, &o, &error));
        for (int32_t r = 0; r < 3; r++) {
            assert_true(bench_shape_rows(&routing, r, to[r], from[r]));
        }
        for (int i = 0; i < 9; i++) {
            assert_int_equal(to[i / 3][i % 3], from[i % 3][i / 3]);
            assert_in_range(to[i / 3][i % 3], 1, 50 * (turn ? 3 : 1));
            sum += to[i / 3][i % 3];
        }
        if (turn) { /* every token has 4 experts */
            assert_int_equal(sum, 3 * 50 * 4);
        }
        bench_routing_close(&routing);
        o.layout = EPX_LAYOUT_EXPERT_MAJOR;
    }
}

static void
test_too_large(void **state)
{
    const struct bench_options o = { .ranks = 1024,
                                     .experts = 1 << 20,
                                     .topk = 64,
                                     .tokens = 1 << 24,
                                     .hidden = 1 << 24,
                                     .layout = EPX_LAYOUT_EXPERT_SLOTS,
                                     .dtype = EPX_F32 };
    struct bench_routing routing;
    struct bench_shape shape;
    struct bench_error error = { "" };
    (void)state;
    assert_true(bench_routing_open(&routing, &o, &error));
    assert_false(bench_shape_make(&shape, &routing, &error));
    assert_non_null(strstr(error.text, "1024 ranks would take"));
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rank_major),
        cmocka_unit_test(test_expert_layouts),
        cmocka_unit_test(test_card),
        cmocka_unit_test(test_fp8),
        cmocka_unit_test(test_rows),
        cmocka_unit_test(test_too_large),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
