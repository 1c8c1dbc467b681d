/* SPDX-License-Identifier: MIT */
/*
 * A card is asked for where something for it is missing: every rank gets
 * EPX_ERR_UNSUPPORTED with a sentence that says what.
 *
 *     cuda_refused WORD [ENGINES]
 *
 * WORD is in the sentence; ENGINES is how many engines the library then lists.
 * Exits with 77 where a card can be used.
 */
#include "api_common.h"
#include "conformance/world.h"

#include <stdio.h>
#include <stdlib.h>

enum { RANKS = 3, ASKING = 1, SKIPPED = 77 };

static const char *word;
static size_t num_engines;

static void
run_ranks(world_kind_t kind, world_fn *fn)
{
    char text[4096];

    if (!world_run(kind, RANKS, true, 0, fn, NULL, NULL, text, sizeof(text))) {
        print_error("%s", text);
        fail();
    }
}

/* Makes a group on a device, which must be refused with these words. */
static void
check_refused(world_rank_t *self, epx_device_t device, const char *first,
              const char *second)
{
    epx_group_config_t config = EPX_GROUP_CONFIG_INIT;
    epx_group_t *group = NULL;
    epx_status_t status;

    config.bootstrap = self->bootstrap;
    config.device = device;
    config.heap_bytes = 1 << 20;
    status = epx_group_create(&config, &group);
    if (status != EPX_ERR_UNSUPPORTED || group != NULL ||
        strstr(epx_last_error(), first) == NULL ||
        strstr(epx_last_error(), second) == NULL) {
        world_fail(self, "status %d and '%s', expected %d with '%s' and '%s'",
                   (int)status, epx_last_error(), (int)EPX_ERR_UNSUPPORTED,
                   first, second);
    }
}

static void
all_ask(world_rank_t *self, void *context)
{
    (void)context;
    check_refused(self, EPX_DEVICE_CUDA, word, "EPX_DEVICE_CUDA");
}

/* The others hear whose fault it was. */
static void
one_asks(world_rank_t *self, void *context)
{
    bool asks = self->rank == ASKING;

    (void)context;
    check_refused(self, asks ? EPX_DEVICE_CUDA : EPX_DEVICE_CPU, word,
                  asks ? "EPX_DEVICE_CUDA" : "rank 1 cannot join the group");
}

static void
every_rank_is_told(void **state)
{
    (void)state;
    run_ranks(WORLD_THREAD, all_ask);
    run_ranks(WORLD_SHM, all_ask);
}

static void
one_rank_ends_all(void **state)
{
    (void)state;
    run_ranks(WORLD_THREAD, one_asks);
}

static void
queries_say_the_same(void **state)
{
    epx_library_info_t library = EPX_LIBRARY_INFO_INIT;
    epx_device_info_t device = EPX_DEVICE_INFO_INIT;
    size_t count = 0;

    (void)state;
    REFUSED(epx_device_query(EPX_DEVICE_CUDA, 0, &device), EPX_ERR_UNSUPPORTED,
            word);
    WORKS(epx_library_query(&library));
    while (library.engines[count] != NULL) {
        count++;
    }
    assert_int_equal(count, num_engines);
    assert_string_equal(library.engines[0], "cpu");
    assert_string_equal(library.fabrics[0], "thread");
    assert_string_equal(library.fabrics[1], "shm");
}

static void
cpus_are_there_all_the_same(void **state)
{
    epx_library_info_t library = EPX_LIBRARY_INFO_INIT;
    epx_device_info_t device = EPX_DEVICE_INFO_INIT;

    (void)state;
    WORKS(epx_library_query(&library));
    WORKS(epx_device_query(EPX_DEVICE_CPU, 0, &device));
    assert_int_equal(device.num_devices, 1);
    assert_int_equal(device.num_workers, library.num_cores);
    assert_true(device.memory_bytes > 0);
    assert_string_equal(device.fabrics[0], "thread");
    assert_string_equal(device.fabrics[1], "shm");
    assert_null(device.fabrics[2]);
    REFUSED(epx_device_query(EPX_DEVICE_CPU, 1, &device), EPX_ERR_UNSUPPORTED,
            "1");
    REFUSED(epx_device_query((epx_device_t)9, 0, &device), EPX_ERR_UNSUPPORTED,
            "9");
    REFUSED(epx_device_query(EPX_DEVICE_CPU, 0, NULL), EPX_ERR_NULL, "info");
}

int
main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_rank_is_told),
        cmocka_unit_test(one_rank_ends_all),
        cmocka_unit_test(queries_say_the_same),
        cmocka_unit_test(cpus_are_there_all_the_same),
    };
    epx_device_info_t device = EPX_DEVICE_INFO_INIT;

    if (argc != 3) {
        (void)fprintf(stderr, "usage: cuda_refused WORD ENGINES\n");
        return 2;
    }
    word = argv[1];
    num_engines = strtoul(argv[2], NULL, 10);
    if (epx_device_query(EPX_DEVICE_CUDA, 0, &device) == EPX_OK) {
        (void)printf("there is a card: %s\n", device.name);
        return SKIPPED;
    }
    return cmocka_run_group_tests(tests, NULL, NULL);
}
