/* SPDX-License-Identifier: MIT */
/*
 * Threads of one process gather through one shared struct: each leaves word
 * where its block is and where it wants the result; the last to come copies for
 * all, while the others sleep.
 */
#include "bootstrap/bootstrap.h"
#include "bootstrap/rank_set.h"
#include "core/clock.h"
#include "core/status.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

typedef struct seat {
    const void *send;
    void *recv;
    size_t bytes;
    bool here; /* waits in the allgather under way */
    bool gone; /* has destroyed its bootstrap */
} seat_t;

/* Everything under the mutex. */
typedef struct round_table {
    pthread_mutex_t mutex;
    pthread_cond_t turned_cond; /* sequence, broken or num_refs changed */
    int32_t num_ranks;
    int32_t num_refs;
    int32_t num_here;
    uint64_t sequence; /* of the allgather under way, from 1 */
    epx__error_t broken;
    seat_t seats[]; /* [num_ranks] */
} round_table_t;

typedef struct place {
    round_table_t *table;
    int32_t rank;
} place_t;

static bool
is_missing(const void *context, int32_t rank)
{
    const round_table_t *table = context;

    return !table->seats[rank].here;
}

static bool
is_gone(const void *context, int32_t rank)
{
    const round_table_t *table = context;

    return table->seats[rank].gone;
}

/* The first failure is everybody's: whoever waits wakes up with it, and nobody
 * touches another's buffers any more. */
static epx_status_t
break_table(round_table_t *table, epx_status_t status)
{
    epx__error_save(&table->broken, status);
    (void)pthread_cond_broadcast(&table->turned_cond);
    return status;
}

static epx_status_t
fail_gone(round_table_t *table)
{
    epx__rank_list_t gone =
        epx__rank_list_make(table->num_ranks, is_gone, table);

    return break_table(
        table, epx__fail(EPX_ERR_PEER_LOST,
                         "%s destroyed the bootstrap before allgather %" PRIu64,
                         gone.text, table->sequence));
}

static epx_status_t
fail_late(round_table_t *table)
{
    epx__rank_list_t missing =
        epx__rank_list_make(table->num_ranks, is_missing, table);

    return break_table(
        table,
        epx__fail(EPX_ERR_TIMEOUT,
                  "%s of %d did not come to allgather %" PRIu64 " in time",
                  missing.text, table->num_ranks, table->sequence));
}

/* All are here: gathers for every one of them. */
static epx_status_t
copy_for_all(round_table_t *table)
{
    size_t bytes = table->seats[0].bytes;

    for (int32_t rank = 1; rank < table->num_ranks; rank++) {
        if (table->seats[rank].bytes != bytes) {
            return break_table(
                table,
                epx__fail(EPX_ERR_MISMATCH,
                          "rank %d passed %zu bytes to allgather %" PRIu64
                          ", rank 0 passed %zu",
                          rank, table->seats[rank].bytes, table->sequence,
                          bytes));
        }
    }
    for (int32_t to = 0; bytes > 0 && to < table->num_ranks; to++) {
        for (int32_t from = 0; from < table->num_ranks; from++) {
            memmove((char *)table->seats[to].recv + (size_t)from * bytes,
                    table->seats[from].send, bytes);
        }
    }
    for (int32_t rank = 0; rank < table->num_ranks; rank++) {
        table->seats[rank].here = false;
    }
    table->num_here = 0;
    table->sequence++;
    (void)pthread_cond_broadcast(&table->turned_cond);
    return EPX_OK;
}

static epx_status_t
wait_for_turn(round_table_t *table, int64_t deadline_ns)
{
    const uint64_t sequence = table->sequence;
    struct timespec until = { 0 };
    int error = 0;

    if (deadline_ns > 0) {
        until.tv_sec = deadline_ns / EPX__NS_PER_SEC;
        until.tv_nsec = deadline_ns % EPX__NS_PER_SEC;
    }
    while (table->sequence == sequence && table->broken.status == EPX_OK &&
           table->num_refs == table->num_ranks && error == 0) {
        error =
            pthread_cond_timedwait(&table->turned_cond, &table->mutex, &until);
    }
    if (table->sequence != sequence) {
        return EPX_OK;
    }
    if (table->broken.status != EPX_OK) {
        return epx__error_restore(&table->broken);
    }
    return table->num_refs < table->num_ranks ? fail_gone(table)
                                              : fail_late(table);
}

static epx_status_t
gather_locked(round_table_t *table, int32_t rank, const seat_t *seat,
              int64_t deadline_ns)
{
    if (table->broken.status != EPX_OK) {
        return epx__fail(EPX_ERR_BROKEN, "the bootstrap has failed earlier: %s",
                         table->broken.text);
    }
    if (table->num_refs < table->num_ranks) {
        return fail_gone(table);
    }
    table->seats[rank] = *seat;
    table->num_here++;
    return table->num_here == table->num_ranks
               ? copy_for_all(table)
               : wait_for_turn(table, deadline_ns);
}

static epx_status_t
threads_allgather(void *context, const void *send, void *recv, size_t bytes,
                  int64_t deadline_ns)
{
    const place_t *place = context;
    round_table_t *table = place->table;
    const seat_t seat = {
        .send = send, .recv = recv, .bytes = bytes, .here = true
    };
    epx_status_t status =
        epx__allgather_check(send, recv, bytes, table->num_ranks);

    if (status != EPX_OK) {
        return status;
    }
    (void)pthread_mutex_lock(&table->mutex);
    status = gather_locked(table, place->rank, &seat, deadline_ns);
    (void)pthread_mutex_unlock(&table->mutex);
    return status;
}

static void
table_free(round_table_t *table)
{
    (void)pthread_cond_destroy(&table->turned_cond);
    (void)pthread_mutex_destroy(&table->mutex);
    free(table);
}

static void
threads_destroy(void *context)
{
    place_t *place = context;
    round_table_t *table = place->table;
    bool last;

    (void)pthread_mutex_lock(&table->mutex);
    table->seats[place->rank].gone = true;
    last = --table->num_refs == 0;
    (void)pthread_cond_broadcast(&table->turned_cond);
    (void)pthread_mutex_unlock(&table->mutex);
    if (last) {
        table_free(table);
    }
    free(place);
}

static round_table_t *
table_new(int32_t num_ranks)
{
    round_table_t *table =
        calloc(1, sizeof(*table) + (size_t)num_ranks * sizeof(seat_t));
    pthread_condattr_t attributes;

    if (table == NULL) {
        return NULL;
    }
    (void)pthread_mutex_init(&table->mutex, NULL);
    (void)pthread_condattr_init(&attributes);
    (void)pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    (void)pthread_cond_init(&table->turned_cond, &attributes);
    (void)pthread_condattr_destroy(&attributes);
    table->num_ranks = num_ranks;
    table->sequence = 1;
    return table;
}

static epx_status_t
place_new(round_table_t *table, int32_t rank, epx_bootstrap_t **bootstrap_p)
{
    place_t *place = malloc(sizeof(*place));
    const epx_bootstrap_t bootstrap = {
        .size = sizeof(bootstrap),
        .rank = rank,
        .num_ranks = table->num_ranks,
        .allgather = threads_allgather,
        .destroy = threads_destroy,
        .context = place,
    };
    epx_status_t status;

    if (place == NULL) {
        return epx__fail(EPX_ERR_NO_MEMORY, "no memory for a bootstrap");
    }
    *place = (place_t){ .table = table, .rank = rank };
    status = epx__bootstrap_new(&bootstrap, bootstrap_p);
    if (status != EPX_OK) {
        free(place);
        return status;
    }
    table->num_refs++;
    return EPX_OK;
}

epx_status_t
epx_bootstrap_threads_create(int32_t num_ranks, epx_bootstrap_t **bootstraps_p)
{
    round_table_t *table;
    int32_t made = 0;

    if (bootstraps_p == NULL) {
        return epx__fail(EPX_ERR_NULL, "bootstraps_p is null");
    }
    if (num_ranks < 1 || num_ranks > EPX_MAX_RANKS) {
        return epx__fail(EPX_ERR_INVALID,
                         "num_ranks is %d; it must be from 1 to %d", num_ranks,
                         EPX_MAX_RANKS);
    }
    table = table_new(num_ranks);
    if (table == NULL) {
        return epx__fail(EPX_ERR_NO_MEMORY, "no memory for %d bootstraps",
                         num_ranks);
    }
    while (made < num_ranks) {
        epx_status_t status = place_new(table, made, &bootstraps_p[made]);

        if (status != EPX_OK) {
            goto destroy_made;
        }
        made++;
    }
    return EPX_OK;

destroy_made:
    if (made == 0) {
        table_free(table);
    }
    while (made > 0) {
        epx_bootstrap_destroy(bootstraps_p[--made]);
        bootstraps_p[made] = NULL;
    }
    return EPX_ERR_NO_MEMORY;
}
