/* SPDX-License-Identifier: MIT */
/*
 * What goes over the network: a header in front of every message, and how it is
 * held against the receiver's own tables.  docs/wire-format.md draws it.
 *
 * Messages of one rank to another carry sequence numbers 1, 2, 3, ..., of which
 * at most EPX__NET_WINDOW are unacknowledged at a time.  Every header says what
 * has been received in the other direction: everything up to `acked`, and
 * acked + 1 + i where bit i of acked_bits is set.  So acknowledgements may be
 * lost in others, repeated, or overtaken.
 *
 * There are two wires for that, and a net uses one.  On the first a backend
 * takes header and payload to the peer: of one message, or of several short
 * ones together, a bundle, in which each header follows the payload before.  On
 * the second it puts them into the peer's memory: the payload of a piece
 * straight into the slot, all else into the box that the peer keeps for this
 * source.
 *
 *   sender                                  receiver
 *   puts: payload, header                   looks at the word of the sequence
 *   flush: they are there                   number that is next
 *   put: the word, which is the number      checks and takes the message
 *
 * Nothing is assumed of the order in which puts land, but that flush means what
 * it says; and that a word of 8 bytes lands whole.
 */
#ifndef EPX_NET_NET_WIRE_H
#define EPX_NET_NET_WIRE_H

#include "core/control.h"
#include "core/pledge.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define EPX__NET_MAGIC   UINT32_C(0x6e787065) /* "epxn" */
#define EPX__NET_VERSION 5
#define EPX__NET_WINDOW  64 /* messages in flight; the bits of acked_bits */

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
               "headers are sent as they lie in memory");

typedef enum epx__net_kind {
    EPX__NET_KIND_ACK = 1, /* only acknowledges; has no sequence number */
    EPX__NET_KIND_BYE,     /* the sender is closing, and has heard of all */
    EPX__NET_KIND_SIGNAL,  /* raise (step, gate) */
    EPX__NET_KIND_POST,    /* the same; the payload is an epx__post_t */
    EPX__NET_KIND_COUNTS,  /* the same; the payload is a count row */
    EPX__NET_KIND_PIECE,   /* of a transfer */
    EPX__NET_KIND_VERDICT, /* the sender's group has failed; the payload is an
                              epx__net_verdict_t */
    EPX__NET_KIND_NOTE,    /* second wire: where a turn's half of a slot is, for
                              it and all later ones; an epx__net_note_t */
    EPX__NET_KIND_PLEDGE,  /* who the sender goes on without; an
                              epx__pledge_t */
} epx__net_kind_t;

typedef struct epx__net_verdict {
    int32_t status;
    uint32_t epoch;       /* that the sender is in */
    uint32_t has_aborted; /* the sender itself has */
    char text[500];
} epx__net_verdict_t;

/* Memory of this rank that a peer may put to. */
#define EPX__NET_KEY_BYTES 448
typedef struct epx__net_note {
    uint64_t address; /* here; peers only add to it */
    uint64_t bytes;
    uint32_t key_bytes;
    uint32_t unused;
    unsigned char key[EPX__NET_KEY_BYTES]; /* the backend's */
} epx__net_note_t;

typedef struct epx__net_header {
    uint32_t magic;
    uint16_t version;
    uint8_t kind; /* epx__net_kind_t */
    uint8_t gate; /* epx__gate_t, of signals, and of pieces with a step */
    uint64_t group;
    uint32_t source; /* rank */
    uint32_t channel;
    uint64_t sequence;
    uint64_t acked;
    uint64_t acked_bits;
    uint64_t step;
    uint64_t turn;
    uint64_t offset; /* of the payload in the slot */
    uint64_t bytes;  /* of payload */
    uint64_t total;  /* of the turn */
} epx__net_header_t;

_Static_assert(sizeof(epx__net_header_t) == 88, "no padding on the wire");

/*
 * What a rank keeps for each source of the second wire: a box, alike on all
 * ranks.  All offsets are multiples of 8.
 *
 *   0                    what the source has received: `acked`
 *   8 (1 + s mod 64)     the word of sequence number s
 *   cells + (s mod 64) * cell_bytes    its header, then up to inline_bytes
 *
 * A longer payload is of a piece, and lies in the slot.
 */
typedef struct epx__net_box {
    uint64_t cells;
    uint64_t cell_bytes;
    uint64_t inline_bytes;
    uint64_t bytes; /* of a box */
} epx__net_box_t;

epx__net_box_t epx__net_box_make(const epx__map_t *map);

static inline uint64_t
epx__net_box_word(uint64_t sequence)
{
    return sizeof(uint64_t) * (1 + sequence % EPX__NET_WINDOW);
}

static inline uint64_t
epx__net_box_cell(const epx__net_box_t *box, uint64_t sequence)
{
    return box->cells + sequence % EPX__NET_WINDOW * box->cell_bytes;
}

/*
 * One half of a slot: the memory for every other turn of a channel.  Engines
 * write base and open_turn, the net's thread all else.
 */
typedef struct epx__net_half {
    char *base;
    uint64_t open_turn; /* that may come, or is coming; 0: none */
    uint64_t done_turn; /* that has come whole; a release of its bytes */
    uint64_t received;  /* bytes of done_turn */
    uint64_t turn;      /* that is coming */
    uint64_t total;
    uint64_t placed; /* bytes that have got a place */
    uint64_t landed; /* bytes that are there */
    uint64_t step;   /* to be raised, as the first piece says; 0: none */
    uint32_t gate;
    uint32_t writers; /* pieces that are landing */
} epx__net_half_t;

typedef struct epx__net_slot {
    epx__net_half_t halves[2];
    uint64_t bytes; /* of each half */
} epx__net_slot_t;

/* What this rank knows about the messages of one source. */
typedef struct epx__net_view {
    uint64_t group;
    uint32_t source;
    uint32_t num_channels;
    const epx__map_t *map;
    const epx__net_slot_t *slots; /* [num_channels] */
    uint64_t last_step;           /* that this rank has started */
    uint64_t next_received;       /* all before it have landed */
    uint64_t started;             /* bit i: next_received + i has come */
    uint64_t next_sent;           /* the next sequence number to source */
    bool has_notes;               /* on the second wire */
} epx__net_view_t;

/*
 * Copies a header of so many bytes out of foreign memory, and looks at every
 * field.  Returns NULL, or what is wrong, as the end of the sentence "rank 3
 * sent a message WHY"; *header_p is then not to be used.  `bytes` is what the
 * transport says of the payload.  What passes may be a duplicate; or a stray, a
 * piece for a slot that is closed or for a turn of it that is over, of which
 * nothing must be placed.
 */
const char *epx__net_check(const epx__net_view_t *view, const void *header,
                           size_t header_bytes, uint64_t bytes,
                           epx__net_header_t *header_p, bool *is_stray_p);

/* Whether a message with this sequence number has come before. */
bool epx__net_is_duplicate(const epx__net_view_t *view, uint64_t sequence);

#endif
