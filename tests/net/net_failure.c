/* SPDX-License-Identifier: MIT */
/*
 * A peer that is killed, that hangs, or whose packets vanish: every survivor is
 * told which, within two seconds; what it had under way with that peer ends,
 * and with others goes on.
 */
#include "hosts.h"
#include "needs.h"
#include "sim.h"
#include "world.h"

#include <signal.h>
#include <string.h>

#define BYTES   ((uint64_t)8 << 20)
#define LIMIT   (2 * EPX__NS_PER_SEC)
#define CHANNEL 2

/* Words that the processes share. */
enum { FAILED_AT = 0, READY = 8, TOLD = 16 };

typedef enum what {
    KILL_IDLE,
    KILL_STREAMING,
    STOP,
    STOP_SHORTLY,
    CUT,
} what_t;

typedef struct scenario {
    const char *name;
    what_t what;
    int32_t num_ranks;
    int32_t victim;
} scenario_t;

static void
set_word(int index, uint64_t value)
{
    __atomic_store_n(&world_shared[index], value, __ATOMIC_SEQ_CST);
}

static uint64_t
get_word(int index)
{
    return __atomic_load_n(&world_shared[index], __ATOMIC_SEQ_CST);
}

static void
await_word(int index)
{
    for (int i = 0; get_word(index) == 0; i++) {
        CHECK(i < 20000, "word %d stays zero", index);
        (void)usleep(1000);
    }
}

/* All that a rank receives goes to the same place: what matters is not here. */
static void
open_slots(rank_t *rank, char *memory)
{
    for (int32_t peer = 0; peer < rank->world->num_ranks; peer++) {
        void *halves[2] = { memory, memory };

        if (peer != rank->rank) {
            CHECK_OK(
                epx__net_slot_open(rank->net, CHANNEL, peer, 1, halves, BYTES));
        }
    }
}

static epx_status_t
send_turn(rank_t *rank, int32_t peer, uint64_t turn, const struct iovec *range,
          epx__net_done_t *done)
{
    const epx__net_send_t send = { .peer = peer,
                                   .channel = CHANNEL,
                                   .turn = turn,
                                   .total = range->iov_len,
                                   .ranges = range,
                                   .num_ranges = 1,
                                   .done = done };

    return epx__net_send(rank->net, &send);
}

/* Some turns between the survivors, to and fro. */
static void
talk(rank_t *rank, const scenario_t *scenario, char *memory, uint64_t turns)
{
    struct iovec range = { memory, 100000 };
    bool sources[8] = { false };
    epx__net_done_t done = { 0 };

    for (int32_t r = 0; r < scenario->num_ranks; r++) {
        sources[r] = r != rank->rank && r != scenario->victim;
    }
    for (uint64_t turn = 1; turn <= turns; turn++) {
        for (int32_t r = 0; r < scenario->num_ranks; r++) {
            if (sources[r]) {
                CHECK_OK(send_turn(rank, r, turn, &range, &done));
            }
        }
        CHECK_OK(epx__net_wait(rank->net, CHANNEL, turn, sources,
                               rank_deadline(rank), "talk"));
        for (int32_t r = 0; r < scenario->num_ranks; r++) {
            if (sources[r]) {
                epx__net_slot_release(rank->net, CHANNEL, r, turn);
            }
        }
        CHECK_OK(
            epx__net_done_wait(rank->net, &done, rank_deadline(rank), "talk"));
    }
}

/* One turn of a stream: the other end answers with an empty one once it has
 * read it. */
static epx_status_t
stream(rank_t *rank, int32_t peer, uint64_t turn, const struct iovec *range,
       bool is_sender)
{
    epx__net_done_t done = { 0 };
    bool sources[8] = { false };
    epx_status_t status = EPX_OK;

    sources[peer] = true;
    if (is_sender) {
        status = send_turn(rank, peer, turn, range, &done);
        if (status == EPX_OK) {
            status = epx__net_done_wait(rank->net, &done, rank_deadline(rank),
                                        "a stream");
        }
    }
    if (status == EPX_OK) {
        status =
            epx__net_wait(rank->net, CHANNEL, turn, sources,
                          epx__now_ns() + 60 * EPX__NS_PER_SEC, "a stream");
    }
    if (status == EPX_OK) {
        epx__net_slot_release(rank->net, CHANNEL, peer, turn);
    }
    if (status == EPX_OK && !is_sender) {
        /* Read when it is sent, which nothing here waits for. */
        static const struct iovec nothing = { NULL, 0 };

        status = send_turn(rank, peer, turn, &nothing, NULL);
    }
    return status;
}

/* Rank 0 streams to the victim until that fails, others wait for it to send. */
static epx_status_t
meet_failure(rank_t *rank, const scenario_t *scenario, char *memory)
{
    struct iovec range = { memory, BYTES };
    epx_status_t status = EPX_OK;
    bool sources[8] = { false };

    if (rank->rank == 0 && scenario->what != KILL_IDLE) {
        for (uint64_t turn = 1; status == EPX_OK; turn++) {
            status = stream(rank, scenario->victim, turn, &range, true);
        }
        return status;
    }
    sources[scenario->victim] = true;
    return epx__net_wait(rank->net, CHANNEL, 1, sources, rank_deadline(rank),
                         "a message of the victim");
}

static epx_status_t
be_victim(rank_t *rank)
{
    epx_status_t status = EPX_OK;

    for (uint64_t turn = 1; status == EPX_OK; turn++) {
        status = stream(rank, 0, turn, NULL, false);
    }
    return status;
}

static void
check_told(rank_t *rank, const scenario_t *scenario, int32_t victim,
           epx_status_t status)
{
    int64_t failed_at = (int64_t)get_word(FAILED_AT);
    char name[16];

    (void)snprintf(name, sizeof(name), "rank %d ", victim);
    CHECK(status == EPX_ERR_PEER_LOST, "%s: %s", scenario->name,
          epx_status_string(status));
    CHECK(strncmp(epx_last_error(), name, strlen(name)) == 0, "%s",
          scenario->name);
    CHECK(num_lost(rank) == 1 && rank->lost_rank == victim,
          "%s: %d peers lost, the last one rank %d", scenario->name,
          num_lost(rank), rank->lost_rank);
    CHECK(failed_at > 0 && rank->lost_ns - failed_at <= LIMIT,
          "%s: told after %.3f s", scenario->name,
          (double)(rank->lost_ns - failed_at) * 1e-9);
    printf("%s: rank %d told after %.3f s: %s\n", scenario->name, rank->rank,
           (double)(rank->lost_ns - failed_at) * 1e-9, rank->lost_text);
    fflush(stdout);
}

static void
failure_main(rank_t *rank)
{
    const scenario_t *scenario = rank->world->argument;
    char *memory = calloc(1, BYTES);
    epx_status_t status;

    open_slots(rank, memory);
    rank_barrier(rank);
    set_word(READY + rank->rank, 1);
    if (rank->rank == scenario->victim) {
        status = be_victim(rank);
        if (scenario->what == CUT) {
            check_told(rank, scenario, 0, status);
        }
        _exit(0); /* whether it was cut off, or stopped and let go again */
    }
    if (scenario->what == STOP_SHORTLY) {
        await_word(FAILED_AT);
        talk(rank, scenario, memory, 200);
        CHECK(num_lost(rank) == 0, "%s: %s", scenario->name, rank->lost_text);
    } else {
        status = meet_failure(rank, scenario, memory);
        check_told(rank, scenario, scenario->victim, status);
        talk(rank, scenario, memory, 20);
    }
    set_word(TOLD + rank->rank, 1);
    /* Nobody leaves while others still check. */
    for (int32_t r = 0; r < scenario->num_ranks; r++) {
        if (r != scenario->victim) {
            await_word(TOLD + r);
        }
    }
    free(memory);
}

static void
strike(const world_t *world, const pid_t *pids)
{
    const scenario_t *scenario = world->argument;
    pid_t victim = pids[scenario->victim];

    for (int32_t r = 0; r < scenario->num_ranks; r++) {
        await_word(READY + r);
    }
    (void)usleep(200000); /* in the midst of it */
    set_word(FAILED_AT, (uint64_t)epx__now_ns());
    if (scenario->what == CUT) {
        bool is_cut = hosts_cut(scenario->victim);

        /* Uncut, they would stream to each other for ever. */
        for (int32_t r = 0; r < scenario->num_ranks && !is_cut; r++) {
            (void)kill(pids[r], SIGKILL);
        }
        CHECK(is_cut, "nft, of the package nftables, has failed");
        return;
    }
    CHECK(kill(victim, scenario->what == STOP || scenario->what == STOP_SHORTLY
                           ? SIGSTOP
                           : SIGKILL) == 0,
          "%m");
    for (int32_t r = 0; r < scenario->num_ranks; r++) {
        if (r != scenario->victim) {
            await_word(TOLD + r);
        }
    }
    (void)kill(victim, SIGKILL);
}

static void
run(epx__net_wire_t wire, scenario_t *scenario, bool apart)
{
    world_t world = world_make(scenario->num_ranks, &epx__net_ucx);

    world.wire = wire;
    world.argument = scenario;
    if (scenario->what == STOP_SHORTLY) {
        world.lost_after_ns = (uint64_t)(10 * EPX__NS_PER_SEC);
        world.timeout_ns = world.lost_after_ns / 5; /* to part from it */
    }
    if (apart) {
        world.device = HOSTS_DEVICE;
    }
    world_run_processes(&world, failure_main, apart ? hosts_enter : NULL,
                        strike);
}

/* The simulated network has no connection that could break: silence tells. */
static void
cut_main(rank_t *rank)
{
    const scenario_t *scenario = rank->world->argument;
    char *memory = calloc(1, BYTES);

    open_slots(rank, memory);
    rank_barrier(rank);
    if (rank->rank == 0) {
        sim_cut(rank->world->backend_context, scenario->victim, true);
    }
    rank_barrier(rank);
    if (rank->rank != scenario->victim) {
        struct iovec range = { memory, 1000 };
        epx__net_done_t done = { 0 };
        char name[16];

        (void)snprintf(name, sizeof(name), "rank %d ", scenario->victim);
        CHECK_OK(send_turn(rank, scenario->victim, 1, &range, &done));
        CHECK(epx__net_done_wait(rank->net, &done, rank_deadline(rank),
                                 "silence") == EPX_ERR_PEER_LOST,
              "simulated cut");
        CHECK(strncmp(epx_last_error(), name, strlen(name)) == 0, "cut");
        talk(rank, scenario, memory, 20);
    }
    rank_barrier(rank);
    free(memory);
}

static void
run_simulated(epx__net_wire_t wire, uint64_t seed)
{
    const sim_faults_t faults = { .max_delay_ns = EPX__NS_PER_MS / 4,
                                  .repeated_per_mille = 100,
                                  .slow_per_mille = 300 };
    scenario_t scenario = { "simulated cut", CUT, 3, 2 };
    world_t world = world_make(3, &sim_backend);
    sim_t *sim = sim_create(3, seed, &faults);

    world.backend_context = sim;
    world.wire = wire;
    world.argument = &scenario;
    world.beat_ns = 0;
    world.lost_after_ns = (uint64_t)(500 * EPX__NS_PER_MS);
    world_run_threads(&world, cut_main);
    sim_destroy(sim);
}

int
main(void)
{
    scenario_t local[] = {
        { "killed while idle", KILL_IDLE, 3, 2 },
        { "killed while streaming", KILL_STREAMING, 4, 3 },
        { "stopped", STOP, 3, 2 },
        { "stopped shortly", STOP_SHORTLY, 3, 2 },
    };
    scenario_t cut = { "silent cut", CUT, 2, 1 };

    static const epx__net_wire_t wires[] = { EPX__NET_WIRE_AM,
                                             EPX__NET_WIRE_RMA };

    for (int w = 0; w < 2; w++) {
        for (uint64_t seed = 1; seed <= 5; seed++) {
            run_simulated(wires[w], seed);
        }
    }
    if (!has_ucx()) {
        return 77;
    }
    for (int w = 0; w < 2; w++) {
        for (size_t i = 0; i < sizeof(local) / sizeof(local[0]); i++) {
            /* UCX 1.13, where it emulates puts, aborts when the sender dies
             * before it is told that its put has landed. */
            if (wires[w] == EPX__NET_WIRE_AM ||
                local[i].what != KILL_STREAMING) {
                run(wires[w], &local[i], false);
            }
        }
        if (hosts_make()) {
            run(wires[w], &cut, true);
            hosts_remove();
        }
    }
    return 0;
}
