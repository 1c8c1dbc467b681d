/* SPDX-License-Identifier: MIT */
/*
 * The proxy: a thread of the host that moves between nodes what the kernels of
 * this rank have packed, and shows them what has come (cuda_rail.h).  It never
 * waits: it looks at every step that is open, and does what can be done.
 *
 *     a step of counts    this rank's words become a count row, which goes to
 *                         the ranks of other nodes; theirs become words
 *     a dispatch or       posts are exchanged and compared; parcels are sent
 *     combine             once they are packed and their receiver's post tells
 *                         that it is there
 *     a dispatch into     both, and the parcels are rows for one rank each
 *     receive slots
 *
 * Each lane of a step has two channels of its own, for heads and for rows, by
 * the step's slot: a step may have ended for the kernels while its peers'
 * acknowledgements are under way.  Turns are the steps.  A slot is opened
 * before the post goes out, so who has the post may send.
 *
 *     cuda_proxy.c        the thread, and the steps of counts
 *     cuda_proxy_op.c     dispatch and combine
 *     cuda_proxy_open.c   what both need
 */
#ifndef EPX_ENGINE_CUDA_PROXY_H
#define EPX_ENGINE_CUDA_PROXY_H

#include "engine/cuda/cuda_engine.h"
#include "net/net_group.h"

/* The messages of a parcel: cuda_rail.h. */
enum { CUDA_HEADS, CUDA_ROWS, CUDA_NUM_PARTS };

/* Channels of rows: the last of the net. */
#define CUDA_ROW_CHANNELS (EPX__NUM_LANES * EPX__NUM_SLOTS)

/* A step that is open. */
typedef struct cuda_errand {
    uint64_t step; /* 0: none */
    bool is_counts;
    bool is_combine;
    epx__signature_t signature;
    cuda_rail_t rail;
    uint32_t num_experts;
    bool *is_met; /* [R] its post or counts, or both, are here */
    /* [lane_end.count]: */
    bool *has_sent[EPX__NUM_LANES];
    bool *has_come[EPX__NUM_LANES];
    /* [lane_end.count][CUDA_NUM_PARTS] of what is sent */
    struct iovec *ranges[EPX__NUM_LANES];
    epx__net_done_t done;
} cuda_errand_t;

typedef struct cuda_proxy {
    epx_group_t *group;
    cuda_relay_t *relay;
    char *mail;
    int32_t num_far; /* ranks of other nodes, masked or not, */
    int32_t *far;    /* ascending */
    int32_t num_forwards;
    int32_t *forwards; /* the ranks that this one is the rail of */
    int32_t num_rails;
    int32_t *rails;   /* this rank's, on each other node: cuda_far_node; -1:
                       * all its ranks are masked */
    bool needs_flush; /* before kernels read what the network has written */
    pthread_t thread;
    bool is_running;
    uint32_t ends;      /* atomic: once nothing is left to do */
    uint64_t last_step; /* that it has taken up */
    cuda_errand_t errands[EPX__NUM_SLOTS];
} cuda_proxy_t;

static inline epx__net_t *
cuda_proxy_net(const cuda_proxy_t *proxy)
{
    return epx__group_net(proxy->group);
}

/* Whether nothing goes to the rank, or comes from it; -1 is none. */
static inline bool
cuda_is_out(const cuda_proxy_t *proxy, int32_t rank)
{
    return rank < 0 || epx__is_masked(proxy->group, rank);
}

static inline cuda_errand_t *
cuda_errand(cuda_proxy_t *proxy, uint64_t step)
{
    return &proxy->errands[epx__slot(step)];
}

static inline cuda_trip_t *
cuda_trip(const cuda_proxy_t *proxy, uint64_t step)
{
    return &proxy->relay->trips[epx__slot(step)];
}

static inline uint64_t *
cuda_words(const cuda_proxy_t *proxy, uint64_t step, int32_t source)
{
    return epx__map_words(&proxy->group->map, proxy->mail, step,
                          (uint32_t)source);
}

/* cuda_proxy.c: read words that this rank's kernels have told; false: some are
 * not there. */
bool cuda_words_read(const uint64_t *words, uint64_t step, size_t count,
                     void *to);
/* Send this rank's row of the step, which is in its control region. */
epx_status_t cuda_signal_all(const cuda_proxy_t *proxy, uint64_t step,
                             epx__gate_t gate, epx__payload_t payload,
                             const void *from, size_t bytes);
/* This rank's count row, if the step has one by now, into its control region;
 * and to the others. */
bool cuda_counts_read(cuda_proxy_t *proxy, uint64_t step);
epx_status_t cuda_counts_send(cuda_proxy_t *proxy, uint64_t step,
                              epx__gate_t gate);
/* A rank's, which has come, into words. */
void cuda_counts_take(const cuda_proxy_t *proxy, const cuda_errand_t *errand,
                      int32_t rank);
/* Whether a rank's row of the step has come. */
epx_status_t cuda_has_signalled(const cuda_proxy_t *proxy,
                                const cuda_errand_t *errand, int32_t rank,
                                epx__gate_t gate, bool *is_there);

/* cuda_proxy_op.c: take up a dispatch or combine that has begun; false: not all
 * that its kernels tell is there. */
bool cuda_op_take_up(cuda_proxy_t *proxy, uint64_t step,
                     epx_status_t *status_p);
/* Do what can be done; sets *busy_p if that was something. */
epx_status_t cuda_op_go_on(const cuda_proxy_t *proxy, cuda_errand_t *errand,
                           bool *busy_p);

/* cuda_proxy.c, for cuda_proxy_open.c. */
void *cuda_proxy_main(void *argument);

#endif
