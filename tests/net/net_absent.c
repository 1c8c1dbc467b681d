/* SPDX-License-Identifier: MIT */
/* A rank that cannot take part: it fails, the others hear of it with its card,
 * and nobody waits for it afterwards. */
#include "sim.h"
#include "world.h"

#include <pthread.h>
#include <string.h>

#define NUM_RANKS 3

typedef struct player {
    epx_bootstrap_t *bootstrap;
    sim_t *sim;
    int32_t rank;
    int num_gathers;
} player_t;

static epx_status_t
gather(void *context, const void *send, void *recv, size_t bytes,
       int64_t deadline_ns)
{
    player_t *player = context;

    player->num_gathers++;
    return player->bootstrap->allgather(player->bootstrap->context, send, recv,
                                        bytes, deadline_ns);
}

static void *
play(void *argument)
{
    player_t *player = argument;
    const bool is_bad = player->rank == 1;
    const epx__map_t map = epx__map_make(NUM_RANKS, 16);
    const epx__net_config_t config = {
        .rank = player->rank,
        .num_ranks = NUM_RANKS,
        .allgather = gather,
        .allgather_context = player,
        .map = &map,
        .timeout_ns = (uint64_t)(5 * EPX__NS_PER_SEC),
        .lost_after_ns = is_bad ? 0 : (uint64_t)EPX__NS_PER_SEC,
        .core = -1,
        .backend = &sim_backend,
        .backend_context = player->sim,
    };
    epx__net_t *net;
    epx_status_t status = epx__net_open(&net, &config);

    CHECK(status == (is_bad ? EPX_ERR_INVALID : EPX_ERR_PEER_LOST),
          "rank %d: %d: %s", player->rank, (int)status, epx_last_error());
    CHECK(is_bad || strstr(epx_last_error(), "rank 1 cannot take part") != NULL,
          "rank %d: %s", player->rank, epx_last_error());
    CHECK(player->num_gathers == 1, "rank %d gathered %d times", player->rank,
          player->num_gathers);
    return NULL;
}

int
main(void)
{
    const sim_faults_t faults = { 0 };
    sim_t *sim = sim_create(NUM_RANKS, 1, &faults);
    epx_bootstrap_t *bootstraps[NUM_RANKS];
    player_t players[NUM_RANKS];
    pthread_t threads[NUM_RANKS];

    CHECK_OK(epx_bootstrap_threads_create(NUM_RANKS, bootstraps));
    for (int32_t r = 0; r < NUM_RANKS; r++) {
        players[r] = (player_t){ bootstraps[r], sim, r, 0 };
        CHECK(pthread_create(&threads[r], NULL, play, &players[r]) == 0,
              "no thread");
    }
    for (int32_t r = 0; r < NUM_RANKS; r++) {
        (void)pthread_join(threads[r], NULL);
        epx_bootstrap_destroy(bootstraps[r]);
    }
    sim_destroy(sim);
    return 0;
}
