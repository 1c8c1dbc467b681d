/* SPDX-License-Identifier: MIT */
/* What the launchers' variables come to: epx__launch_parse. */
#include "bootstrap_util.h"

#include "bootstrap/launch_env.h"

#include <stdio.h>
#include <string.h>

#define MAX_VARIABLES 12

typedef struct variable {
    const char *name;
    const char *value;
} variable_t;

typedef struct environment {
    variable_t variables[MAX_VARIABLES];
} environment_t;

static const char *
get(void *context, const char *name)
{
    const environment_t *environment = context;

    for (int i = 0; i < MAX_VARIABLES; i++) {
        const variable_t *variable = &environment->variables[i];

        if (variable->name != NULL && strcmp(variable->name, name) == 0) {
            return variable->value;
        }
    }
    return NULL;
}

/* Sets a variable, or, with a null value, removes it. */
static void
set(environment_t *environment, const char *name, const char *value)
{
    variable_t *free_place = NULL;

    for (int i = MAX_VARIABLES - 1; i >= 0; i--) {
        variable_t *variable = &environment->variables[i];

        if (variable->name == NULL) {
            free_place = variable;
        } else if (strcmp(variable->name, name) == 0) {
            variable->value = value;
            return;
        }
    }
    assert_non_null(free_place);
    *free_place = (variable_t){ name, value };
}

static const environment_t torchrun = { {
    { "RANK", "3" },
    { "WORLD_SIZE", "8" },
    { "MASTER_ADDR", "node-1.cluster" },
    { "MASTER_PORT", "29500" },
    { "TORCHELASTIC_RUN_ID", "17" },
} };
static const environment_t open_mpi = { {
    { "OMPI_COMM_WORLD_RANK", "1" },
    { "OMPI_COMM_WORLD_SIZE", "4" },
    { "OMPI_COMM_WORLD_LOCAL_SIZE", "4" },
    { "PMIX_RANK", "1" },
    { "PMIX_NAMESPACE", "813498369" },
} };
static const environment_t pmix = { {
    { "PMIX_RANK", "2" },
    { "PMIX_NAMESPACE", "job" },
    { "SLURM_NTASKS", "3" },
    { "SLURM_NNODES", "1" },
} };
static const environment_t slurm = { {
    { "SLURM_PROCID", "5" },
    { "SLURM_NTASKS", "6" },
    { "SLURM_JOB_NUM_NODES", "1" },
    { "SLURM_JOB_ID", "99" },
    { "SLURM_STEP_ID", "0" },
} };

static void
check_launch(environment_t environment, int32_t rank, int32_t num_ranks,
             const char *host, int port)
{
    epx__launch_t launch;
    outcome_t outcome;

    outcome_set(&outcome, epx__launch_parse(get, &environment, &launch));
    outcome_check(&outcome, EPX_OK, "");
    assert_int_equal(launch.rank, rank);
    assert_int_equal(launch.num_ranks, num_ranks);
    assert_string_equal(launch.host, host);
    if (port < 0) {
        assert_in_range(launch.port, 20000, 29999);
    } else {
        assert_int_equal(launch.port, port);
    }
}

static void
check_error(environment_t environment, const char *part)
{
    epx__launch_t launch;
    outcome_t outcome;

    outcome_set(&outcome, epx__launch_parse(get, &environment, &launch));
    outcome_check(&outcome, EPX_ERR_ENVIRONMENT, part);
}

/* The environment `base` with one variable changed. */
static environment_t
with(environment_t base, const char *name, const char *value)
{
    set(&base, name, value);
    return base;
}

static void
test_launchers(void **state)
{
    environment_t both = torchrun;

    (void)state;
    check_launch(torchrun, 3, 8, "node-1.cluster", 29501);
    check_launch(open_mpi, 1, 4, "127.0.0.1", -1);
    check_launch(pmix, 2, 3, "127.0.0.1", -1);
    check_launch(with(pmix, "PMIX_SIZE", "5"), 2, 5, "127.0.0.1", -1);
    check_launch(slurm, 5, 6, "127.0.0.1", -1);
    check_launch(with(slurm, "EPX_PORT", "65535"), 5, 6, "127.0.0.1", 65535);
    check_launch(with(torchrun, "EPX_PORT", "1"), 3, 8, "node-1.cluster", 1);
    check_launch(with(torchrun, "MASTER_ADDR", "fe80::1%eth0"), 3, 8,
                 "fe80::1%eth0", 29501);
    /* The inner launcher's word counts. */
    set(&both, "SLURM_PROCID", "0");
    set(&both, "SLURM_NTASKS", "1");
    check_launch(both, 3, 8, "node-1.cluster", 29501);
}

static void
test_one_rank_needs_no_address(void **state)
{
    environment_t environment = { { { "RANK", "0" }, { "WORLD_SIZE", "1" } } };

    (void)state;
    check_launch(environment, 0, 1, "", 0);
}

static void
test_nothing_set(void **state)
{
    static const char *const names[] = {
        "RANK and WORLD_SIZE",
        "OMPI_COMM_WORLD_RANK and OMPI_COMM_WORLD_SIZE",
        "PMIX_RANK and PMIX_SIZE",
        "SLURM_PROCID and SLURM_NTASKS",
    };
    environment_t empty = { { { NULL, NULL } } };

    (void)state;
    for (size_t i = 0; i < sizeof(names) / sizeof(*names); i++) {
        check_error(empty, names[i]);
    }
}

static void
test_half_a_pair(void **state)
{
    (void)state;
    check_error(with(torchrun, "RANK", NULL),
                "WORLD_SIZE is set but RANK is not");
    check_error(with(torchrun, "WORLD_SIZE", NULL),
                "RANK is set but WORLD_SIZE is not");
    check_error(with(open_mpi, "OMPI_COMM_WORLD_SIZE", NULL),
                "OMPI_COMM_WORLD_SIZE is not");
    check_error(with(pmix, "SLURM_NTASKS", NULL),
                "PMIX_RANK is set but PMIX_SIZE or SLURM_NTASKS is not");
    check_error(with(slurm, "SLURM_PROCID", NULL),
                "SLURM_NTASKS is set but SLURM_PROCID is not");
    check_error(with(slurm, "SLURM_NTASKS", NULL),
                "SLURM_PROCID is set but SLURM_NTASKS is not");
    check_error(with(torchrun, "MASTER_ADDR", NULL),
                "MASTER_PORT is set but MASTER_ADDR is not");
    check_error(with(torchrun, "MASTER_PORT", NULL),
                "MASTER_ADDR is set but neither MASTER_PORT nor EPX_PORT is");
}

static void
test_where_is_rank_0(void **state)
{
    environment_t environment = torchrun;

    (void)state;
    set(&environment, "MASTER_ADDR", NULL);
    set(&environment, "MASTER_PORT", NULL);
    check_error(environment, "set MASTER_ADDR and MASTER_PORT");
    check_error(with(open_mpi, "OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
                "set MASTER_ADDR and MASTER_PORT");
    check_error(with(slurm, "SLURM_JOB_NUM_NODES", "2"),
                "set MASTER_ADDR and MASTER_PORT");
    check_error(with(slurm, "SLURM_JOB_NUM_NODES", NULL),
                "set MASTER_ADDR and MASTER_PORT");
    /* The step's nodes count, not the job's. */
    check_launch(
        with(with(slurm, "SLURM_JOB_NUM_NODES", "2"), "SLURM_NNODES", "1"), 5,
        6, "127.0.0.1", -1);
    check_error(with(open_mpi, "PMIX_NAMESPACE", NULL), "set EPX_JOB_ID");
    check_launch(with(with(open_mpi, "PMIX_NAMESPACE", NULL), "EPX_PORT", "80"),
                 1, 4, "127.0.0.1", 80);
}

/* What every number must be refused as, whatever its range. */
static const char *const bad_numbers[] = {
    "",         " ",
    " 1",       "1 ",
    "-1",       "+1",
    "1e9",      "0x",
    "0x1",      "1g ",
    "1.0",      "one",
    "\xff\xfe", "18446744073709551616",
    "1025",     "\n1",
    "\xd9\xa3", "99999999999999999999999999999999999999999999",
};

static void
test_bad_numbers(void **state)
{
    static const struct {
        const environment_t *base;
        const char *name;
        uint64_t max;
    } cases[] = {
        { &torchrun, "RANK", EPX_MAX_RANKS - 1 },
        { &torchrun, "WORLD_SIZE", EPX_MAX_RANKS },
        { &torchrun, "MASTER_PORT", 65534 },
        { &torchrun, "EPX_PORT", 65535 },
        { &open_mpi, "OMPI_COMM_WORLD_RANK", EPX_MAX_RANKS - 1 },
        { &open_mpi, "OMPI_COMM_WORLD_SIZE", EPX_MAX_RANKS },
        { &open_mpi, "OMPI_COMM_WORLD_LOCAL_SIZE", EPX_MAX_RANKS },
        { &pmix, "PMIX_RANK", EPX_MAX_RANKS - 1 },
        { &pmix, "PMIX_SIZE", EPX_MAX_RANKS },
        { &pmix, "SLURM_NTASKS", EPX_MAX_RANKS },
        { &pmix, "SLURM_NNODES", UINT32_MAX },
        { &slurm, "SLURM_PROCID", EPX_MAX_RANKS - 1 },
        { &slurm, "SLURM_NTASKS", EPX_MAX_RANKS },
        { &slurm, "SLURM_JOB_NUM_NODES", UINT32_MAX },
    };
    char expected[128];

    (void)state;
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        for (size_t j = 0; j < sizeof(bad_numbers) / sizeof(*bad_numbers);
             j++) {
            const char *value = bad_numbers[j];

            if (strcmp(value, "1025") == 0 && cases[i].max > 1025) {
                continue;
            }
            (void)snprintf(expected, sizeof(expected),
                           "%s is \"%.40s\"; it must be a whole number",
                           cases[i].name, value);
            check_error(with(*cases[i].base, cases[i].name, value), expected);
            (void)snprintf(expected, sizeof(expected), " to %llu",
                           (unsigned long long)cases[i].max);
            check_error(with(*cases[i].base, cases[i].name, value), expected);
        }
    }
    check_error(with(torchrun, "RANK", "8"),
                "RANK is 8; it must be below WORLD_SIZE, which is 8");
    check_error(with(torchrun, "WORLD_SIZE", "0"), "from 1 to 1024");
    check_error(with(torchrun, "EPX_PORT", "0"), "from 1 to 65535");
    check_error(with(torchrun, "MASTER_PORT", "65535"), "from 1 to 65534");
    check_launch(with(with(torchrun, "MASTER_PORT", "65535"), "EPX_PORT", "9"),
                 3, 8, "node-1.cluster", 9);
    check_launch(with(with(torchrun, "WORLD_SIZE", "1024"), "RANK", "1023"),
                 1023, 1024, "node-1.cluster", 29501);
}

static void
test_bad_addresses(void **state)
{
    static const char *const bad[] = { "",          " ",           " host",
                                       "host name", "a\tb",        "a/b",
                                       "\xff\xfe",  "h\xc3\xb6st", "[::1]" };
    static char long_name[300];

    (void)state;
    for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++) {
        check_error(with(torchrun, "MASTER_ADDR", bad[i]), "MASTER_ADDR is \"");
    }
    memset(long_name, 'a', sizeof(long_name) - 1);
    check_error(with(torchrun, "MASTER_ADDR", long_name), "of 1 to 253");
    long_name[253] = '\0';
    check_launch(with(torchrun, "MASTER_ADDR", long_name), 3, 8, long_name,
                 29501);
}

static void
job_of(environment_t environment, epx__launch_t *launch)
{
    outcome_t outcome;

    outcome_set(&outcome, epx__launch_parse(get, &environment, launch));
    outcome_check(&outcome, EPX_OK, "");
}

static void
test_job_ids(void **state)
{
    epx__launch_t a;
    epx__launch_t b;

    (void)state;
    /* The same for all ranks of a job... */
    job_of(slurm, &a);
    job_of(with(slurm, "SLURM_PROCID", "0"), &b);
    assert_memory_equal(a.job, b.job, sizeof(a.job));
    assert_int_equal(a.port, b.port);
    /* ... and different for two steps, or two jobs. */
    job_of(with(slurm, "SLURM_STEP_ID", "1"), &b);
    assert_memory_not_equal(a.job, b.job, sizeof(a.job));
    job_of(with(slurm, "SLURM_JOB_ID", "98"), &b);
    assert_memory_not_equal(a.job, b.job, sizeof(a.job));
    /* The user's own id hides the launcher's. */
    job_of(with(slurm, "EPX_JOB_ID", "\xff mine"), &a);
    job_of(with(with(slurm, "EPX_JOB_ID", "\xff mine"), "SLURM_JOB_ID", "98"),
           &b);
    assert_memory_equal(a.job, b.job, sizeof(a.job));
    check_error(with(slurm, "EPX_JOB_ID", ""), "EPX_JOB_ID is empty");
    check_error(with(torchrun, "TORCHELASTIC_RUN_ID", ""),
                "TORCHELASTIC_RUN_ID is empty");
}

static void
test_unknown_variables(void **state)
{
    static char *environment[] = {
        "EPX_LOG=none", "EPX_SECRET=a", "EPX_SECRET_FILE=b",
        "EPX_PORT=1",   "EPX_JOB_ID=x", "PATH=/bin",
        "EPX=1",        "EPX_PROT=1",   "EPX_SECRET_FILES=1",
        "EPX_",         NULL,
    };

    (void)state;
    assert_int_equal(epx__launch_warn_unknown(environment), 3);
    assert_int_equal(epx__launch_warn_unknown(NULL), 0);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_launchers),
        cmocka_unit_test(test_one_rank_needs_no_address),
        cmocka_unit_test(test_nothing_set),
        cmocka_unit_test(test_half_a_pair),
        cmocka_unit_test(test_where_is_rank_0),
        cmocka_unit_test(test_bad_numbers),
        cmocka_unit_test(test_bad_addresses),
        cmocka_unit_test(test_job_ids),
        cmocka_unit_test(test_unknown_variables),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
