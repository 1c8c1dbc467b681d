/* SPDX-License-Identifier: MIT */
/*
 * The handshake of the rendezvous as a machine that is fed bytes: it knows no
 * socket and no clock, and reads only as many bytes as the message it waits for
 * has.  rendezvous_wire.h draws the messages.
 *
 *     rank 0   WANT_HELLO     -> WANT_PROOF   -> PROVEN, or FAILED
 *     rank r   WANT_CHALLENGE -> WANT_VERDICT -> JUDGED, or FAILED
 */
#ifndef EPX_BOOTSTRAP_HANDSHAKE_H
#define EPX_BOOTSTRAP_HANDSHAKE_H

#include "bootstrap/io.h"
#include "bootstrap/rendezvous_wire.h"

/* Which rank of which job, and what proves it. */
typedef struct epx__identity {
    int32_t rank;
    int32_t num_ranks;
    unsigned char job[EPX__JOB_BYTES];       /* hash of the job's id */
    unsigned char secret[EPX__SECRET_BYTES]; /* the job's secret */
} epx__identity_t;

typedef enum epx__handshake_state {
    EPX__HANDSHAKE_WANT_HELLO,
    EPX__HANDSHAKE_WANT_PROOF,
    EPX__HANDSHAKE_PROVEN, /* hello may be believed; a verdict is due */
    EPX__HANDSHAKE_WANT_CHALLENGE,
    EPX__HANDSHAKE_WANT_VERDICT,
    EPX__HANDSHAKE_JUDGED, /* verdict and value may be believed */
    EPX__HANDSHAKE_FAILED,
} epx__handshake_state_t;

typedef enum epx__handshake_failure {
    EPX__FAILURE_NONE = 0,
    EPX__FAILURE_GARBAGE, /* not this protocol */
    EPX__FAILURE_VERSION, /* another version of it: peer_version */
    EPX__FAILURE_SECRET,  /* the peer's proof is wrong */
} epx__handshake_failure_t;

typedef struct epx__handshake {
    const epx__identity_t *identity;
    epx__handshake_state_t state;
    epx__handshake_failure_t failure;
    uint32_t peer_version;
    unsigned char hello[EPX__HELLO_BYTES]; /* as it travelled */
    unsigned char nonce[EPX__NONCE_BYTES]; /* of rank 0 */
    unsigned char in[EPX__HELLO_BYTES];    /* the message awaited */
    size_t in_bytes;
    uint32_t verdict;
    uint32_t value;
} epx__handshake_t;

/* Both keep `identity`, and need a nonce that was never used before. */
void epx__handshake_accept(epx__handshake_t *shake,
                           const epx__identity_t *identity,
                           const unsigned char nonce[EPX__NONCE_BYTES]);
void epx__handshake_connect(epx__handshake_t *shake,
                            const epx__identity_t *identity,
                            const unsigned char nonce[EPX__NONCE_BYTES],
                            epx__outbox_t *out);

/* Bytes that the message awaited still lacks; they go to in + in_bytes.  0 when
 * nothing is awaited. */
size_t epx__handshake_want(const epx__handshake_t *shake);

/* `bytes` more bytes are there, at most as many as wanted.  What there is to
 * answer is added to `out`; in FAILED it is to be sent before closing. */
void epx__handshake_got(epx__handshake_t *shake, size_t bytes,
                        epx__outbox_t *out);

/* In PROVEN: the verdict on the rank that said hello.  `taken` says whether
 * that rank is here already; it is asked for ranks 1..num_ranks-1 only. */
epx__verdict_t epx__handshake_judge(epx__handshake_t *shake,
                                    bool (*taken)(const void *context,
                                                  int32_t rank),
                                    const void *context, epx__outbox_t *out);

/* In PROVEN or JUDGED: the connection's key, which both ends alone know.  Both
 * nonces and the rank are part of what it is made from. */
void epx__handshake_key(const epx__handshake_t *shake,
                        unsigned char key[EPX__KEY_BYTES]);

/* The rank and size in the HELLO, whatever they are. */
uint32_t epx__handshake_rank(const epx__handshake_t *shake);
uint32_t epx__handshake_num_ranks(const epx__handshake_t *shake);

#endif
