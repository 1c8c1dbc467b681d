/* SPDX-License-Identifier: MIT */
/* The group object and its steps: the numbered collective operations that
 * control.h describes. */
#ifndef EPX_CORE_GROUP_H
#define EPX_CORE_GROUP_H

#include "core/control.h"
#include "core/heap.h"
#include "core/nodes.h"
#include "core/pledge.h"
#include "core/status.h"

#include <epx/epx.h>
#include <pthread.h>
#include <stdbool.h>

struct epx__engine_ops;
struct epx__fabric_ops;
struct epx__far;
struct epx__listener;
struct epx__watch;

/* A rank's segment as this rank sees it. */
typedef struct epx__peer {
    char *base; /* in the device's memory: the host need not reach it; NULL
                 * for a rank of another node */
    uint64_t bytes;
} epx__peer_t;

/* What a group's segments are for. */
typedef enum epx__purpose {
    EPX__FOR_ALL = 0,  /* the control region and the heap */
    EPX__FOR_THE_HOST, /* vitals, roll and gates alone */
} epx__purpose_t;

/* How this rank reaches the segments of its node. */
typedef struct epx__reach {
    epx__purpose_t purpose;
    const struct epx__fabric_ops *fabric;
    void *state;        /* the fabric's */
    epx__peer_t *peers; /* [R], this rank's own among them */
} epx__reach_t;

/* One entry of the window of steps: see epx__step_begin. */
typedef struct epx__open_step {
    uint64_t step;    /* 0: none */
    epx_plan_t *plan; /* whose counts they are; NULL when it is gone */
    bool is_counts;
} epx__open_step_t;

/* What comes with a signal. */
typedef enum epx__payload {
    EPX__PAYLOAD_NONE = 0,
    EPX__PAYLOAD_POST,   /* an epx__post_t */
    EPX__PAYLOAD_COUNTS, /* a count row */
} epx__payload_t;

/* How a group reaches the ranks of other nodes; what a net fills in. */
typedef struct epx__remote {
    void *context;
    /* This rank starts the step. */
    void (*step_begin)(void *context, uint64_t step);
    /* epx__signal for such a rank: the payload is `bytes` at `from`, and stays
     * as it is until this rank starts step + EPX__NUM_SLOTS.  With a payload it
     * goes along with what is sent there next, or attended to, or when this
     * rank waits. */
    epx_status_t (*signal)(void *context, int32_t peer, uint64_t step,
                           epx__gate_t gate, epx__payload_t payload,
                           const void *from, size_t bytes);
    /* What a thread that spins does meanwhile, and when it is to sleep. */
    void (*help)(void *context);
    void (*help_end)(void *context);
    /* The thread goes on to something else, and waits for nothing. */
    void (*leave)(void *context);
    /* What a thread that works does now and then; whether there was anything
     * to be done. */
    bool (*attend)(void *context);
    /* The group has failed: tell those ranks, and end this rank's own waits. */
    void (*tell)(void *context, uint32_t epoch, const epx__error_t *error,
                 bool has_aborted);
    void (*wake)(void *context);
    /* Whether the rank has destroyed its group: an acquire of its signals. */
    bool (*has_left)(void *context, int32_t rank);
    /* Whether nothing more will come from it; but of a peer whose process is
     * not known to have ended not before it has been so for grace_ns. */
    bool (*is_gone)(void *context, int32_t rank, uint64_t grace_ns);
    /* Tell the rank; false: it has not yet taken in the last pledge. */
    bool (*pledge)(void *context, int32_t rank, const epx__pledge_t *pledge);
    /* Whether it has taken in that and all else, or is gone. */
    bool (*is_told)(void *context, int32_t rank);
    void (*close)(void *context);
} epx__remote_t;

/* So many beats must fail to come before a peer is lost. */
#define EPX__BEATS 10

/* What an engine has to do when ranks are masked (core/mask.h), with op_lock
 * held; masked is a bit for each rank. */
typedef struct epx__renewal {
    /* Until no operation of this rank runs, nor will do anything to a peer any
     * more, so that it can join; *last_step_p is the last step that it may have
     * signalled. */
    epx_status_t (*rest)(epx_group_t *group, const uint64_t *masked,
                         uint64_t *last_step_p);
    /* All that remain have joined: the next step comes after last_step,
     * failures are forgotten.  May be called again before that epoch begins, or
     * with more ranks masked. */
    epx_status_t (*renew)(epx_group_t *group, const uint64_t *masked,
                          uint64_t last_step);
} epx__renewal_t;

/* What a net has to know of an engine whose rows may lie on a card. */
typedef struct epx__card_net {
    /* The last of the net's channels are for such rows; 0: none.  On the second
     * wire all that they carry is put from and to its place, however short it
     * is, and no thread of the host touches it. */
    uint32_t num_channels;
    /* Whether what the network writes to the card is there for kernels before
     * what it then tells the host; only then is it let at the card. */
    bool orders_puts;
    bool exports_dmabuf; /* the driver can, of the card's memory */
    void *block;         /* some of that memory, to try with; page-aligned */
    uint64_t block_bytes;
    /* What a thread of the net does first, with that; it never leaves. */
    void (*enter_thread)(int32_t ordinal);
    int32_t ordinal;
} epx__card_net_t;

struct epx_group {
    int32_t rank;
    int32_t num_ranks;
    int32_t num_workers;
    int32_t max_experts;
    epx_device_t device;
    int32_t device_ordinal;
    uint64_t timeout_ns;
    int64_t spin_ns; /* how long a wait spins before it sleeps */
    uint64_t job_id[2];

    epx__nodes_t nodes;
    epx__remote_t remote; /* all NULL with a single node */
    uint32_t has_remote;  /* atomic: it is there */

    /* Of the peers that are other processes; NULL when there are none. */
    struct epx__watch *watch;
    uint64_t lost_after_ns; /* of silence */
    /* Hears what peers tell; NULL where this rank's own waits do, or nobody
     * can. */
    struct epx__listener *listener;
    uint32_t is_joined; /* peers can be told: atomic, 1 once they are there */

    epx__map_t map;
    epx__reach_t reach;
    epx__peer_t *peers; /* reach.peers */
    /* The vitals, the roll and the gates where the host of every rank reaches
     * them: in the segments or, where those are in the memory of cards, in
     * segments of their own.  There may be none then: a rank's base is NULL. */
    epx__reach_t controls;
    /* Where the net puts what ranks of other nodes tell: a control region in
     * memory of the host; NULL: the segment's own. */
    void *net_control;
    epx__card_net_t card_net; /* the engine's, before the nodes are joined */
    epx__heap_t heap;

    /* Who is masked (core/mask.h).  The first two are atomic, and change under
     * both locks. */
    uint32_t epoch; /* how many are */
    uint64_t masked[EPX_MAX_RANKS / 64];
    const uint16_t *roll; /* NULL: nobody can be */
    struct epx__far *far; /* what ranks of other nodes say; NULL: none do */
    /* The epoch that this rank has joined last, and what it has told then; not
     * read back from where peers can write.  Under op_lock. */
    uint32_t joined;
    uint64_t joined_step;
    uint32_t renewed; /* with several nodes: has come to EPX__STAGE_READY */
    const epx__renewal_t *renewal; /* NULL: operations end with their calls */

    const struct epx__engine_ops *engine;
    void *engine_state;

    /* One operation at a time; guards what follows. */
    pthread_mutex_t op_lock;
    uint64_t last_step;
    epx__open_step_t open_steps[EPX__NUM_SLOTS];
    int64_t *wait_ns; /* [R] to which the operation's waits are added; NULL */

    pthread_mutex_t state_lock; /* guards what follows */
    epx__error_t broken;        /* EPX_OK while the group works */
    uint64_t *halt; /* set to 1 once it is broken, for kernels to see; NULL:
                     * none look */
    uint32_t num_tellers; /* atomic: threads that raise the alarm */
    bool is_told;         /* a call has returned that error */
    int32_t num_plans;
    int32_t num_queues;
};

/* Record the first error that makes the group unusable, this thread's last;
 * tell the peers, and end all waits of this rank.  Returns status, which the
 * caller's operation ends with. */
epx_status_t epx__group_break(epx_group_t *group, epx_status_t status);

/* The same outside of any operation: the next one reports it. */
void epx__group_end(epx_group_t *group, epx_status_t status);
/* The same for what was found in this epoch, and is of no account once another
 * has begun. */
void epx__group_end_epoch(epx_group_t *group, uint32_t epoch,
                          epx_status_t status);

/* The same for an error that a peer has told of. */
void epx__group_adopt_epoch(epx_group_t *group, uint32_t epoch,
                            const epx__error_t *error);

/* EPX_OK; the error that broke the group, when no call has returned it yet; or
 * EPX_ERR_BROKEN with its sentence. */
epx_status_t epx__group_check(epx_group_t *group);

/* The error that broke it, as this call's. */
epx_status_t epx__group_restore(epx_group_t *group);

/* What has been read from peers is whole only if none had given up by then, and
 * so may have changed it: the group's error when one had. */
epx_status_t epx__group_check_read(epx_group_t *group);

/* From now on *halt tells kernels whether the group is broken: they end soon
 * after.  NULL: nobody looks any more. */
void epx__group_set_halt(epx_group_t *group, uint64_t *halt);

/* Whether it has failed, here or, as far as has been heard, at a peer. */
bool epx__group_is_broken(epx_group_t *group);

/* No call returns an error before the peers of this node have been told of it:
 * they may be reading what the caller changes next. */
void epx__group_wait_for_tellers(const epx_group_t *group);

/* Give back a block that peers wrote to; not once the group is broken, when
 * they may still do so: then it goes with the group, or is given back when all
 * that could write are known to be gone. */
void epx__group_heap_free(epx_group_t *group, void *block);
/* The same for a block that peers wrote to in an earlier epoch. */
void epx__group_heap_free_old(epx_group_t *group, void *block);

/* Add to num_plans or num_queues. */
void epx__group_count(epx_group_t *group, int32_t *counter, int32_t change);

/* Whether this rank's group goes on without that one. */
static inline bool
epx__is_masked(const epx_group_t *group, int32_t rank)
{
    return (__atomic_load_n(&group->masked[rank / 64], __ATOMIC_RELAXED) >>
                (rank % 64) &
            1) != 0;
}

static inline char *
epx__group_segment(const epx_group_t *group)
{
    return group->peers[group->rank].base;
}

/* Where the host finds a rank's vitals and gates, by epx__map_*; NULL where it
 * cannot reach them. */
static inline char *
epx__group_control(const epx_group_t *group, int32_t rank)
{
    return group->controls.peers == NULL ? NULL
                                         : group->controls.peers[rank].base;
}

/* Tell `peer` that what belongs to this gate of the step is in place: a release
 * of everything written before; the waits below acquire it.  A peer of another
 * node that cannot be told breaks the group; a masked one is not told. */
void epx__signal(epx_group_t *group, int32_t peer, uint64_t step,
                 epx__gate_t gate);
/* The same; with it comes this rank's own post or the first `bytes` of its
 * count row of the step, which lie in its own control region. */
void epx__signal_with(epx_group_t *group, int32_t peer, uint64_t step,
                      epx__gate_t gate, epx__payload_t payload, size_t bytes);
/* All ranks of this node, without a payload. */
void epx__signal_near(epx_group_t *group, uint64_t step, epx__gate_t gate);

/* What that does in the control region of the peer, whose segment this is. */
void epx__arrive(const epx__map_t *map, void *segment, uint32_t source,
                 uint64_t step, epx__gate_t gate);

/* Wait until every rank that is not masked has signalled; breaks the group and
 * names the missing ranks when the timeout passes.  `what` completes "timed out
 * in WHAT". */
epx_status_t epx__wait_all(epx_group_t *group, uint64_t step, epx__gate_t gate,
                           const char *what);
/* The same for the ranks of this node alone. */
epx_status_t epx__wait_near(epx_group_t *group, uint64_t step, epx__gate_t gate,
                            const char *what);

/* A word of this rank that moves when somebody rings; any gate's would do. */
static inline uint32_t *
epx__group_bell(const epx_group_t *group)
{
    return &epx__map_gate(&group->map, epx__group_control(group, group->rank),
                          0, EPX__GATE_READY)
                ->count;
}

/* Make everybody who sleeps at a gate of this segment look around; and of this
 * rank's. */
void epx__ring(const epx__map_t *map, void *segment);
void epx__group_wake(epx_group_t *group);

#endif
