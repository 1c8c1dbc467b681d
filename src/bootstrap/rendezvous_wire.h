/* SPDX-License-Identifier: MIT */
/*
 * What the rendezvous puts on the wire.  Every integer is unsigned and little-
 * endian, every message has one fixed size, and only an allgather's data is
 * longer than 184 bytes: its length is known to both ends beforehand and merely
 * compared with the one that arrives.
 *
 * A rank connects to rank 0, and they prove to each other that they hold the
 * job's secret:
 *
 *     rank r                                      rank 0
 *       | HELLO: rank, num_ranks, nonce, job        |
 *       |------------------------------------------>|
 *       |         CHALLENGE: nonce, rank 0's proof  |
 *       |<------------------------------------------|
 *       | PROOF: rank r's proof                     |
 *       |------------------------------------------>|
 *       |           VERDICT: code, value, its proof |
 *       |<------------------------------------------|
 *
 *                0       4    6    8      12      16          48          80
 *     HELLO      | magic | v  | 1  | rank | ranks | nonce[32] | job[32]   |
 *     CHALLENGE  | magic | v  | 2  | nonce[32] | proof[32] |   (72 bytes)
 *     PROOF      | magic | v  | 3  | proof[32] |               (40 bytes)
 *     VERDICT    | magic | v  | 4  | code | value | proof[32] | (48 bytes)
 *
 * A proof is HMAC-SHA256, keyed with the secret, of
 *
 *     label[16] | the HELLO as it travelled [80] | rank 0's nonce [32] |
 *     code and value, in a VERDICT [8]
 *
 * with a different label for each message, so that none can be sent back or
 * stand for another.  Both nonces are fresh in each connection, so a recording
 * proves nothing.  Rank 0 says nothing but its proof to a stranger; to another
 * version it says its own header, and that alone.
 *
 * Both ends then have a key of their own for this connection, an HMAC of the
 * same with yet another label, and the connection carries frames.  A frame is a
 * header of 56 bytes,
 *
 *     0       4      6      8          16      24        56
 *     | magic | kind | rank | sequence | bytes | MAC[32] |
 *
 * and `bytes` bytes.  `rank` is the sender's.  Sequence 0 is the join itself;
 * allgathers count from 1.  The MAC is HMAC-SHA256, keyed with the connection's
 * key, of
 *
 *     label of the direction[16] | number[8] | the header's first 24 bytes |
 *     SHA-256 of the `bytes` bytes [32]
 *
 * where `number` counts the frames in this direction from 0 and does not
 * travel: a frame that is changed, sent back, sent again, left out, or taken
 * from another connection has a wrong MAC.  The receiver knows what the header
 * may say and looks at that first, so it reads no more than it waits for.
 *
 *     DATA     to rank 0: the sender's block; from rank 0: all blocks, in rank
 *              order.  In sequence 0: nothing, from rank 0: all have joined.
 *     Reports, from rank 0, with a set of ranks (rank_set.h):
 *     WAITING  these have not come yet
 *     LATE     these had not come by the deadline: the operation has failed;
 *              also to rank 0, when the sender's deadline comes first
 *     LOST     these have gone away: failed
 *     DISAGREE these passed another number of bytes than rank 0: failed
 */
#ifndef EPX_BOOTSTRAP_RENDEZVOUS_WIRE_H
#define EPX_BOOTSTRAP_RENDEZVOUS_WIRE_H

#include "bootstrap/rank_set.h"

#include <stdint.h>

#define EPX__WIRE_VERSION    2u
#define EPX__HANDSHAKE_MAGIC UINT32_C(0x52585045) /* "EPXR" */
#define EPX__FRAME_MAGIC     UINT32_C(0x46585045) /* "EPXF" */

#define EPX__NONCE_BYTES  32
#define EPX__PROOF_BYTES  32
#define EPX__JOB_BYTES    32
#define EPX__SECRET_BYTES 32
#define EPX__KEY_BYTES    32
#define EPX__MAC_BYTES    32
#define EPX__LABEL_BYTES  16

#define EPX__PREFIX_BYTES    8 /* magic, version, type */
#define EPX__HELLO_BYTES     80
#define EPX__CHALLENGE_BYTES 72
#define EPX__PROOF_MSG_BYTES 40
#define EPX__VERDICT_BYTES   48

#define EPX__HELLO_RANK      8
#define EPX__HELLO_NUM_RANKS 12
#define EPX__HELLO_NONCE     16
#define EPX__HELLO_JOB       48
#define EPX__CHALLENGE_NONCE 8
#define EPX__CHALLENGE_PROOF 40
#define EPX__PROOF_PROOF     8
#define EPX__VERDICT_CODE    8
#define EPX__VERDICT_VALUE   12
#define EPX__VERDICT_PROOF   16

#define EPX__FRAME_MAC    24
#define EPX__FRAME_BYTES  (EPX__FRAME_MAC + EPX__MAC_BYTES)
#define EPX__REPORT_BYTES (EPX__FRAME_BYTES + EPX__RANK_SET_BYTES)

_Static_assert(EPX_MAX_RANKS <= UINT16_MAX, "a rank fits a frame's header");
_Static_assert(EPX__REPORT_BYTES == 184, "as drawn above");

typedef enum epx__message_type {
    EPX__NO_MESSAGE = 0,
    EPX__HELLO = 1,
    EPX__CHALLENGE,
    EPX__PROOF,
    EPX__VERDICT,
} epx__message_type_t;

/* Why an authenticated rank is let in, or not. */
typedef enum epx__verdict {
    EPX__VERDICT_WELCOME = 0,
    EPX__VERDICT_OTHER_JOB,
    EPX__VERDICT_OTHER_SIZE, /* value: rank 0's num_ranks */
    EPX__VERDICT_BAD_RANK,   /* value: rank 0's num_ranks */
    EPX__VERDICT_TAKEN,      /* value: the rank */
} epx__verdict_t;

typedef enum epx__frame_kind {
    EPX__FRAME_DATA = 1,
    EPX__FRAME_WAITING,
    EPX__FRAME_LATE,
    EPX__FRAME_LOST,
    EPX__FRAME_DISAGREE,
} epx__frame_kind_t;

typedef struct epx__frame {
    epx__frame_kind_t kind;
    int32_t rank;
    uint64_t sequence;
    uint64_t bytes;
} epx__frame_t;

static inline void
epx__put_le(unsigned char *at, uint64_t value, int bytes)
{
    for (int i = 0; i < bytes; i++) {
        at[i] = (unsigned char)(value >> (8 * i));
    }
}

static inline uint64_t
epx__get_le(const unsigned char *at, int bytes)
{
    uint64_t value = 0;

    for (int i = 0; i < bytes; i++) {
        value |= (uint64_t)at[i] << (8 * i);
    }
    return value;
}

static inline void
epx__prefix_encode(unsigned char *at, epx__message_type_t type)
{
    epx__put_le(at, EPX__HANDSHAKE_MAGIC, 4);
    epx__put_le(at + 4, EPX__WIRE_VERSION, 2);
    epx__put_le(at + 6, (uint64_t)type, 2);
}

/* All but the MAC. */
static inline void
epx__frame_encode(unsigned char *at, const epx__frame_t *frame)
{
    epx__put_le(at, EPX__FRAME_MAGIC, 4);
    epx__put_le(at + 4, (uint64_t)frame->kind, 2);
    epx__put_le(at + 6, (uint64_t)frame->rank, 2);
    epx__put_le(at + 8, frame->sequence, 8);
    epx__put_le(at + 16, frame->bytes, 8);
}

/* False when this is no frame's header, whatever its MAC. */
static inline bool
epx__frame_decode(const unsigned char *at, epx__frame_t *frame)
{
    uint64_t kind = epx__get_le(at + 4, 2);

    frame->kind = (epx__frame_kind_t)kind;
    frame->rank = (int32_t)epx__get_le(at + 6, 2);
    frame->sequence = epx__get_le(at + 8, 8);
    frame->bytes = epx__get_le(at + 16, 8);
    return epx__get_le(at, 4) == EPX__FRAME_MAGIC && kind >= EPX__FRAME_DATA &&
           kind <= EPX__FRAME_DISAGREE;
}

#endif
