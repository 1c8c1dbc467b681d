/* SPDX-License-Identifier: MIT */
/* What the parts of the UCX backend share. */
#ifndef EPX_NET_UCX_UCX_BACKEND_H
#define EPX_NET_UCX_UCX_BACKEND_H

#include "net/net_backend.h"
#include "net/ucx/ucx_library.h"

typedef struct ucx ucx_t;
typedef struct ucx_peer ucx_peer_t;

/* A rendezvous that is under way to this rank. */
typedef struct ucx_landing {
    ucx_peer_t *peer;
    uint64_t landing; /* the net's */
} ucx_landing_t;

struct ucx_peer {
    ucx_t *ucx;
    int32_t rank;
    ucp_ep_h ep;     /* NULL: none, or cancelled */
    bool has_failed; /* not yet acted on */
    ucs_status_t failure;
    bool has_greeted;
    ucx_landing_t landings[EPX__NET_WINDOW];
    /* By the sequence number of the first of a bundle. */
    struct iovec bundles[EPX__NET_WINDOW][EPX__NET_BUNDLE_RANGES];
};

/* This rank's memory that peers may put to, and what this rank may put to:
 * whatever is left of both at the end is given back then. */
typedef struct ucx_share ucx_share_t;
typedef struct ucx_reach ucx_reach_t;

struct ucx {
    const epx__ucx_library_t *library;
    epx__net_t *net;
    int32_t num_ranks;
    ucp_context_h context;
    ucp_worker_h worker;
    uint64_t num_requests; /* UCX has not ended */
    bool has_failures;
    bool is_settling;
    ucx_peer_t *peers; /* [num_ranks] */
    ucx_share_t *shares;
    ucx_reach_t *reaches;
};

/* --- ucx_backend.c --- */
/* To be acted on once UCX is not in the midst of something. */
void epx__ucx_note_failure(ucx_peer_t *peer, ucs_status_t status);

/* --- ucx_greet.c --- */
/* Before anybody can reach the worker. */
ucs_status_t epx__ucx_expect_greetings(ucx_t *ucx);
/* Greets all when it is called first; whether all have greeted, and the own
 * greetings are gone. */
bool epx__ucx_settle(void *state);

/* --- ucx_puts.c --- */
extern const epx__net_puts_t epx__ucx_puts;
/* No request is under way any more. */
void epx__ucx_release_reaches(ucx_t *ucx);
void epx__ucx_release_shares(ucx_t *ucx);

/* --- ucx_card.c --- */
bool epx__ucx_reaches_card(void *state, const epx__net_config_t *config,
                           bool is_short, const char **why_p);

/* --- ucx_settings.c --- */
/* Whether an adapter, "mlx5_0", is one that the config lets UCX use. */
bool epx__ucx_names(const epx__net_config_t *config, const char *adapter);
bool epx__ucx_has_native_puts(const epx__net_config_t *config);
uint64_t epx__ucx_piece_bytes(const epx__net_config_t *config);

#endif
