/* SPDX-License-Identifier: MIT */
/* Ranks to test with: threads of this process, or processes forked from it. */
#ifndef TESTS_CONFORMANCE_WORLD_H
#define TESTS_CONFORMANCE_WORLD_H

#include <epx/epx.h>
#include <stdbool.h>

enum { WORLD_MAX_RANKS = 16, WORLD_TEXT = 1024 };

typedef enum world_kind {
    WORLD_THREAD,
    WORLD_SHM,
} world_kind_t;

const char *world_name(world_kind_t kind);

/* One rank; in memory that all ranks and their parent share. */
typedef struct world_rank {
    int32_t rank;
    int32_t num_ranks;
    world_kind_t kind;
    const epx_bootstrap_t *bootstrap; /* NULL after the group is made */
    void *shared;                     /* the shared_bytes of world_run */
    bool failed;
    char text[WORLD_TEXT]; /* the first failure */
} world_rank_t;

/* Notes a failure; only the first of a rank is kept. */
void world_fail(world_rank_t *self, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

/* Notes the failure of an EPX call, with its sentence.  True if there was one.
 */
bool world_failed(world_rank_t *self, epx_status_t status, const char *call);

/* Notes a failure unless the status is the one that is wanted and, if that is
 * an error, its sentence has the word in it. */
void world_expect(world_rank_t *self, const char *what, epx_status_t got,
                  epx_status_t want, const char *word);

/* Set where peers get lost: calls may fail for it, and that is no failure of
 * the test.  How many did is counted, of ranks that are threads. */
extern bool world_may_lose;
extern uint32_t world_num_lost;

/* Whether a call may fail with this status. */
bool world_excuses(epx_status_t status);

/* How long ranks may be silent before they are taken for hung; well past the
 * timeout of a group.  Set it before world_run. */
extern uint32_t world_patience_s;

/* Tells that a rank is not silent. */
void world_progress(world_rank_t *self);

typedef void world_fn(world_rank_t *self, void *context);

/*
 * Runs fn(rank, context) on every rank and waits for all.  Processes always
 * meet through an allgather of the test's own; threads do so when own_bootstrap
 * is set, and through epx_bootstrap_threads_create otherwise.  shared_bytes of
 * zeroed memory are shared by the ranks; *shared_p, if not NULL, takes it over
 * (release it with world_release).  False, with the first failure of each rank
 * in text, when a rank failed or died.
 */
bool world_run(world_kind_t kind, int32_t num_ranks, bool own_bootstrap,
               size_t shared_bytes, world_fn *fn, void *context,
               void **shared_p, char *text, size_t text_bytes);

void world_release(void *shared, size_t shared_bytes);

/* A barrier of the ranks that does not involve EPX. */
void world_barrier(world_rank_t *self);

/* The same; true, on every rank, when none had failed. */
bool world_all_well(world_rank_t *self);

#endif
