/* SPDX-License-Identifier: MIT */
/* Which fabric joins ranks, from what they tell about their places; those of
 * the engine that the first argument names: cpu or cuda. */
#include "api_common.h"
#include "engine/engine.h"

#include <stdio.h>

enum { RANKS = 3, ALL_KINDS = 0xf, SKIPPED = 77 };

static const epx__engine_ops_t *engine;

/* Ranks of one process, on a device that offers everything. */
static void
make_places(epx__fabric_place_t *places)
{
    memset(places, 0, RANKS * sizeof(*places));
    for (int r = 0; r < RANKS; r++) {
        places[r].host[0] = 1;
        places[r].net_ns = 2;
        places[r].process[0] = 3;
        places[r].device.memory_kinds = ALL_KINDS;
    }
}

static void
check_choice(const epx__fabric_place_t *places, int32_t num_ranks,
             const char *name)
{
    const epx__fabric_ops_t *fabric = NULL;
    const int32_t one_node[RANKS] = { 0 };

    WORKS(epx__fabric_choose(engine->fabrics, places, one_node, num_ranks,
                             &fabric));
    assert_string_equal(fabric->name, name);
}

static void
check_refusal(const epx__fabric_place_t *places, const char *word)
{
    const epx__fabric_ops_t *fabric = NULL;
    const int32_t one_node[RANKS] = { 0 };

    REFUSED(
        epx__fabric_choose(engine->fabrics, places, one_node, RANKS, &fabric),
        EPX_ERR_UNSUPPORTED, word);
    assert_null(fabric);
}

/* The nodes of RANKS ranks, and the fabric inside them. */
static void
check_nodes(const epx__fabric_place_t *places, int32_t a, int32_t b, int32_t c,
            const char *name)
{
    const epx__fabric_ops_t *fabric = NULL;
    int32_t node_of[RANKS];

    epx__fabric_nodes(engine->fabrics, places, RANKS, node_of);
    assert_int_equal(node_of[0], a);
    assert_int_equal(node_of[1], b);
    assert_int_equal(node_of[2], c);
    WORKS(epx__fabric_choose(engine->fabrics, places, node_of, RANKS, &fabric));
    assert_string_equal(fabric->name, name);
}

static void
set_kinds(epx__fabric_place_t *places, uint32_t kinds)
{
    for (int r = 0; r < RANKS; r++) {
        places[r].device.memory_kinds = kinds;
    }
}

static void
use_processes(epx__fabric_place_t *places)
{
    for (int r = 0; r < RANKS; r++) {
        places[r].process[1] = (uint64_t)r;
    }
}

/* ---- CPUs ---- */

static void
cpu_threads(void **state)
{
    epx__fabric_place_t places[RANKS];

    (void)state;
    make_places(places);
    check_choice(places, RANKS, "thread");
    places[2].device.cores.words[0] = 1; /* devices make no difference */
    check_choice(places, RANKS, "thread");
}

static void
cpu_processes(void **state)
{
    epx__fabric_place_t places[RANKS];

    (void)state;
    make_places(places);
    use_processes(places);
    check_choice(places, RANKS, "shm");
    check_choice(places, 1, "thread");
    /* Only the last two are apart. */
    make_places(places);
    places[2].process[1] = 1;
    check_choice(places, 2, "thread");
    check_choice(places, RANKS, "shm");
}

static void
cpu_hosts(void **state)
{
    epx__fabric_place_t places[RANKS];

    (void)state;
    make_places(places);
    places[2].host[1] = 1;
    check_refusal(places, "thread: ranks 0 and 2 are in different processes; "
                          "shm: ranks 0 and 2 are on different hosts");
    make_places(places);
    places[1].net_ns = 9;
    check_refusal(places, "shm: ranks 0 and 1 are on one host but in different "
                          "network namespaces");
}

static void
cpu_nodes(void **state)
{
    epx__fabric_place_t places[RANKS];

    (void)state;
    make_places(places);
    check_nodes(places, 0, 0, 0, "thread");
    places[1].node = 1;
    check_nodes(places, 0, 1, 0, "thread");
    use_processes(places);
    check_nodes(places, 0, 1, 0, "shm");
    make_places(places);
    use_processes(places);
    places[2].host[1] = 1;
    check_nodes(places, 0, 0, 1, "shm");
    places[0].net_ns = 9;
    check_nodes(places, 0, 1, 2, "thread");
}

/* ---- cards ---- */

static void
cuda_threads(void **state)
{
    epx__fabric_place_t places[RANKS];

    (void)state;
    make_places(places);
    check_choice(places, RANKS, "cuda_thread");
    /* As EPX_CUDA_FABRIC leaves it. */
    set_kinds(places, EPX__MEMORY_POSIX_FD);
    check_choice(places, RANKS, "cuda_vmm");
    set_kinds(places, EPX__MEMORY_FABRIC);
    check_choice(places, RANKS, "cuda_fabric");
    set_kinds(places, EPX__MEMORY_IPC);
    check_refusal(places, "cuda_ipc: ranks 0 and 1 are in one process");
}

static void
cuda_processes(void **state)
{
    epx__fabric_place_t places[RANKS];

    (void)state;
    make_places(places);
    use_processes(places);
    check_choice(places, RANKS, "cuda_vmm");
    places[1].device.memory_kinds &= ~EPX__MEMORY_POSIX_FD;
    check_choice(places, RANKS, "cuda_ipc");
    places[2].device.memory_kinds &= ~EPX__MEMORY_IPC;
    check_choice(places, RANKS, "cuda_fabric");
    places[0].device.memory_kinds &= ~EPX__MEMORY_FABRIC;
    check_refusal(places, "cuda_fabric: ranks 0 and 1 do not both");
    /* Two of them in one process cannot open each other's handles. */
    make_places(places);
    places[2].process[1] = 1;
    set_kinds(places, EPX__MEMORY_IPC);
    check_refusal(places, "cuda_ipc: ranks 0 and 1 are in one process");
}

static void
cuda_hosts(void **state)
{
    epx__fabric_place_t places[RANKS];

    (void)state;
    make_places(places);
    places[1].host[0] = 7;
    check_choice(places, RANKS, "cuda_fabric");
    set_kinds(places, ALL_KINDS & ~EPX__MEMORY_FABRIC);
    check_refusal(places, "cuda_vmm: ranks 0 and 1 are on different hosts; "
                          "cuda_ipc: ranks 0 and 1 are on different hosts; "
                          "cuda_fabric: ranks 0 and 1 do not both");
    /* Containers of one host. */
    make_places(places);
    use_processes(places);
    places[1].net_ns = 9;
    check_choice(places, RANKS, "cuda_ipc");
}

int
main(int argc, char **argv)
{
    const struct CMUnitTest cpu_tests[] = {
        cmocka_unit_test(cpu_threads),
        cmocka_unit_test(cpu_processes),
        cmocka_unit_test(cpu_hosts),
        cmocka_unit_test(cpu_nodes),
    };
    const struct CMUnitTest cuda_tests[] = {
        cmocka_unit_test(cuda_threads),
        cmocka_unit_test(cuda_processes),
        cmocka_unit_test(cuda_hosts),
    };
    bool is_cuda = argc == 2 && strcmp(argv[1], "cuda") == 0;
    const char *why = "";

    engine = epx__engine_look(is_cuda ? EPX_DEVICE_CUDA : EPX_DEVICE_CPU, &why);
    if (engine == NULL) {
        (void)printf("%s\n", why);
        return SKIPPED;
    }
    return is_cuda ? cmocka_run_group_tests(cuda_tests, NULL, NULL)
                   : cmocka_run_group_tests(cpu_tests, NULL, NULL);
}
