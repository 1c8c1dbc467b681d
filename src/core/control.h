/* SPDX-License-Identifier: MIT */
/*
 * The control region: the first bytes of every rank's segment, which peers
 * write and the owner reads.  Every offset into it is computed here.  Where
 * segments are memory of a card, vitals, roll and gates are used in a second
 * one, of the host's.
 *
 *     offset of the segment
 *     0         header           identity of the segment, checked on attach
 *     1024      vitals           whether its rank lives (core/lost.h)
 *     2048      roll             of rank 0: who is masked (core/mask.h)
 *     gates     [16][2]          one line each: futex word, sleepers, wake_at
 *     arrivals  [16][2][R]       one line each: the last step that source
 *                                signalled at this gate
 *     posts     [16][R]          where source's buffers are (epx__post_t)
 *     counts    [16][R]          source's count row (epx__count_row_t, then
 *                                u32 tokens[R], u32 rows[E], u32 nodes[N]);
 * with engines that poll, all that a source tells at a step's start, in words
 * (epx__word) heap      the rest         handed out by core/heap.c
 *
 * Collective steps of a group are numbered 1, 2, 3, ... alike on every rank;
 * step s uses slot s mod 16.  At most 8 steps are open on a rank at a time.  So
 * when rank A starts step s it has completed step s - 8, for which every peer B
 * signalled it; B had started s - 8 and so completed s - 16: the slot of step s
 * is idle everywhere, and nothing ever needs clearing.
 */
#ifndef EPX_CORE_CONTROL_H
#define EPX_CORE_CONTROL_H

#include "core/host_device.h"

#include <stddef.h>
#include <stdint.h>

#define EPX__NUM_SLOTS      16
#define EPX__MAX_OPEN       8 /* half of the slots: see above */
#define EPX__LINE           64
#define EPX__PAGE           4096
#define EPX__SEGMENT_MAGIC  UINT64_C(0x746e656d67657358) /* "Xsegment" */
#define EPX__LAYOUT_VERSION 5
#define EPX__VITALS         1024
#define EPX__ROLL           2048 /* u16 [1024], to the end of the page */

typedef struct epx__segment_header {
    uint64_t magic;
    uint64_t layout_version;
    uint64_t job_id[2];
    uint64_t bytes;
    uint32_t rank;
    uint32_t num_ranks;
    uint32_t max_experts;
} epx__segment_header_t;

/* The owner writes all but the alarm, which is its peers'. */
typedef struct epx__vitals {
    uint64_t beat;     /* raised as long as the owner's process runs */
    uint32_t has_left; /* has destroyed its group: signals no more */
    uint32_t has_aborted;
    uint64_t joined; /* an epoch: has ended what it did before that */
    uint32_t unused[10];
    /* The epoch, above 16 bits: 1 + the rank that found the group failed, and
     * has a verdict.  Only grows. */
    uint32_t alarm;
    uint32_t unused_too[15];
    /* Why the owner's group failed: written before the alarm is raised. */
    int32_t status;
    char text[508];
} epx__vitals_t;

/* In `joined`, above the last step that the rank may have signalled: its epoch.
 * One word, so that they belong together. */
#define EPX__JOINED_SHIFT 48

/* READY: a count row or a post is there.  DONE: rows have landed, or a block
 * has been read. */
typedef enum epx__gate {
    EPX__GATE_READY = 0,
    EPX__GATE_DONE = 1,
    EPX__NUM_GATES = 2,
} epx__gate_t;

typedef struct epx__gate_line {
    uint32_t count;    /* futex word: signals so far */
    uint32_t sleepers; /* the owner sleeps on count */
    uint32_t wake_at;  /* and wants to be woken at this count */
    uint32_t unused[13];
} epx__gate_line_t;

typedef struct epx__arrival_line {
    uint64_t step;
    uint64_t unused[7];
} epx__arrival_line_t;

/* What all ranks must agree on in one operation, compared field by field. */
typedef struct epx__signature {
    uint64_t plan_id;
    uint32_t kind; /* epx__step_kind_t */
    uint32_t dtype;
    uint32_t quantize;
    uint32_t arrays; /* which optional arrays: bits 1 << epx__array_t */
    uint32_t flags;
    uint32_t num_scales;
    uint64_t hidden;
} epx__signature_t;

typedef enum epx__step_kind {
    EPX__STEP_COUNTS = 1,
    EPX__STEP_DISPATCH,
    EPX__STEP_COMBINE,
} epx__step_kind_t;

/* The arrays that a post can point to, and their bits in a signature. */
typedef enum epx__array {
    EPX__ARRAY_X = 0,
    EPX__ARRAY_SCALES,
    EPX__ARRAY_TOPK_IDX,
    EPX__ARRAY_TOPK_WEIGHTS,
    EPX__ARRAY_SRC_TOKEN,
    EPX__NUM_ARRAYS,
} epx__array_t;

/* The two ways of a token between nodes: to its experts, and back. */
typedef enum epx__lane {
    EPX__LANE_OUT = 0,
    EPX__LANE_BACK,
    EPX__NUM_LANES,
} epx__lane_t;

/* In a signature: a rank without rows, which cannot tell. */
#define EPX__ARRAYS_ANY (1u << 31)

/* Dispatch: where the receiver wants its rows.  Combine: where an expert rank
 * keeps its outputs.  Offsets count from the start of the sender's segment. */
typedef struct epx__post {
    uint64_t step; /* of this post: an older one is another operation's */
    epx__signature_t signature;
    uint64_t num_rows; /* rows that the arrays hold */
    uint64_t offset[EPX__NUM_ARRAYS];
    uint64_t scale_row_stride; /* in elements of 4 bytes */
    uint64_t scale_stride;
    uint64_t scale_expert_stride;
    uint64_t slot_parity; /* which half of the receive slots was filled */
    /* With several nodes, where ranks of others may send what belongs to this
     * operation: the first channel of the lane for what this rank forwards, and
     * of that for what comes back to it, and the turns. */
    uint32_t lane_channel[EPX__NUM_LANES];
    uint64_t lane_turn[EPX__NUM_LANES];
    uint64_t lane_weights; /* combine: this rank sends weights by then */
    /* Words: what the DONE arrivals from this source count up to once all of
     * the step has landed; there they are a sum, not a step. */
    uint64_t arrivals;
} epx__post_t;

/* The parameters of a plan that every rank must share. */
typedef struct epx__plan_key {
    uint64_t plan_id; /* the step of its first exchange of counts */
    uint32_t layout;
    uint32_t num_experts;
    uint32_t topk;
    uint32_t idx_dtype;
    uint64_t expert_alignment;
    uint64_t max_tokens_per_rank;
    uint64_t recv_capacity;
    uint64_t send_only_row_bytes;
} epx__plan_key_t;

/* One rank's part in the exchange of counts; u32 tokens[R] (to each rank), u32
 * rows[E] (to each expert) and, with several nodes, u32 nodes[N] (tokens to
 * each node) follow. */
typedef struct epx__count_row {
    uint64_t step;
    epx__plan_key_t key;
    uint64_t num_tokens;
    uint64_t slots_offset; /* receive slots of send-only dispatches, or 0 */
    /* Where ranks of other nodes send to these slots. */
    uint64_t slots_channel;
    uint64_t slots_turn; /* of the plan's first such dispatch */
    /* Routing that is found to be bad only when the peers are waiting: 1 + the
     * first such entry of topk_idx, and what it holds.  0: none. */
    uint64_t bad_entry;
    int64_t bad_expert;
} epx__count_row_t;

/*
 * Words of 8 bytes that tell by themselves whether they are there: 4 bytes of
 * content below the low half of the step that they belong to.  A word of the
 * same slot is 16 steps older, or a multiple of that; to be taken for the new
 * one it would have to be 2^32 steps old, through which slots are reused.
 *
 *     post        epx__post_t
 *     count row   epx__count_row_t
 *     tokens      [R]
 *     rows        [max_experts]
 */
#define EPX__POST_WORDS (sizeof(epx__post_t) / sizeof(uint32_t))
#define EPX__HEAD_WORDS \
    (EPX__POST_WORDS + sizeof(epx__count_row_t) / sizeof(uint32_t))

/* Offsets of one group's control regions; alike on every rank. */
typedef struct epx__map {
    uint32_t num_ranks;
    uint32_t max_experts;
    size_t gates;
    size_t arrivals;
    size_t posts;
    size_t counts;
    size_t count_row_bytes;
    size_t heap; /* end of the control region */
} epx__map_t;

EPX__INLINE size_t
epx__round_up(size_t value, size_t to)
{
    return (value + to - 1) / to * to;
}

EPX__INLINE epx__map_t
epx__map_make(uint32_t num_ranks, uint32_t max_experts)
{
    epx__map_t map;
    size_t slot_ranks = (size_t)EPX__NUM_SLOTS * num_ranks;

    map.num_ranks = num_ranks;
    map.max_experts = max_experts;
    map.count_row_bytes = epx__round_up(
        sizeof(uint64_t) * (EPX__HEAD_WORDS + num_ranks + max_experts),
        EPX__LINE);
    map.gates = EPX__PAGE;
    map.arrivals = map.gates + (size_t)EPX__NUM_SLOTS * EPX__NUM_GATES *
                                   sizeof(epx__gate_line_t);
    map.posts = map.arrivals +
                slot_ranks * EPX__NUM_GATES * sizeof(epx__arrival_line_t);
    map.counts = map.posts + slot_ranks * sizeof(epx__post_t);
    map.heap =
        epx__round_up(map.counts + slot_ranks * map.count_row_bytes, EPX__PAGE);
    return map;
}

/* What comes before the arrivals: all of a segment that only hosts use. */
EPX__INLINE size_t
epx__map_control_bytes(const epx__map_t *map)
{
    return epx__round_up(map->arrivals, EPX__PAGE);
}

EPX__INLINE epx__vitals_t *
epx__map_vitals(void *segment)
{
    return (epx__vitals_t *)(void *)((char *)segment + EPX__VITALS);
}

EPX__INLINE uint16_t *
epx__map_roll(void *segment)
{
    return (uint16_t *)(void *)((char *)segment + EPX__ROLL);
}

EPX__INLINE uint32_t
epx__slot(uint64_t step)
{
    return (uint32_t)(step % EPX__NUM_SLOTS);
}

EPX__INLINE epx__gate_line_t *
epx__map_gate(const epx__map_t *map, void *segment, uint64_t step,
              epx__gate_t gate)
{
    return (epx__gate_line_t *)((char *)segment + map->gates) +
           (size_t)epx__slot(step) * EPX__NUM_GATES + gate;
}

EPX__INLINE uint64_t *
epx__map_arrival(const epx__map_t *map, void *segment, uint64_t step,
                 epx__gate_t gate, uint32_t source)
{
    epx__arrival_line_t *lines =
        (epx__arrival_line_t *)((char *)segment + map->arrivals);

    return &lines[((size_t)epx__slot(step) * EPX__NUM_GATES + gate) *
                      map->num_ranks +
                  source]
                .step;
}

EPX__INLINE epx__post_t *
epx__map_post(const epx__map_t *map, void *segment, uint64_t step,
              uint32_t source)
{
    return (epx__post_t *)((char *)segment + map->posts) +
           (size_t)epx__slot(step) * map->num_ranks + source;
}

EPX__INLINE epx__count_row_t *
epx__map_counts(const epx__map_t *map, void *segment, uint64_t step,
                uint32_t source)
{
    size_t row = (size_t)epx__slot(step) * map->num_ranks + source;

    return (epx__count_row_t *)((char *)segment + map->counts +
                                row * map->count_row_bytes);
}

EPX__INLINE uint64_t *
epx__map_words(const epx__map_t *map, void *segment, uint64_t step,
               uint32_t source)
{
    return (uint64_t *)(void *)epx__map_counts(map, segment, step, source);
}

EPX__INLINE uint32_t *
epx__count_row_tokens(epx__count_row_t *row)
{
    return (uint32_t *)(row + 1);
}

EPX__INLINE uint32_t *
epx__count_row_experts(epx__count_row_t *row, uint32_t num_ranks)
{
    return (uint32_t *)(row + 1) + num_ranks;
}

#endif
