/* SPDX-License-Identifier: MIT */
/*
 * The fault suite: rounds with random faults (fault.h).
 *
 *     fault [--rounds N] [--seed S] [--bound-ms B] [--kind 0|1|2] [--masks 0|1]
 *
 * The survivors of each fault must be told within the bound.  Ends with how
 * long that took.  Every round is a function of its seed, times and ports
 * apart.
 */
#include "fault.h"
#include "conformance/holdings.h"
#include "conformance/rng.h"

#include <errno.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static const char *const kind_names[FAULT_NUM_KINDS] = { "kill", "stop",
                                                         "stop and continue" };
static const char *const phase_names[FAULT_NUM_PHASES] = {
    "at the start",   "in a gather", "at a point of a layer",
    "after a signal", "at any time", "in the end",
};

typedef struct options {
    int64_t rounds;
    int64_t seed;
    int64_t bound_ms;
    int64_t kind; /* -1: all */
    int64_t nodes;
    int64_t masks; /* -1: now and then */
} options_t;

/* How long survivors took to be told. */
typedef struct times {
    int64_t *ns;
    size_t count;
} times_t;

static void
draw_round(fault_round_t *round, const options_t *options, uint64_t seed)
{
    rng_t rng = rng_of(seed, 0, 0);

    memset(round, 0, sizeof(*round));
    round->seed = seed;
    round->num_ranks = (int32_t)rng_int(&rng, 2, FAULT_MAX_RANKS);
    round->victim = (int32_t)rng_int(&rng, 0, round->num_ranks - 1);
    round->kind = rng_one_in(&rng, 4)   ? FAULT_STOP
                  : rng_one_in(&rng, 8) ? FAULT_STOP_CONTINUE
                                        : FAULT_KILL;
    if (options->kind >= 0) {
        round->kind = (fault_kind_t)options->kind;
    }
    round->num_nodes = (int32_t)options->nodes;
    round->phase = (fault_phase_t)rng_int(&rng, 0, FAULT_NUM_PHASES - 1);
    round->layer = (int32_t)rng_int(&rng, 1, 5);
    round->delay_us = (uint32_t)rng_int(&rng, 0, 20000);
    round->which =
        (int32_t)(round->phase == FAULT_IN_GATHER ? rng_int(&rng, 1, 6)
                  : round->phase == FAULT_AT_POINT
                      ? rng_int(&rng, 0, NUM_POINTS - 1)
                      : rng_int(&rng, 1, 40));
    if (round->phase == FAULT_IN_END) {
        round->delay_us /= 20;
    }
    round->layout = (epx_layout_t)rng_int(&rng, EPX_LAYOUT_RANK_MAJOR,
                                          EPX_LAYOUT_EXPERT_SLOTS);
    round->is_queued = rng_one_in(&rng, 2) && FAULT_DEVICE == EPX_DEVICE_CPU;
    round->is_split = rng_one_in(&rng, 2);
    round->has_slots = rng_one_in(&rng, 2);
    round->in_heap = rng_one_in(&rng, 2) && !FAULT_ON_CARD;
    round->hidden = rng_one_in(&rng, 3) ? 2048 : 64;
    if (round->phase == FAULT_AT_POINT && !round->is_split &&
        (round->which == POINT_IN_DISPATCH_HOOK ||
         round->which == POINT_IN_COMBINE_HOOK)) {
        round->is_split = true;
    }
    round->masks = round->phase != FAULT_IN_END &&
                   (options->masks < 0 ? rng_one_in(&rng, 2) : options->masks);
    round->keeps_plan = rng_one_in(&rng, 2);
    round->routes_ride = round->layout == EPX_LAYOUT_EXPERT_SLOTS &&
                         round->phase != FAULT_AT_POINT && rng_one_in(&rng, 2);
    round->second = -1;
    if (round->masks && round->num_ranks > 2 && rng_one_in(&rng, 3)) {
        round->second =
            (round->victim + (int32_t)rng_int(&rng, 1, round->num_ranks - 1)) %
            round->num_ranks;
        round->second_delay_us = (uint32_t)rng_int(&rng, 0, 3000);
    }
    /* One that is let go on may find itself in the majority. */
    if (options->nodes > 1 && round->kind == FAULT_STOP_CONTINUE &&
        !fault_most_remain(round)) {
        round->masks = false;
        round->second = -1;
    }
    if (round->second < 0) {
        round->num_newcomers = (int32_t)rng_int(&rng, 0, FAULT_MAX_NEWCOMERS);
    }
    /* Nobody is told of a rank that never came but by the clock. */
    round->timeout_ns = round->phase > FAULT_IN_GATHER ? UINT64_C(60000000000)
                        : FAULT_ON_CARD /* whose driver takes seconds */
                            ? UINT64_C(20000000000)
                            : UINT64_C(3000000000);
    round->bound_ns = options->bound_ms * 1000000;
}

static void
describe(const fault_round_t *round)
{
    fprintf(stderr,
            "round with --seed %" PRIu64 ": %d ranks, %s rank %d %s (%d, layer "
            "%d, %u us), layout %d%s%s%s%s, hidden %d%s%s, then %d (%u us), "
            "%d newcomers\n",
            round->seed, round->num_ranks, kind_names[round->kind],
            round->victim, phase_names[round->phase], round->which,
            round->layer, round->delay_us, (int)round->layout,
            round->is_queued ? ", queued" : "",
            round->is_split ? ", split" : "", round->has_slots ? ", slots" : "",
            round->in_heap ? ", in the heap" : "", round->hidden,
            round->masks ? ", masks" : "",
            round->keeps_plan ? ", keeps its plan" : "", round->second,
            round->second_delay_us, round->num_newcomers);
}

/* ---- a round's processes ---- */

/* Waits for one; kills it when it does not end. */
static bool
reap(fault_round_t *round, int32_t rank, pid_t pid, int64_t deadline_ns)
{
    const struct timespec nap = { 0, 1000000 };
    int status = 0, num_naps = 0;

    while (waitpid(pid, &status, WNOHANG) == 0) {
        if (rank == round->victim && num_naps++ % 64 == 0) {
            (void)kill(pid, SIGCONT); /* it may stop only now */
        }
        if (fault_now_ns() > deadline_ns) {
            fault_complain(round, rank, "hangs");
            (void)kill(pid, SIGKILL);
            (void)waitpid(pid, &status, 0);
            return false;
        }
        (void)nanosleep(&nap, NULL);
    }
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
        fault_complain(round, rank, "its process ended with %s %d",
                       WIFSIGNALED(status) ? "signal" : "status",
                       WIFSIGNALED(status) ? WTERMSIG(status)
                                           : WEXITSTATUS(status));
        return false;
    }
    return true;
}

static void
end_victim(fault_round_t *round, pid_t pid, int64_t deadline_ns)
{
    const struct timespec nap = { 0, 1000000 };

    while (round->kind == FAULT_STOP_CONTINUE && fault_now_ns() < deadline_ns &&
           __atomic_load_n(&round->num_told, __ATOMIC_SEQ_CST) <
               round->num_ranks - 1 - (round->second >= 0) &&
           __atomic_load_n(&round->num_gone_on, __ATOMIC_SEQ_CST) == 0) {
        (void)nanosleep(&nap, NULL);
    }
    if (round->kind == FAULT_STOP_CONTINUE) {
        (void)reap(round, round->victim, pid, deadline_ns);
        return;
    }
    (void)kill(pid, SIGKILL);
    (void)waitpid(pid, NULL, 0);
}

/* Whether the round went as it ought to. */
static bool
run_round(fault_round_t *round)
{
    int64_t deadline_ns = fault_now_ns() + INT64_C(90000000000);
    int32_t num_processes = round->num_ranks + round->num_newcomers;
    pid_t pids[FAULT_MAX_RANKS + FAULT_MAX_NEWCOMERS] = { 0 };
    int guards[2] = { port_reserve("127.0.0.1", &round->port),
                      port_reserve("127.0.0.1", &round->new_port) };
    bool is_well = true;

    if (guards[0] < 0 || guards[1] < 0) {
        perror("fault: no port on 127.0.0.1");
        exit(1);
    }
    (void)fflush(NULL);
    for (int32_t rank = 0; rank < num_processes; rank++) {
        pids[rank] = fork();
        if (pids[rank] < 0) {
            perror("fork");
            exit(1);
        }
        if (pids[rank] == 0) {
            (rank < round->num_ranks ? fault_rank_main
                                     : fault_newcomer_main)(round, rank);
            exit(0); /* not _exit: leak checkers want to look */
        }
    }
    if (round->kind == FAULT_STOP_CONTINUE) {
        end_victim(round, pids[round->victim], deadline_ns);
    }
    for (int32_t rank = 0; rank < num_processes; rank++) {
        if (rank == round->second) {
            (void)waitpid(pids[rank], NULL, 0);
        } else if (rank != round->victim) {
            (void)reap(round, rank, pids[rank], deadline_ns);
        }
    }
    if (round->kind != FAULT_STOP_CONTINUE) {
        end_victim(round, pids[round->victim], deadline_ns);
    }
    (void)close(guards[0]);
    (void)close(guards[1]);
    for (int32_t rank = 0; rank < num_processes; rank++) {
        const fault_report_t *report = &round->reports[rank];

        if (report->failed) {
            if (is_well) {
                describe(round);
            }
            fprintf(stderr, "  rank %d: %s\n", rank, report->text);
            is_well = false;
        }
    }
    return is_well;
}

/* ---- all rounds ---- */

static int
compare_times(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;

    return (x > y) - (x < y);
}

static void
print_times(const char *name, times_t *times)
{
    if (times->count == 0) {
        return;
    }
    qsort(times->ns, times->count, sizeof(*times->ns), compare_times);
    printf("%-40s %6zu told: median %9.3f ms, 99 %% %9.3f ms, all %9.3f ms\n",
           name, times->count, (double)times->ns[times->count / 2] * 1e-6,
           (double)times->ns[times->count * 99 / 100] * 1e-6,
           (double)times->ns[times->count - 1] * 1e-6);
}

static void
note_times(const fault_round_t *round, times_t *times)
{
    for (int32_t rank = 0; rank < round->num_ranks; rank++) {
        int64_t told = round->reports[rank].told_ns;

        if (told != 0 && round->struck_ns != 0 && rank != round->victim &&
            rank != round->second) {
            times->ns[times->count++] = told - round->struck_ns;
        }
    }
}

static int64_t
parse(const char *name, const char *text, int64_t low)
{
    char *end;
    long long value;

    errno = 0;
    value = strtoll(text, &end, 10);
    if (errno != 0 || end == text || *end != '\0' || value < low) {
        fprintf(stderr,
                "fault: %s is \"%s\"; it must be a number from %" PRId64
                " on\n",
                name, text, low);
        exit(2);
    }
    return value;
}

static options_t
parse_options(int argc, char **argv)
{
    const char *rounds = getenv("EPX_FAULT_ROUNDS");
    options_t options = {
        rounds == NULL ? 40 : parse("EPX_FAULT_ROUNDS", rounds, 1),
        1,
        2000,
        -1,
        1,
        -1
    };

    for (int i = 1; i + 1 < argc; i += 2) {
        if (strcmp(argv[i], "--rounds") == 0) {
            options.rounds = parse(argv[i], argv[i + 1], 1);
        } else if (strcmp(argv[i], "--seed") == 0) {
            options.seed = parse(argv[i], argv[i + 1], 0);
        } else if (strcmp(argv[i], "--bound-ms") == 0) {
            options.bound_ms = parse(argv[i], argv[i + 1], 1);
        } else if (strcmp(argv[i], "--kind") == 0) {
            options.kind = parse(argv[i], argv[i + 1], 0) % FAULT_NUM_KINDS;
        } else if (strcmp(argv[i], "--nodes") == 0) {
            options.nodes = parse(argv[i], argv[i + 1], 1);
        } else if (strcmp(argv[i], "--masks") == 0) {
            options.masks = parse(argv[i], argv[i + 1], 0) != 0;
        } else {
            fprintf(stderr, "fault: unknown option %s\n", argv[i]);
            exit(2);
        }
    }
    return options;
}

/* By a process of its own: what it opens would not survive a fork. */
static bool
has_card(void)
{
    epx_device_info_t info = EPX_DEVICE_INFO_INIT;
    int status = 1;
    pid_t pid = fork();

    if (pid == 0) {
        _exit(epx_device_query(EPX_DEVICE_CUDA, 0, &info) == EPX_OK ? 0 : 1);
    }
    return pid > 0 && waitpid(pid, &status, 0) == pid && status == 0;
}

int
main(int argc, char **argv)
{
    options_t options = parse_options(argc, argv);
    fault_round_t *round = mmap(NULL, sizeof(*round), PROT_READ | PROT_WRITE,
                                MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    times_t times[FAULT_NUM_KINDS * FAULT_NUM_PHASES];
    size_t most = (size_t)options.rounds * FAULT_MAX_RANKS;
    int64_t num_bad = 0, num_gone_on = 0;

    if (FAULT_ON_CARD && !has_card()) {
        fprintf(stderr, "fault: skipped, for there is no NVIDIA GPU here\n");
        return 77;
    }
    for (int i = 0; i < FAULT_NUM_KINDS * FAULT_NUM_PHASES; i++) {
        times[i] = (times_t){ calloc(most, sizeof(int64_t)), 0 };
    }
    if (round == MAP_FAILED) {
        perror("mmap");
        return 1;
    }
    for (int64_t i = 0; i < options.rounds; i++) {
        draw_round(round, &options, (uint64_t)(options.seed + i));
        num_bad += !run_round(round);
        num_gone_on += round->num_gone_on;
        note_times(round,
                   &times[round->kind * FAULT_NUM_PHASES + round->phase]);
    }
    if (waitpid(-1, NULL, WNOHANG) != -1 || errno != ECHILD) {
        fprintf(stderr, "fault: a process is left\n");
        num_bad++;
    }
    for (int i = 0; i < FAULT_NUM_KINDS * FAULT_NUM_PHASES; i++) {
        char name[80];

        (void)snprintf(name, sizeof(name),
                       "%s, %s:", kind_names[i / FAULT_NUM_PHASES],
                       phase_names[i % FAULT_NUM_PHASES]);
        print_times(name, &times[i]);
        free(times[i].ns);
    }
    (void)munmap(round, sizeof(*round));
    printf("%" PRId64 " epochs were begun after a mask\n", num_gone_on);
    printf("%" PRId64 " of %" PRId64 " rounds went wrong\n", num_bad,
           options.rounds);
    return num_bad == 0 ? 0 : 1;
}
