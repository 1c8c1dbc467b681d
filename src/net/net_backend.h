/* SPDX-License-Identifier: MIT */
/*
 * A backend takes messages to peers.  All of its functions are called by one
 * thread at a time, and none waits, but for close.  It may deliver late, twice
 * or in any order, but not never, unless it says that the link is lost.
 */
#ifndef EPX_NET_NET_BACKEND_H
#define EPX_NET_NET_BACKEND_H

#include "net/net.h"
#include "net/net_wire.h"

/* Bytes of a backend's address, the same on every rank. */
#define EPX__NET_ADDRESS_BYTES 4000

/* Short messages that are posted together.  Payloads and headers beyond the
 * first message's: so many bytes, in so many ranges. */
#define EPX__NET_BUNDLE_BYTES  ((uint64_t)64 << 10)
#define EPX__NET_BUNDLE_RANGES 24

/* It stays where it is, and as it is, until epx__net_sent. */
typedef struct epx__net_message {
    epx__net_header_t header;
    struct epx__net_message *next; /* of its bundle, on the first wire; NULL */
    const struct iovec *ranges;    /* the payload, header.bytes in all */
    uint32_t num_ranges;
    struct iovec one; /* what ranges points to, if it is part of a range */
    void *backend_data;
} epx__net_message_t;

/* A message on the second wire: it is put in parts. */
typedef struct epx__net_put {
    epx__net_t *net;
    int32_t rank;
    void *backend_data;
    epx__net_message_t *message;
    uint64_t word;    /* to be put last: what it says, */
    uint64_t word_at; /* and where */
    uint32_t pending; /* puts and flushes that have not ended */
    bool is_last;     /* the word is on its way */
    bool has_failed;
} epx__net_put_t;

/* Puts into memory of peers.  Each put and each flush ends in
 * epx__net_put_ended, once, from within itself or a later poll. */
typedef struct epx__net_puts {
    /* Whether the network does them by itself, and not by messages. */
    bool (*are_native)(const epx__net_config_t *config);
    /* Whether what is shared and put may lie on a card; with is_short, without
     * a detour through the host's memory.  If not, *why_p says why. */
    bool (*reaches_card)(void *state, const epx__net_config_t *config,
                         bool is_short, const char **why_p);
    /* Let peers put to this memory, until it is taken back or closed: the note
     * tells them how. */
    epx_status_t (*share)(void *state, void *memory, uint64_t bytes,
                          bool is_on_card, epx__net_note_t *note,
                          void **share_p);
    void (*unshare)(void *state, void *share);
    /* What a peer's note tells, ready for use until close; NULL: it cannot be.
     * `old` is a reach that is not used any more, or NULL. */
    void *(*reach)(void *state, int32_t peer, const epx__net_note_t *note,
                   void *old);
    /* The range stays until the end, which says nothing of the peer's memory.
     */
    void (*put)(void *state, int32_t peer, void *reach, uint64_t address,
                const struct iovec *range, bool is_on_card,
                epx__net_put_t *put);
    /* All that has been put to the peer before is there when this has ended. */
    void (*flush)(void *state, int32_t peer, epx__net_put_t *put);
} epx__net_puts_t;

typedef struct epx__net_backend {
    const char *name;
    /* What is done once for the process; may be NULL.  UCX, when it is loaded,
     * tries out its hooks by moving the program's break, and takes back what
     * another thread's malloc has got from it meanwhile.  So ranks that are
     * threads come here straight from an exchange, and wait for the first. */
    void (*prepare)(void);
    /* Bytes of the pieces that suit the network; NULL: EPX__NET_PIECE_BYTES. */
    uint64_t (*piece_bytes)(const epx__net_config_t *config);
    /* *address_p is what peers need to connect, *address_bytes_p of
     * EPX__NET_ADDRESS_BYTES; *fd_p becomes readable when there is something to
     * do after poll has said that there was not, -1: never.  config->wire is
     * the wire that has been chosen, not AUTO. */
    epx_status_t (*open)(epx__net_t *net, const epx__net_config_t *config,
                         void **state_p, void *address, size_t *address_bytes_p,
                         int *fd_p);
    epx_status_t (*connect)(void *state, int32_t peer, const void *address,
                            size_t address_bytes);
    /* Once all ranks have connected, time and again: whether all peers are, at
     * both ends; NULL: connect has done all. */
    bool (*settle)(void *state);
    /* Take this message there, and those that follow it; together they are a
     * bundle, as net_wire.h says.  Errors come by epx__net_sent. */
    void (*post)(void *state, int32_t peer, epx__net_message_t *message);
    /* Do what is to be done, by the functions below.  Returns whether there was
     * anything.  may_sleep: the caller wants to sleep on fd, unless this
     * returns true, or until *wake_ns_p, which may be lowered. */
    bool (*poll)(void *state, int64_t now_ns, bool may_sleep,
                 int64_t *wake_ns_p);
    /* Nothing goes to or comes from the peer any more; what is under way ends
     * in later polls. */
    void (*cancel_peer)(void *state, int32_t peer);
    void (*close)(void *state);
    const epx__net_puts_t *puts; /* NULL: there is no second wire */
} epx__net_backend_t;

extern const epx__net_backend_t epx__net_ucx;

/* What a backend tells its net, from within post, poll and close. */

/* A message came over the link to `peer`, -1: of nobody.  Returns where its
 * bytes belong; EPX__NET_DROP: nowhere, and nothing further is said of it. */
#define EPX__NET_DROP UINT64_MAX
uint64_t epx__net_came(epx__net_t *net, int32_t rank, const void *header,
                       size_t header_bytes, uint64_t bytes, void **to_p);

/* A bundle came, all of which is here: `bytes` follow the first header. */
void epx__net_came_whole(epx__net_t *net, int32_t rank, const void *header,
                         size_t header_bytes, const void *data, uint64_t bytes);

/* The bytes that came are there, or will not be; `landing` is what
 * epx__net_came returned. */
void epx__net_landed(epx__net_t *net, int32_t rank, uint64_t landing, bool ok);

/* The message is the net's again, each of a bundle for itself.  Not proof that
 * it was delivered. */
void epx__net_sent(epx__net_t *net, int32_t rank, epx__net_message_t *message);

/* A put or a flush is over. */
void epx__net_put_ended(epx__net_put_t *put, bool ok);

/* Not from within a callback of the network library. */
void epx__net_link_lost(epx__net_t *net, int32_t rank, const char *why);

#endif
