/* SPDX-License-Identifier: MIT */
/*
 * Messages between ranks whose memory is not mapped into each other.
 *
 * A net belongs to one rank of one group.  It has a thread that does its work
 * whether or not anybody waits for it; a thread of the engine that does wait
 * can stand in.  One thread at a time is at it, and it never blocks.  The
 * functions below are for any thread, at any time between open and close.
 *
 * There are two kinds of message:
 *
 *   a signal does what a mapped peer does with two stores: it puts a post or a
 *   count row into the receiver's control region, then raises the arrival of
 *   (step, gate, source) there.  epx__wait_all waits for it as for any other.
 *
 *   a transfer brings bytes into a slot, memory that the receiver has named
 *   for this source.  It may be sent in parts, which land in any order; once
 *   all its bytes are there, and not before, the receiver can see it, and the
 *   arrival that came with it, if any, is raised.
 *
 * How an engine moves rows to a remote peer, in turn n of a channel:
 *
 *   receiver                               sender
 *   epx__net_slot_open(both halves)
 *     ... both learn of it, e.g. by the exchange of counts ...
 *                                          epx__net_send(turn n, ranges, done)
 *   epx__net_wait(turn n), or
 *   epx__wait_all(step, gate)              epx__net_done_wait(done): now the
 *   reads the slot                         ranges may change
 *   epx__net_slot_release(turn n)
 *   epx__net_signal(...)                   hears of it, may send turn n + 2
 *
 * Turns of a channel count 1, 2, 3, ... for each pair of ranks.  Turn n uses
 * half n mod 2 of the slot, so that turn n + 1 may come while turn n is read.
 *
 * Nothing is assumed of the order in which messages come, and nothing of what
 * a peer says: every field of a header is held against this rank's own tables
 * before a byte is placed.  What does not fit is refused, and its sender is
 * bad: EPX_ERR_PEER_DATA, and nothing more is taken from it.
 */
#ifndef EPX_NET_NET_H
#define EPX_NET_NET_H

#include "core/group.h"
#include "core/status.h"

#include <epx/epx.h>
#include <stdbool.h>
#include <sys/uio.h>

struct epx__net_backend;

typedef struct epx__net epx__net_t;

/* A setting of the network library, by the name that it has there without the
 * prefix of environment variables: { "IB_SL", "3" }. */
typedef struct epx__net_setting {
    const char *name;
    const char *value;
} epx__net_setting_t;

/* A peer is gone: status is EPX_ERR_PEER_LOST or EPX_ERR_PEER_DATA, and text
 * the sentence that names it.  Called once for each peer, by the thread that is
 * at the net's work, which must not wait, nor call the net; whoever sleeps at a
 * gate of the control region, or in this header's functions, is woken
 * afterwards. */
typedef void epx__net_lost_t(void *context, int32_t rank, epx_status_t status,
                             const char *text);

/* A peer has told that its group has failed, in which epoch and why, and
 * whether it has aborted it itself; otherwise the same. */
typedef void epx__net_failed_t(void *context, int32_t rank, uint32_t epoch,
                               const epx__error_t *error, bool has_aborted);

/* A peer has told whom it goes on without; otherwise the same.  False: that
 * cannot be, and the peer is bad. */
typedef bool epx__net_pledged_t(void *context, int32_t rank,
                                const epx__pledge_t *pledge);

/* How bytes move: net_wire.h. */
typedef enum epx__net_wire {
    EPX__NET_WIRE_AUTO = 0, /* RMA where the network does puts by itself */
    EPX__NET_WIRE_AM,
    EPX__NET_WIRE_RMA,
} epx__net_wire_t;

typedef struct epx__net_config {
    int32_t rank;
    int32_t num_ranks;
    /* [num_ranks] the host that each rank is on, as a number; ranks of one
     * host do not meet here.  NULL: every rank is on a host of its own. */
    const int32_t *hosts;
    uint64_t group_id[2]; /* alike on all ranks, and of this group alone */

    /* How the ranks meet: authenticated, as in epx_bootstrap_t. */
    epx_status_t (*allgather)(void *context, const void *send, void *recv,
                              size_t bytes, int64_t deadline_ns);
    void *allgather_context;

    const epx__map_t *map;
    void *segment; /* this rank's control region; outlives the net */
    uint32_t num_channels;
    epx__card_net_t card_net; /* alike on all ranks: its num_channels */
    /* Whether the network is let at this rank's card: -1: where it can; 0: no;
     * 1: an error where it cannot.  See epx__net_reaches_card. */
    int32_t gpudirect;

    uint64_t timeout_ns;    /* of open; and of sends that wait for room */
    uint64_t beat_ns;       /* between heartbeats; 0: none */
    uint64_t lost_after_ns; /* of silence */
    int64_t spin_ns; /* how long those that wait do the net's work first */
    int32_t core;    /* that the thread is pinned to, and then spins too; -1:
                      * none */
    bool is_manual;  /* no thread: the caller calls epx__net_progress */

    epx__net_lost_t *lost;     /* may be NULL, */
    epx__net_failed_t *failed; /* so may these */
    epx__net_pledged_t *pledged;
    void *lost_context;

    const struct epx__net_backend *backend;
    void *backend_context; /* the simulated network; NULL for others */
    /* The interface or device that is used, and no other: "eth0", "mlx5_0:1".
     * NULL: the first interface that is up and no loopback. */
    const char *device;
    const char *address;    /* numeric, for heartbeats; NULL: the interface's */
    const char *transports; /* NULL: "tcp" for an interface, else all */
    epx__net_wire_t wire;   /* the same on all ranks, once it is chosen */
    const epx__net_setting_t *settings; /* ended by a NULL name; or NULL */
} epx__net_config_t;

/*
 * Join the network.  Collective: a rank that cannot take part tells the others,
 * and all fail.  All peers are connected when this returns.
 */
epx_status_t epx__net_open(epx__net_t **net_p, const epx__net_config_t *config);

/*
 * Leave it.  What has been submitted is delivered first, as far as peers take
 * it within timeout_ns.  No other call may be under way.  NULL is allowed.
 */
void epx__net_close(epx__net_t *net);

/* Whether what goes by the channels for cards may lie on this rank's: both its
 * slots and the ranges that it sends have to, then.  Peers need not know. */
bool epx__net_reaches_card(const epx__net_t *net);

/* Whether a rank is reached by this net. */
bool epx__net_has_peer(const epx__net_t *net, int32_t rank);

/* EPX_OK; or why a peer is gone, as this thread's last error. */
epx_status_t epx__net_peer_status(epx__net_t *net, int32_t rank);

/* Whether a rank has closed its net: an acquire of all that it has sent. */
bool epx__net_has_left(const epx__net_t *net, int32_t rank);

/* -------------------------------------------------------------------------
 * Signals
 */

/* This rank starts the step: peers' signals for it and its neighbours are taken
 * from now on.  To be called before the first signal of the step is sent. */
void epx__net_step_begin(epx__net_t *net, uint64_t step);

/*
 * Tell a remote peer what epx__signal tells a mapped one.  The payload goes to
 * this rank's row of the step in the peer's control region, before the arrival
 * is raised.  It is read later: it must stay as it is until this rank starts
 * step + EPX__NUM_SLOTS, as this rank's own row of the step in its own control
 * region does.  A post is whole; of a count row the first `bytes` are sent.
 * is_for_later: it goes along with what the caller sends to the peer next, or
 * attends to.
 */
epx_status_t epx__net_signal(epx__net_t *net, int32_t peer, uint64_t step,
                             epx__gate_t gate, epx__payload_t payload,
                             const void *from, size_t bytes, bool is_for_later);

/* -------------------------------------------------------------------------
 * Transfers, the receiver's side
 */

/*
 * Let source fill both halves of a slot, `bytes` each (half 1 is turn 1's).
 * The slot stays open until it is closed; its first turn is `turn`, 1 when the
 * channel is new.  If it has been open before, source learns of it by a signal
 * of this rank: the second wire tells by a message ahead of that where the slot
 * is now.  After a failure the slot is not open, but closing it gives back what
 * of its memory has been lent; until then the memory must be kept.
 */
epx_status_t epx__net_slot_open(epx__net_t *net, uint32_t channel,
                                int32_t source, uint64_t turn,
                                void *const halves[2], uint64_t bytes);

/* Nothing writes to the slot any more when this returns, which the source must
 * not be trying to by now.  EPX_ERR_TIMEOUT: something still does, at
 * deadline_ns, and the memory must be kept until a later call returns EPX_OK.
 */
epx_status_t epx__net_slot_close(epx__net_t *net, uint32_t channel,
                                 int32_t source, int64_t deadline_ns);

/* What turn n brought has been read: turn n + 2 may come. */
void epx__net_slot_release(epx__net_t *net, uint32_t channel, int32_t source,
                           uint64_t turn);

/* The same of a turn that nobody waits for any more: what still comes of it is
 * dropped.  Waits until what is landing has landed, or deadline_ns. */
epx_status_t epx__net_slot_give_up(epx__net_t *net, uint32_t channel,
                                   int32_t source, uint64_t turn,
                                   int64_t deadline_ns);

/* Whether all of a turn is there (an acquire of its bytes), and how many bytes
 * that is; bytes_p may be NULL. */
bool epx__net_arrived(epx__net_t *net, uint32_t channel, int32_t source,
                      uint64_t turn, uint64_t *bytes_p);

/*
 * Wait for the turn of each source (of each rank with sources[rank] set; NULL:
 * of all peers).  `what` completes "timed out in WHAT".  Ends early, with the
 * sentence on that peer, when one that is still missing is gone.
 */
epx_status_t epx__net_wait(epx__net_t *net, uint32_t channel, uint64_t turn,
                           const bool *sources, int64_t deadline_ns,
                           const char *what);

/* -------------------------------------------------------------------------
 * Transfers, the sender's side
 */

/* How many of the sends that name it the peers have not acknowledged; zero it
 * first.  It is the engine's, and must live until none are left. */
typedef struct epx__net_done {
    uint32_t pending;
    int32_t status; /* EPX_OK, or that of the first that failed */
    int32_t rank;   /* whose it was */
} epx__net_done_t;

typedef struct epx__net_send {
    int32_t peer;
    uint32_t channel;
    uint64_t turn;
    /* This part's place in the peer's slot, and the bytes of all the turn's
     * parts together.  Parts must not overlap. */
    uint64_t offset;
    uint64_t total;
    /* The bytes of this part, gathered from here; list and bytes stay as they
     * are until it is done. */
    const struct iovec *ranges;
    uint32_t num_ranges;
    /* What to raise at the peer once the turn is whole; 0: nothing.  All parts
     * of a turn say the same. */
    epx__gate_t arrive_gate;
    uint64_t arrive_step;
    epx__net_done_t *done; /* may be NULL */
    /* The caller attends to the net soon, or waits: nothing is sent by the call
     * itself. */
    bool is_for_later;
} epx__net_send_t;

/*
 * Send a part of a turn; a turn without bytes is one part without ranges.
 * Returns once the net has noted it.  When the peer leaves too much unread this
 * waits, as long as timeout_ns; other peers are not held up.
 */
epx_status_t epx__net_send(epx__net_t *net, const epx__net_send_t *send);

/* Wait until the peers have acknowledged all: the bytes have landed there, and
 * those here may change.  After EPX_ERR_TIMEOUT they may not yet. */
epx_status_t epx__net_done_wait(epx__net_t *net, epx__net_done_t *done,
                                int64_t deadline_ns, const char *what);

/* Whether that is so already: an acquire, no wait. */
bool epx__net_done_test(const epx__net_done_t *done);

/* -------------------------------------------------------------------------
 * The end
 */

/* Tell all peers that this rank's group has failed, in which epoch and why.
 * Counts once for an epoch, and once more when this rank has aborted it; does
 * not wait, and may be called from epx__net_lost_t. */
void epx__net_tell(epx__net_t *net, uint32_t epoch, const epx__error_t *error,
                   bool has_aborted);

/* Every wait in this header's functions ends, now and later, with
 * EPX_ERR_BROKEN. */
void epx__net_interrupt(epx__net_t *net);

/*
 * Let go of the transfers that were submitted: when this returns, or at the
 * deadline, no send that counts in `done` reads its memory any more.  No more
 * of any transfer goes out before epx__net_renew.  A peer that keeps some of
 * what counts there for three quarters of the time is let go itself.
 */
void epx__net_abandon(epx__net_t *net, const epx__net_done_t *done,
                      int64_t deadline_ns);

/* -------------------------------------------------------------------------
 * Going on without some ranks: masked is a bit for each
 */

/* Whether nothing comes from the peer any more.  One whose process is not known
 * to have ended counts grace_ns later. */
bool epx__net_is_gone(const epx__net_t *net, int32_t rank, uint64_t grace_ns);

/* Tell a peer whom this rank goes on without; false: it has not acknowledged
 * what it was told before.  True if it is gone.  By one thread at a time. */
bool epx__net_pledge(epx__net_t *net, int32_t rank,
                     const epx__pledge_t *pledge);
/* Whether it has acknowledged that and all else, or is gone. */
bool epx__net_is_pledged(epx__net_t *net, int32_t rank);

/*
 * Until nothing of this rank is under way to peers that are not masked, but for
 * what is submitted meanwhile; transfers are let go.  A peer that has not taken
 * the rest at the deadline is lost.
 */
void epx__net_rest(epx__net_t *net, const uint64_t *masked,
                   int64_t deadline_ns);

/* Begin anew, after all peers that are not masked have rested: nothing goes to
 * or comes from masked ones any more, all slots are closed, waits can be waited
 * again, and peers may signal steps after last_step. */
epx_status_t epx__net_renew(epx__net_t *net, const uint64_t *masked,
                            uint64_t last_step, int64_t deadline_ns);
/* Then, whatever has become of them, until no send counts in `done` any more;
 * it is zeroed. */
epx_status_t epx__net_forget(epx__net_t *net, epx__net_done_t *done,
                             int64_t deadline_ns);

/* -------------------------------------------------------------------------
 * Waiting for anything else
 */

/*
 * A thread that waits for a peer may as well do the net's work: that saves the
 * way from one thread to the other, which takes longer than the message's.  The
 * waits above do so as long as config.spin_ns lets them spin, and epx__wait_all
 * does when it is told how (epx_group.help).  Returns at once, the time at
 * which it began.
 */
int64_t epx__net_help(epx__net_t *net);
/* It will not for a while: the net's thread takes over now, not soon. */
void epx__net_help_end(epx__net_t *net);
/* The same if anything is left to be sent: nothing is waited for. */
void epx__net_leave(epx__net_t *net);
/*
 * What a thread that has other work, too, does now and then: as after a wait
 * that helped, the net's thread keeps away for up to a millisecond then.
 * Returns whether there was anything to do; false while another thread is at
 * it.
 */
bool epx__net_attend(epx__net_t *net);
/* Acknowledge now what has come: its senders wait for that, and this thread is
 * about to turn to something else. */
void epx__net_acknowledge(epx__net_t *net);

/* A futex word that changes whenever a turn has come whole, a send is done, or
 * a peer is gone: read it, look, then sleep while it is still the same. */
uint32_t epx__net_event(const epx__net_t *net);
void epx__net_event_wait(epx__net_t *net, uint32_t event, int64_t deadline_ns);

/* -------------------------------------------------------------------------
 * Inspection, and simulation
 */

typedef struct epx__net_stats {
    uint64_t messages_sent; /* signals and pieces of transfers */
    uint64_t bytes_sent;    /* of their payload */
    uint64_t messages_received;
    uint64_t bytes_received;
    uint64_t duplicates; /* received once more, and dropped */
    uint64_t acks_sent;  /* in messages of their own */
    uint64_t refused;    /* headers that did not fit */
    uint64_t sleeps;     /* of the thread */
} epx__net_stats_t;

void epx__net_stats_get(epx__net_t *net, epx__net_stats_t *stats);

/* What the thread does, once, at this time; for nets without one.  Returns
 * whether there was anything to do. */
bool epx__net_progress(epx__net_t *net, int64_t now_ns);

#endif
