/* SPDX-License-Identifier: MIT */
#include "conformance/world.h"
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MEET_BYTES = 1 << 16 };

/* The tests' groups wait 40 s at most; with room for sanitizers. */
uint32_t world_patience_s = 200;

bool world_may_lose;
uint32_t world_num_lost;

/* Where the ranks meet; shared by all. */
typedef struct meeting {
    int32_t num_ranks;
    atomic_int arrived;
    atomic_int round;
    uint8_t data[WORLD_MAX_RANKS][MEET_BYTES];
} meeting_t;

typedef struct meeting_seat {
    meeting_t *meeting;
    int32_t rank;
} meeting_seat_t;

/* All that the ranks share. */
typedef struct world {
    meeting_t bootstrap;
    meeting_t barrier;
    meeting_seat_t seats[WORLD_MAX_RANKS];
    epx_bootstrap_t own[WORLD_MAX_RANKS];
    world_rank_t ranks[WORLD_MAX_RANKS];
} world_t;

const char *
world_name(world_kind_t kind)
{
    return kind == WORLD_THREAD ? "thread" : "shm";
}

void
world_fail(world_rank_t *self, const char *format, ...)
{
    va_list args;

    if (self->failed) {
        return;
    }
    va_start(args, format);
    vsnprintf(self->text, sizeof(self->text), format, args);
    va_end(args);
    self->failed = true;
}

bool
world_excuses(epx_status_t status)
{
    bool is_loss = status == EPX_ERR_PEER_LOST || status == EPX_ERR_TIMEOUT ||
                   status == EPX_ERR_BROKEN;

    if (world_may_lose && is_loss) {
        __atomic_fetch_add(&world_num_lost, 1, __ATOMIC_RELAXED);
    }
    return world_may_lose && is_loss;
}

void
world_expect(world_rank_t *self, const char *what, epx_status_t got,
             epx_status_t want, const char *word)
{
    if (got != want ||
        (want != EPX_OK && strstr(epx_last_error(), word) == NULL)) {
        world_fail(self,
                   "%s: expected status %d and a sentence with '%s', got %d "
                   "and '%s'",
                   what, (int)want, word, (int)got, epx_last_error());
    }
}

bool
world_failed(world_rank_t *self, epx_status_t status, const char *call)
{
    if (status != EPX_OK && !world_excuses(status)) {
        world_fail(self, "%s: status %d (%s): %s", call, (int)status,
                   epx_status_string(status), epx_last_error());
    }
    return status != EPX_OK;
}

/* ranks[rank] lies in its world. */
static world_t *
world_of(world_rank_t *self)
{
    uint8_t *first = (uint8_t *)(self - self->rank);

    return (world_t *)(void *)(first - offsetof(world_t, ranks));
}

void
world_progress(world_rank_t *self)
{
    if (self->kind == WORLD_SHM) {
        alarm(world_patience_s);
    }
}

/* ---- meeting ---- */

static int64_t
now_ns(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * 1000000000 + ts.tv_nsec;
}

/* The last to arrive starts the next round, which lets the others go. */
static bool
meet(meeting_t *meeting, int64_t deadline_ns)
{
    int round = atomic_load(&meeting->round);

    if (atomic_fetch_add(&meeting->arrived, 1) + 1 == meeting->num_ranks) {
        atomic_store(&meeting->arrived, 0);
        atomic_fetch_add(&meeting->round, 1);
        return true;
    }
    while (atomic_load(&meeting->round) == round) {
        struct timespec nap = { 0, 20000 };

        if (now_ns() > deadline_ns) {
            return false;
        }
        nanosleep(&nap, NULL);
    }
    return true;
}

static epx_status_t
meeting_allgather(void *context, const void *send, void *recv, size_t bytes,
                  int64_t deadline_ns)
{
    const meeting_seat_t *seat = context;
    meeting_t *meeting = seat->meeting;

    if (bytes > MEET_BYTES) {
        return EPX_ERR_TOO_SMALL;
    }
    memcpy(meeting->data[seat->rank], send, bytes);
    if (!meet(meeting, deadline_ns)) {
        return EPX_ERR_TIMEOUT;
    }
    for (int32_t r = 0; r < meeting->num_ranks; r++) {
        memcpy((uint8_t *)recv + (size_t)r * bytes, meeting->data[r], bytes);
    }
    return meet(meeting, deadline_ns) ? EPX_OK : EPX_ERR_TIMEOUT;
}

void
world_barrier(world_rank_t *self)
{
    world_t *world = world_of(self);

    if (!meet(&world->barrier,
              now_ns() + world_patience_s * INT64_C(1000000000))) {
        world_fail(self, "a rank did not come to the test's barrier");
    }
}

bool
world_all_well(world_rank_t *self)
{
    bool ok = true;

    world_barrier(self);
    for (int32_t r = 0; r < self->num_ranks; r++) {
        ok = ok && !world_of(self)->ranks[r].failed;
    }
    world_barrier(self); /* nobody fails anew before all have looked */
    return ok;
}

/* ---- threads ---- */

typedef struct start {
    pthread_t thread;
    world_rank_t *self;
    world_fn *fn;
    void *context;
} start_t;

static void *
thread_main(void *arg)
{
    start_t *start = arg;

    start->fn(start->self, start->context);
    return NULL;
}

static void
run_threads(world_t *world, int32_t num_ranks, world_fn *fn, void *context)
{
    start_t starts[WORLD_MAX_RANKS];
    struct timespec deadline;

    for (int32_t r = 0; r < num_ranks; r++) {
        starts[r] =
            (start_t){ .self = &world->ranks[r], .fn = fn, .context = context };
        if (pthread_create(&starts[r].thread, NULL, thread_main, &starts[r])) {
            perror("pthread_create");
            abort();
        }
    }
    clock_gettime(CLOCK_REALTIME, &deadline);
    deadline.tv_sec += world_patience_s;
    for (int32_t r = 0; r < num_ranks; r++) {
        if (pthread_timedjoin_np(starts[r].thread, NULL, &deadline)) {
            fprintf(stderr, "rank %d hangs\n", r);
            abort(); /* its stack says where */
        }
    }
}

/* ---- processes ---- */

static void
run_processes(world_t *world, int32_t num_ranks, world_fn *fn, void *context)
{
    pid_t pids[WORLD_MAX_RANKS];

    fflush(NULL);
    for (int32_t r = 0; r < num_ranks; r++) {
        pids[r] = fork();
        if (pids[r] < 0) {
            perror("fork");
            abort();
        }
        if (pids[r] == 0) {
            alarm(world_patience_s);
            fn(&world->ranks[r], context);
            exit(0); /* not _exit: leak checkers want to look */
        }
    }
    for (int32_t r = 0; r < num_ranks; r++) {
        int status;

        while (waitpid(pids[r], &status, 0) < 0 && errno == EINTR) {
        }
        if (WIFSIGNALED(status)) {
            world_fail(&world->ranks[r], "killed by signal %d%s",
                       WTERMSIG(status),
                       WTERMSIG(status) == SIGALRM ? ", for it hung" : "");
        } else if (WEXITSTATUS(status) != 0) {
            world_fail(&world->ranks[r], "exited with status %d",
                       WEXITSTATUS(status));
        }
    }
}

/* ---- both ---- */

static void *
shared_memory(size_t bytes)
{
    void *memory = mmap(NULL, bytes ? bytes : 1, PROT_READ | PROT_WRITE,
                        MAP_SHARED | MAP_ANONYMOUS, -1, 0);

    if (memory == MAP_FAILED) {
        perror("mmap");
        abort();
    }
    return memory;
}

void
world_release(void *shared, size_t shared_bytes)
{
    munmap(shared, shared_bytes ? shared_bytes : 1);
}

static void
sit_down(world_t *world, world_kind_t kind, int32_t num_ranks, void *shared)
{
    world->bootstrap.num_ranks = num_ranks;
    world->barrier.num_ranks = num_ranks;
    for (int32_t r = 0; r < num_ranks; r++) {
        epx_bootstrap_t *own = &world->own[r];
        world_rank_t *self = &world->ranks[r];

        world->seats[r] = (meeting_seat_t){ &world->bootstrap, r };
        *own = (epx_bootstrap_t)EPX_BOOTSTRAP_INIT;
        own->rank = r;
        own->num_ranks = num_ranks;
        own->allgather = meeting_allgather;
        own->context = &world->seats[r];
        self->rank = r;
        self->num_ranks = num_ranks;
        self->kind = kind;
        self->bootstrap = own;
        self->shared = shared;
    }
}

/* Appends the failures: first those that are not just the echo of another's. */
static bool
report(world_t *world, int32_t num_ranks, char *text, size_t text_bytes)
{
    size_t used = 0;
    bool ok = true;

    text[0] = '\0';
    for (int echo = 0; echo < 2; echo++) {
        for (int32_t r = 0; r < num_ranks; r++) {
            const world_rank_t *self = &world->ranks[r];
            bool is_echo =
                strstr(self->text, "TIMEOUT") || strstr(self->text, "in time");

            if (self->failed && is_echo == (echo == 1) && used < text_bytes) {
                used += (size_t)snprintf(text + used, text_bytes - used,
                                         "  rank %d: %s\n", r, self->text);
            }
            ok = ok && !self->failed;
        }
    }
    return ok;
}

bool
world_run(world_kind_t kind, int32_t num_ranks, bool own_bootstrap,
          size_t shared_bytes, world_fn *fn, void *context, void **shared_p,
          char *text, size_t text_bytes)
{
    epx_bootstrap_t *threads[WORLD_MAX_RANKS] = { 0 };
    world_t *world = shared_memory(sizeof(*world));
    void *shared = shared_memory(shared_bytes);
    bool ok;

    sit_down(world, kind, num_ranks, shared);
    if (kind == WORLD_THREAD && !own_bootstrap) {
        if (epx_bootstrap_threads_create(num_ranks, threads) != EPX_OK) {
            fprintf(stderr, "epx_bootstrap_threads_create: %s\n",
                    epx_last_error());
            abort();
        }
        for (int32_t r = 0; r < num_ranks; r++) {
            world->ranks[r].bootstrap = threads[r];
        }
    }
    if (kind == WORLD_THREAD) {
        run_threads(world, num_ranks, fn, context);
    } else {
        run_processes(world, num_ranks, fn, context);
    }
    for (int32_t r = 0; r < num_ranks; r++) {
        epx_bootstrap_destroy(threads[r]);
    }
    ok = report(world, num_ranks, text, text_bytes);
    if (shared_p) {
        *shared_p = shared;
    } else {
        world_release(shared, shared_bytes);
    }
    world_release(world, sizeof(*world));
    return ok;
}
