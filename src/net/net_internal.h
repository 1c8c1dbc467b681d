/* SPDX-License-Identifier: MIT */
/*
 * The insides of a net.  What is marked "shared" is for all threads, with the
 * functions of core/atomic.h; the rest of a peer belongs to the net's thread.
 */
#ifndef EPX_NET_NET_INTERNAL_H
#define EPX_NET_NET_INTERNAL_H

#include "core/atomic.h"
#include "core/clock.h"
#include "net/net_backend.h"

#include <pthread.h>
#include <sys/socket.h>

#define EPX__NET_RING 128 /* submissions to a peer, of each kind */

/* Pieces of a transfer, unless the backend has a length of its own: long enough
 * that what is done for each does not count, short enough that several are
 * under way. */
#define EPX__NET_PIECE_BYTES ((uint64_t)1 << 20)
/* Pieces that a peer has not acknowledged, by their bytes. */
#define EPX__NET_CREDIT_PIECES 8

/* How long an acknowledgement waits for a message that takes it along. */
#define EPX__NET_ACK_NS (10 * EPX__NS_PER_MS / 1000)

/* Ranges of a piece on the second wire, where each is a put. */
#define EPX__NET_PUT_RANGES 256

/* A signal, or a transfer that is to be cut into pieces. */
typedef struct epx__net_job {
    epx__net_header_t header; /* of its first message */
    const struct iovec *ranges;
    uint32_t num_ranges;
    struct iovec one; /* what ranges points to, of a signal */
    uint64_t bytes;   /* of all ranges */
    epx__net_done_t *done;
} epx__net_job_t;

/* Many producers, one consumer: cell n is free for submission s when its turn
 * is s, and full when that is s + 1. */
typedef struct epx__net_cell {
    uint64_t turn; /* shared */
    epx__net_job_t job;
} epx__net_cell_t;

typedef struct epx__net_ring {
    uint64_t tail; /* shared: the next submission */
    uint64_t head; /* the next to be taken */
    epx__net_cell_t cells[EPX__NET_RING];
} epx__net_ring_t;

/* A message that has not been acknowledged, or that the backend still has. */
typedef struct epx__net_outgoing {
    epx__net_message_t message; /* first: the backend knows only this */
    epx__net_done_t *done;
    bool is_posted; /* the backend has it */
    bool is_acked;
} epx__net_outgoing_t;

/* Half of a slot of this rank, while its source may put to it. */
typedef struct epx__net_lent {
    void *share; /* the backend's; NULL: the other half has it */
    epx__net_note_t note;
    epx__net_done_t told; /* that note */
} epx__net_lent_t;

/* The place of a turn's half of a slot in the tables of halves. */
static inline uint64_t
epx__net_half(uint32_t channel, uint64_t turn)
{
    return (uint64_t)channel * 2 + turn % 2;
}

/* Memory of a peer that this rank may put to. */
typedef struct epx__net_reach {
    void *reach; /* the backend's; NULL: none has been told */
    uint64_t address;
    uint64_t bytes;
} epx__net_reach_t;

typedef enum epx__net_beat_state {
    EPX__BEAT_NONE = 0,
    EPX__BEAT_CONNECTING,
    EPX__BEAT_UP,
    EPX__BEAT_OVER, /* the peer is gone: only whether it ends is of interest */
} epx__net_beat_state_t;

typedef enum epx__net_peer_state {
    EPX__PEER_NONE = 0, /* not of this net */
    EPX__PEER_UP,
    EPX__PEER_LEFT, /* has said so: it will not fail, but it is gone */
    EPX__PEER_GONE, /* error says why */
} epx__net_peer_state_t;

typedef struct epx__net_peer {
    uint32_t state;         /* shared: epx__net_peer_state_t */
    epx__error_t error;     /* shared, written before state */
    epx__net_slot_t *slots; /* shared: [num_channels] */
    epx__net_ring_t *rings; /* shared: signals, transfers */

    /* What goes there. */
    epx__net_outgoing_t *outgoing; /* [EPX__NET_WINDOW] by sequence */
    uint64_t next_sent;
    uint64_t next_acked; /* all before it are acknowledged */
    uint64_t credit_used;
    int64_t heard_ns;    /* of an acknowledgement, or nothing was missing */
    uint32_t job_range;  /* of the transfer that is being cut: how far */
    uint64_t job_offset; /* in that range */
    uint64_t job_cut;    /* bytes that have been cut */
    epx__net_message_t *bundle; /* to be posted; within a pump */
    epx__net_message_t *bundle_end;
    uint64_t bundle_bytes;
    uint32_t bundle_ranges;
    epx__pledge_t pledge_out;
    epx__net_done_t pledge_done; /* shared: of that */
    epx__net_message_t ack;
    bool ack_is_posted;
    bool bye_is_sent;

    /* What comes from there. */
    epx__net_header_t *landings; /* [EPX__NET_WINDOW] by sequence */
    uint64_t next_received;
    uint64_t started;  /* bit i: next_received + i has come */
    uint64_t finished; /* and has landed */
    uint32_t ack_due;  /* messages that landed since the last header */
    int64_t ack_by_ns;
    const char *doom;           /* why it is bad; not yet acted on */
    epx__net_verdict_t verdict; /* where its own lands */
    epx__pledge_t pledge_in;    /* the same */
    /* Shared, written before state becomes GONE: whether it was LEFT; and when.
     * Atomic: whether its process has ended, which may be known only later. */
    bool has_left;
    uint32_t has_ended;
    int64_t lost_ns;

    /* The second wire. */
    epx__net_put_t *puts; /* [EPX__NET_WINDOW + 1] by sequence, and of `ack` */
    char *box_here;       /* that this rank keeps for the peer */
    epx__net_reach_t box; /* that the peer keeps for this rank */
    epx__net_reach_t *slots_there; /* [num_channels * 2] by half */
    epx__net_lent_t **lent;        /* [num_channels * 2] this rank's */
    epx__net_note_t note;          /* where the peer's land */
    bool owes_note;     /* a transfer waits for one, which must be on the way */
    uint64_t box_acked; /* what its box has last said */

    struct {
        epx__net_beat_state_t state;
        int fd;
        int64_t heard_ns;
        bool is_partner;
        bool has_let_go; /* it lives, and takes this rank for lost */
        struct sockaddr_storage address;
        unsigned char token[16];
    } beat;
} epx__net_peer_t;

/* A heartbeat connection whose other end has not said who it is. */
typedef struct epx__net_stranger {
    int fd;
    int64_t deadline_ns;
} epx__net_stranger_t;

#define EPX__NET_STRANGERS 64

typedef struct epx__net_beats {
    int listener;
    int64_t next_ns; /* to send one */
    unsigned char token[16];
    struct sockaddr_storage address;
    epx__net_stranger_t strangers[EPX__NET_STRANGERS];
    int64_t deadline_ns; /* for all partners to be connected */
} epx__net_beats_t;

struct epx__net {
    epx__net_config_t config; /* pointers that open alone reads are gone */
    uint64_t group;           /* of the headers */
    epx__map_t map;
    const epx__net_backend_t *backend;
    void *state;
    const epx__net_puts_t *puts; /* NULL: on the first wire */
    bool reaches_card;
    uint64_t piece_bytes;
    epx__net_box_t box;
    char *boxes;            /* [ranks of other hosts][box.bytes] */
    epx__net_peer_t *peers; /* [num_ranks] */
    int32_t *statuses;      /* [num_ranks] scratch of open */
    epx__net_beats_t beats;
    epx__net_stats_t stats; /* shared */

    uint64_t last_step; /* shared */
    uint64_t *ready;    /* shared: bit p: peer p has something to be done */
    uint32_t is_asleep; /* shared: somebody must write to wake_fd */
    uint32_t crank;     /* shared: a thread does the net's work */
    uint32_t parked; /* shared futex word: where the thread waits for helpers */
    uint32_t under_way; /* shared: jobs in rings, messages that are posted */
    int64_t busy_ns;    /* shared: when there was something to do */
    int64_t helped_ns;  /* shared: when a thread helped last */
    uint32_t closing;   /* shared */
    uint32_t is_interrupted; /* shared: waits end */
    uint32_t is_resting;     /* shared: no more of any transfer goes out */
    /* Shared: what is on its way, a failure and an abort of this rank. */
    uint32_t is_told[2];
    epx__net_verdict_t verdicts[2];
    uint32_t event;    /* shared futex word */
    uint32_t sleepers; /* shared: on event */

    int backend_fd;
    int wake_fd;
    int epoll_fd;
    int64_t now_ns;  /* of the round that the thread is in */
    int64_t tick_ns; /* how often silence is looked at */
    int64_t next_tick_ns;
    int64_t last_tick_ns;
    int64_t close_by_ns;
    bool is_parting;
    bool has_closed; /* all that close waits for has come */
    bool has_thread;
    pthread_t thread;
};

static inline bool
epx__net_is_for_card(const epx__net_t *net, uint32_t channel)
{
    return channel >=
           net->config.num_channels - net->config.card_net.num_channels;
}

/* The second wire: whether so much of a channel goes to the box, with its
 * header, and not to the slot. */
static inline bool
epx__net_fits_box(const epx__net_t *net, uint32_t channel, uint64_t bytes)
{
    return bytes == 0 || (bytes <= net->box.inline_bytes &&
                          !epx__net_is_for_card(net, channel));
}

/* Whatever is no piece does. */
static inline bool
epx__net_goes_to_box(const epx__net_t *net, const epx__net_header_t *header)
{
    return header->kind != EPX__NET_KIND_PIECE ||
           epx__net_fits_box(net, header->channel, header->bytes);
}

/* Whether what a channel carries lies on a card, at this end. */
static inline bool
epx__net_is_on_card(const epx__net_t *net, uint32_t channel)
{
    return net->reaches_card && epx__net_is_for_card(net, channel);
}

/* --- net_open.c --- */
/* What a rank tells all others; how to reach it, or that it cannot be. */
typedef struct epx__net_card {
    uint64_t magic;
    uint64_t group_id[2];
    int32_t rank;
    int32_t status; /* EPX_OK, or why it cannot take part */
    uint32_t num_channels;
    uint32_t num_card_channels;
    uint64_t count_row_bytes;
    char backend[16];
    struct sockaddr_storage beat_address;
    unsigned char beat_token[16];
    uint32_t address_bytes;
    uint32_t wire;         /* epx__net_wire_t, which it has chosen */
    epx__net_note_t boxes; /* on the second wire */
    unsigned char address[EPX__NET_ADDRESS_BYTES];
} epx__net_card_t;

/* All that a rank can do by itself; the card tells of it. */
epx_status_t epx__net_open_alone(epx__net_t *net, epx__net_card_t *card);

/* --- net_meet.c --- */
epx_status_t epx__net_meet(epx__net_t *net, const epx__net_config_t *config,
                           int64_t deadline_ns);
/* Until all peers are connected, at both ends; the thread is at work, or
 * `status` says why not, which the others are told. */
epx_status_t epx__net_settle(epx__net_t *net, const epx__net_config_t *config,
                             epx_status_t status, int64_t deadline_ns);

/* --- net_ring.c --- */
void epx__net_ring_init(epx__net_ring_t *ring);
/* A full ring: false. */
bool epx__net_ring_push(epx__net_ring_t *ring, const epx__net_job_t *job);
/* The oldest job, or NULL; it stays there until it is dropped. */
epx__net_job_t *epx__net_ring_first(epx__net_ring_t *ring);
void epx__net_ring_drop(epx__net_ring_t *ring);

/* --- net_end.c --- */
/* A peer's verdict has landed. */
void epx__net_heard(epx__net_t *net, int32_t rank);

/* EPX_ERR_BROKEN once waits are to end. */
epx_status_t epx__net_check_waits(const epx__net_t *net);
/* From now on transfers are let go. */
void epx__net_start_rest(epx__net_t *net);
/* Time for the net's thread, where a caller has nothing to do but to wait. */
void epx__net_nap(epx__net_t *net);

/* --- net_renew.c --- */
/* A peer's pledge has landed. */
void epx__net_hear_pledge(epx__net_t *net, int32_t rank);

/* --- net_wait.c --- */
/* Something that engines may wait for has changed. */
void epx__net_event_raise(epx__net_t *net);
void epx__net_done_drop(epx__net_t *net, epx__net_done_t *done, int32_t rank,
                        epx_status_t status);

/* --- net_send.c --- */
void epx__net_wake(epx__net_t *net);
/* Whoever is at the net's work is to look at the peer. */
void epx__net_mark(epx__net_t *net, int32_t peer);
/* Post what the peer's window lets through. */
void epx__net_pump(epx__net_t *net, int32_t rank);
void epx__net_send_ack(epx__net_t *net, int32_t rank);
/* Note what the peer says that it has. */
void epx__net_acked(epx__net_t *net, int32_t rank, uint64_t acked,
                    uint64_t bits);
/* Nothing is left to be delivered to the peer. */
bool epx__net_is_drained(epx__net_t *net, int32_t peer);
/* End all that was to go to a peer that is gone. */
void epx__net_drop_all(epx__net_t *net, int32_t rank);

/* --- net_bundle.c --- */
/* Post the message with those before it, as far as they go together; all are
 * posted by the end of the pump. */
void epx__net_bundle_add(epx__net_t *net, int32_t rank,
                         epx__net_message_t *message);
void epx__net_bundle_post(epx__net_t *net, int32_t rank);

/* --- net_put.c --- */
/* Hand a message to the wire that the net uses; on the first a bundle. */
void epx__net_move(epx__net_t *net, int32_t rank, epx__net_message_t *message);
/* Whether the peer has told where the transfer belongs. */
bool epx__net_has_place(epx__net_t *net, int32_t rank,
                        const epx__net_job_t *job);
/* The peer's note on half of a slot has landed. */
void epx__net_told(epx__net_t *net, int32_t rank,
                   const epx__net_header_t *header);

/* --- net_box.c --- */
/* Memory for what peers put, and the note that tells them of it. */
epx_status_t epx__net_boxes_open(epx__net_t *net, epx__net_note_t *note);
/* What the peer has told of its own. */
epx_status_t epx__net_boxes_reach(epx__net_t *net, int32_t rank,
                                  const epx__net_note_t *note);
/* Take what peers have put; returns whether there was anything. */
bool epx__net_boxes_poll(epx__net_t *net);
void epx__net_boxes_close(epx__net_t *net);
/* Let source put to its slot, and tell it; let it no more. */
epx_status_t epx__net_slot_lend(epx__net_t *net, uint32_t channel,
                                int32_t source, uint64_t turn,
                                void *const halves[2], uint64_t bytes);
epx_status_t epx__net_slot_take_back(epx__net_t *net, uint32_t channel,
                                     int32_t source, int64_t deadline_ns);

/* --- net_submit.c --- */
/* Into a ring of the peer, which is to be marked then; a full one: false. */
bool epx__net_queue(epx__net_t *net, int32_t rank, int ring,
                    const epx__net_job_t *job);
/* For later: the caller's thread sends nothing now. */
epx_status_t epx__net_submit(epx__net_t *net, int32_t rank, int ring,
                             const epx__net_job_t *job, bool is_for_later);

/* --- net_receive.c --- */
/* The peer is bad: it has sent a message WHY.  Returns EPX__NET_DROP. */
uint64_t epx__net_refuse(epx__net_t *net, int32_t rank, const char *why);

/* --- net_thread.c --- */
/* Whoever sleeps at a gate is to look again. */
void epx__net_wake_gates(epx__net_t *net);
void *epx__net_thread_main(void *argument);
/* Be the one thread that is at the net's work; nobody is for long. */
void epx__net_crank_take(epx__net_t *net);
void epx__net_crank_leave(epx__net_t *net);
/* Do what is to be done for a peer, here and now; false: another thread is at
 * the net's work, and will. */
bool epx__net_serve_now(epx__net_t *net, int32_t peer);
/* The peer is gone, for the reason that completes the sentence "rank 3 WHY". */
void epx__net_lose(epx__net_t *net, int32_t rank, epx_status_t status,
                   const char *why);
/* The same, and nobody need be told. */
void epx__net_cut(epx__net_t *net, int32_t rank, epx_status_t status,
                  const char *why);

/* --- net_beat.c --- */
epx_status_t epx__net_beats_open(epx__net_t *net);
void epx__net_beats_connect(epx__net_t *net);
/* Read what has come, then see who is late; now and then also send. */
void epx__net_beats_read(epx__net_t *net, int64_t now_ns);
void epx__net_beats_send(epx__net_t *net, int64_t now_ns);
/* The peer is gone; tell it so, should it live. */
void epx__net_beats_let_go(epx__net_t *net, int32_t rank);
void epx__net_beats_close(epx__net_t *net);

/* --- net_interface.c --- */
/* The interface of that name, NULL: the first that is up and no loopback;
 * false when there is none.  Its first IPv4 address, else its IPv6 one. */
bool epx__net_interface(const char *wanted, char *name, size_t name_bytes,
                        struct sockaddr_storage *address_p);

/* Whether two ranks are on different hosts, and so meet in the net. */
static inline bool
epx__net_is_apart(const epx__net_config_t *config, int32_t a, int32_t b)
{
    return a != b &&
           (config->hosts == NULL || config->hosts[a] != config->hosts[b]);
}

static inline uint32_t
epx__net_state(const epx__net_peer_t *peer)
{
    return __atomic_load_n(&peer->state, __ATOMIC_ACQUIRE);
}

/* Shared counters that only the net's thread adds to. */
static inline void
epx__net_count(uint64_t *counter, uint64_t more)
{
    __atomic_store_n(counter, *counter + more, __ATOMIC_RELAXED);
}

#endif
