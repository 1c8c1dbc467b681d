/* SPDX-License-Identifier: MIT */
/* The bootstraps of an MPI job, run by mpirun: epx/epx_mpi.h, and the variables
 * that mpirun sets.  No cmocka: every rank must come to every step. */
#include <epx/epx_mpi.h>
#include <stdio.h>
#include <unistd.h>

#define SECRET \
    "5eb63bbbe01eeed093cb22bb8f5acdc35eb63bbbe01eeed093cb22bb8f5acdc3"

static int failures;

#define CHECK_EQUAL(a, b) check_equal((long)(a), (long)(b), #a " == " #b)

static void
check_equal(long a, long b, const char *text)
{
    if (a != b) {
        (void)fprintf(stderr, "%s: %ld and %ld; \"%s\"\n", text, a, b,
                      epx_last_error());
        failures++;
    }
}

static int64_t
in_ms(int64_t ms)
{
    struct timespec now;

    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec + ms * 1000000;
}

static void
check_gather(const epx_bootstrap_t *bootstrap)
{
    static const size_t lengths[] = { 8, 0, 1, 100000 };
    int num_ranks = 0;
    int rank = 0;

    (void)MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    (void)MPI_Comm_size(MPI_COMM_WORLD, &num_ranks);
    CHECK_EQUAL(bootstrap->size, sizeof(*bootstrap));
    CHECK_EQUAL(bootstrap->rank, rank);
    CHECK_EQUAL(bootstrap->num_ranks, num_ranks);
    for (size_t i = 0; i < sizeof(lengths) / sizeof(*lengths); i++) {
        size_t bytes = lengths[i];
        unsigned char *send = malloc(bytes + 1);
        unsigned char *recv = calloc((size_t)num_ranks, bytes + 1);
        long wrong = 0;

        memset(send, rank + 1, bytes);
        CHECK_EQUAL(bootstrap->allgather(bootstrap->context, send, recv, bytes,
                                         in_ms(60000)),
                    EPX_OK);
        for (size_t at = 0; at < bytes * (size_t)num_ranks; at++) {
            wrong += recv[at] != at / bytes + 1;
        }
        CHECK_EQUAL(wrong, 0);
        free(send);
        free(recv);
    }
}

static void
check_mpi(void)
{
    epx_bootstrap_t *bootstrap = NULL;
    char byte = 'x';

    CHECK_EQUAL(epx_bootstrap_mpi_create(MPI_COMM_WORLD, NULL), EPX_ERR_NULL);
    CHECK_EQUAL(epx_bootstrap_mpi_create(MPI_COMM_WORLD, &bootstrap), EPX_OK);
    check_gather(bootstrap);
    CHECK_EQUAL(
        bootstrap->allgather(bootstrap->context, NULL, &byte, 1, in_ms(1000)),
        EPX_ERR_NULL);
    CHECK_EQUAL(bootstrap->allgather(bootstrap->context, &byte, &byte, SIZE_MAX,
                                     in_ms(1000)),
                EPX_ERR_INVALID);
    epx_bootstrap_destroy(bootstrap);
}

/* Rank 0 comes too late for the others, who give up; then it comes, so that MPI
 * can end in peace. */
static void
check_timeout(void)
{
    epx_bootstrap_t *bootstrap = NULL;
    char send = 'x';
    char *recv;
    int rank = 0;
    int num_ranks = 0;

    (void)MPI_Comm_size(MPI_COMM_WORLD, &num_ranks);
    (void)MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    recv = calloc((size_t)num_ranks, 1);
    CHECK_EQUAL(epx_bootstrap_mpi_create(MPI_COMM_WORLD, &bootstrap), EPX_OK);
    if (rank != 0) {
        CHECK_EQUAL(bootstrap->allgather(bootstrap->context, &send, recv, 1,
                                         in_ms(200)),
                    EPX_ERR_TIMEOUT);
        CHECK_EQUAL(bootstrap->allgather(bootstrap->context, &send, recv, 1,
                                         in_ms(60000)),
                    EPX_ERR_BROKEN);
        for (int i = 0; i < num_ranks; i++) {
            CHECK_EQUAL(recv[i], 0);
        }
    }
    (void)MPI_Barrier(MPI_COMM_WORLD);
    if (rank == 0) {
        (void)bootstrap->allgather(bootstrap->context, &send, recv, 1,
                                   in_ms(200));
    }
    (void)MPI_Barrier(MPI_COMM_WORLD);
    epx_bootstrap_destroy(bootstrap);
    free(recv);
}

static void
check_environment(void)
{
    epx_bootstrap_t *bootstrap = NULL;

    if (getenv("OMPI_COMM_WORLD_RANK") == NULL) {
        (void)fprintf(stderr, "SKIPPED: this MPI is not Open MPI, whose "
                              "variables EPX reads\n");
        return;
    }
    CHECK_EQUAL(setenv("EPX_SECRET", SECRET, 1), 0);
    CHECK_EQUAL(epx_bootstrap_env_create(UINT64_C(60000000000), &bootstrap),
                EPX_OK);
    if (bootstrap != NULL) {
        check_gather(bootstrap);
        epx_bootstrap_destroy(bootstrap);
    }
}

int
main(int argc, char **argv)
{
    int total = 0;

    (void)MPI_Init(&argc, &argv);
    check_mpi();
    check_environment();
    check_timeout();
    (void)MPI_Allreduce(&failures, &total, 1, MPI_INT, MPI_SUM, MPI_COMM_WORLD);
    (void)MPI_Finalize();
    return total == 0 ? 0 : 1;
}
