/* SPDX-License-Identifier: MIT */
/* LogFMT-10: the oracle's bits, the error that docs/formats.md promises, and
 * the example there. */
#include "api_common.h"
#include "conformance/rng.h"
#include "engine/common/logfmt.h"
#include "engine/cpu/cpu_kernels.h"
#include "oracle/oracle.h"

#include <math.h>

enum { BLOCK = EPX_LOGFMT_BLOCK, MAGNITUDES = 1 << 15 };

/* ---- one block ---- */

typedef struct block {
    uint16_t x[BLOCK];
    int count;
    uint32_t max; /* of its numbers, 0 without any */
    uint32_t min;
    epx__logfmt_t meaning;
} block_t;

static void
find_meaning(block_t *b)
{
    b->max = 0;
    b->min = 0;
    for (int i = 0; i < b->count; i++) {
        uint32_t magnitude = b->x[i] & 0x7fff;

        if (!epx__logfmt_is_number(magnitude)) {
            continue;
        }
        b->max = magnitude > b->max ? magnitude : b->max;
        b->min = b->min == 0 || magnitude < b->min ? magnitude : b->min;
    }
    b->meaning = epx__logfmt_block(b->max, b->min);
}

static double
value_of(uint32_t bf16)
{
    return (double)epx__f32_from_bf16((uint16_t)bf16);
}

/* The bound of docs/formats.md. */
static void
check_error(const block_t *b, double x, double y)
{
    double range = b->max == 0 ? 0 : log2(value_of(b->max) / value_of(b->min));
    double bound = fmin(range, 32) / 1465 + 0x1p-14;

    if (y == 0) {
        assert_true(fabs(x) < 0x1p-126 ||
                    fabs(x) < value_of(b->max) * 0x1p-32 * (1 + 0x1p-14));
    } else if (fabs(x - y) > bound * fabs(x)) {
        fail_msg("%a came back as %a, in a block over 2^%g", x, y, range);
    }
}

static void
check_element(const block_t *b, int i, uint32_t want_code, float want)
{
    uint16_t x = b->x[i];
    uint32_t code = epx__logfmt_encode(&b->meaning, x);
    float decoded = epx__logfmt_decode(&b->meaning, code, x >> 15);
    float term = epx__logfmt_term(&b->meaning, x);

    if (code != want_code ||
        (code != EPX__LOGFMT_NAN &&
         (epx__bits_from_f32(decoded) != epx__bits_from_f32(want) ||
          epx__bits_from_f32(term) != epx__bits_from_f32(want)))) {
        fail_msg("%#x among %#x..%#x: expected %u, %a; got %u, %a, %a", x,
                 b->min, b->max, want_code, (double)want, code, (double)decoded,
                 (double)term);
    }
    if (code == EPX__LOGFMT_NAN) {
        assert_true((x & 0x7fff) > 0x7f80 && isnan(decoded) && isnan(term));
        assert_true(isnan(want));
    } else if (code == EPX__LOGFMT_INF) {
        assert_int_equal(epx__bits_from_f32(decoded), (uint32_t)x << 16);
    } else {
        check_error(b, value_of(x), (double)decoded);
    }
}

static void
check_block(block_t *b)
{
    uint16_t codes[BLOCK];
    float decoded[BLOCK];

    find_meaning(b);
    oracle_logfmt(b->x, b->count, codes, decoded);
    for (int i = 0; i < b->count; i++) {
        check_element(b, i, codes[i], decoded[i]);
    }
}

/* ---- blocks ---- */

static void
random_blocks(void **state)
{
    rng_t rng = rng_of(1, 2, 3);
    block_t b;

    (void)state;
    for (int i = 0; i < 20000; i++) {
        b.count = (int)rng_int(&rng, 1, BLOCK);
        rng_fill(&rng, EPX_BF16, b.x, b.count, i % 2 == 0);
        check_block(&b);
    }
}

/* Every magnitude in ranges from one value to more than 32 powers of two. */
static void
every_magnitude(void **state)
{
    static const uint32_t widths[] = { 1,    2,    3,    17,   127,
                                       128,  129,  1000, 2000, 4095,
                                       4096, 4097, 5000, 9000, MAGNITUDES };
    block_t b;

    (void)state;
    b.count = BLOCK;
    for (size_t w = 0; w < sizeof(widths) / sizeof(*widths); w++) {
        for (uint32_t first = 0; first < MAGNITUDES;
             first += widths[w] < 128 ? widths[w] * 7 : widths[w]) {
            for (uint32_t at = 0; at < widths[w]; at += BLOCK - 2) {
                for (uint32_t i = 0; i < BLOCK - 2; i++) {
                    b.x[i] = (uint16_t)((first + (at + i) % widths[w]) |
                                        (i % 2) << 15);
                }
                b.x[BLOCK - 2] = (uint16_t)(first + widths[w] - 1);
                b.x[BLOCK - 1] = (uint16_t)first;
                check_block(&b);
            }
        }
    }
}

/* Larger magnitudes never get smaller codes, and the largest is exact. */
static void
codes_are_in_order(void **state)
{
    static const uint32_t tops[] = { 0x0080, 0x00ff, 0x1234, 0x3f80,
                                     0x3fff, 0x4000, 0x7f7f };

    (void)state;
    for (size_t t = 0; t < sizeof(tops) / sizeof(*tops); t++) {
        for (uint32_t span = 0; span < tops[t]; span += 1 + span / 3) {
            epx__logfmt_t block = epx__logfmt_block(tops[t], tops[t] - span);
            uint32_t before = 0;

            for (uint32_t h = tops[t] - span; h <= tops[t]; h++) {
                uint32_t code = epx__logfmt_encode(&block, (uint16_t)h);

                assert_true(code >= before);
                before = code;
            }
            assert_int_equal(before, EPX__LOGFMT_TOP);
            assert_int_equal(epx__bits_from_f32(epx__logfmt_decode(
                                 &block, EPX__LOGFMT_TOP, 0)),
                             tops[t] << 16);
        }
    }
}

/* Any head and code decode to something: what a peer sends may be anything. */
static void
any_head_decodes(void **state)
{
    rng_t rng = rng_of(4, 5, 6);

    (void)state;
    for (int i = 0; i < 100000; i++) {
        uint32_t heads = (uint32_t)rng_next(&rng);
        epx__logfmt_t block = epx__logfmt_block(heads & 0xffff, heads >> 16);
        float value =
            epx__logfmt_decode(&block, (uint32_t)rng_int(&rng, 1, 509), 0);

        assert_true(isnan(value) ||
                    fabsf(value) <= fabsf(block.max) * (1 + 0x1p-20f));
    }
}

/* ---- the example of docs/formats.md ---- */

static void
the_example(void **state)
{
    static const float x[] = { 1.0f,    -0.5f,    0.3f, 0.0f,
                               0.0101f, INFINITY, 2.5f, 0x1p-8f };
    static const uint32_t codes[] = { 437, 382, 343, 0, 75, 510, 509, 1 };
    static const float decoded[] = { 1.00049043f, -0.497042716f, 0.302662909f,
                                     0.0f,        0.010012228f,  INFINITY,
                                     2.5f,        0.00390621461f };
    static const uint8_t bytes[] = { 0x20, 0x40, 0x80, 0x3b, 0xb5, 0x7e, 0x57,
                                     0x00, 0x4b, 0xfe, 0xfd, 0x01, 0x67, 0x02 };
    block_t b = { .count = 8 };
    const void *rows[] = { b.x };
    const uint8_t kinds[] = { EPX__ROW_PLAIN };
    uint8_t packed[sizeof(bytes)];

    (void)state;
    for (int i = 0; i < b.count; i++) {
        b.x[i] = oracle_to_bf16(x[i]);
    }
    check_block(&b);
    epx__kernels_get()->reduce_logfmt(&(epx__reduce_t){ .rows = rows,
                                                        .kinds = kinds,
                                                        .num_rows = 1,
                                                        .out = packed,
                                                        .count = 8,
                                                        .packs = true });
    for (int i = 0; i < b.count; i++) {
        assert_int_equal(epx__logfmt_encode(&b.meaning, b.x[i]), codes[i]);
        assert_int_equal(epx__bits_from_f32(epx__logfmt_decode(
                             &b.meaning, codes[i], b.x[i] >> 15)),
                         epx__bits_from_f32(decoded[i]));
    }
    assert_memory_equal(packed, bytes, sizeof(bytes));
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(random_blocks),
        cmocka_unit_test(every_magnitude),
        cmocka_unit_test(codes_are_in_order),
        cmocka_unit_test(any_head_decodes),
        cmocka_unit_test(the_example),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
