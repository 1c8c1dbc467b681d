/* SPDX-License-Identifier: MIT */
/*
 * usage: epx-bench-mpi-peer FILE, under mpirun; epx-bench starts it.
 *        epx-bench-mpi-peer HOST COMMAND..., which mpirun starts to
 *        reach a host that is a network namespace.
 */
#include "mpi_peer.h"

#include "bench_times.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

enum {
    DISPATCH,
    COMBINE,
    NUM_OPS,
};

static void
run_op(struct mpi_peer *peer, int op)
{
    if (op == DISPATCH) {
        mpi_peer_dispatch(peer);
    } else {
        mpi_peer_combine(peer);
    }
}

/* Iterations below 0 warm up. */
static void
iterate(struct mpi_peer *peer, int32_t iter, struct bench_span *spans)
{
    for (int op = 0; op < NUM_OPS; op++) {
        struct bench_span span;
        MPI_Barrier(MPI_COMM_WORLD);
        span.start = bench_now_ns();
        run_op(peer, op);
        span.end = bench_now_ns();
        if (iter >= 0) {
            spans[op * peer->head.iters + iter] = span;
        }
    }
}

/* Every rank's spans of one operation, as [iters, R] on rank 0. */
static void
report(const struct mpi_peer *peer, const struct bench_span *spans,
       const char *name)
{
    int32_t ranks = peer->head.ranks;
    int32_t iters = peer->head.iters;
    int bytes = (int)((size_t)iters * sizeof *spans);
    size_t count = peer->rank ? 1 : (size_t)iters * (size_t)ranks;
    struct bench_span *all = calloc(count, sizeof *all);
    struct bench_span *turned = calloc(count, sizeof *turned);
    struct bench_times times = { 0 };
    if (!all || !turned) {
        MPI_Abort(MPI_COMM_WORLD, 1);
        exit(1);
    }
    MPI_Gather(spans, bytes, MPI_BYTE, all, bytes, MPI_BYTE, 0, MPI_COMM_WORLD);
    if (peer->rank == 0) {
        struct bench_series series = { turned, iters, ranks, false };
        for (int32_t r = 0; r < ranks; r++) {
            for (int32_t i = 0; i < iters; i++) {
                turned[(size_t)i * (size_t)ranks + (size_t)r] =
                    all[(size_t)r * (size_t)iters + (size_t)i];
            }
        }
        if (bench_series_times(&series, &times)) {
            printf("epx-bench-mpi-peer %s %.3f %.3f %.3f\n", name, times.min,
                   times.p50, times.p99);
        }
    }
    free(all);
    free(turned);
}

/* The words of the command are a shell's, as they would be with ssh. */
static int
be_agent(const char *host, char **words)
{
    char command[65536];
    size_t used = 0;
    for (; *words; words++) {
        int wrote =
            snprintf(command + used, sizeof command - used, "%s ", *words);
        if (wrote < 0 || (size_t)wrote >= sizeof command - used) {
            fprintf(stderr, "epx-bench-mpi-peer: the command is too long\n");
            return 1;
        }
        used += (size_t)wrote;
    }
    /* A name of its own, by which MPI knows a host from others; and no files
     * where another host's daemon, on this machine, would find them. */
    setenv("PMIX_MCA_gds", "hash", 1);
    setenv("EPX_BENCH_HOST", host, 1);
    setenv("EPX_BENCH_COMMAND", command, 1);
    execlp("ip", "ip", "netns", "exec", host, "unshare", "--uts", "sh", "-c",
           "hostname \"$EPX_BENCH_HOST\"; exec sh -c \"$EPX_BENCH_COMMAND\"",
           NULL);
    perror("epx-bench-mpi-peer: ip");
    return 1;
}

int
main(int argc, char **argv)
{
    struct mpi_peer peer;
    char text[200];
    if (argc > 2) {
        return be_agent(argv[1], argv + 2);
    }
    MPI_Init(&argc, &argv);
    if (argc != 2) {
        fprintf(stderr, "epx-bench-mpi-peer: started by epx-bench, with the "
                        "file that it has written\n");
        MPI_Abort(MPI_COMM_WORLD, 2);
        return 2;
    }
    mpi_peer_open(&peer, argv[1]);
    struct bench_span *spans =
        calloc((size_t)peer.head.iters * NUM_OPS, sizeof *spans);
    if (!spans) {
        MPI_Abort(MPI_COMM_WORLD, 1);
        return 1;
    }
    mpi_peer_dispatch(&peer);
    mpi_peer_set_outputs(&peer);
    for (int32_t i = -peer.head.warmup; i < peer.head.iters; i++) {
        iterate(&peer, i, spans);
    }
    if (!mpi_peer_check(&peer, text, sizeof text)) {
        fprintf(stderr, "epx-bench-mpi-peer: rank %d: %s\n", peer.rank, text);
        MPI_Abort(MPI_COMM_WORLD, 1);
    }
    report(&peer, &spans[0], "dispatch");
    report(&peer, &spans[peer.head.iters], "combine");
    free(spans);
    mpi_peer_close(&peer);
    MPI_Finalize();
    return 0;
}
