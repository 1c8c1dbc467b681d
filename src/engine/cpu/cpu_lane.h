/* SPDX-License-Identifier: MIT */
/*
 * Lanes: how the tokens of an operation go between nodes.
 *
 * A lane is memory of this rank that ranks of other nodes fill through the net,
 * a region for each of them, and memory for what this rank sends meanwhile.  It
 * serves one operation at a time; that operation's post tells its channel and
 * turn, and whoever has the post may send.  A region is filled in chunks, each
 * on a channel of its own, so that one can be worked on while the next is on
 * its way.
 */
#ifndef EPX_ENGINE_CPU_CPU_LANE_H
#define EPX_ENGINE_CPU_CPU_LANE_H

#include "core/group.h"
#include "net/net_group.h"

#define CPU_CHUNKS 4

/* A group's lanes of each kind: as many as operations can be open. */
#define CPU_LANES EPX__MAX_OPEN
/* Channels from here on are for receive slots, one for each plan with them. */
#define CPU_SLOT_CHANNEL      (EPX__NUM_LANES * CPU_LANES * CPU_CHUNKS)
#define CPU_NUM_SLOT_CHANNELS (EPX__GROUP_CHANNELS - CPU_SLOT_CHANNEL)

/* Memory that grows and is kept. */
typedef struct cpu_block {
    char *memory;
    uint64_t bytes;
} cpu_block_t;

/* How a parcel goes through the net. */
typedef struct cpu_turn {
    uint32_t channel;
    uint64_t number;
} cpu_turn_t;

typedef struct cpu_lane {
    epx__lane_t kind;
    uint32_t channel; /* the first of CPU_CHUNKS */
    uint64_t turn;    /* that is used, or was; alike for all sources */
    bool is_taken;
    cpu_block_t in;       /* [sources][CPU_CHUNKS][chunk_bytes] */
    uint64_t chunk_bytes; /* room of a chunk; 0: not all slots are open */
    cpu_block_t out;
    uint64_t out_used;
    epx__net_done_t done; /* of what is sent; may outlast the operation, */
    bool lends;           /* unless some of it lies in the caller's memory */
} cpu_lane_t;

/* What a rank is to other nodes. */
typedef struct cpu_rails {
    /* Who fills the regions of a lane of each kind.  OUT: the ranks of other
     * nodes whose tokens for this node this rank takes in, ascending.  BACK:
     * for each node the rank that takes in this rank's tokens; -1 for its own.
     */
    int32_t num_sources[EPX__NUM_LANES];
    int32_t *sources[EPX__NUM_LANES];
    bool *wanted;          /* [R] scratch: whom to wait for */
    const float **weights; /* [sources of OUT] scratch */
    cpu_lane_t lanes[EPX__NUM_LANES][CPU_LANES];
    struct {
        uint64_t turn; /* last used */
        bool is_taken;
    } slot_channels[CPU_NUM_SLOT_CHANNELS];
} cpu_rails_t;

/* Set engine->rails; nothing to do with a single node. */
epx_status_t cpu_rails_open(epx_group_t *group);
/* The net is closed by now. */
void cpu_rails_close(cpu_rails_t *rails);

/* Take a free lane whose chunks have room for so many bytes. */
epx_status_t cpu_lane_take(epx_group_t *group, epx__lane_t kind,
                           uint64_t chunk_bytes, cpu_lane_t **lane_p);
/* NULL is allowed.  What was sent from the caller's memory is acknowledged, or
 * the group broken. */
void cpu_lane_give(epx_group_t *group, cpu_lane_t *lane);

/* The turn that a chunk comes in. */
static inline cpu_turn_t
cpu_lane_turn(const cpu_lane_t *lane, int chunk)
{
    return (cpu_turn_t){ lane->channel + (uint32_t)chunk, lane->turn };
}

/* That of a peer, as its post says. */
static inline cpu_turn_t
cpu_post_turn(const epx__post_t *post, epx__lane_t kind, int chunk)
{
    return (cpu_turn_t){ post->lane_channel[kind] + (uint32_t)chunk,
                         post->lane_turn[kind] };
}

/* A chunk of the region that `source`, an index into the kind's, fills. */
char *cpu_lane_chunk(const cpu_lane_t *lane, int32_t source, int chunk);
/* Empty the memory for what is sent, and make it so large. */
epx_status_t cpu_lane_reserve(cpu_lane_t *lane, uint64_t bytes);
/* Aligned bytes of what was reserved. */
void *cpu_lane_out(cpu_lane_t *lane, uint64_t bytes);
/* Add one to so many ranges, or to the last of them if it follows that in
 * memory; returns how many there are then. */
static inline uint32_t
cpu_range_add(struct iovec *ranges, uint32_t count, struct iovec range)
{
    struct iovec *last = count == 0 ? NULL : &ranges[count - 1];

    if (last != NULL &&
        (char *)last->iov_base + last->iov_len == range.iov_base) {
        last->iov_len += range.iov_len;
        return count;
    }
    ranges[count] = range;
    return count + 1;
}
/* Whether it is memory of the lane. */
static inline bool
cpu_lane_owns(const cpu_lane_t *lane, const void *at)
{
    return (uintptr_t)at - (uintptr_t)lane->out.memory < lane->out_used;
}

/* Tell the peers of a lane in a post. */
void cpu_lane_announce(const cpu_lane_t *lane, epx__post_t *post);
/* Whether a peer's post announces a lane that there can be. */
epx_status_t cpu_lane_check(int32_t rank, epx__lane_t kind,
                            const epx__post_t *post);

/* Send a turn of a peer's channel; it is counted in lane->done.  For later:
 * once somebody attends to the network. */
epx_status_t cpu_lane_send(epx_group_t *group, cpu_lane_t *lane, int32_t peer,
                           cpu_turn_t turn, const struct iovec *ranges,
                           uint32_t num_ranges, bool is_for_later);
/* Until what this rank has sent is acknowledged, if the caller's memory is part
 * of it: what lies in the lane need not be waited for. */
epx_status_t cpu_lane_wait_sent(epx_group_t *group, cpu_lane_t *lane,
                                const char *what);
/* Wait for a turn of a channel from all ranks that rails->wanted names; errors
 * break the group. */
epx_status_t cpu_turn_wait(epx_group_t *group, cpu_turn_t turn,
                           const char *what);
/* Whether a rank sent just so many bytes; an error breaks the group. */
epx_status_t cpu_turn_check(epx_group_t *group, cpu_turn_t turn, int32_t rank,
                            uint64_t bytes);

/* A channel for the receive slots of a plan, and the first turn of it;
 * cpu_slot_channel_give tells the last. */
epx_status_t cpu_slot_channel_take(epx_group_t *group, uint32_t *channel_p,
                                   uint64_t *turn_p);
void cpu_slot_channel_give(epx_group_t *group, uint32_t channel, uint64_t turn);

#endif
