/* SPDX-License-Identifier: MIT */
/*
 * Nobody is thought lost who is only short of time: processes that spin take
 * all cores while a group stands idle, then runs.
 *
 *     calm [SPINNERS [SECONDS [RANKS]]]
 *
 * Prints how far apart the beats of a peer were, as another rank saw them.
 */
#include "conformance/world.h"
#include "core/atomic.h"
#include "core/clock.h"
#include "core/lost.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MOST_SPINNERS = 256, MOST_GAPS = 100000, STEPS = 200 };

static int num_spinners = 32;
static int num_seconds = 4;

typedef struct gaps {
    int64_t ns[MOST_GAPS];
    size_t count;
} gaps_t;

static int
compare(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;

    return (x > y) - (x < y);
}

static void
print_gaps(gaps_t *gaps)
{
    qsort(gaps->ns, gaps->count, sizeof(*gaps->ns), compare);
    if (gaps->count > 0) {
        printf("%zu gaps between beats: median %.1f ms, 99 %% %.1f ms, longest "
               "%.1f ms\n",
               gaps->count, (double)gaps->ns[gaps->count / 2] * 1e-6,
               (double)gaps->ns[gaps->count * 99 / 100] * 1e-6,
               (double)gaps->ns[gaps->count - 1] * 1e-6);
        (void)fflush(stdout);
    }
}

/* What rank 0 sees of rank 1, until it is time. */
static void
watch_beats(const epx_group_t *group, gaps_t *gaps)
{
    const epx__vitals_t *vitals = epx__lost_vitals(group, 1);
    const struct timespec nap = { 0, 500000 };
    int64_t end = epx__now_ns() + num_seconds * EPX__NS_PER_SEC;
    uint64_t beat = epx__load_acquire_u64(&vitals->beat);
    int64_t at = 0, now;

    while ((now = epx__now_ns()) < end) {
        uint64_t next = epx__load_acquire_u64(&vitals->beat);

        if (next != beat && at != 0 && gaps->count < MOST_GAPS) {
            gaps->ns[gaps->count++] = now - at;
        }
        if (next != beat) {
            beat = next;
            at = now;
        }
        (void)nanosleep(&nap, NULL);
    }
}

/* Steps of the group, as any operation takes them. */
static void
run_steps(world_rank_t *self, epx_group_t *group)
{
    for (uint64_t step = 1; step <= STEPS && !self->failed; step++) {
        for (int32_t rank = 0; rank < self->num_ranks; rank++) {
            epx__signal(group, rank, step, EPX__GATE_READY);
        }
        (void)world_failed(
            self, epx__wait_all(group, step, EPX__GATE_READY, "calm"), "wait");
    }
}

static void
calm_rank(world_rank_t *self, void *context)
{
    epx_group_config_t config = EPX_GROUP_CONFIG_INIT;
    gaps_t *gaps = calloc(1, sizeof(*gaps));
    epx_group_t *group;

    (void)context;
    config.bootstrap = self->bootstrap;
    config.heap_bytes = 1 << 20;
    config.num_workers = 1;
    if (gaps == NULL ||
        world_failed(self, epx_group_create(&config, &group), "group")) {
        free(gaps);
        return;
    }
    if (self->rank == 0) {
        watch_beats(group, gaps);
        print_gaps(gaps);
    }
    world_barrier(self);
    run_steps(self, group);
    (void)world_failed(self, epx_group_status(group), "status");
    world_barrier(self);
    (void)world_failed(self, epx_group_destroy(group), "destroy");
    free(gaps);
}

static void
start_spinners(pid_t *pids)
{
    for (int i = 0; i < num_spinners; i++) {
        pids[i] = fork();
        if (pids[i] == 0) {
            (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
            for (;;) {
                epx__pause();
            }
        }
    }
}

int
main(int argc, char **argv)
{
    int num_ranks = argc > 3 ? atoi(argv[3]) : 4;
    pid_t pids[MOST_SPINNERS];
    char text[4096];
    bool is_well;

    num_spinners = argc > 1 ? atoi(argv[1]) : num_spinners;
    num_seconds = argc > 2 ? atoi(argv[2]) : num_seconds;
    if (num_spinners < 0 || num_spinners > MOST_SPINNERS || num_ranks < 2 ||
        num_ranks > WORLD_MAX_RANKS) {
        fprintf(stderr, "calm: 0 to %d spinners, 2 to %d ranks\n",
                MOST_SPINNERS, WORLD_MAX_RANKS);
        return 2;
    }
    start_spinners(pids);
    is_well = world_run(WORLD_SHM, num_ranks, true, 0, calm_rank, NULL, NULL,
                        text, sizeof(text));
    for (int i = 0; i < num_spinners; i++) {
        (void)kill(pids[i], SIGKILL);
        (void)waitpid(pids[i], NULL, 0);
    }
    if (!is_well) {
        fprintf(stderr, "%s", text);
    }
    return is_well ? 0 : 1;
}
