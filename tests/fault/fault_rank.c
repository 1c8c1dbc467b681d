/* SPDX-License-Identifier: MIT */
#include "conformance/holdings.h"
#include "core/atomic.h"
#include "core/group.h"
#include "fault.h"

#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { END_LAYERS = 3, NEW_LAYERS = 3, MORE_LAYERS = 20 };

/* The fault must have come long before. */
static const int64_t patience_ns = INT64_C(30000000000);

/* A rank's life. */
typedef struct life {
    fault_round_t *round;
    int32_t rank;
    epx_bootstrap_t *bootstrap;
    epx_group_t *group;
    int32_t num_gathers;
    pthread_t striker;
    bool has_striker;
    int32_t last_layer; /* where run_layers stops; 0: only at the fault */
} life_t;

/* ---- the fault ---- */

static bool
has_struck(const fault_round_t *round)
{
    return __atomic_load_n(&round->struck_ns, __ATOMIC_SEQ_CST) != 0;
}

/* Once, though two threads may come to it. */
static void
strike(fault_round_t *round)
{
    int64_t never = 0;

    if (__atomic_compare_exchange_n(&round->struck_ns, &never, fault_now_ns(),
                                    false, __ATOMIC_SEQ_CST,
                                    __ATOMIC_SEQ_CST)) {
        (void)raise(round->kind == FAULT_KILL ? SIGKILL : SIGSTOP);
    }
}

static void *
strike_later(void *argument)
{
    const life_t *life = argument;

    (void)usleep(life->round->delay_us);
    strike(life->round);
    return NULL;
}

/* Whether a rank has signalled a step in a peer's segment: at a gate or, on a
 * card, by what it tells at the step's start. */
static bool
has_signalled(const epx_group_t *group, char *segment, uint64_t step,
              epx__gate_t gate)
{
    uint32_t rank = (uint32_t)group->rank;
    const uint64_t *words = epx__map_words(&group->map, segment, step, rank);

    return FAULT_DEVICE == EPX_DEVICE_CPU
               ? epx__load_acquire_u64(epx__map_arrival(
                     &group->map, segment, step, gate, rank)) >= step
               : epx__load_acquire_u64(&words[0]) >> 32 >= step ||
                     epx__load_acquire_u64(&words[EPX__POST_WORDS]) >> 32 >=
                         step;
}

/* Once the victim's signal of a step is at a peer's gate, which it may leave
 * the next moment. */
static void *
strike_after_signal(void *argument)
{
    const life_t *life = argument;
    fault_round_t *round = life->round;
    epx_group_t *group = life->group;
    int32_t peer = (life->rank + 1 + (int32_t)(round->seed % 7)) %
                   round->num_ranks; /* may be itself, the last to signal */
    epx__gate_t gate = (epx__gate_t)(round->seed / 7 % EPX__NUM_GATES);
    char *segment = group->peers[peer].base != NULL ? group->peers[peer].base
                                                    : epx__group_segment(group);
    int64_t give_up = fault_now_ns() + patience_ns;

    while (!has_signalled(group, segment, (uint64_t)round->which, gate) &&
           fault_now_ns() < give_up) {
    }
    strike(round);
    return NULL;
}

static void
start_striker(life_t *life, fault_phase_t phase, void *(*main)(void *argument))
{
    if (life->rank == life->round->victim && life->round->phase == phase) {
        life->has_striker =
            pthread_create(&life->striker, NULL, main, life) == 0;
    }
}

static void
at_point(void *context, int32_t layer, fault_point_t point)
{
    life_t *life = context;
    const fault_round_t *round = life->round;

    if (life->rank == round->victim && round->phase == FAULT_AT_POINT &&
        (int32_t)point == round->which && layer == round->layer) {
        strike(life->round);
    }
}

/* The bootstrap's, with a fault before call n (2n - 1) or after it (2n). */
static epx_status_t
gather_with_fault(void *context, const void *send, void *recv, size_t bytes,
                  int64_t deadline_ns)
{
    life_t *life = context;
    bool is_mine = life->rank == life->round->victim &&
                   life->round->phase == FAULT_IN_GATHER;
    epx_status_t status;

    life->num_gathers++;
    if (is_mine && life->round->which == 2 * life->num_gathers - 1) {
        strike(life->round);
    }
    status = life->bootstrap->allgather(life->bootstrap->context, send, recv,
                                        bytes, deadline_ns);
    if (is_mine && life->round->which == 2 * life->num_gathers) {
        strike(life->round);
    }
    return status;
}

/* ---- what a process holds ---- */

typedef struct holdings {
    int fds;
    int threads;
    int segments;
} holdings_t;

static holdings_t
holdings_now(void)
{
    FILE *maps = fopen("/proc/self/maps", "r");
    holdings_t now = { 0 };
    char line[512];

    while (maps != NULL && fgets(line, sizeof(line), maps) != NULL) {
        now.segments += strstr(line, "epx-segment") != NULL;
    }
    if (maps != NULL) {
        (void)fclose(maps);
    }
    now.fds = count_descriptors();
    if (FAULT_DEVICE == EPX_DEVICE_CPU) { /* the emulation keeps its own */
        now.threads = count_threads();
    }
    return now;
}

static void
check_holdings(const life_t *life, const char *when, const holdings_t *before)
{
    holdings_t now = holdings_now();

    if ((!FAULT_ON_CARD && /* whose driver keeps its own */
         (now.fds != before->fds || now.threads != before->threads)) ||
        now.segments != 0) {
        fault_complain(life->round, life->rank,
                       "%s: %d descriptors, %d threads, %d segments; before it "
                       "had %d, %d and 0",
                       when, now.fds, now.threads, now.segments, before->fds,
                       before->threads);
    }
}

/* ---- the first group ---- */

static void
set_number(const char *name, int64_t value)
{
    char text[24];

    (void)snprintf(text, sizeof(text), "%lld", (long long)value);
    (void)setenv(name, text, 1);
}

static void
set_environment(const fault_round_t *round, int32_t rank, int32_t num_ranks,
                uint16_t port)
{
    set_number("RANK", rank);
    set_number("WORLD_SIZE", num_ranks);
    set_number("EPX_PORT", port);
    set_number("EPX_JOB_ID", (int64_t)(round->seed >> 1) + num_ranks);
    (void)setenv("MASTER_ADDR", "127.0.0.1", 1);
    (void)setenv("EPX_SECRET",
                 "000102030405060708090a0b0c0d0e0f"
                 "101112131415161718191a1b1c1d1e1f",
                 1);
}

static epx_status_t
create_group(life_t *life)
{
    epx_group_config_t config = EPX_GROUP_CONFIG_INIT;
    epx_bootstrap_t bootstrap;
    epx_status_t status =
        epx_bootstrap_env_create(life->round->timeout_ns, &life->bootstrap);

    if (status != EPX_OK) {
        return status;
    }
    bootstrap = *life->bootstrap;
    bootstrap.allgather = gather_with_fault;
    bootstrap.context = life;
    config.bootstrap = &bootstrap;
    config.device = FAULT_DEVICE;
    config.heap_bytes = 16 << 20;
    config.num_workers = 1 + life->rank % 2;
    config.timeout_ns = life->round->timeout_ns;
    config.node = 1 + life->rank % life->round->num_nodes;
    status = epx_group_create(&config, &life->group);
    epx_bootstrap_destroy(life->bootstrap);
    return status;
}

static bool
names(int32_t rank)
{
    char name[32];

    (void)snprintf(name, sizeof(name), "rank %d ", rank);
    return strncmp(epx_last_error(), name, strlen(name)) == 0;
}

static bool
names_the_victim(const fault_round_t *round)
{
    return names(round->victim) ||
           (round->second >= 0 &&
            (names(round->second) ||
             strncmp(epx_last_error(), "ranks ", 6) == 0));
}

/* Whether this rank's end is nobody's business. */
static bool
is_struck(const life_t *life)
{
    return life->rank == life->round->victim ||
           life->rank == life->round->second;
}

/* The fault has come to light. */
static void
check_told(const life_t *life, epx_status_t status)
{
    fault_round_t *round = life->round;
    fault_report_t *report = &round->reports[life->rank];
    int64_t allowed = round->bound_ns;
    int64_t took;

    report->told_ns = fault_now_ns();
    took =
        report->told_ns - __atomic_load_n(&round->struck_ns, __ATOMIC_SEQ_CST);
    if (is_struck(life)) {
        return; /* let go on, it need only end */
    }
    if (!has_struck(round)) {
        fault_complain(round, life->rank, "before the fault: status %d: %s",
                       (int)status, epx_last_error());
        return;
    }
    if (life->group == NULL) { /* who never came is only missed in the end */
        allowed += (int64_t)round->timeout_ns;
    } else if (status != EPX_ERR_PEER_LOST || !names_the_victim(round)) {
        fault_complain(round, life->rank, "status %d: %s", (int)status,
                       epx_last_error());
    }
    if (took > allowed) {
        fault_complain(round, life->rank, "told after %.3f s: %s",
                       (double)took * 1e-9, epx_last_error());
    }
}

/* What a group that has failed may still do. */
static void
check_broken(const life_t *life)
{
    void *memory;
    epx_status_t polled = epx_group_status(life->group);
    epx_status_t next;

    if (polled == EPX_OK) {
        fault_complain(life->round, life->rank, "epx_group_status is EPX_OK");
    }
    next = epx_mem_alloc(life->group, 64, &memory);
    if (FAULT_DEVICE == EPX_DEVICE_CUDA && next == polled) {
        /* Kernels fail by themselves: no call had told of it. */
        next = epx_mem_alloc(life->group, 64, &memory);
    }
    if (next != EPX_ERR_BROKEN &&
        (next != EPX_ERR_MASKED || !is_struck(life))) {
        fault_complain(life->round, life->rank, "the next call gives %d: %s",
                       (int)next, epx_last_error());
    }
}

/* Runs layers until the fault, or some. */
static epx_status_t
run_layers(life_t *life, fault_layers_t *layers)
{
    fault_round_t *round = life->round;
    fault_report_t *report = &round->reports[life->rank];
    int64_t give_up = fault_now_ns() + patience_ns;
    epx_status_t status = EPX_OK;

    while (status == EPX_OK &&
           (life->last_layer == 0 || report->num_layers < life->last_layer)) {
        const char *wrong;

        if (fault_now_ns() > give_up) {
            fault_complain(round, life->rank, "the fault never came");
            return EPX_OK;
        }
        status = fault_layers_run(layers, report->num_layers + 1, &wrong);
        if (status == EPX_OK && wrong != NULL) {
            fault_complain(round, life->rank, "layer %d: %s",
                           report->num_layers + 1, wrong);
        }
        report->num_layers += status == EPX_OK;
    }
    return status;
}

/* Who is masked, which is nobody that takes part. */
static void
check_masks(const life_t *life, const int32_t *masked)
{
    fault_round_t *round = life->round;

    for (int32_t rank = 0; rank < round->num_ranks; rank++) {
        if (masked[rank] == 0
                ? rank == round->victim
                : rank != round->victim && rank != round->second &&
                      __atomic_load_n(&round->has_left[rank],
                                      __ATOMIC_SEQ_CST) == 0) {
            fault_complain(round, life->rank, "the mask of rank %d is %d", rank,
                           masked[rank]);
        }
    }
}

bool
fault_most_remain(const fault_round_t *round)
{
    int32_t remain = round->num_ranks - 1 - (round->second >= 0);

    return 2 * remain > round->num_ranks;
}

/* Between nodes only a majority goes on; whether half of the ranks are one may
 * depend on how many were lost at a time. */
static bool
may_be_refused(const fault_round_t *round)
{
    int32_t remain = round->num_ranks - 1 - (round->second >= 0);

    return round->num_nodes > 1 && !fault_most_remain(round) &&
           (2 * remain < round->num_ranks || round->victim == 0 ||
            round->second == 0) &&
           strstr(epx_last_error(), "ranks remain") != NULL;
}

/* Without those that are lost, as often as it takes.  The first layer of each
 * epoch has a number that all can tell. */
static void
go_on(life_t *life, fault_layers_t *layers)
{
    fault_round_t *round = life->round;
    epx_status_t status;

    do {
        int32_t masked[FAULT_MAX_RANKS];
        int32_t count = 0;

        status = epx_group_mask(life->group, NULL, 0);
        if (life->rank == round->victim &&
            (status == EPX_ERR_MASKED ||
             (status == EPX_ERR_PEER_LOST && round->num_nodes > 1 &&
              strstr(epx_last_error(), "ranks remain") != NULL))) {
            return; /* it was let go on */
        }
        if (status == EPX_ERR_PEER_LOST && may_be_refused(round)) {
            return;
        }
        if (status != EPX_OK ||
            epx_group_masked(life->group, masked) != EPX_OK) {
            fault_complain(round, life->rank, "epx_group_mask gives %d: %s",
                           (int)status, epx_last_error());
            return;
        }
        for (int32_t rank = 0; rank < round->num_ranks; rank++) {
            count += masked[rank];
        }
        check_masks(life, masked);
        fault_layers_mask(layers, masked);
        (void)__atomic_add_fetch(&round->num_gone_on, 1, __ATOMIC_SEQ_CST);
        round->reports[life->rank].num_layers = 1000 * count;
        life->last_layer = 1000 * count + MORE_LAYERS;
        status = run_layers(life, layers);
    } while (status == EPX_ERR_PEER_LOST);
    /* Else blocks that the victim may still write to are kept; and those of a
     * card's plan until a later one is made. */
    if (round->kind == FAULT_KILL && FAULT_DEVICE == EPX_DEVICE_CPU &&
        !fault_layers_are_clean(layers)) {
        fault_complain(round, life->rank, "some of the heap is lost");
    }
    if (status != EPX_OK) {
        fault_complain(round, life->rank, "going on: status %d: %s",
                       (int)status, epx_last_error());
    }
}

static void *
strike_second(void *argument)
{
    const life_t *life = argument;

    while (!has_struck(life->round)) {
        (void)usleep(100);
    }
    (void)usleep(life->round->second_delay_us);
    (void)raise(SIGKILL);
    return NULL;
}

static void
use_group(life_t *life)
{
    fault_round_t *round = life->round;
    fault_layers_t *layers =
        fault_layers_open(round, life->group, at_point, life);
    epx_status_t status;

    if (layers == NULL) {
        /* It may have failed by now; else memory is missing. */
        status = epx_group_status(life->group);
        if (status == EPX_OK) {
            fault_complain(round, life->rank, "no layers");
        }
    } else {
        start_striker(life, FAULT_ANY_TIME, strike_later);
        start_striker(life, FAULT_AT_SIGNAL,
                      FAULT_ON_CARD ? strike_later : strike_after_signal);
        if (life->rank == round->second) {
            life->has_striker =
                pthread_create(&life->striker, NULL, strike_second, life) == 0;
        }
        life->last_layer = round->phase == FAULT_IN_END ? END_LAYERS : 0;
        status = run_layers(life, layers);
    }
    if (status != EPX_OK) {
        check_told(life, status);
        check_broken(life);
    }
    if (status != EPX_OK && layers != NULL && round->masks) {
        go_on(life, layers);
    }
    __atomic_store_n(&round->has_left[life->rank], 1, __ATOMIC_SEQ_CST);
    start_striker(life, FAULT_IN_END, strike_later);
    if (layers != NULL) {
        fault_layers_close(layers);
    }
    status = epx_group_destroy(life->group);
    if (status != EPX_OK) {
        fault_complain(round, life->rank, "epx_group_destroy: %s",
                       epx_last_error());
    }
}

/* ---- the second group ---- */

static void
never(void *context, int32_t layer, fault_point_t point)
{
    (void)context;
    (void)layer;
    (void)point;
}

/* The survivors and the newcomers. */
static void
start_anew(const life_t *life)
{
    fault_round_t *round = life->round;
    epx_group_config_t config = EPX_GROUP_CONFIG_INIT;
    fault_layers_t *layers = NULL;
    epx_group_t *group;

    set_environment(round, life->rank - (life->rank > round->victim),
                    round->num_ranks - 1 + round->num_newcomers,
                    round->new_port);
    config.device = FAULT_DEVICE;
    config.heap_bytes = 16 << 20;
    config.num_workers = 1;
    config.node = 1 + life->rank % round->num_nodes;
    if (epx_group_create(&config, &group) != EPX_OK) {
        fault_complain(round, life->rank, "a new group: %s", epx_last_error());
        return;
    }
    layers = fault_layers_open(round, group, never, NULL);
    for (int32_t i = 1; layers != NULL && i <= NEW_LAYERS; i++) {
        const char *wrong = NULL;

        if (fault_layers_run(layers, i, &wrong) != EPX_OK || wrong != NULL) {
            fault_complain(round, life->rank, "in a new group: %s",
                           wrong != NULL ? wrong : epx_last_error());
        }
    }
    if (layers != NULL) {
        fault_layers_close(layers);
    }
    if (epx_group_destroy(group) != EPX_OK) {
        fault_complain(round, life->rank, "the end of a new group: %s",
                       epx_last_error());
    }
}

void
fault_newcomer_main(fault_round_t *round, int32_t number)
{
    life_t life = { .round = round, .rank = number };
    const struct timespec nap = { 0, 1000000 };

    while (__atomic_load_n(&round->num_told, __ATOMIC_SEQ_CST) <
           round->num_ranks - 1) {
        (void)nanosleep(&nap, NULL);
    }
    start_anew(&life);
}

static void *
do_nothing(void *argument)
{
    return argument;
}

/* Sanitizers start a thread of their own with the first one. */
static void
warm_up(void)
{
    pthread_t thread;

    if (pthread_create(&thread, NULL, do_nothing, NULL) == 0) {
        (void)pthread_join(thread, NULL);
    }
}

void
fault_rank_main(fault_round_t *round, int32_t rank)
{
    life_t life = { .round = round, .rank = rank };
    holdings_t before;
    epx_status_t status;

    set_environment(round, rank, round->num_ranks, round->port);
    warm_up();
    before = holdings_now();
    start_striker(&life, FAULT_AT_START, strike_later);
    status = create_group(&life);
    if (status != EPX_OK) {
        life.group = NULL;
        check_told(&life, status);
    } else {
        use_group(&life);
    }
    if (rank == round->victim) {
        strike(round); /* at the latest */
        if (life.has_striker) {
            (void)pthread_join(life.striker, NULL);
        }
    }
    if (rank == round->second) {
        (void)raise(SIGKILL);
    }
    check_holdings(&life, "after the fault", &before);
    (void)__atomic_add_fetch(&round->num_told, 1, __ATOMIC_SEQ_CST);
    if (rank != round->victim && round->second < 0) {
        start_anew(&life);
        check_holdings(&life, "after a new group", &before);
    }
}
