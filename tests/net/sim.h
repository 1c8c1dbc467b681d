/* SPDX-License-Identifier: MIT */
/*
 * A network within the process that is as bad as a network may be: it delays,
 * reorders and repeats messages, loses some and brings them later, and cuts
 * ranks off.  What happens to a message follows from the seed, the two ranks
 * and its number between them, and from nothing else.
 */
#ifndef EPX_TESTS_NET_SIM_H
#define EPX_TESTS_NET_SIM_H

#include "net/net_backend.h"

typedef struct sim_faults {
    int64_t max_delay_ns;    /* of a message; what reorders */
    int64_t retransmit_ns;   /* how much later a lost one comes */
    uint32_t lost_per_mille; /* which a reliable transport sends again */
    uint32_t repeated_per_mille;
    uint32_t slow_per_mille; /* whose bytes land after they came, */
    int64_t landing_ns;      /* so much later; 0: half of max_delay_ns */
    /* The messages of all ranks are counted: with which one a rank is cut off,
     * and which one never comes; 0: none. */
    uint64_t cut_at;
    int32_t cut_rank;
    uint64_t vanishes_at;
    /* Which memory of each rank cannot be shared; the first is its boxes'. */
    uint64_t unshared_at;
} sim_faults_t;

typedef struct sim sim_t;

sim_t *sim_create(int32_t num_ranks, uint64_t seed, const sim_faults_t *faults);
/* After all nets are closed. */
void sim_destroy(sim_t *sim);

/* Rewrite what messages of the first wire carry, header apart. */
typedef void sim_tamper_fn_t(void *context, int32_t from,
                             const epx__net_header_t *header,
                             unsigned char *payload);
void sim_tamper(sim_t *sim, sim_tamper_fn_t *fn, void *context);

/* Nothing reaches or leaves the rank, while it is cut off. */
void sim_cut(sim_t *sim, int32_t rank, bool is_cut);

/* Nothing goes between the two ranks, in either direction, while it is so. */
void sim_part(sim_t *sim, int32_t a, int32_t b, bool is_parted);

/* How many messages were lost, and repeated. */
void sim_counts(sim_t *sim, uint64_t *lost_p, uint64_t *repeated_p);

/* How many pieces of memory a rank shares. */
int sim_num_shares(sim_t *sim, int32_t rank);

/* The network of the groups that are made from now on, where this backend has
 * taken the place of UCX's. */
void sim_use(sim_t *sim);

/* Its backend_context is a sim_t; NULL: that of sim_use. */
extern const epx__net_backend_t sim_backend;

#endif
