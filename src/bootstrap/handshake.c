/* SPDX-License-Identifier: MIT */
#include "bootstrap/handshake.h"

#include <sodium.h>
#include <string.h>

_Static_assert(EPX__CHALLENGE_BYTES + EPX__VERDICT_BYTES <= EPX__OUTBOX_BYTES &&
                   EPX__HELLO_BYTES + EPX__PROOF_MSG_BYTES <= EPX__OUTBOX_BYTES,
               "all that one end says fits the outbox, were none of it sent");
_Static_assert(crypto_auth_hmacsha256_BYTES == EPX__PROOF_BYTES &&
                   crypto_auth_hmacsha256_BYTES == EPX__KEY_BYTES &&
                   crypto_auth_hmacsha256_KEYBYTES == EPX__SECRET_BYTES,
               "HMAC-SHA256");

static const unsigned char challenge_label[EPX__LABEL_BYTES] =
    "epx challenge 2";
static const unsigned char proof_label[EPX__LABEL_BYTES] = "epx proof     2";
static const unsigned char verdict_label[EPX__LABEL_BYTES] = "epx verdict   2";
static const unsigned char session_label[EPX__LABEL_BYTES] = "epx session   2";

/* HMAC of label | HELLO | rank 0's nonce | extra. */
static void
make_proof(const epx__handshake_t *shake, const unsigned char *label,
           const unsigned char *extra, size_t extra_bytes,
           unsigned char proof[EPX__PROOF_BYTES])
{
    crypto_auth_hmacsha256_state hmac;

    crypto_auth_hmacsha256_init(&hmac, shake->identity->secret,
                                EPX__SECRET_BYTES);
    crypto_auth_hmacsha256_update(&hmac, label, EPX__LABEL_BYTES);
    crypto_auth_hmacsha256_update(&hmac, shake->hello, EPX__HELLO_BYTES);
    crypto_auth_hmacsha256_update(&hmac, shake->nonce, EPX__NONCE_BYTES);
    if (extra_bytes > 0) {
        crypto_auth_hmacsha256_update(&hmac, extra, extra_bytes);
    }
    crypto_auth_hmacsha256_final(&hmac, proof);
    sodium_memzero(&hmac, sizeof(hmac));
}

static bool
proof_is_right(const epx__handshake_t *shake, const unsigned char *label,
               const unsigned char *extra, size_t extra_bytes,
               const unsigned char *proof)
{
    unsigned char right[EPX__PROOF_BYTES];

    make_proof(shake, label, extra, extra_bytes, right);
    return sodium_memcmp(right, proof, EPX__PROOF_BYTES) == 0;
}

static void
fail(epx__handshake_t *shake, epx__handshake_failure_t failure)
{
    shake->state = EPX__HANDSHAKE_FAILED;
    shake->failure = failure;
}

void
epx__handshake_accept(epx__handshake_t *shake, const epx__identity_t *identity,
                      const unsigned char nonce[EPX__NONCE_BYTES])
{
    *shake = (epx__handshake_t){ .identity = identity,
                                 .state = EPX__HANDSHAKE_WANT_HELLO };
    memcpy(shake->nonce, nonce, EPX__NONCE_BYTES);
}

void
epx__handshake_connect(epx__handshake_t *shake, const epx__identity_t *identity,
                       const unsigned char nonce[EPX__NONCE_BYTES],
                       epx__outbox_t *out)
{
    unsigned char *hello = shake->hello;
    unsigned char *message = epx__outbox_add(out, EPX__HELLO_BYTES);

    *shake = (epx__handshake_t){ .identity = identity,
                                 .state = EPX__HANDSHAKE_WANT_CHALLENGE };
    epx__prefix_encode(hello, EPX__HELLO);
    epx__put_le(hello + EPX__HELLO_RANK, (uint64_t)identity->rank, 4);
    epx__put_le(hello + EPX__HELLO_NUM_RANKS, (uint64_t)identity->num_ranks, 4);
    memcpy(hello + EPX__HELLO_NONCE, nonce, EPX__NONCE_BYTES);
    memcpy(hello + EPX__HELLO_JOB, identity->job, EPX__JOB_BYTES);
    memcpy(message, hello, EPX__HELLO_BYTES);
}

/* What the machine waits for: the type and length of the message. */
static epx__message_type_t
awaited(const epx__handshake_t *shake, size_t *bytes_p)
{
    switch (shake->state) {
    case EPX__HANDSHAKE_WANT_HELLO:
        *bytes_p = EPX__HELLO_BYTES;
        return EPX__HELLO;
    case EPX__HANDSHAKE_WANT_PROOF:
        *bytes_p = EPX__PROOF_MSG_BYTES;
        return EPX__PROOF;
    case EPX__HANDSHAKE_WANT_CHALLENGE:
        *bytes_p = EPX__CHALLENGE_BYTES;
        return EPX__CHALLENGE;
    case EPX__HANDSHAKE_WANT_VERDICT:
        *bytes_p = EPX__VERDICT_BYTES;
        return EPX__VERDICT;
    default:
        *bytes_p = 0;
        return EPX__NO_MESSAGE;
    }
}

size_t
epx__handshake_want(const epx__handshake_t *shake)
{
    size_t bytes;

    (void)awaited(shake, &bytes);
    return bytes == 0 ? 0 : bytes - shake->in_bytes;
}

static void
got_hello(epx__handshake_t *shake, epx__outbox_t *out)
{
    unsigned char *message = epx__outbox_add(out, EPX__CHALLENGE_BYTES);

    memcpy(shake->hello, shake->in, EPX__HELLO_BYTES);
    epx__prefix_encode(message, EPX__CHALLENGE);
    memcpy(message + EPX__CHALLENGE_NONCE, shake->nonce, EPX__NONCE_BYTES);
    make_proof(shake, challenge_label, NULL, 0, message + EPX__CHALLENGE_PROOF);
    shake->state = EPX__HANDSHAKE_WANT_PROOF;
}

static void
got_challenge(epx__handshake_t *shake, epx__outbox_t *out)
{
    unsigned char *message;

    memcpy(shake->nonce, shake->in + EPX__CHALLENGE_NONCE, EPX__NONCE_BYTES);
    if (!proof_is_right(shake, challenge_label, NULL, 0,
                        shake->in + EPX__CHALLENGE_PROOF)) {
        fail(shake, EPX__FAILURE_SECRET);
        return;
    }
    message = epx__outbox_add(out, EPX__PROOF_MSG_BYTES);
    epx__prefix_encode(message, EPX__PROOF);
    make_proof(shake, proof_label, NULL, 0, message + EPX__PROOF_PROOF);
    shake->state = EPX__HANDSHAKE_WANT_VERDICT;
}

static void
got_verdict(epx__handshake_t *shake)
{
    if (!proof_is_right(shake, verdict_label, shake->in + EPX__VERDICT_CODE, 8,
                        shake->in + EPX__VERDICT_PROOF)) {
        fail(shake, EPX__FAILURE_SECRET);
        return;
    }
    shake->verdict = (uint32_t)epx__get_le(shake->in + EPX__VERDICT_CODE, 4);
    shake->value = (uint32_t)epx__get_le(shake->in + EPX__VERDICT_VALUE, 4);
    shake->state = EPX__HANDSHAKE_JUDGED;
}

static void
got_message(epx__handshake_t *shake, epx__message_type_t type,
            epx__outbox_t *out)
{
    shake->in_bytes = 0;
    switch (type) {
    case EPX__NO_MESSAGE:
        break;
    case EPX__HELLO:
        got_hello(shake, out);
        break;
    case EPX__CHALLENGE:
        got_challenge(shake, out);
        break;
    case EPX__PROOF:
        if (proof_is_right(shake, proof_label, NULL, 0,
                           shake->in + EPX__PROOF_PROOF)) {
            shake->state = EPX__HANDSHAKE_PROVEN;
        } else {
            fail(shake, EPX__FAILURE_SECRET);
        }
        break;
    case EPX__VERDICT:
        got_verdict(shake);
        break;
    }
}

/* Looks at the prefix as soon as it is there: what speaks another protocol is
 * not waited for, and another version may have messages of other lengths. */
static bool
prefix_is_right(epx__handshake_t *shake, epx__message_type_t type,
                epx__outbox_t *out)
{
    shake->peer_version = (uint32_t)epx__get_le(shake->in + 4, 2);
    if (epx__get_le(shake->in, 4) != EPX__HANDSHAKE_MAGIC) {
        fail(shake, EPX__FAILURE_GARBAGE);
        return false;
    }
    if (shake->peer_version != EPX__WIRE_VERSION) {
        if (type == EPX__HELLO) {
            epx__prefix_encode(epx__outbox_add(out, EPX__PREFIX_BYTES),
                               EPX__CHALLENGE);
        }
        fail(shake, EPX__FAILURE_VERSION);
        return false;
    }
    if (epx__get_le(shake->in + 6, 2) != (uint64_t)type) {
        fail(shake, EPX__FAILURE_GARBAGE);
        return false;
    }
    return true;
}

void
epx__handshake_got(epx__handshake_t *shake, size_t bytes, epx__outbox_t *out)
{
    size_t message_bytes;
    epx__message_type_t type = awaited(shake, &message_bytes);

    shake->in_bytes += bytes;
    if (shake->in_bytes < EPX__PREFIX_BYTES || message_bytes == 0 ||
        !prefix_is_right(shake, type, out)) {
        return;
    }
    if (shake->in_bytes == message_bytes) {
        got_message(shake, type, out);
    }
}

static epx__verdict_t
decide(const epx__handshake_t *shake,
       bool (*taken)(const void *context, int32_t rank), const void *context,
       uint32_t *value_p)
{
    const epx__identity_t *identity = shake->identity;
    uint32_t rank = epx__handshake_rank(shake);

    *value_p = (uint32_t)identity->num_ranks;
    if (memcmp(shake->hello + EPX__HELLO_JOB, identity->job, EPX__JOB_BYTES) !=
        0) {
        *value_p = 0;
        return EPX__VERDICT_OTHER_JOB;
    }
    if (epx__handshake_num_ranks(shake) != (uint32_t)identity->num_ranks) {
        return EPX__VERDICT_OTHER_SIZE;
    }
    if (rank >= (uint32_t)identity->num_ranks) {
        return EPX__VERDICT_BAD_RANK;
    }
    *value_p = rank;
    return rank == 0 || taken(context, (int32_t)rank) ? EPX__VERDICT_TAKEN
                                                      : EPX__VERDICT_WELCOME;
}

epx__verdict_t
epx__handshake_judge(epx__handshake_t *shake,
                     bool (*taken)(const void *context, int32_t rank),
                     const void *context, epx__outbox_t *out)
{
    uint32_t value;
    epx__verdict_t verdict = decide(shake, taken, context, &value);
    unsigned char *message = epx__outbox_add(out, EPX__VERDICT_BYTES);

    epx__prefix_encode(message, EPX__VERDICT);
    epx__put_le(message + EPX__VERDICT_CODE, (uint64_t)verdict, 4);
    epx__put_le(message + EPX__VERDICT_VALUE, value, 4);
    make_proof(shake, verdict_label, message + EPX__VERDICT_CODE, 8,
               message + EPX__VERDICT_PROOF);
    return verdict;
}

void
epx__handshake_key(const epx__handshake_t *shake,
                   unsigned char key[EPX__KEY_BYTES])
{
    make_proof(shake, session_label, NULL, 0, key);
}

uint32_t
epx__handshake_rank(const epx__handshake_t *shake)
{
    return (uint32_t)epx__get_le(shake->hello + EPX__HELLO_RANK, 4);
}

uint32_t
epx__handshake_num_ranks(const epx__handshake_t *shake)
{
    return (uint32_t)epx__get_le(shake->hello + EPX__HELLO_NUM_RANKS, 4);
}
