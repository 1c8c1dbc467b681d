/* SPDX-License-Identifier: MIT */
/*
 * Two ranks that use the shm fabric.  They are threads here, each with a group
 * that has just what the fabric needs, so that a test can step between open and
 * connect.
 */
#ifndef TESTS_UNIT_FABRIC_PAIR_H
#define TESTS_UNIT_FABRIC_PAIR_H

#include "api_common.h"
#include "conformance/holdings.h"
#include "fabric/fabric.h"

enum { PAIR_RANKS = 2, PAIR_EXPERTS = 4, PAIR_HEAP = 1 << 16, PAIR_SEALS = 7 };

typedef struct pair_rank {
    epx_group_t group;
    epx__peer_t peers[PAIR_RANKS];
    const epx__fabric_card_t *cards;
    int64_t deadline_ns;
    pthread_t thread;
    epx__error_t result; /* of connect */
} pair_rank_t;

typedef struct pair {
    pair_rank_t ranks[PAIR_RANKS];
    epx__fabric_card_t cards[PAIR_RANKS];
    size_t bytes; /* of a segment */
} pair_t;

/* Both ranks have opened, and not connected. */
pair_t *pair_open(void);
void pair_close(pair_t *pair);

/* A rank's connect, on a thread of its own; its result is in the rank. */
void pair_start_connect(pair_t *pair, int rank, int64_t timeout_ms);
void pair_end_connect(pair_t *pair, int rank);

/* Both ranks connect and reach each other's real segment.  Rank 0, which
 * strangers turn to, comes late. */
void pair_assert_joins(pair_t *pair);
/* A rank's connect, which has been started, ends with this. */
void pair_assert_fails(pair_t *pair, int rank, epx_status_t status,
                       const char *word);

/* ---- what a rank says to another ---- */

/* As the fabric sends it. */
typedef struct pair_hello {
    uint64_t magic;
    uint64_t job_id[2];
    uint64_t token[4];
    uint32_t rank;
    uint32_t unused;
} pair_hello_t;

/* What rank 1 would say, with everything right. */
pair_hello_t pair_right_hello(const pair_t *pair);

/* A socket that is connected to a rank's, or -1. */
int pair_connect_to(const pair_t *pair, int rank);

void pair_say(int connection, const void *data, size_t bytes, const int *fds,
              int num_fds);

/* A segment that could be rank 1's, but is not. */
int pair_make_decoy(const pair_t *pair, size_t bytes, int seals);

#endif
