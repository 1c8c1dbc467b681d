/* SPDX-License-Identifier: MIT */
/*
 * The kernels of each instruction set that this machine runs: the oracle's
 * bits, and nothing read or written beside the arrays.  Arrays end at a page
 * that cannot be touched.
 */
#include "engine/cpu/cpu_kernels.h"
#include "api_common.h"
#include "conformance/rng.h"
#include "oracle/oracle.h"

#include <math.h>
#include <sys/mman.h>

enum { ROOM = 8192, MOST_ROWS = 9, MOST_COUNT = 1500, GUARD = 64 };

/* ---- the tables ---- */

static const epx__kernels_t *tables[4];

static int
find_tables(void **state)
{
    int count = 0;

    (void)state;
    tables[count++] = &epx__kernels_base;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        tables[count++] = &epx__kernels_avx2;
    }
    if (__builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
        tables[count++] = &epx__kernels_avx512;
    }
#endif
    for (int i = 0; i < count; i++) {
        print_message("instruction set: %s\n", tables[i]->isa);
    }
    return 0;
}

static void
the_best_table_is_taken(void **state)
{
    const epx__kernels_t *best = tables[0];

    (void)state;
    for (int i = 0; tables[i] != NULL; i++) {
        best = tables[i];
    }
    assert_string_equal(epx__kernels_get()->isa, best->isa);
}

/* ---- arrays ---- */

/* ROOM bytes up to a page that cannot be touched. */
typedef struct room {
    uint8_t *end;
} room_t;

static room_t
room_open(void)
{
    uint8_t *base = mmap(NULL, ROOM + 4096, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    assert_ptr_not_equal(base, MAP_FAILED);
    assert_int_equal(mprotect(base + ROOM, 4096, PROT_NONE), 0);
    return (room_t){ base + ROOM };
}

static void
room_close(room_t room)
{
    assert_int_equal(munmap(room.end - ROOM, ROOM + 4096), 0);
}

/* The last `bytes` bytes, after a guard. */
static void *
output(room_t room, size_t bytes)
{
    memset(room.end - bytes - GUARD, 0xa5, bytes + GUARD);
    return room.end - bytes;
}

static void
check_guard(room_t room, size_t bytes)
{
    for (int i = 1; i <= GUARD; i++) {
        assert_int_equal(room.end[-(ptrdiff_t)bytes - i], 0xa5);
    }
}

static void
check_same(const char *isa, epx_dtype_t dtype, const void *want,
           const void *got, int64_t count)
{
    int64_t i = oracle_difference(dtype, want, got, count);
    size_t size = epx_dtype_size(dtype);
    uint32_t w = 0, g = 0;

    if (i >= 0) {
        memcpy(&w, (const uint8_t *)want + (size_t)i * size, size);
        memcpy(&g, (const uint8_t *)got + (size_t)i * size, size);
        fail_msg("%s: element %d of %d: expected %#x, got %#x", isa, (int)i,
                 (int)count, w, g);
    }
}

/* ---- quantize ---- */

static void
check_quantize(epx_quantize_t kind, const uint16_t *x, size_t count,
               room_t q_room, room_t scale_room)
{
    size_t blocks = (count + EPX_SCALE_BLOCK - 1) / EPX_SCALE_BLOCK;
    size_t num_scales =
        kind == EPX_QUANTIZE_F8E4M3_UE8M0 ? (blocks + 3) / 4 : blocks;
    uint8_t q[MOST_COUNT], first[MOST_COUNT];
    uint32_t scales[MOST_COUNT / EPX_SCALE_BLOCK + 1];

    oracle_quantize(kind, x, (int64_t)count, q, scales);
    for (int i = 0; tables[i] != NULL; i++) {
        size_t scale_bytes = num_scales * sizeof(uint32_t);
        uint8_t *got = output(q_room, count);
        uint32_t *got_scales = output(scale_room, scale_bytes);

        tables[i]->quantize(kind, x, count, got, got_scales);
        check_same(tables[i]->isa, EPX_F8E4M3, q, got, (int64_t)count);
        check_same(tables[i]->isa, EPX_I32, scales, got_scales,
                   (int64_t)num_scales);
        check_guard(q_room, count);
        check_guard(scale_room, scale_bytes);
        if (i == 0) {
            memcpy(first, got, count);
        }
        assert_memory_equal(got, first, count); /* NaNs too */
    }
}

static void
quantizes_rows_of_any_length(void **state)
{
    room_t x_room = room_open(), q_room = room_open(), s_room = room_open();
    rng_t rng = rng_of(1, 2, 3);

    (void)state;
    for (size_t count = 1; count <= 700; count++) {
        uint16_t *x = output(x_room, count * sizeof(*x));

        rng_fill(&rng, EPX_BF16, x, (int64_t)count, count % 2 == 0);
        for (int kind = EPX_QUANTIZE_F8E4M3_F32;
             kind <= EPX_QUANTIZE_F8E4M3_UE8M0; kind++) {
            check_quantize((epx_quantize_t)kind, x, count, q_room, s_room);
        }
    }
    room_close(x_room);
    room_close(q_room);
    room_close(s_room);
}

/* ---- reduce ---- */

/* The arrays of one sum; rows in rooms of their own. */
typedef struct sum {
    epx_dtype_t dtype;
    size_t count;
    int num_rows;
    bool has_weights;
    room_t rows[MOST_ROWS];
    room_t weights;
    room_t out;
} sum_t;

static sum_t sum;

static int
open_sum(void **state)
{
    (void)state;
    for (int i = 0; i < MOST_ROWS; i++) {
        sum.rows[i] = room_open();
    }
    sum.weights = room_open();
    sum.out = room_open();
    return 0;
}

static int
close_sum(void **state)
{
    (void)state;
    for (int i = 0; i < MOST_ROWS; i++) {
        room_close(sum.rows[i]);
    }
    room_close(sum.weights);
    room_close(sum.out);
    return 0;
}

static float
element(const void *row, size_t i)
{
    switch (sum.dtype) {
    case EPX_F16:
        return oracle_from_f16(((const uint16_t *)row)[i]);
    case EPX_BF16:
        return oracle_from_bf16(((const uint16_t *)row)[i]);
    default:
        return ((const float *)row)[i];
    }
}

/* What epx_combine_args_t says, word for word. */
static void
add_up(const epx__reduce_t *reduce, void *out)
{
    for (size_t i = 0; i < sum.count; i++) {
        float total = 0.0f;

        for (int r = 0; r < sum.num_rows; r++) {
            float x = element(reduce->rows[r], i);

            total = sum.has_weights ? fmaf(reduce->weights[r], x, total)
                                    : total + x;
        }
        if (sum.dtype == EPX_F32) {
            ((float *)out)[i] = total;
        } else {
            ((uint16_t *)out)[i] = sum.dtype == EPX_F16 ? oracle_to_f16(total)
                                                        : oracle_to_bf16(total);
        }
    }
}

static void
run_reduce(const epx__kernels_t *kernels, const epx__reduce_t *reduce)
{
    switch (sum.dtype) {
    case EPX_F16:
        kernels->reduce_f16(reduce);
        break;
    case EPX_BF16:
        kernels->reduce_bf16(reduce);
        break;
    default:
        kernels->reduce_f32(reduce);
    }
}

static void
check_reduce(epx__reduce_t *reduce)
{
    static float want[MOST_COUNT], first[MOST_COUNT];
    size_t bytes = sum.count * epx_dtype_size(sum.dtype);

    add_up(reduce, want);
    for (int i = 0; tables[i] != NULL; i++) {
        reduce->out = output(sum.out, bytes);
        run_reduce(tables[i], reduce);
        check_same(tables[i]->isa, sum.dtype, want, reduce->out,
                   (int64_t)sum.count);
        check_guard(sum.out, bytes);
        if (i == 0) {
            memcpy(first, reduce->out, bytes);
        }
        if (sum.dtype != EPX_F32) { /* there a NaN's payload may differ */
            assert_memory_equal(reduce->out, first, bytes);
        }
    }
}

/* One sum of random numbers, by the fields of `sum`. */
static void
check_sum(rng_t *rng)
{
    const void *rows[MOST_ROWS];
    bool special = rng_one_in(rng, 3);
    size_t bytes = sum.count * epx_dtype_size(sum.dtype);
    float *weights =
        output(sum.weights, (size_t)sum.num_rows * sizeof(*weights));
    epx__reduce_t reduce = { .rows = rows,
                             .weights = sum.has_weights ? weights : NULL,
                             .num_rows = sum.num_rows,
                             .count = sum.count };

    rng_fill(rng, EPX_F32, weights, sum.num_rows, special);
    for (int r = 0; r < sum.num_rows; r++) {
        void *row = output(sum.rows[r], bytes);

        rng_fill(rng, sum.dtype, row, (int64_t)sum.count, special);
        rows[r] = row;
    }
    reduce.streams = bytes % EPX_ROW_ALIGN == 0 && rng_one_in(rng, 2);
    check_reduce(&reduce);
}

static const epx_dtype_t dtypes[] = { EPX_F32, EPX_F16, EPX_BF16 };

/* Every number of rows, with and without weights. */
static void
reduces_every_combination(void **state)
{
    static const size_t counts[] = { 1, 7, 64, 511, 512, 513, 1024, 1030 };
    rng_t rng = rng_of(4, 5, 6);

    (void)state;
    for (int i = 0; i < 3 * (MOST_ROWS + 1) * 2; i++) {
        sum.dtype = dtypes[i % 3];
        sum.num_rows = i / 3 % (MOST_ROWS + 1);
        sum.has_weights = i / (3 * (MOST_ROWS + 1)) == 1;
        for (size_t c = 0; c < sizeof(counts) / sizeof(*counts); c++) {
            sum.count = counts[c];
            check_sum(&rng);
        }
    }
}

static void
reduces_rows_of_any_length(void **state)
{
    rng_t rng = rng_of(7, 8, 9);

    (void)state;
    for (sum.count = 1; sum.count <= MOST_COUNT; sum.count++) {
        for (int d = 0; d < 3; d++) {
            sum.dtype = dtypes[d];
            sum.num_rows = (int)rng_int(&rng, 0, MOST_ROWS);
            sum.has_weights = rng_one_in(&rng, 2);
            check_sum(&rng);
        }
    }
}

/* ---- reduce in LogFMT-10 ---- */

enum { HEAD = 4 };

static size_t
packed_bytes(size_t count)
{
    size_t blocks = (count + EPX_LOGFMT_BLOCK - 1) / EPX_LOGFMT_BLOCK;

    return blocks * HEAD + count / 8 * 10;
}

/* One block by the drawing of docs/formats.md; returns its end. */
static uint8_t *
pack_block(const uint16_t *x, const uint16_t *codes, size_t length, uint8_t *to)
{
    uint16_t head[2] = { 0, 0 };

    memset(to, 0, packed_bytes(length));
    for (size_t i = 0; i < length; i++) {
        uint16_t magnitude = x[i] & 0x7fff;

        if (isnormal(oracle_from_bf16(magnitude))) {
            head[0] = magnitude > head[0] ? magnitude : head[0];
            head[1] = head[1] == 0 || magnitude < head[1] ? magnitude : head[1];
        }
        to[HEAD + i] = (uint8_t)(codes[i] % 256);
        to[HEAD + length + i / 8] |= (uint8_t)(codes[i] / 256 << i % 8);
        to[HEAD + length / 8 * 9 + i / 8] |= (uint8_t)(x[i] / 32768 << i % 8);
    }
    memcpy(to, head, HEAD);
    return to + packed_bytes(length);
}

static void
pack_row(const uint16_t *x, size_t count, uint8_t *to)
{
    static uint16_t codes[MOST_COUNT];
    static float decoded[MOST_COUNT];

    oracle_logfmt(x, (int64_t)count, codes, decoded);
    for (size_t i = 0; i < count; i += EPX_LOGFMT_BLOCK) {
        size_t left = count - i;

        to = pack_block(x + i, codes + i,
                        left < EPX_LOGFMT_BLOCK ? left : EPX_LOGFMT_BLOCK, to);
    }
}

/* Adds a row, as bf16, to the sums. */
static void
add_logfmt_row(const uint16_t *x, uint8_t kind, float weight, float *sums)
{
    static uint16_t codes[MOST_COUNT];
    static float terms[MOST_COUNT];

    oracle_logfmt(x, (int64_t)sum.count, codes, terms);
    for (size_t i = 0; i < sum.count; i++) {
        float plain = oracle_from_bf16(x[i]);

        sums[i] =
            fmaf(weight, kind == EPX__ROW_PLAIN ? plain : terms[i], sums[i]);
    }
}

/* Rows of random kinds at the end of their rooms, and their sum. */
static void
make_logfmt_rows(rng_t *rng, bool special, const void **rows, uint8_t *kinds,
                 const float *weights, uint16_t *want)
{
    static uint16_t x[MOST_COUNT];
    static float sums[MOST_COUNT];

    memset(sums, 0, sizeof(sums));
    for (int r = 0; r < sum.num_rows; r++) {
        size_t bytes = sum.count * sizeof(*x);

        rng_fill(rng, EPX_BF16, x, (int64_t)sum.count, special);
        kinds[r] = (uint8_t)rng_int(rng, EPX__ROW_PLAIN,
                                    sum.count % 8 == 0 ? EPX__ROW_PACKED
                                                       : EPX__ROW_LOGFMT);
        add_logfmt_row(x, kinds[r], sum.has_weights ? weights[r] : 1.0f, sums);
        if (kinds[r] == EPX__ROW_PACKED) {
            uint8_t *row = output(sum.rows[r], packed_bytes(sum.count));

            pack_row(x, sum.count, row);
            rows[r] = row;
        } else {
            rows[r] = memcpy(output(sum.rows[r], bytes), x, bytes);
        }
    }
    for (size_t i = 0; i < sum.count; i++) {
        want[i] = isnan(sums[i]) ? 0x7fff : oracle_to_bf16(sums[i]);
    }
}

static void
check_logfmt_sum(rng_t *rng)
{
    static uint16_t want[MOST_COUNT];
    static uint8_t packed[2 * MOST_COUNT];
    const void *rows[MOST_ROWS];
    uint8_t kinds[MOST_ROWS];
    size_t bytes = sum.count * sizeof(*want);
    bool special = rng_one_in(rng, 3);
    float *weights =
        output(sum.weights, (size_t)sum.num_rows * sizeof(*weights));
    epx__reduce_t reduce = { .rows = rows,
                             .kinds = kinds,
                             .weights = sum.has_weights ? weights : NULL,
                             .num_rows = sum.num_rows,
                             .count = sum.count };

    rng_fill(rng, EPX_F32, weights, sum.num_rows, special);
    make_logfmt_rows(rng, special, rows, kinds, weights, want);
    reduce.packs = sum.count % 8 == 0 && rng_one_in(rng, 2);
    reduce.streams = !reduce.packs && sum.count % 8 == 0 && rng_one_in(rng, 2);
    if (reduce.packs) {
        bytes = packed_bytes(sum.count);
        pack_row(want, sum.count, packed);
    }
    for (int i = 0; tables[i] != NULL; i++) {
        reduce.out = output(sum.out, bytes);
        tables[i]->reduce_logfmt(&reduce);
        check_same(tables[i]->isa, EPX_BYTES,
                   reduce.packs ? (const void *)packed : want, reduce.out,
                   (int64_t)bytes);
        check_guard(sum.out, bytes);
    }
}

static void
reduces_logfmt_of_any_length(void **state)
{
    rng_t rng = rng_of(10, 11, 12);

    (void)state;
    for (sum.count = 1; sum.count <= MOST_COUNT; sum.count++) {
        sum.num_rows = (int)rng_int(&rng, 0, MOST_ROWS);
        sum.has_weights = rng_one_in(&rng, 2);
        check_logfmt_sum(&rng);
    }
}

/* ---- copy ---- */

static void
check_copy(const epx__kernels_t *kernels, uint8_t *to, const uint8_t *from,
           size_t bytes)
{
    memset(to - GUARD, 0xa5, bytes + 2 * GUARD);
    kernels->copy_stream(to, from, bytes);
    epx__kernels_fence();
    assert_memory_equal(to, from, bytes);
    for (int i = 0; i < GUARD; i++) {
        assert_int_equal(to[-1 - i], 0xa5);
        assert_int_equal(to[bytes + (size_t)i], 0xa5);
    }
}

/* From anywhere to every multiple of 16. */
static void
copies_to_every_alignment(void **state)
{
    _Alignas(64) static uint8_t to[4 * GUARD + 2048];
    room_t room = room_open();
    rng_t rng = rng_of(1, 1, 1);

    (void)state;
    for (size_t bytes = 0; bytes <= 1024; bytes += EPX_ROW_ALIGN) {
        for (size_t align = 0; align < 64; align += EPX_ROW_ALIGN) {
            uint8_t *from =
                (uint8_t *)output(room, bytes + 64) + rng_int(&rng, 0, 64);

            rng_fill(&rng, EPX_BYTES, from, (int64_t)bytes, false);
            for (int i = 0; tables[i] != NULL; i++) {
                check_copy(tables[i], to + GUARD + align, from, bytes);
            }
        }
    }
    room_close(room);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_best_table_is_taken),
        cmocka_unit_test(quantizes_rows_of_any_length),
        cmocka_unit_test_setup_teardown(reduces_every_combination, open_sum,
                                        close_sum),
        cmocka_unit_test_setup_teardown(reduces_rows_of_any_length, open_sum,
                                        close_sum),
        cmocka_unit_test_setup_teardown(reduces_logfmt_of_any_length, open_sum,
                                        close_sum),
        cmocka_unit_test(copies_to_every_alignment),
    };

    return cmocka_run_group_tests(tests, find_tables, NULL);
}
