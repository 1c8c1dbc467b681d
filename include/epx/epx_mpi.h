/* SPDX-License-Identifier: MIT */
/*
 * A bootstrap for the ranks of an MPI communicator.  All of it is in this
 * header, so that EPX itself depends on no MPI; it works with any that has
 * MPI 3.
 *
 *     epx_bootstrap_t *bootstrap;
 *     epx_bootstrap_mpi_create(MPI_COMM_WORLD, &bootstrap);
 *     config.bootstrap = bootstrap;
 *     epx_group_create(&config, &group);
 *     epx_bootstrap_destroy(bootstrap);
 *
 * MPI is called on the threads that call this function, epx_group_create and
 * epx_bootstrap_destroy, and on no other: any level of thread support will do
 * as long as no other thread of the program calls MPI meanwhile.
 *
 * Needs clock_gettime and nanosleep: compile with GNU or POSIX extensions
 * (-std=gnu11, or _POSIX_C_SOURCE of 200809L before the first #include).
 */
#ifndef EPX_EPX_MPI_H
#define EPX_EPX_MPI_H

#include <epx/epx.h>
#include <limits.h>
#include <mpi.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#ifndef CLOCK_MONOTONIC
#error "epx_mpi.h needs the POSIX clocks: define _POSIX_C_SOURCE as 200809L"
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef struct epx_mpi__context {
    MPI_Comm comm; /* a duplicate: EPX's messages meet no others */
    int num_ranks;
    int broken; /* an allgather has failed */
    int stuck;  /* it may still be under way, in blocks that stay allocated */
} epx_mpi__context_t;

/* 1 once the request is complete, 0 when the deadline has passed, -1 when MPI
 * has failed. */
static inline int
epx_mpi__wait(MPI_Request *request, int64_t deadline_ns)
{
    long tries = 0;

    for (;;) {
        struct timespec now;
        const struct timespec pause = { 0, 100000 };
        int done = 0;

        if (MPI_Test(request, &done, MPI_STATUS_IGNORE) != MPI_SUCCESS) {
            return -1;
        }
        if (done) {
            return 1;
        }
        (void)clock_gettime(CLOCK_MONOTONIC, &now);
        if ((int64_t)now.tv_sec * 1000000000 + now.tv_nsec >= deadline_ns) {
            return 0;
        }
        /* At first at full speed, then without taking a core from others. */
        if (++tries > 1000) {
            (void)nanosleep(&pause, NULL);
        }
    }
}

static inline epx_status_t
epx_mpi__allgather(void *context, const void *send, void *recv, size_t bytes,
                   int64_t deadline_ns)
{
    epx_mpi__context_t *self = (epx_mpi__context_t *)context;
    const size_t total_bytes = bytes * (size_t)self->num_ranks;
    MPI_Request request;
    char *blocks;
    int done = -1;

    if (self->broken) {
        return EPX_ERR_BROKEN;
    }
    if (bytes > (size_t)INT_MAX / (size_t)self->num_ranks) {
        return EPX_ERR_INVALID;
    }
    if (bytes > 0 && (send == NULL || recv == NULL)) {
        return EPX_ERR_NULL;
    }
    blocks = (char *)malloc(total_bytes + bytes + 1);
    if (blocks == NULL) {
        return EPX_ERR_NO_MEMORY;
    }
    /* A collective of MPI cannot be called off, so it works on blocks that can
     * be left to it. */
    if (bytes > 0) {
        memcpy(blocks + total_bytes, send, bytes);
    }
    if (MPI_Iallgather(blocks + total_bytes, (int)bytes, MPI_BYTE, blocks,
                       (int)bytes, MPI_BYTE, self->comm,
                       &request) == MPI_SUCCESS) {
        done = epx_mpi__wait(&request, deadline_ns);
    }
    if (done != 1) {
        self->broken = 1;
        self->stuck = 1;
        return done == 0 ? EPX_ERR_TIMEOUT : EPX_ERR_PEER_LOST;
    }
    if (bytes > 0) {
        memcpy(recv, blocks, total_bytes);
    }
    free(blocks);
    return EPX_OK;
}

static inline void
epx_mpi__destroy(void *context)
{
    epx_mpi__context_t *self = (epx_mpi__context_t *)context;

    if (!self->stuck) {
        (void)MPI_Comm_free(&self->comm);
    }
    free(self);
}

/*
 * The ranks of `comm`, with the same numbers.  Collective over comm, which is
 * duplicated and may be freed.  The caller owns the bootstrap; to be destroyed,
 * with epx_bootstrap_destroy, by every rank and before MPI_Finalize, since it
 * frees the duplicate.
 *
 * EPX_ERR_NULL, EPX_ERR_NO_MEMORY; EPX_ERR_INVALID when comm is an inter-
 * communicator or has more than EPX_MAX_RANKS ranks; EPX_ERR_SYSTEM when MPI
 * reports an error, unless comm's error handler deals with it first.
 *
 * An allgather that is not complete by its deadline returns EPX_ERR_TIMEOUT,
 * without saying which rank it waited for: MPI does not tell.  Nor can MPI call
 * it off.  It goes on in memory that is left to it, what the caller passed is
 * not touched any more, and the bootstrap can then only be destroyed, which
 * leaves the duplicate communicator as it is.  MPI_Finalize may wait for it; a
 * program that cannot go on should end with MPI_Abort.
 *
 * epx_last_error() has no sentence on errors of this header.
 */
static inline epx_status_t
epx_bootstrap_mpi_create(MPI_Comm comm, epx_bootstrap_t **bootstrap_p)
{
    epx_bootstrap_t *bootstrap;
    epx_mpi__context_t *context;
    int is_inter = 0;
    int rank = 0;
    int num_ranks = 0;

    if (bootstrap_p == NULL) {
        return EPX_ERR_NULL;
    }
    if (MPI_Comm_test_inter(comm, &is_inter) != MPI_SUCCESS ||
        MPI_Comm_rank(comm, &rank) != MPI_SUCCESS ||
        MPI_Comm_size(comm, &num_ranks) != MPI_SUCCESS) {
        return EPX_ERR_SYSTEM;
    }
    if (is_inter || num_ranks > EPX_MAX_RANKS) {
        return EPX_ERR_INVALID;
    }
    bootstrap = (epx_bootstrap_t *)calloc(1, sizeof(*bootstrap));
    context = (epx_mpi__context_t *)calloc(1, sizeof(*context));
    if (bootstrap == NULL || context == NULL) {
        free(bootstrap);
        free(context);
        return EPX_ERR_NO_MEMORY;
    }
    if (MPI_Comm_dup(comm, &context->comm) != MPI_SUCCESS) {
        free(bootstrap);
        free(context);
        return EPX_ERR_SYSTEM;
    }
    /* From here on errors are returned, whatever comm's handler does. */
    (void)MPI_Comm_set_errhandler(context->comm, MPI_ERRORS_RETURN);
    context->num_ranks = num_ranks;
    bootstrap->size = sizeof(*bootstrap);
    bootstrap->rank = rank;
    bootstrap->num_ranks = num_ranks;
    bootstrap->allgather = epx_mpi__allgather;
    bootstrap->destroy = epx_mpi__destroy;
    bootstrap->context = context;
    *bootstrap_p = bootstrap;
    return EPX_OK;
}

#ifdef __cplusplus
}
#endif
#endif /* EPX_EPX_MPI_H */
