/* SPDX-License-Identifier: MIT */
/* The sizes of argument structs: callers older, newer, and mistaken. */
#include "api_common.h"
#include <stddef.h>
#include <stdio.h>

enum { HIDDEN = 8, ROWS = 8, MORE = 24, ABSURD = 1 << 20 };

/* A struct as a newer caller would pass it: with room behind. */
#define NEWER(type)               \
    struct {                      \
        type known;               \
        unsigned char more[MORE]; \
    }

typedef struct fixture {
    epx_group_t *group;
    epx_plan_t *plan;
    uint16_t x[ROWS * HIDDEN];
    uint16_t recv[ROWS * HIDDEN];
} fixture_t;

static void
fixture_open(fixture_t *f)
{
    epx_plan_args_t args = api_plan_args(EPX_LAYOUT_RANK_MAJOR);

    memset(f, 0, sizeof(*f));
    f->group = api_group_of_one(1 << 20);
    WORKS(epx_plan_create(f->group, &args, NULL, &f->plan));
}

static void
fixture_close(fixture_t *f)
{
    WORKS(epx_plan_destroy(f->plan));
    WORKS(epx_group_destroy(f->group));
}

/* One call with a struct of each wrong size (the oldest version had `oldest`
 * bytes), then of a newer version: refused only if it sets what this version
 * does not have.  `call` uses args. */
#define CHECK_INPUT(type, init, oldest, call)                   \
    do {                                                        \
        NEWER(type) newer = { init, { 0 } };                    \
        type *args = &newer.known;                              \
        char size[24];                                          \
                                                                \
        snprintf(size, sizeof(size), "%zu", (oldest) - 8);      \
        args->size = 0;                                         \
        REFUSED(call, EPX_ERR_INVALID, "size is 0");            \
        args->size = (oldest) - 8;                              \
        REFUSED(call, EPX_ERR_INVALID, size);                   \
        args->size = ABSURD;                                    \
        REFUSED(call, EPX_ERR_INVALID, "1048576");              \
        args->size = SIZE_MAX;                                  \
        REFUSED(call, EPX_ERR_INVALID, "18446744073709551615"); \
        args->size = sizeof(newer);                             \
        newer.more[MORE - 1] = 1;                               \
        REFUSED(call, EPX_ERR_UNSUPPORTED, "byte");             \
        newer.more[MORE - 1] = 0;                               \
        WORKS(call);                                            \
    } while (0)

static void
group_config(void **state)
{
    epx_group_config_t good = EPX_GROUP_CONFIG_INIT;
    epx_bootstrap_t *bootstrap;
    epx_group_t *group;

    (void)state;
    WORKS(epx_bootstrap_threads_create(1, &bootstrap));
    good.bootstrap = bootstrap;
    good.heap_bytes = 1 << 20;
    CHECK_INPUT(epx_group_config_t, good, sizeof(good),
                epx_group_create(args, &group));
    WORKS(epx_group_destroy(group));
    epx_bootstrap_destroy(bootstrap);
}

static void
plan_args(void **state)
{
    epx_plan_args_t good = api_plan_args(EPX_LAYOUT_EXPERT_MAJOR);
    epx_plan_t *plan;
    fixture_t f;

    (void)state;
    fixture_open(&f);
    CHECK_INPUT(epx_plan_args_t, good, sizeof(good),
                epx_plan_create(f.group, args, NULL, &plan));
    WORKS(epx_plan_destroy(plan));
    fixture_close(&f);
}

static void
dispatch_args(void **state)
{
    epx_dispatch_args_t good = EPX_DISPATCH_ARGS_INIT;
    fixture_t f;

    (void)state;
    fixture_open(&f);
    good.x = f.x;
    good.hidden = HIDDEN;
    good.dtype = EPX_BF16;
    good.recv_x = f.recv;
    good.recv_rows = ROWS;
    CHECK_INPUT(epx_dispatch_args_t, good, sizeof(good),
                epx_dispatch(f.plan, args, NULL));
    fixture_close(&f);
}

static void
combine_args(void **state)
{
    epx_combine_args_t good = EPX_COMBINE_ARGS_INIT;
    fixture_t f;

    (void)state;
    fixture_open(&f);
    good.x = f.recv;
    good.num_rows = ROWS;
    good.hidden = HIDDEN;
    good.dtype = EPX_BF16;
    good.out = f.x;
    CHECK_INPUT(epx_combine_args_t, good,
                offsetof(epx_combine_args_t, quantize),
                epx_combine(f.plan, args, NULL));
    good.size = offsetof(epx_combine_args_t, quantize);
    good.quantize = (epx_quantize_t)77; /* beyond the struct */
    WORKS(epx_combine(f.plan, &good, NULL));
    fixture_close(&f);
}

/* What EPX fills in: a newer caller's extra fields are left alone, and so is
 * the size. */
#define CHECK_OUTPUT(type, init, call)               \
    do {                                             \
        NEWER(type) newer = { init, { 0 } };         \
        type *out = &newer.known;                    \
                                                     \
        memset(newer.more, 0x77, MORE);              \
        out->size = 0;                               \
        REFUSED(call, EPX_ERR_INVALID, "size is 0"); \
        out->size = ABSURD;                          \
        REFUSED(call, EPX_ERR_INVALID, "1048576");   \
        out->size = sizeof(newer);                   \
        WORKS(call);                                 \
        assert_int_equal(out->size, sizeof(newer));  \
        for (int i = 0; i < MORE; i++) {             \
            assert_int_equal(newer.more[i], 0x77);   \
        }                                            \
    } while (0)

static void
what_is_filled_in(void **state)
{
    epx_group_info_t group_info = EPX_GROUP_INFO_INIT;
    epx_library_info_t library_info = EPX_LIBRARY_INFO_INIT;
    epx_plan_counts_t counts = EPX_PLAN_COUNTS_INIT;
    fixture_t f;

    (void)state;
    fixture_open(&f);
    REFUSED(epx_library_query(NULL), EPX_ERR_NULL, "info");
    CHECK_OUTPUT(epx_group_info_t, group_info, epx_group_query(f.group, out));
    CHECK_OUTPUT(epx_library_info_t, library_info, epx_library_query(out));
    CHECK_OUTPUT(epx_plan_counts_t, counts, epx_plan_counts(f.plan, out));
    fixture_close(&f);
}

static void
library_info(void **state)
{
    epx_library_info_t info = EPX_LIBRARY_INFO_INIT;
    char version[32];
    int thread = 0;
    int shm = 0;

    (void)state;
    WORKS(epx_library_query(&info));
    snprintf(version, sizeof(version), "%d.%d.%d", EPX_VERSION_MAJOR,
             EPX_VERSION_MINOR, EPX_VERSION_PATCH);
    assert_string_equal(info.version, version);
    assert_string_equal(info.engines[0], "cpu");
    for (int i = 0; info.fabrics[i]; i++) {
        thread += strcmp(info.fabrics[i], "thread") == 0;
        shm += strcmp(info.fabrics[i], "shm") == 0;
    }
    assert_int_equal(thread, 1);
    assert_int_equal(shm, 1);
    assert_non_null(info.cpu_isa);
    assert_true(info.num_cores >= 1);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(group_config),      cmocka_unit_test(plan_args),
        cmocka_unit_test(dispatch_args),     cmocka_unit_test(combine_args),
        cmocka_unit_test(what_is_filled_in), cmocka_unit_test(library_info),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
