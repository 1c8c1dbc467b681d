/* SPDX-License-Identifier: MIT */
/* Recorded routings: what is read and what is refused. */
#include "routing_csv.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

#define HEAD1 "expert0,weight0\n"
#define HEAD2 "expert0,expert1,weight0,weight1\n"

static void
refused(const char *text, const char *part)
{
    struct routing_table table;
    struct bench_error error = { "" };
    if (routing_csv_parse(text, strlen(text), 60, &table, &error)) {
        fail_msg("'%s' is accepted", text);
    }
    if (!strstr(error.text, part)) {
        fail_msg("'%s' is refused with '%s', without '%s'", text, error.text,
                 part);
    }
    assert_null(table.experts);
    assert_null(table.weights);
}

static void
test_table(void **state)
{
    static const char text[] =
        "# a comment\n# another\n" HEAD2 "13,15,0.5,0.25\r\n-1,59,1e-3,-2.";
    struct routing_table table;
    struct bench_error error = { "" };
    (void)state;
    if (!routing_csv_parse(text, strlen(text), 60, &table, &error)) {
        fail_msg("%s", error.text);
    }
    assert_int_equal(table.topk, 2);
    assert_int_equal(table.num_tokens, 2);
    const int64_t experts[] = { 13, 15, -1, 59 };
    const float weights[] = { 0.5f, 0.25f, 1e-3f, -2.0f };
    for (int i = 0; i < 4; i++) {
        assert_int_equal(table.experts[i], experts[i]);
        assert_float_equal(table.weights[i], weights[i], 0);
    }
    routing_table_release(&table);
    assert_null(table.experts);
}

static void
test_refused(void **state)
{
    (void)state;
    refused("", "no line of columns");
    refused("# only this", "no line of columns");
    refused(HEAD1, "line 1: no token");
    refused("weight0,expert0\n1,1\n", "line 1: the columns");
    refused("expert0\n1\n", "line 1: the columns");
    refused("expert1,weight1\n1,1\n", "line 1: the columns");
    refused("# c\n" HEAD1 "60,1\n", "line 3: the expert is '60'; allowed: -1 "
                                    "to 59");
    refused(HEAD1 "-2,1\n", "'-2'");
    refused(HEAD1 "+1,1\n", "'+1'");
    refused(HEAD1 "1.0,1\n", "'1.0'");
    refused(HEAD1 ",1\n", "''");
    refused(HEAD1 "18446744073709551617,1\n", "the expert");
    refused(HEAD1 "1,1e99\n", "'1e99'; allowed: a finite");
    refused(HEAD1 "1,nan\n", "'nan'");
    refused(HEAD1 "1,0x1p3\n", "'0x1p3'");
    refused(HEAD1 "1, 1\n", "' 1'");
    refused(HEAD1 "1,\n", "''");
    refused(HEAD1 "1\n", "line 2 has 1 columns; the header has 2");
    refused(HEAD1 "1,1,1\n", "line 2 has 3 columns");
    refused(HEAD1 "1,1\n\n", "line 3");
    refused(HEAD2 "7,7,1,1\n", "line 2: expert 7 stands there twice");
}

static void
test_no_end_needed(void **state)
{
    /* Nothing behind the given bytes is looked at. */
    static const char text[] = HEAD1 "5,1" /* here it ends */ "9,2\n";
    struct routing_table table;
    struct bench_error error = { "" };
    (void)state;
    assert_true(routing_csv_parse(text, strlen(HEAD1) + 3, 60, &table, &error));
    assert_int_equal(table.num_tokens, 1);
    assert_float_equal(table.weights[0], 1.0f, 0);
    routing_table_release(&table);
}

static void
test_files(void **state)
{
    struct routing_table table;
    struct bench_error error = { "" };
    (void)state;
    assert_false(routing_csv_read("/nonexistent/x.csv", 60, &table, &error));
    assert_non_null(strstr(error.text, "/nonexistent/x.csv: No such file"));
    assert_false(routing_csv_read("/proc", 60, &table, &error));
    assert_null(table.experts);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_table),
        cmocka_unit_test(test_refused),
        cmocka_unit_test(test_no_end_needed),
        cmocka_unit_test(test_files),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
