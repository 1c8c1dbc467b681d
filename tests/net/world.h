/* SPDX-License-Identifier: MIT */
/* Ranks that have nothing but a net between them: threads of this process, or
 * processes of their own. */
#ifndef EPX_TESTS_NET_WORLD_H
#define EPX_TESTS_NET_WORLD_H

#include "core/clock.h"
#include "core/group.h"
#include "net/net.h"
#include "net/net_backend.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/types.h>
#include <unistd.h>

/* In any thread of any rank: its failure is the program's. */
#define CHECK(condition, ...)                                               \
    do {                                                                    \
        if (!(condition)) {                                                 \
            fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
            fprintf(stderr, __VA_ARGS__);                                   \
            fprintf(stderr, " (%s)\n", epx_last_error());                   \
            _exit(1);                                                       \
        }                                                                   \
    } while (0)

#define CHECK_OK(expression)                                        \
    do {                                                            \
        epx_status_t status_ = (expression);                        \
        CHECK(status_ == EPX_OK, "%s", epx_status_string(status_)); \
    } while (0)

typedef struct world {
    int32_t num_ranks;
    const epx__net_backend_t *backend;
    void *backend_context;
    const char *device;
    epx__net_wire_t wire;
    const epx__net_setting_t *settings;
    uint64_t beat_ns;
    uint64_t lost_after_ns;
    uint64_t timeout_ns;
    int64_t spin_ns;
    uint32_t num_channels;
    uint32_t num_card_channels;
    bool is_manual;
    void *argument; /* the test's own */
} world_t;

/* A world with what most tests want. */
world_t world_make(int32_t num_ranks, const epx__net_backend_t *backend);

typedef struct rank {
    const world_t *world;
    int32_t rank;
    epx__net_t *net;
    epx__map_t map;
    epx_group_t group; /* what epx__wait_all needs of it */
    epx__peer_t *peers;
    epx_status_t (*allgather)(void *, const void *, void *, size_t, int64_t);
    void *allgather_context;
    int32_t num_lost; /* that the callback was told of */
    int32_t lost_rank;
    epx_status_t lost_status;
    char lost_text[256];
    int64_t lost_ns; /* when */
} rank_t;

/* Peers that the net has told to be lost: then lost_rank and its sentence are
 * there. */
static inline int
num_lost(const rank_t *rank)
{
    return __atomic_load_n(&rank->num_lost, __ATOMIC_ACQUIRE);
}

typedef void rank_main_t(rank_t *rank);

/* Run main for every rank in a thread of its own, between open and close. */
void world_run_threads(const world_t *world, rank_main_t *main);

/* The same in processes.  prepare, if there is one, runs first in each.  The
 * caller's parent_main sees the processes while they run. */
void world_run_processes(const world_t *world, rank_main_t *main,
                         void (*prepare)(int32_t rank),
                         void (*parent_main)(const world_t *world,
                                             const pid_t *pids));

/* For tests that drive nets themselves. */
void rank_open(rank_t *rank);
void rank_close(rank_t *rank);

void rank_barrier(rank_t *rank);
int64_t rank_deadline(const rank_t *rank);

/* Words that all processes of the world see, zero at first. */
extern uint64_t *world_shared;

void fill(void *to, size_t bytes, uint64_t seed);
/* The first byte that differs, or -1. */
int64_t differs(const void *from, size_t bytes, uint64_t seed);

#endif
