/* SPDX-License-Identifier: MIT */
#include "bench_soak.h"

#include "bench_measure.h"
#include "bench_rng.h"

#include <dirent.h>
#include <inttypes.h>
#include <malloc.h>
#include <unistd.h>

#define TURNS_PER_GROUP 8
#define ROUNDS_PER_TURN 2
#define SOAK_STREAM     4u /* beside those of bench_data.c */

/* What memory may grow by, from the first half of the time to the last quarter:
 * tables of the system's libraries, and what a sanitizer holds back. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SLACK_BYTES (INT64_C(512) << 20)
#else
#define SLACK_BYTES (INT64_C(8) << 20)
#endif
/* On a card, which others may use too. */
#define CARD_SLACK_BYTES (INT64_C(64) << 20)

/* A run as it would be asked for, for one turn. */
struct turn {
    struct bench_options options;
    struct bench_routing routing;
    struct bench_run run;
};

/* Something that must not grow. */
struct gauge {
    int64_t first; /* the most in the first half, or at its first look */
    int64_t last;  /* the least in the last quarter; both -1 before that */
};

struct soak {
    struct bench_rank rank;
    struct bench_run largest; /* of the group's turns; the card looks there */
    struct turn turn;
    int64_t num_turns;
    int64_t num_groups;
    int64_t heap_free; /* of the group, before its first turn */
    int64_t num_files; /* that were open after the first group */
    struct gauge resident;
    struct gauge card;
};

static int32_t
draw_up_to(struct bench_rng *rng, int64_t most)
{
    return 1 + (int32_t)bench_rng_below(rng, (uint32_t)most);
}

/* The same on every rank. */
static void
draw_options(struct bench_options *o, int64_t turn)
{
    static const epx_dtype_t dtypes[] = { EPX_BF16, EPX_F8E4M3, EPX_F32,
                                          EPX_F16 };
    struct bench_rng rng =
        bench_rng_make(o->seed, SOAK_STREAM, (uint64_t)turn, 0);
    o->mode = bench_rng_below(&rng, 2) ? BENCH_LL : BENCH_HT;
    o->layout = (epx_layout_t)draw_up_to(&rng, EPX_LAYOUT_EXPERT_SLOTS);
    o->send_only = o->mode == BENCH_LL && bench_rng_below(&rng, 2);
    o->buffers_outside = bench_rng_below(&rng, 2);
    o->tokens = draw_up_to(&rng, o->tokens);
    o->experts = draw_up_to(&rng, o->experts);
    o->topk = draw_up_to(&rng, o->topk < o->experts ? o->topk : o->experts);
    o->hidden = 16 * (int64_t)draw_up_to(&rng, (o->hidden + 15) / 16);
    o->dtype = dtypes[bench_rng_below(&rng, 4)];
    o->quantize = o->dtype == EPX_BF16
                      ? (epx_quantize_t)bench_rng_below(&rng, 4)
                      : EPX_QUANTIZE_NONE;
    o->logfmt = (o->dtype == EPX_BF16 || o->dtype == EPX_F8E4M3) &&
                bench_rng_below(&rng, 2);
    o->iters = ROUNDS_PER_TURN;
}

/* Pointers within the turn: it must stay where it is. */
static void
make_turn(struct turn *turn, const struct bench_rank *rank,
          const struct bench_run *run, int64_t number)
{
    struct bench_error error;
    turn->options = *run->options;
    draw_options(&turn->options, number);
    turn->run = *run;
    turn->run.options = &turn->options;
    turn->run.routing = &turn->routing;
    if (!bench_routing_open(&turn->routing, &turn->options, &error) ||
        !bench_shape_make(&turn->run.shape, &turn->routing, &error)) {
        bench_rank_fail(run, rank->rank, "%s", error.text);
    }
}

/* What the next turns need together. */
static void
open_group(struct soak *soak, const struct bench_run *run, int32_t rank,
           const epx_bootstrap_t *bootstrap)
{
    uint64_t *heap_bytes = &soak->largest.shape.heap_bytes;
    epx_group_info_t info = EPX_GROUP_INFO_INIT;
    soak->largest = *run;
    *heap_bytes = 0;
    soak->rank.rank = rank;
    for (int i = 0; i < TURNS_PER_GROUP; i++) {
        make_turn(&soak->turn, &soak->rank, run, soak->num_turns + i);
        if (soak->turn.run.shape.heap_bytes > *heap_bytes) {
            *heap_bytes = soak->turn.run.shape.heap_bytes;
        }
    }
    if (run->options->device == EPX_DEVICE_CUDA) {
        /* A plan may give its memory back only when the next one is made. */
        *heap_bytes *= 2;
    }
    bench_rank_open_group(&soak->rank, &soak->largest, rank, bootstrap);
    soak->rank.run = run;
    bench_rank_check(&soak->rank, epx_group_query(soak->rank.group, &info));
    soak->heap_free = (int64_t)info.heap_free_bytes;
}

/* On a card the last turn's plan may have some of it still. */
static void
check_heap(const struct soak *soak)
{
    epx_group_info_t info = EPX_GROUP_INFO_INIT;
    bench_rank_check(&soak->rank, epx_group_query(soak->rank.group, &info));
    if (!soak->rank.card && (int64_t)info.heap_free_bytes != soak->heap_free) {
        bench_rank_fail(soak->rank.run, soak->rank.rank,
                        "turn %" PRId64 ": the heap has %" PRIu64
                        " bytes left, and had %" PRId64 " before",
                        soak->num_turns, info.heap_free_bytes, soak->heap_free);
    }
}

static void
run_turn(struct soak *soak, const struct bench_run *run)
{
    struct bench_rank *rank = &soak->rank;
    char what[48];
    make_turn(&soak->turn, rank, run, soak->num_turns);
    rank->run = &soak->turn.run;
    bench_rank_open_arrays(rank);
    for (int i = 1; i <= ROUNDS_PER_TURN; i++) {
        snprintf(what, sizeof what, "turn %" PRId64 ", round %d",
                 soak->num_turns, i);
        bench_measure_check(rank, (uint64_t)i, what);
    }
    bench_rank_close_arrays(rank);
    rank->run = run;
    check_heap(soak);
    soak->num_turns++;
}

/* ---- what must not grow ---- */

static int64_t
resident_bytes(void)
{
    long long pages = 0;
    FILE *file = fopen("/proc/self/statm", "r");
    if (file) {
        if (fscanf(file, "%*d %lld", &pages) != 1) {
            pages = 0;
        }
        fclose(file);
    }
    return pages * sysconf(_SC_PAGESIZE);
}

static int64_t
open_files(void)
{
    int64_t count = 0;
    DIR *folder = opendir("/proc/self/fd");
    while (folder && readdir(folder)) {
        count++;
    }
    if (folder) {
        closedir(folder);
    }
    return count;
}

static void
gauge_note(struct gauge *gauge, const struct bench_run *run, int64_t value)
{
    int64_t parts = (bench_now_ns() - run->start_ns) /
                    (run->options->soak_s * INT64_C(250000000));
    if ((parts < 2 || gauge->first < 0) && value > gauge->first) {
        gauge->first = value;
    }
    if (parts >= 3 && (gauge->last < 0 || value < gauge->last)) {
        gauge->last = value;
    }
}

static void
gauge_check(const struct gauge *gauge, const struct soak *soak,
            const char *what, int64_t slack)
{
    if (gauge->last - gauge->first > slack) {
        bench_rank_fail(soak->rank.run, soak->rank.rank,
                        "%s has grown from %" PRId64 " to %" PRId64
                        " bytes in %" PRId64 " groups",
                        what, gauge->first, gauge->last, soak->num_groups);
    }
}

/* Between two groups, while nobody has one. */
static void
look_around(struct soak *soak, const struct bench_run *run, int64_t card_used)
{
    int64_t files = open_files();
    (void)malloc_trim(0);
    gauge_note(&soak->resident, run, resident_bytes());
    gauge_note(&soak->card, run, card_used);
    if (soak->num_groups == 1) {
        soak->num_files = files;
    }
    if (files > soak->num_files) {
        bench_rank_fail(run, soak->rank.rank,
                        "%" PRId64 " files are open after %" PRId64
                        " groups, and %" PRId64 " were after the first",
                        files, soak->num_groups, soak->num_files);
    }
}

static void
close_group(struct soak *soak, const struct bench_run *run)
{
    struct bench_barrier *ranks = &run->shared->ranks;
    int64_t card_used = 0;
    /* The card is looked at when it has no group's memory any more. */
    bench_rank_check(&soak->rank, epx_group_destroy(soak->rank.group));
    bench_barrier_wait(ranks, BENCH_NO_DEADLINE);
    if (soak->rank.card) {
        card_used = soak->rank.card->ops->used_bytes(soak->rank.card);
        bench_barrier_wait(ranks, BENCH_NO_DEADLINE);
        soak->rank.card->ops->close(soak->rank.card);
    }
    soak->num_groups++;
    bench_barrier_wait(ranks, BENCH_NO_DEADLINE);
    if (run->options->procs || soak->rank.rank == 0) {
        look_around(soak, run, card_used);
    }
    bench_barrier_wait(ranks, BENCH_NO_DEADLINE);
}

/* Two groups at least, or there is nothing to compare. */
static bool
goes_on(const struct soak *soak, const struct bench_run *run, int32_t rank)
{
    struct bench_shared *shared = run->shared;
    if (rank == 0) {
        shared->soak.goes_on = soak->num_groups < 2 ||
                               bench_now_ns() - run->start_ns <
                                   run->options->soak_s * INT64_C(1000000000);
    }
    bench_barrier_wait(&shared->ranks, BENCH_NO_DEADLINE);
    return shared->soak.goes_on != 0;
}

void
bench_soak_rank(const struct bench_run *run, int32_t rank,
                const epx_bootstrap_t *bootstrap)
{
    struct bench_soak *found = &run->shared->soak;
    struct bench_progress progress = { 0 };
    struct soak soak = { .resident = { -1, -1 }, .card = { -1, -1 } };
    while (goes_on(&soak, run, rank)) {
        open_group(&soak, run, rank, bootstrap);
        for (int i = 0; i < TURNS_PER_GROUP; i++) {
            run_turn(&soak, run);
        }
        close_group(&soak, run);
        if (rank == 0) {
            bench_progress_show(&progress, run, "second",
                                (bench_now_ns() - run->start_ns) / 1000000000,
                                run->options->soak_s);
        }
    }
    bench_progress_clear(&progress);
    gauge_check(&soak.resident, &soak, "the process's memory", SLACK_BYTES);
    gauge_check(&soak.card, &soak, "the card's used memory", CARD_SLACK_BYTES);
    if (rank == 0) {
        found->turns = soak.num_turns;
        found->groups = soak.num_groups;
        found->ns = bench_now_ns() - run->start_ns;
        found->first_bytes = soak.resident.first;
        found->last_bytes = soak.resident.last;
    }
}

void
bench_soak_report(FILE *file, const struct bench_run *run)
{
    const struct bench_soak *found = &run->shared->soak;
    const struct bench_options *o = run->options;
    if (o->json) {
        fprintf(file,
                "{\"op\": \"soak\", \"engine\": \"%s\", \"fabric\": \"%s\", "
                "\"ranks\": %d, \"workers\": %d, \"seconds\": %.1f, "
                "\"groups\": %" PRId64 ", \"turns\": %" PRId64
                ", \"first_bytes\": %" PRId64 ", \"last_bytes\": %" PRId64
                "}\n",
                run->shared->engine, run->shared->fabric, o->ranks, o->workers,
                (double)found->ns / 1e9, found->groups, found->turns,
                found->first_bytes, found->last_bytes);
        return;
    }
    fprintf(file,
            "%s engine, %s fabric: %d ranks x %d workers; %" PRId64
            " groups with %" PRId64 " shapes in %.1f s, every result as it "
            "should be\nmemory of %s: %.1f MiB in the first half, %.1f MiB in "
            "the last quarter\n",
            run->shared->engine, run->shared->fabric, o->ranks, o->workers,
            found->groups, found->turns, (double)found->ns / 1e9,
            o->procs ? "rank 0" : "the process",
            (double)found->first_bytes / 1048576.0,
            (double)found->last_bytes / 1048576.0);
}
