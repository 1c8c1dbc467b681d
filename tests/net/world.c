/* SPDX-License-Identifier: MIT */
#include "world.h"

#include "core/atomic.h"

#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>

#define NUM_EXPERTS  16
#define GATHER_BYTES 8192

uint64_t *world_shared;

world_t
world_make(int32_t num_ranks, const epx__net_backend_t *backend)
{
    return (world_t){
        .num_ranks = num_ranks,
        .backend = backend,
        .device = "lo",
        .beat_ns = (uint64_t)(100 * EPX__NS_PER_MS),
        .lost_after_ns = (uint64_t)EPX__NS_PER_SEC,
        .timeout_ns = (uint64_t)(20 * EPX__NS_PER_SEC),
        .num_channels = 4,
    };
}

int64_t
rank_deadline(const rank_t *rank)
{
    return epx__deadline_ns(rank->world->timeout_ns);
}

static void
help(void *context)
{
    (void)epx__net_help(((rank_t *)context)->net);
}

static void
help_end(void *context)
{
    epx__net_help_end(((rank_t *)context)->net);
}

static void
on_lost(void *context, int32_t lost, epx_status_t status, const char *text)
{
    rank_t *rank = context;

    rank->lost_ns = epx__now_ns();
    rank->lost_rank = lost;
    rank->lost_status = status;
    (void)snprintf(rank->lost_text, sizeof(rank->lost_text), "%s", text);
    __atomic_fetch_add(&rank->num_lost, 1, __ATOMIC_RELEASE);
}

void
rank_open(rank_t *rank)
{
    const world_t *world = rank->world;
    epx__net_config_t config = {
        .rank = rank->rank,
        .num_ranks = world->num_ranks,
        .group_id = { 17, 42 },
        .allgather = rank->allgather,
        .allgather_context = rank->allgather_context,
        .map = &rank->map,
        .num_channels = world->num_channels,
        .card_net.num_channels = world->num_card_channels,
        .timeout_ns = world->timeout_ns,
        .beat_ns = world->beat_ns,
        .lost_after_ns = world->lost_after_ns,
        .spin_ns = world->spin_ns,
        .core = -1,
        .is_manual = world->is_manual,
        .lost = on_lost,
        .lost_context = rank,
        .backend = world->backend,
        .backend_context = world->backend_context,
        .device = world->device,
        .wire = world->wire,
        .settings = world->settings,
    };

    rank->map = epx__map_make((uint32_t)world->num_ranks, NUM_EXPERTS);
    rank->peers = calloc((size_t)world->num_ranks, sizeof(*rank->peers));
    rank->peers[rank->rank].base = aligned_alloc(EPX__PAGE, rank->map.heap);
    memset(rank->peers[rank->rank].base, 0, rank->map.heap);
    config.segment = rank->peers[rank->rank].base;
    rank->group.rank = rank->rank;
    rank->group.num_ranks = world->num_ranks;
    rank->group.timeout_ns = world->timeout_ns;
    rank->group.spin_ns = world->spin_ns;
    rank->group.map = rank->map;
    rank->group.remote.help = help;
    rank->group.remote.help_end = help_end;
    rank->group.remote.context = rank;
    rank->group.peers = rank->peers;
    (void)pthread_mutex_init(&rank->group.state_lock, NULL);
    CHECK_OK(epx__net_open(&rank->net, &config));
}

void
rank_close(rank_t *rank)
{
    epx__net_close(rank->net);
    free(rank->peers[rank->rank].base);
    free(rank->peers);
}

void
rank_barrier(rank_t *rank)
{
    char from = 0;
    char to[EPX_MAX_RANKS];

    CHECK_OK(rank->allgather(rank->allgather_context, &from, to, 1,
                             rank_deadline(rank)));
}

/* --- Threads ----------------------------------------------------------- */

typedef struct start {
    rank_t rank;
    rank_main_t *main;
} start_t;

static void *
thread_main(void *argument)
{
    start_t *start = argument;

    rank_open(&start->rank);
    start->main(&start->rank);
    rank_close(&start->rank);
    return NULL;
}

void
world_run_threads(const world_t *world, rank_main_t *main)
{
    size_t num_ranks = (size_t)world->num_ranks;
    pthread_t *threads = calloc(num_ranks, sizeof(*threads));
    start_t *starts = calloc(num_ranks, sizeof(*starts));
    epx_bootstrap_t **bootstraps = calloc(num_ranks, sizeof(*bootstraps));

    if (world->backend->prepare) {
        world->backend->prepare();
    }
    CHECK_OK(epx_bootstrap_threads_create(world->num_ranks, bootstraps));
    for (int32_t r = 0; r < world->num_ranks; r++) {
        starts[r] =
            (start_t){ .rank = { .world = world,
                                 .rank = r,
                                 .allgather = bootstraps[r]->allgather,
                                 .allgather_context = bootstraps[r]->context },
                       .main = main };
        CHECK(pthread_create(&threads[r], NULL, thread_main, &starts[r]) == 0,
              "no thread");
    }
    for (int32_t r = 0; r < world->num_ranks; r++) {
        (void)pthread_join(threads[r], NULL);
        epx_bootstrap_destroy(bootstraps[r]);
    }
    free(bootstraps);
    free(starts);
    free(threads);
}

/* --- Processes --------------------------------------------------------- */

typedef struct shared {
    uint64_t words[64]; /* the test's */
    uint32_t arrived;
    uint32_t round; /* futex word */
    char blocks[];  /* [2][num_ranks][GATHER_BYTES] */
} shared_t;

typedef struct gather {
    shared_t *shared;
    int32_t rank;
    int32_t num_ranks;
} gather_t;

static epx_status_t
gather(void *context, const void *send, void *recv, size_t bytes,
       int64_t deadline_ns)
{
    gather_t *g = context;
    shared_t *shared = g->shared;
    uint32_t round = epx__load_u32(&shared->round);
    char *blocks = shared->blocks +
                   (size_t)(round % 2) * (size_t)g->num_ranks * GATHER_BYTES;

    CHECK(bytes <= GATHER_BYTES, "%zu", bytes);
    memcpy(blocks + (size_t)g->rank * GATHER_BYTES, send, bytes);
    if (epx__add_u32(&shared->arrived, 1) == (uint32_t)g->num_ranks) {
        epx__store_u32(&shared->arrived, 0);
        (void)epx__add_u32(&shared->round, 1);
        epx__futex_wake_all(&shared->round);
    }
    while (epx__load_u32(&shared->round) == round) {
        int64_t now = epx__now_ns();

        if (now >= deadline_ns) {
            return epx__fail(EPX_ERR_TIMEOUT, "ranks are missing");
        }
        epx__futex_wait(&shared->round, round, deadline_ns - now);
    }
    for (int32_t r = 0; r < g->num_ranks; r++) {
        memcpy((char *)recv + (size_t)r * bytes,
               blocks + (size_t)r * GATHER_BYTES, bytes);
    }
    return EPX_OK;
}

void
world_run_processes(const world_t *world, rank_main_t *main,
                    void (*prepare)(int32_t rank),
                    void (*parent_main)(const world_t *world,
                                        const pid_t *pids))
{
    size_t bytes =
        sizeof(shared_t) + 2 * (size_t)world->num_ranks * GATHER_BYTES;
    shared_t *shared = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                            MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    pid_t *pids = calloc((size_t)world->num_ranks, sizeof(*pids));
    int failures = 0;

    CHECK(shared != MAP_FAILED, "no memory");
    world_shared = shared->words;
    for (int32_t r = 0; r < world->num_ranks; r++) {
        pids[r] = fork();
        CHECK(pids[r] >= 0, "no process");
        if (pids[r] == 0) {
            gather_t g = { shared, r, world->num_ranks };
            rank_t rank = { .world = world,
                            .rank = r,
                            .allgather = gather,
                            .allgather_context = &g };

            if (prepare != NULL) {
                prepare(r);
            }
            rank_open(&rank);
            main(&rank);
            rank_close(&rank);
            exit(0);
        }
    }
    if (parent_main != NULL) {
        parent_main(world, pids);
    }
    for (int32_t r = 0; r < world->num_ranks; r++) {
        int status;

        CHECK(waitpid(pids[r], &status, 0) == pids[r], "%m");
        /* Killed by the test itself is as it should be. */
        if (!(WIFEXITED(status) && WEXITSTATUS(status) == 0) &&
            !(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL)) {
            fprintf(stderr, "rank %d ended with %x\n", r, (unsigned)status);
            failures++;
        }
    }
    free(pids);
    (void)munmap(shared, bytes);
    world_shared = NULL;
    if (failures > 0) {
        _exit(1);
    }
}

/* --- Bytes ------------------------------------------------------------- */

static uint64_t
word(uint64_t seed, uint64_t i)
{
    uint64_t x = (seed + 1) * UINT64_C(0x9e3779b97f4a7c15) + i;

    x *= UINT64_C(0xbf58476d1ce4e5b9);
    return x ^ x >> 29;
}

void
fill(void *to, size_t bytes, uint64_t seed)
{
    char *at = to;

    for (size_t i = 0; i < bytes; i += 8) {
        uint64_t value = word(seed, i);

        memcpy(at + i, &value, bytes - i < 8 ? bytes - i : 8);
    }
}

int64_t
differs(const void *from, size_t bytes, uint64_t seed)
{
    const char *at = from;

    for (size_t i = 0; i < bytes; i += 8) {
        uint64_t value = word(seed, i);

        if (memcmp(at + i, &value, bytes - i < 8 ? bytes - i : 8) != 0) {
            return (int64_t)i;
        }
    }
    return -1;
}
