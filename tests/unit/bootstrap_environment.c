/* SPDX-License-Identifier: MIT */
/* epx_bootstrap_env_create as a launcher's processes call it. */
#include "bootstrap_util.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define NUM_RANKS 4
#define SECRET \
    "5eb63bbbe01eeed093cb22bb8f5acdc35eb63bbbe01eeed093cb22bb8f5acdc3"

typedef struct launch {
    const char *rank_name;
    const char *size_name;
    const char *local_name; /* says that all ranks are here; or NULL */
    const char *local_value;
    const char *job_name;
    int32_t num_ranks;
    uint16_t port; /* for EPX_PORT; 0: none */
} launch_t;

static void
set_number(const char *name, int value)
{
    char text[16];

    (void)snprintf(text, sizeof(text), "%d", value);
    assert_int_equal(setenv(name, text, 1), 0);
}

/* As the launcher would leave it, and no trace of the one that runs the test.
 */
static void
set_environment(const launch_t *launch, int rank)
{
    char job[32];

    assert_int_equal(clearenv(), 0);
    assert_int_equal(setenv("EPX_SECRET", SECRET, 1), 0);
    set_number(launch->rank_name, rank);
    set_number(launch->size_name, launch->num_ranks);
    if (launch->local_name != NULL) {
        assert_int_equal(setenv(launch->local_name, launch->local_value, 1), 0);
    } else {
        assert_int_equal(setenv("MASTER_ADDR", "127.0.0.1", 1), 0);
    }
    (void)snprintf(job, sizeof(job), "test %d", (int)getppid());
    assert_int_equal(setenv(launch->job_name, job, 1), 0);
    set_number("EPX_PORT", launch->port);
}

static void
take_part(void *arg, int index, outcome_t *outcome)
{
    const launch_t *launch = arg;
    int32_t recv[NUM_RANKS] = { -1, -1, -1, -1 };
    epx_bootstrap_t *bootstrap;
    epx_status_t status;

    set_environment(launch, index);
    status = epx_bootstrap_env_create(UINT64_C(60000000000), &bootstrap);
    if (status == EPX_OK) {
        outcome->value += bootstrap->size != sizeof(*bootstrap) ||
                          bootstrap->rank != index ||
                          bootstrap->num_ranks != launch->num_ranks;
        status = bootstrap->allgather(bootstrap->context, &bootstrap->rank,
                                      recv, sizeof(int32_t), in_ms(60000));
        for (int32_t rank = 0; rank < launch->num_ranks; rank++) {
            outcome->value += recv[rank] != rank;
        }
        epx_bootstrap_destroy(bootstrap);
    }
    outcome_set(outcome, status);
}

static void
check_all(const launch_t *launch)
{
    processes_t processes = { 0 };

    for (int i = 0; i < launch->num_ranks; i++) {
        process_start(&processes, take_part, (void *)(uintptr_t)launch);
    }
    processes_wait(&processes);
    for (int i = 0; i < launch->num_ranks; i++) {
        outcome_check(&processes.outcomes[i], EPX_OK, "");
        assert_int_equal(processes.outcomes[i].value, 0);
    }
}

static void
test_launchers(void **state)
{
    launch_t launches[] = {
        { "RANK", "WORLD_SIZE", NULL, NULL, "TORCHELASTIC_RUN_ID", NUM_RANKS,
          0 },
        { "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE",
          "OMPI_COMM_WORLD_LOCAL_SIZE", "4", "PMIX_NAMESPACE", NUM_RANKS, 0 },
        { "PMIX_RANK", "SLURM_NTASKS", "SLURM_NNODES", "1", "PMIX_NAMESPACE",
          NUM_RANKS, 0 },
        { "SLURM_PROCID", "SLURM_NTASKS", "SLURM_JOB_NUM_NODES", "1",
          "SLURM_JOB_ID", NUM_RANKS, 0 },
    };

    (void)state;
    for (size_t i = 0; i < sizeof(launches) / sizeof(*launches); i++) {
        int guard = port_reserve("127.0.0.1", &launches[i].port);

        check_all(&launches[i]);
        (void)close(guard);
    }
}

/* One rank needs neither a secret nor a port. */
static void
test_one_rank(void **state)
{
    epx_bootstrap_t *bootstrap;
    char byte = 'x';
    char copy = 0;

    (void)state;
    assert_int_equal(clearenv(), 0);
    set_number("RANK", 0);
    set_number("WORLD_SIZE", 1);
    assert_int_equal(epx_bootstrap_env_create(0, &bootstrap), EPX_OK);
    assert_int_equal(bootstrap->rank, 0);
    assert_int_equal(bootstrap->num_ranks, 1);
    assert_int_equal(
        bootstrap->allgather(bootstrap->context, &byte, &copy, 1, in_ms(1000)),
        EPX_OK);
    assert_int_equal(copy, 'x');
    assert_int_equal(
        bootstrap->allgather(bootstrap->context, NULL, &copy, 1, in_ms(1000)),
        EPX_ERR_NULL);
    epx_bootstrap_destroy(bootstrap);
}

static void
test_errors(void **state)
{
    epx_bootstrap_t *bootstrap = NULL;
    outcome_t outcome;

    (void)state;
    assert_int_equal(clearenv(), 0);
    outcome_set(&outcome, epx_bootstrap_env_create(0, NULL));
    outcome_check(&outcome, EPX_ERR_NULL, "bootstrap_p is null");
    outcome_set(&outcome, epx_bootstrap_env_create(0, &bootstrap));
    outcome_check(&outcome, EPX_ERR_ENVIRONMENT, "torchrun");
    set_number("RANK", 1);
    set_number("WORLD_SIZE", 2);
    set_number("MASTER_PORT", 29500);
    assert_int_equal(setenv("MASTER_ADDR", "127.0.0.1", 1), 0);
    assert_int_equal(setenv("EPX_SECRET", "hush", 1), 0);
    outcome_set(&outcome, epx_bootstrap_env_create(0, &bootstrap));
    outcome_check(&outcome, EPX_ERR_ENVIRONMENT, "EPX_SECRET has 4 characters");
    assert_int_equal(setenv("EPX_SECRET", SECRET, 1), 0);
    assert_int_equal(setenv("MASTER_ADDR", "0.0.0.0", 1), 0);
    outcome_set(&outcome, epx_bootstrap_env_create(0, &bootstrap));
    outcome_check(&outcome, EPX_ERR_ENVIRONMENT, "every interface");
    assert_null(bootstrap);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_launchers),
        cmocka_unit_test(test_one_rank),
        cmocka_unit_test(test_errors),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
