/* SPDX-License-Identifier: MIT */
/* The map of the control region: nothing overlaps, nothing leaves its region.
 */
#include "api_common.h"
#include "core/control.h"

#include <stdlib.h>
#include <sys/mman.h>

/* A thing in the control region. */
typedef struct span {
    size_t offset;
    size_t bytes;
} span_t;

typedef struct spans {
    char *segment;
    span_t *all;
    size_t count;
} spans_t;

static const uint32_t ranks[] = { 1, 2, 3, 7, 8, 63, 64, 1024 };
static const uint32_t experts[] = { 1, 2, 13, 256, 1024, 1 << 16 };

enum {
    NUM_RANKS = sizeof(ranks) / sizeof(*ranks),
    NUM_EXPERTS = sizeof(experts) / sizeof(*experts)
};

static void
for_each_map(void (*check)(const epx__map_t *map))
{
    for (int r = 0; r < NUM_RANKS; r++) {
        for (int e = 0; e < NUM_EXPERTS; e++) {
            epx__map_t map = epx__map_make(ranks[r], experts[e]);

            check(&map);
        }
    }
}

/* ---- the regions ---- */

static void
check_regions(const epx__map_t *map)
{
    size_t slot_ranks = (size_t)EPX__NUM_SLOTS * map->num_ranks;
    size_t gates = EPX__NUM_SLOTS * EPX__NUM_GATES * sizeof(epx__gate_line_t);
    size_t arrivals = slot_ranks * EPX__NUM_GATES * sizeof(epx__arrival_line_t);
    size_t row = sizeof(epx__count_row_t) +
                 sizeof(uint32_t) * ((size_t)map->num_ranks + map->max_experts);

    assert_true(map->gates >= sizeof(epx__segment_header_t));
    assert_true(map->arrivals >= map->gates + gates);
    assert_true(map->posts >= map->arrivals + arrivals);
    assert_true(map->counts >= map->posts + slot_ranks * sizeof(epx__post_t));
    assert_true(map->heap >= map->counts + slot_ranks * map->count_row_bytes);
    assert_true(map->count_row_bytes >= row);
    assert_int_equal(map->gates % EPX__LINE, 0);
    assert_int_equal(map->arrivals % EPX__LINE, 0);
    assert_int_equal(map->posts % EPX__LINE, 0);
    assert_int_equal(map->counts % EPX__LINE, 0);
    assert_int_equal(map->count_row_bytes % EPX__LINE, 0);
    assert_int_equal(map->heap % EPX__PAGE, 0);
}

static void
regions_follow_each_other(void **state)
{
    epx__map_t largest = epx__map_make(EPX_MAX_RANKS, 1 << 20);

    (void)state;
    for_each_map(check_regions);
    check_regions(&largest);
}

static void
lines_are_lines(void **state)
{
    (void)state;
    assert_int_equal(sizeof(epx__gate_line_t), EPX__LINE);
    assert_int_equal(sizeof(epx__arrival_line_t), EPX__LINE);
}

/* ---- what is in them ---- */

static void
add(spans_t *spans, const void *at, size_t bytes, size_t align, size_t begin,
    size_t end)
{
    size_t offset = (size_t)((const char *)at - spans->segment);

    assert_int_equal(offset % align, 0);
    assert_true(offset >= begin);
    assert_true(offset + bytes <= end);
    spans->all[spans->count++] = (span_t){ offset, bytes };
}

static void
add_source(spans_t *spans, const epx__map_t *map, uint64_t step, uint32_t r)
{
    for (int gate = 0; gate < EPX__NUM_GATES; gate++) {
        add(spans,
            epx__map_arrival(map, spans->segment, step, (epx__gate_t)gate, r),
            EPX__LINE, EPX__LINE, map->arrivals, map->posts);
    }
    add(spans, epx__map_post(map, spans->segment, step, r), sizeof(epx__post_t),
        _Alignof(epx__post_t), map->posts, map->counts);
    add(spans, epx__map_counts(map, spans->segment, step, r),
        map->count_row_bytes, EPX__LINE, map->counts, map->heap);
}

static void
add_slot(spans_t *spans, const epx__map_t *map, uint64_t step)
{
    for (int gate = 0; gate < EPX__NUM_GATES; gate++) {
        add(spans, epx__map_gate(map, spans->segment, step, (epx__gate_t)gate),
            EPX__LINE, EPX__LINE, map->gates, map->arrivals);
    }
    for (uint32_t r = 0; r < map->num_ranks; r++) {
        add_source(spans, map, step, r);
    }
}

static int
by_offset(const void *a, const void *b)
{
    size_t x = ((const span_t *)a)->offset;
    size_t y = ((const span_t *)b)->offset;

    return x < y ? -1 : x > y;
}

static void
check_accessors(const epx__map_t *map)
{
    size_t most =
        EPX__NUM_SLOTS *
        (EPX__NUM_GATES + (EPX__NUM_GATES + 2) * (size_t)map->num_ranks);
    spans_t spans = { .all = calloc(most, sizeof(span_t)) };

    assert_non_null(spans.all);
    /* Addresses alone: nothing is read or written. */
    spans.segment = mmap(NULL, map->heap, PROT_NONE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    assert_ptr_not_equal(spans.segment, MAP_FAILED);
    for (uint64_t step = 1; step <= EPX__NUM_SLOTS; step++) {
        add_slot(&spans, map, step);
    }
    assert_int_equal(spans.count, most);
    qsort(spans.all, spans.count, sizeof(span_t), by_offset);
    for (size_t i = 1; i < spans.count; i++) {
        const span_t *before = &spans.all[i - 1];

        assert_true(before->offset + before->bytes <= spans.all[i].offset);
    }
    assert_int_equal(munmap(spans.segment, map->heap), 0);
    free(spans.all);
}

static void
nothing_overlaps(void **state)
{
    (void)state;
    for_each_map(check_accessors);
}

/* Steps that are open at one time have slots of their own; a slot serves the
 * step 16 later, also where the number is as large as it can be. */
static void
slots_come_round(void **state)
{
    static const uint64_t starts[] = { 1, 17, 1000003, UINT64_MAX - 32 };
    epx__map_t map = epx__map_make(3, 8);
    char *segment = aligned_alloc(EPX__PAGE, map.heap);

    (void)state;
    assert_non_null(segment);
    for (size_t i = 0; i < sizeof(starts) / sizeof(*starts); i++) {
        for (uint64_t d = 1; d <= EPX__NUM_SLOTS; d++) {
            const void *first = epx__map_post(&map, segment, starts[i], 2);
            const void *later = epx__map_post(&map, segment, starts[i] + d, 2);

            assert_int_equal(first == later, d == EPX__NUM_SLOTS);
        }
    }
    free(segment);
}

/* A row's two arrays lie behind its head, without a gap, within the row. */
static void
count_row_holds_its_arrays(void **state)
{
    epx__map_t map = epx__map_make(5, 11);
    epx__count_row_t *row = calloc(1, map.count_row_bytes);
    uint32_t *tokens = epx__count_row_tokens(row);
    uint32_t *rows = epx__count_row_experts(row, 5);

    (void)state;
    assert_ptr_equal(tokens, row + 1);
    assert_ptr_equal(rows, tokens + 5);
    assert_true((char *)(rows + 11) <= (char *)row + map.count_row_bytes);
    free(row);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(regions_follow_each_other),
        cmocka_unit_test(lines_are_lines),
        cmocka_unit_test(nothing_overlaps),
        cmocka_unit_test(slots_come_round),
        cmocka_unit_test(count_row_holds_its_arrays),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
