/* SPDX-License-Identifier: MIT */
/*
 * A peer that writes random numbers all over another rank's control region
 * while both run layers: vitals, gates, arrivals, posts, counts.  The rank may
 * fail, but it may not crash, hang, or write where it has no business.
 *
 *     scribble [--rounds N] [--seed S]
 */
#include "conformance/rng.h"
#include "core/group.h"
#include "fault.h"

#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { RANKS = 2, SCRIBBLER = 1, LAYERS = 60 };

typedef struct table {
    fault_round_t round;
    fault_meeting_t meeting;
} table_t;

static table_t *table;

/* ---- the scribbler ---- */

typedef struct scribbler {
    epx_group_t *group;
    uint64_t seed;
    bool stop;
} scribbler_t;

/* Small, huge, beside what is there, or anything. */
static uint64_t
draw_word(rng_t *rng, uint64_t present)
{
    switch (rng_int(rng, 0, 5)) {
    case 0:
        return (uint64_t)rng_int(rng, 0, 300);
    case 1:
        return UINT64_C(1) << rng_int(rng, 0, 63);
    case 2:
        return UINT64_MAX - (uint64_t)rng_int(rng, 0, 4096);
    case 3:
        return present + (uint64_t)rng_int(rng, -2, 2);
    case 4:
        return present ^ (UINT64_C(1) << rng_int(rng, 0, 63));
    default:
        return rng_next(rng);
    }
}

/* Races with all that the ranks do, which is the point: not for the thread
 * sanitizer, and volatile, for it would see an atomic access. */
__attribute__((no_sanitize_thread, noinline)) static void
scribble_word(volatile uint64_t *word, rng_t *rng)
{
    *word = draw_word(rng, *word);
}

static void *
scribble(void *argument)
{
    scribbler_t *self = argument;
    const epx__map_t *map = &self->group->map;
    char *segment = self->group->peers[1 - SCRIBBLER].base;
    char *control = epx__group_control(self->group, 1 - SCRIBBLER);
    rng_t rng = rng_of(self->seed, 77, 0);
    /* Where the ranges of the region begin; the first has the vitals and the
     * roll. */
    const size_t begins[] = { EPX__VITALS, map->gates, map->arrivals,
                              map->posts, map->counts };
    const size_t ends[] = { EPX__PAGE, map->arrivals, map->posts, map->counts,
                            map->heap };
    /* Most rounds keep to one: else all fail at the first step. */
    int64_t part = rng_int(&rng, 0, 5);
    int64_t pause_us = rng_int(&rng, 0, 300);

    while (!__atomic_load_n(&self->stop, __ATOMIC_RELAXED)) {
        int64_t i = part < 5 ? part : rng_int(&rng, 0, 4);
        int64_t words = (int64_t)((ends[i] - begins[i]) / sizeof(uint64_t));
        /* With cards, what hosts write has a segment of its own. */
        uint64_t *word =
            (uint64_t *)(void *)((i < 2 ? control : segment) + begins[i]) +
            rng_int(&rng, 0, words - 1);

        scribble_word(word, &rng);
        if (pause_us > 0 && rng_one_in(&rng, 8)) {
            (void)usleep((useconds_t)pause_us);
        }
    }
    return NULL;
}

/* ---- both ---- */

static void
never(void *context, int32_t layer, fault_point_t point)
{
    (void)context;
    (void)layer;
    (void)point;
}

static void
run_layers(int32_t rank, epx_group_t *group)
{
    fault_round_t *round = &table->round;
    fault_layers_t *layers = fault_layers_open(round, group, never, NULL);
    epx_status_t status = EPX_OK;
    const char *wrong;

    for (int32_t i = 1; layers != NULL && i <= LAYERS && status == EPX_OK;
         i++) {
        /* What is wrong with the rows is the scribbler's doing. */
        status = fault_layers_run(layers, i, &wrong);
        round->reports[rank].num_layers += status == EPX_OK;
    }
    if (status != EPX_OK && epx_last_error()[0] == '\0') {
        fault_complain(round, rank, "status %d without a sentence",
                       (int)status);
    }
    if (status != EPX_OK && round->seed % 4 == 0) {
        (void)epx_group_mask(group, NULL, 0); /* with a roll of any kind */
    }
    if (layers != NULL) {
        fault_layers_close(layers);
    }
}

static void
rank_main(int32_t rank)
{
    epx_group_config_t config = EPX_GROUP_CONFIG_INIT;
    fault_seat_t seat = { &table->meeting, rank, RANKS };
    epx_bootstrap_t bootstrap = fault_bootstrap(&seat);
    scribbler_t scribbler = { .seed = table->round.seed };
    pthread_t thread;

    config.bootstrap = &bootstrap;
    config.device = FAULT_DEVICE;
    config.heap_bytes = 4 << 20;
    config.num_workers = 1;
    config.max_experts = 8;
    config.timeout_ns = 1000000000;
    if (epx_group_create(&config, &scribbler.group) != EPX_OK) {
        fault_complain(&table->round, rank, "group: %s", epx_last_error());
        return;
    }
    if (rank == SCRIBBLER &&
        pthread_create(&thread, NULL, scribble, &scribbler) != 0) {
        fault_complain(&table->round, rank, "no thread");
        return;
    }
    run_layers(rank, scribbler.group);
    if (rank == SCRIBBLER) {
        __atomic_store_n(&scribbler.stop, true, __ATOMIC_RELAXED);
        (void)pthread_join(thread, NULL);
    }
    if (epx_group_destroy(scribbler.group) != EPX_OK) {
        fault_complain(&table->round, rank, "destroy: %s", epx_last_error());
    }
}

static void
draw_round(uint64_t seed)
{
    rng_t rng = rng_of(seed, 5, 0);
    fault_round_t *round = &table->round;

    memset(table, 0, sizeof(*table));
    round->seed = seed;
    round->num_ranks = RANKS;
    round->layout = (epx_layout_t)rng_int(&rng, EPX_LAYOUT_RANK_MAJOR,
                                          EPX_LAYOUT_EXPERT_SLOTS);
    round->is_split = rng_one_in(&rng, 2);
    round->has_slots = rng_one_in(&rng, 2);
    round->in_heap = rng_one_in(&rng, 2);
    round->hidden = 64;
    round->routes_ride =
        round->layout == EPX_LAYOUT_EXPERT_SLOTS && rng_one_in(&rng, 2);
}

static bool
run_round(uint64_t seed)
{
    pid_t pids[RANKS];
    bool is_well = true;

    draw_round(seed);
    (void)fflush(NULL);
    for (int32_t rank = 0; rank < RANKS; rank++) {
        pids[rank] = fork();
        if (pids[rank] == 0) {
            (void)alarm(100);
            rank_main(rank);
            exit(0); /* not _exit: leak checkers want to look */
        }
    }
    for (int32_t rank = 0; rank < RANKS; rank++) {
        int status = 0;

        while (waitpid(pids[rank], &status, 0) < 0 && errno == EINTR) {
        }
        if (status != 0) {
            fault_complain(&table->round, rank, "wait status %#x",
                           (unsigned)status);
        }
        if (table->round.reports[rank].failed) {
            fprintf(stderr, "--seed %" PRIu64 ": rank %d: %s\n", seed, rank,
                    table->round.reports[rank].text);
            is_well = false;
        }
    }
    return is_well;
}

int
main(int argc, char **argv)
{
    uint64_t rounds = 60, seed = 1, num_bad = 0, num_layers = 0;

    for (int i = 1; i + 1 < argc; i += 2) {
        if (strcmp(argv[i], "--rounds") == 0) {
            rounds = strtoull(argv[i + 1], NULL, 10);
        } else if (strcmp(argv[i], "--seed") == 0) {
            seed = strtoull(argv[i + 1], NULL, 10);
        }
    }
    table = mmap(NULL, sizeof(*table), PROT_READ | PROT_WRITE,
                 MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (table == MAP_FAILED) {
        perror("mmap");
        return 1;
    }
    for (uint64_t i = 0; i < rounds; i++) {
        num_bad += !run_round(seed + i);
        num_layers += (uint64_t)table->round.reports[0].num_layers;
    }
    (void)munmap(table, sizeof(*table));
    printf("%" PRIu64 " of %" PRIu64 " rounds went wrong; %" PRIu64
           " layers ran beside the scribbler\n",
           num_bad, rounds, num_layers);
    return num_bad == 0 ? 0 : 1;
}
