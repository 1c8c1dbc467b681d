/* SPDX-License-Identifier: MIT */
/* The allocator of a segment, against a model with one entry for each page. */
#include "api_common.h"
#include "conformance/rng.h"
#include "core/heap.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <sys/mman.h>

enum { PAGE = EPX__HEAP_ALIGN, BEGIN = 3 * PAGE, PAGES = 64, ROUNDS = 40000 };

static const uint64_t all_bytes = (uint64_t)PAGES * PAGE;

/* Memory that nobody may touch: the allocator keeps its lists elsewhere. */
static char *base;

static int
open_heap(void **state)
{
    static epx__heap_t heap;

    base = mmap(NULL, BEGIN + all_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS,
                -1, 0);
    if (base == MAP_FAILED) {
        return -1;
    }
    *state = &heap;
    return epx__heap_open(&heap, base, BEGIN, BEGIN + all_bytes);
}

static int
close_heap(void **state)
{
    epx__heap_close(*state);
    return munmap(base, BEGIN + all_bytes);
}

static void
assert_usage(epx__heap_t *heap, uint64_t want_free, uint64_t want_largest)
{
    uint64_t free_bytes, largest;

    epx__heap_usage(heap, &free_bytes, &largest);
    assert_int_equal(free_bytes, want_free);
    assert_int_equal(largest, want_largest);
}

static void
assert_empty(epx__heap_t *heap)
{
    assert_usage(heap, all_bytes, all_bytes);
}

static void *
alloc(epx__heap_t *heap, uint64_t bytes)
{
    void *ptr = NULL;

    WORKS(epx__heap_alloc(heap, bytes, "a test", &ptr));
    return ptr;
}

/* ---- the model ---- */

/* owner[i] is the number of the allocation that holds page i, 0 for none. */
typedef struct model {
    int owner[PAGES];
    int next_owner;
} model_t;

static int
pages_of(const model_t *model, int first)
{
    int end = first;

    while (end < PAGES && model->owner[end] == model->owner[first]) {
        end++;
    }
    return end - first;
}

static void
model_usage(const model_t *model, uint64_t *free_p, uint64_t *largest_p)
{
    *free_p = 0;
    *largest_p = 0;
    for (int i = 0; i < PAGES; i += pages_of(model, i)) {
        uint64_t bytes = (uint64_t)pages_of(model, i) * PAGE;

        if (model->owner[i] == 0) {
            *free_p += bytes;
            *largest_p = bytes > *largest_p ? bytes : *largest_p;
        }
    }
}

static void
try_alloc(epx__heap_t *heap, model_t *model, uint64_t bytes)
{
    uint64_t rounded = bytes == 0 ? PAGE : (bytes + PAGE - 1) / PAGE * PAGE;
    uint64_t free_bytes, largest;
    void *ptr = NULL;
    int first;

    model_usage(model, &free_bytes, &largest);
    if (rounded > largest) {
        REFUSED(epx__heap_alloc(heap, bytes, "a test", &ptr),
                EPX_ERR_HEAP_EXHAUSTED, "for a test");
        assert_null(ptr);
        return;
    }
    ptr = alloc(heap, bytes);
    assert_int_equal((uintptr_t)ptr % PAGE, 0);
    first = (int)(((char *)ptr - base - BEGIN) / PAGE);
    assert_in_range(first, 0, PAGES - 1);
    model->next_owner++;
    for (int i = first; i < first + (int)(rounded / PAGE); i++) {
        assert_in_range(i, 0, PAGES - 1);
        assert_int_equal(model->owner[i], 0);
        model->owner[i] = model->next_owner;
    }
}

static void
free_at(epx__heap_t *heap, model_t *model, int page)
{
    char *ptr = base + BEGIN + (size_t)page * PAGE;
    int owner = model->owner[page];
    bool starts = page == 0 || model->owner[page - 1] != owner;

    if (owner == 0 || !starts) {
        REFUSED(epx__heap_free(heap, ptr), EPX_ERR_INVALID, "not the start");
        return;
    }
    WORKS(epx__heap_free(heap, ptr));
    for (int i = page; i < PAGES && model->owner[i] == owner; i++) {
        model->owner[i] = 0;
    }
}

static void
check_find(epx__heap_t *heap, const model_t *model, uint64_t offset)
{
    uint64_t left = 1;
    int page = (int)(offset / PAGE);
    uint64_t end = ((uint64_t)page + (uint64_t)pages_of(model, page)) * PAGE;

    assert_true(epx__heap_find(heap, base + BEGIN + offset, &left));
    assert_int_equal(left, model->owner[page] == 0 ? 0 : end - offset);
}

static void
agrees_with_model(void **state)
{
    epx__heap_t *heap = *state;
    model_t model = { { 0 }, 0 };
    rng_t rng = rng_of(1, 2, 3);

    for (int round = 0; round < ROUNDS; round++) {
        uint64_t free_bytes, largest;

        if (rng_one_in(&rng, 2)) {
            /* mostly small, now and then nearly everything */
            int64_t most = rng_one_in(&rng, 8) ? PAGES + 1 : 6;

            try_alloc(heap, &model, (uint64_t)rng_int(&rng, 0, most * PAGE));
        } else {
            free_at(heap, &model, (int)rng_int(&rng, 0, PAGES - 1));
        }
        model_usage(&model, &free_bytes, &largest);
        assert_usage(heap, free_bytes, largest);
        check_find(heap, &model,
                   (uint64_t)rng_int(&rng, 0, (int64_t)all_bytes - 1));
    }
    for (int page = 0; page < PAGES; page++) {
        if (model.owner[page] != 0) {
            free_at(heap, &model, page);
        }
    }
    assert_empty(heap);
}

/* ---- by hand ---- */

static void
merges_neighbours_in_every_order(void **state)
{
    static const int orders[6][3] = { { 0, 1, 2 }, { 0, 2, 1 }, { 1, 0, 2 },
                                      { 1, 2, 0 }, { 2, 0, 1 }, { 2, 1, 0 } };
    epx__heap_t *heap = *state;

    for (int i = 0; i < 6; i++) {
        void *blocks[3];

        for (int b = 0; b < 3; b++) {
            blocks[b] = alloc(heap, PAGE);
        }
        for (int b = 0; b < 3; b++) {
            WORKS(epx__heap_free(heap, blocks[orders[i][b]]));
        }
        assert_empty(heap);
    }
}

/* 3 of 64 pages are used, and leave holes of 20 and 41 pages. */
static void
exhaustion_says_how_much_is_left(void **state)
{
    epx__heap_t *heap = *state;
    void *first = alloc(heap, PAGE);
    void *hole = alloc(heap, 20 * PAGE);
    void *second = alloc(heap, 2 * PAGE);
    void *ptr = NULL;
    char sentence[256];

    WORKS(epx__heap_free(heap, hole));
    (void)snprintf(sentence, sizeof(sentence),
                   "the heap has no %d bytes in one piece for recv_x; of %d "
                   "bytes %d are free, the largest piece has %d",
                   42 * PAGE, PAGES * PAGE, 61 * PAGE, 41 * PAGE);
    REFUSED(epx__heap_alloc(heap, 42 * PAGE, "recv_x", &ptr),
            EPX_ERR_HEAP_EXHAUSTED, sentence);
    WORKS(epx__heap_free(heap, first));
    WORKS(epx__heap_free(heap, second));
    assert_empty(heap);
}

static void
sizes_at_the_ends(void **state)
{
    static const uint64_t too_large[] = {
        UINT64_MAX,
        UINT64_MAX - 1,
        UINT64_MAX - PAGE + 1,
        UINT64_MAX - PAGE,
        UINT64_C(1) << 63,
        UINT64_C(1) << 32,
        PAGES * (uint64_t)PAGE + 1,
    };
    epx__heap_t *heap = *state;
    void *ptr = NULL;
    void *next;

    for (size_t i = 0; i < sizeof(too_large) / sizeof(*too_large); i++) {
        char digits[24];

        (void)snprintf(digits, sizeof(digits), "%" PRIu64, too_large[i]);
        REFUSED(epx__heap_alloc(heap, too_large[i], "a test", &ptr),
                EPX_ERR_HEAP_EXHAUSTED, digits);
        assert_null(ptr);
        assert_empty(heap);
    }
    ptr = alloc(heap, 0);
    next = alloc(heap, 1);
    assert_ptr_not_equal(ptr, next);
    assert_usage(heap, all_bytes - 2 * PAGE, all_bytes - 2 * PAGE);
    WORKS(epx__heap_free(heap, ptr));
    WORKS(epx__heap_free(heap, next));
    ptr = alloc(heap, all_bytes);
    assert_usage(heap, 0, 0);
    WORKS(epx__heap_free(heap, ptr));
    assert_empty(heap);
}

static void
refuses_pointers_that_it_did_not_give(void **state)
{
    epx__heap_t *heap = *state;
    char *ptr = alloc(heap, 2 * PAGE);
    int local = 0;
    void *foreign[] = {
        NULL,       &local, base, base + BEGIN - 1, base + BEGIN + all_bytes,
        base - PAGE
    };

    for (size_t i = 0; i < sizeof(foreign) / sizeof(*foreign); i++) {
        REFUSED(epx__heap_free(heap, foreign[i]), EPX_ERR_WRONG_GROUP,
                "not memory of this group");
    }
    REFUSED(epx__heap_free(heap, ptr + 1), EPX_ERR_INVALID, "not the start");
    REFUSED(epx__heap_free(heap, ptr + PAGE), EPX_ERR_INVALID, "not the start");
    REFUSED(epx__heap_free(heap, ptr + 2 * PAGE), EPX_ERR_INVALID,
            "not the start");
    WORKS(epx__heap_free(heap, ptr));
    REFUSED(epx__heap_free(heap, ptr), EPX_ERR_INVALID, "freed already");
    assert_empty(heap);
}

static void
finds_what_a_block_holds(void **state)
{
    epx__heap_t *heap = *state;
    char *last = base + BEGIN + all_bytes - 1;
    char *ptr = alloc(heap, PAGE + 1);
    int local = 0;
    uint64_t left;

    assert_true(epx__heap_find(heap, ptr, &left));
    assert_int_equal(left, 2 * PAGE);
    assert_true(epx__heap_find(heap, ptr + 2 * PAGE - 1, &left));
    assert_int_equal(left, 1);
    assert_true(epx__heap_find(heap, ptr + 2 * PAGE, &left));
    assert_int_equal(left, 0);
    assert_true(epx__heap_find(heap, last, &left));
    assert_int_equal(left, 0);

    assert_false(epx__heap_find(heap, base + BEGIN - 1, &left));
    assert_false(epx__heap_find(heap, last + 1, &left));
    assert_false(epx__heap_find(heap, &local, &left));
    assert_false(epx__heap_find(heap, NULL, &left));
    assert_int_equal(left, 0);
    WORKS(epx__heap_free(heap, ptr));
}

/* ---- threads ---- */

typedef struct user {
    pthread_t thread;
    epx__heap_t *heap;
    uint64_t seed;
    int *owners; /* [PAGES], shared */
    int failures;
} user_t;

/* Marks or unmarks its pages; a page that is another's already is a failure. */
static void
mark(user_t *user, const void *ptr, int pages, int from, int to)
{
    int first = (int)(((const char *)ptr - base - BEGIN) / PAGE);

    for (int i = first; i < first + pages; i++) {
        user->failures +=
            __atomic_exchange_n(&user->owners[i], to, __ATOMIC_RELAXED) != from;
    }
}

static void *
use_heap(void *arg)
{
    user_t *user = arg;
    rng_t rng = rng_of(user->seed, 4, 5);
    int self = (int)user->seed;

    for (int i = 0; i < 2000; i++) {
        int pages = (int)rng_int(&rng, 1, 8);
        void *ptr;

        if (epx__heap_alloc(user->heap, (uint64_t)pages * PAGE, "", &ptr) !=
            EPX_OK) {
            user->failures++;
            continue;
        }
        mark(user, ptr, pages, 0, self);
        mark(user, ptr, pages, self, 0);
        user->failures += epx__heap_free(user->heap, ptr) != EPX_OK;
    }
    return NULL;
}

static void
serves_threads(void **state)
{
    epx__heap_t *heap = *state;
    int owners[PAGES] = { 0 };
    user_t users[4];

    for (int i = 0; i < 4; i++) {
        users[i] =
            (user_t){ .heap = heap, .seed = (uint64_t)i + 1, .owners = owners };
        assert_int_equal(
            pthread_create(&users[i].thread, NULL, use_heap, &users[i]), 0);
    }
    for (int i = 0; i < 4; i++) {
        assert_int_equal(pthread_join(users[i].thread, NULL), 0);
        assert_int_equal(users[i].failures, 0);
    }
    assert_empty(heap);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, open_heap, close_heap)

int
main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(agrees_with_model),
        TEST(merges_neighbours_in_every_order),
        TEST(exhaustion_says_how_much_is_left),
        TEST(sizes_at_the_ends),
        TEST(refuses_pointers_that_it_did_not_give),
        TEST(finds_what_a_block_holds),
        TEST(serves_threads),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
