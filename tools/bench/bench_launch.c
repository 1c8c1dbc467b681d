/* SPDX-License-Identifier: MIT */
#include "bench_launch.h"

#include "bench_link.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

int32_t
bench_usable_cores(void)
{
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set)) {
        long count = sysconf(_SC_NPROCESSORS_ONLN);
        return count > 0 ? (int32_t)count : 1;
    }
    return CPU_COUNT(&set);
}

/* A rank's operations keep so many cores busy; one that works on a card has its
 * share for the threads of CUDA too. */
static int32_t
cores_of_rank(const struct bench_options *o)
{
    int32_t share = o->cores / o->ranks;
    return o->device == EPX_DEVICE_CPU ? o->workers : share > 1 ? share : 1;
}

/* Rank i gets the W cores from i * W on, counted around.  Threads that it
 * makes later inherit them. */
static void
bind_rank(const struct bench_options *o, int32_t rank)
{
    int32_t cores = cores_of_rank(o);
    cpu_set_t all;
    cpu_set_t mine;
    if (!o->bind || sched_getaffinity(0, sizeof all, &all)) {
        return;
    }
    CPU_ZERO(&mine);
    int32_t count = CPU_COUNT(&all);
    for (int32_t w = 0; w < cores; w++) {
        int32_t skip = (int32_t)(((int64_t)rank * cores + w) % count);
        for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
            if (CPU_ISSET(cpu, &all) && skip-- == 0) {
                CPU_SET(cpu, &mine);
                break;
            }
        }
    }
    /* A system that refuses leaves the rank unbound, which is slower only. */
    (void)sched_setaffinity(0, sizeof mine, &mine);
}

/* ---- threads ---- */

struct thread_rank {
    const struct bench_run *run;
    bench_rank_fn *fn;
    int32_t rank;
    epx_bootstrap_t *bootstrap;
    pthread_t thread;
};

static void *
thread_main(void *arg)
{
    struct thread_rank *self = arg;
    bind_rank(self->run->options, self->rank);
    self->fn(self->run, self->rank, self->bootstrap);
    return NULL;
}

static bool
launch_threads(const struct bench_run *run, bench_rank_fn *fn,
               struct bench_error *error)
{
    int32_t ranks = run->options->ranks;
    struct thread_rank *all = calloc((size_t)ranks, sizeof *all);
    epx_bootstrap_t **boots = calloc((size_t)ranks, sizeof(void *));
    bool good = all && boots;
    if (!good) {
        bench_fail(error, "no memory for %d ranks", ranks);
    } else if (epx_bootstrap_threads_create(ranks, boots)) {
        good = bench_fail(error, "%s", epx_last_error());
    }
    int32_t started = 0;
    for (; good && started < ranks; started++) {
        all[started] =
            (struct thread_rank){ run, fn, started, boots[started], 0 };
        int code = pthread_create(&all[started].thread, NULL, thread_main,
                                  &all[started]);
        if (code) {
            /* The ranks before it would wait in vain. */
            bench_rank_fail(run, started, "cannot start a thread: %s",
                            strerror(code));
        }
    }
    for (int32_t r = 0; r < started; r++) {
        pthread_join(all[r].thread, NULL);
    }
    for (int32_t r = 0; boots && r < ranks; r++) {
        epx_bootstrap_destroy(boots[r]);
    }
    free(boots);
    free(all);
    return good;
}

/* ---- processes ---- */

struct gather_context {
    const struct bench_run *run;
    int32_t rank;
};

/* An allgather through the shared memory, a bounded part at a time. */
static epx_status_t
gather(void *context, const void *send, void *recv, size_t bytes,
       int64_t deadline_ns)
{
    const struct gather_context *self = context;
    struct bench_shared *shared = self->run->shared;
    size_t mine = (size_t)self->rank * BENCH_GATHER_BYTES;
    for (size_t at = 0; at < bytes; at += BENCH_GATHER_BYTES) {
        size_t part =
            bytes - at < BENCH_GATHER_BYTES ? bytes - at : BENCH_GATHER_BYTES;
        memcpy(shared->gather + mine, (const char *)send + at, part);
        if (!bench_barrier_wait(&shared->ranks, deadline_ns)) {
            return EPX_ERR_TIMEOUT;
        }
        for (int32_t r = 0; r < self->run->options->ranks; r++) {
            memcpy((char *)recv + (size_t)r * bytes + at,
                   shared->gather + (size_t)r * BENCH_GATHER_BYTES, part);
        }
        /* Nobody overwrites what another has yet to read. */
        if (!bench_barrier_wait(&shared->ranks, deadline_ns)) {
            return EPX_ERR_TIMEOUT;
        }
    }
    return EPX_OK;
}

__attribute__((noreturn)) static void
child_main(const struct bench_run *run, bench_rank_fn *fn, int32_t rank,
           pid_t parent)
{
    struct gather_context context = { run, rank };
    epx_bootstrap_t bootstrap = EPX_BOOTSTRAP_INIT;
    struct bench_error error;
    bootstrap.rank = rank;
    bootstrap.num_ranks = run->options->ranks;
    bootstrap.allgather = gather;
    bootstrap.context = &context;
    /* No rank outlives the command, however that ends. */
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) || getppid() != parent) {
        _exit(1);
    }
    if (!bench_link_enter(run->options, rank, &error)) {
        bench_rank_fail(run, rank, "%s", error.text);
    }
    bind_rank(run->options, rank);
    fn(run, rank, &bootstrap);
    exit(0);
}

/* Waits for all children; the first that fails ends the others. */
static bool
wait_for(pid_t *pids, int32_t count, struct bench_error *error)
{
    bool good = true;
    for (int32_t left = count; left > 0;) {
        int status = 0;
        int32_t rank = 0;
        pid_t pid = waitpid(-1, &status, 0);
        if (pid < 0 && errno == EINTR) {
            continue;
        }
        if (pid < 0) {
            return bench_fail(error, "waitpid failed: %s", strerror(errno));
        }
        while (rank < count && pids[rank] != pid) {
            rank++;
        }
        if (rank == count) {
            continue;
        }
        left--;
        pids[rank] = 0;
        if (status == 0 || !good) {
            continue;
        }
        good = false;
        if (WIFSIGNALED(status)) {
            bench_fail(error, "rank %d was ended by signal %d (%s)", rank,
                       WTERMSIG(status), strsignal(WTERMSIG(status)));
        }
        for (int32_t r = 0; r < count; r++) {
            if (pids[r]) {
                kill(pids[r], SIGKILL);
            }
        }
    }
    return good;
}

static bool
launch_procs(const struct bench_run *run, bench_rank_fn *fn,
             struct bench_error *error)
{
    int32_t ranks = run->options->ranks;
    pid_t parent = getpid();
    pid_t *pids = calloc((size_t)ranks, sizeof *pids);
    int32_t started = 0;
    int failure = 0;
    if (!pids) {
        return bench_fail(error, "no memory for %d ranks", ranks);
    }
    /* Waiting works whatever the caller did with this signal. */
    signal(SIGCHLD, SIG_DFL);
    fflush(NULL);
    for (; started < ranks; started++) {
        pids[started] = fork();
        if (pids[started] == 0) {
            child_main(run, fn, started, parent);
        }
        if (pids[started] < 0) {
            failure = errno;
            break;
        }
    }
    for (int32_t r = 0; failure && r < started; r++) {
        kill(pids[r], SIGKILL);
    }
    bool good = wait_for(pids, started, error);
    if (failure) {
        good = bench_fail(error, "cannot start rank %d: %s", started,
                          strerror(failure));
    }
    free(pids);
    return good;
}

bool
bench_launch(const struct bench_run *run, bench_rank_fn *fn,
             struct bench_error *error)
{
    error->text[0] = '\0';
    if (run->options->device == EPX_DEVICE_CUDA && !run->options->procs) {
        /* As many queues to a card as there can be, so that no two threads
         * share one.  Processes have their own; MPS has no room for so many of
         * each. */
        setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0);
    }
    return run->options->procs ? launch_procs(run, fn, error)
                               : launch_threads(run, fn, error);
}
