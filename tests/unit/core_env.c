/* SPDX-License-Identifier: MIT */
/* Strict reading of numbers from the environment. */
#include "api_common.h"
#include "core/env.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#define NAME "EPX_TEST_NUMBER"

enum { UNTOUCHED = 4711 };

static void
takes_whole_numbers(void **state)
{
    static const struct {
        const char *text;
        uint64_t value;
    } good[] = {
        { "0", 0 },
        { "7", 7 },
        { "007", 7 },
        { "65535", 65535 },
        { "18446744073709551615", UINT64_MAX },
    };

    (void)state;
    for (size_t i = 0; i < sizeof(good) / sizeof(*good); i++) {
        uint64_t value = UNTOUCHED;

        WORKS(epx__parse_uint(NAME, good[i].text, 0, UINT64_MAX, &value));
        assert_int_equal(value, good[i].value);
    }
}

static void
refuses_all_else(void **state)
{
    static const char *const bad[] = {
        "",         " ",
        " 1",       "1 ",
        "1\n",      "\t1",
        "+1",       "-1",
        "-0",       "0x",
        "0x10",     "1e9",
        "1.0",      "1g",
        "1g ",      "one",
        "1,000",    "18446744073709551616",
        "1\x80",    "\xff",
        "\xc2\xb2", "99999999999999999999999999",
    };

    (void)state;
    for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++) {
        uint64_t value = UNTOUCHED;
        char sentence[128];

        (void)snprintf(sentence, sizeof(sentence),
                       NAME " is \"%.40s\"; it must be a whole number from 0 "
                            "to 18446744073709551615",
                       bad[i]);
        REFUSED(epx__parse_uint(NAME, bad[i], 0, UINT64_MAX, &value),
                EPX_ERR_ENVIRONMENT, sentence);
        assert_int_equal(value, UNTOUCHED);
    }
}

static void
keeps_to_the_range(void **state)
{
    uint64_t value = UNTOUCHED;

    (void)state;
    REFUSED(epx__parse_uint(NAME, "9", 10, 20, &value), EPX_ERR_ENVIRONMENT,
            "\"9\"; it must be a whole number from 10 to 20");
    REFUSED(epx__parse_uint(NAME, "21", 10, 20, &value), EPX_ERR_ENVIRONMENT,
            "\"21\"; it must be a whole number from 10 to 20");
    assert_int_equal(value, UNTOUCHED);
    WORKS(epx__parse_uint(NAME, "10", 10, 20, &value));
    assert_int_equal(value, 10);
    WORKS(epx__parse_uint(NAME, "20", 10, 20, &value));
    assert_int_equal(value, 20);
}

/* The sentence must not be filled by what somebody else wrote. */
static void
shortens_long_text(void **state)
{
    char text[4096];
    uint64_t value;

    (void)state;
    memset(text, 'x', sizeof(text));
    text[sizeof(text) - 1] = '\0';
    REFUSED(epx__parse_uint(NAME, text, 1, 2, &value), EPX_ERR_ENVIRONMENT,
            "x\"; it must be a whole number from 1 to 2");
    assert_true(strlen(epx_last_error()) < 128);
}

static void
reads_the_environment(void **state)
{
    (void)state;
    assert_int_equal(unsetenv(NAME), 0);
    assert_null(epx__env_string(NAME));
    assert_int_equal(setenv(NAME, "5", 1), 0);
    assert_string_equal(epx__env_string(NAME), "5");
    assert_int_equal(setenv(NAME, "", 1), 0);
    assert_string_equal(epx__env_string(NAME), "");
    assert_int_equal(unsetenv(NAME), 0);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(takes_whole_numbers),
        cmocka_unit_test(refuses_all_else),
        cmocka_unit_test(keeps_to_the_range),
        cmocka_unit_test(shortens_long_text),
        cmocka_unit_test(reads_the_environment),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
