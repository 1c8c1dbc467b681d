/* SPDX-License-Identifier: MIT */
/* How sentences name ranks. */
#include "api_common.h"
#include "core/rank_list.h"

#include <stdlib.h>

/* The ranks that a list of numbers, which ends with -1, holds. */
static bool
is_in(const void *context, int32_t rank)
{
    for (const int32_t *at = context; *at >= 0; at++) {
        if (*at == rank) {
            return true;
        }
    }
    return false;
}

static bool
is_any(const void *context, int32_t rank)
{
    (void)context;
    return rank >= 0;
}

static void
check(int32_t num_ranks, const int32_t *listed, const char *text)
{
    epx__rank_list_t list = epx__rank_list_make(num_ranks, is_in, listed);

    assert_string_equal(list.text, text);
}

static void
names_each(void **state)
{
    (void)state;
    check(4, (const int32_t[]){ -1 }, "no rank");
    check(4, (const int32_t[]){ 3, -1 }, "rank 3");
    check(4, (const int32_t[]){ 0, 3, -1 }, "ranks 0 and 3");
    check(8, (const int32_t[]){ 7, 2, 5, -1 }, "ranks 2, 5 and 7");
    check(1024, (const int32_t[]){ 1023, -1 }, "rank 1023");
    /* not ranks of this group */
    check(4, (const int32_t[]){ 4, 100, -1 }, "no rank");
    check(0, (const int32_t[]){ 0, -1 }, "no rank");
}

static void
shortens_what_is_long(void **state)
{
    epx__rank_list_t list;

    (void)state;
    list = epx__rank_list_make(12, is_any, NULL);
    assert_string_equal(list.text,
                        "ranks 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 11");
    list = epx__rank_list_make(13, is_any, NULL);
    assert_string_equal(
        list.text, "ranks 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 1 more");
    list = epx__rank_list_make(1024, is_any, NULL);
    assert_string_equal(
        list.text, "ranks 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 1012 more");
}

/* The widest numbers fit. */
static void
is_never_cut(void **state)
{
    int32_t wide[15];
    epx__rank_list_t list;

    (void)state;
    for (int i = 0; i < 14; i++) {
        wide[i] = 1010 + i;
    }
    wide[14] = -1;
    list = epx__rank_list_make(1024, is_in, wide);
    assert_string_equal(list.text,
                        "ranks 1010, 1011, 1012, 1013, 1014, 1015, 1016, 1017, "
                        "1018, 1019, 1020, 1021 and 2 more");
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(names_each),
        cmocka_unit_test(shortens_what_is_long),
        cmocka_unit_test(is_never_cut),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
