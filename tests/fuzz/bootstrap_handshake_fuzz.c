/* SPDX-License-Identifier: MIT */
/*
 * The rendezvous' handshake.  Whoever does not hold the secret may say what he
 * likes, in pieces of any size: he is not let in, nor believed.  Whoever holds
 * it may claim to be any rank of any job: only the right one is welcome.
 *
 * Input: how (1 byte), the size of the pieces (1 byte), what is said.
 */
#include "bootstrap/handshake.h"

#include <stdlib.h>
#include <string.h>

#define NUM_RANKS 8

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const unsigned char nonce[EPX__NONCE_BYTES] = { 1, 2, 3 };

static void
require(bool condition)
{
    if (!condition) {
        abort();
    }
}

static epx__identity_t
identity_make(int32_t rank)
{
    epx__identity_t identity = { .rank = rank, .num_ranks = NUM_RANKS };

    memset(identity.secret, 42, sizeof(identity.secret));
    return identity;
}

/* Feeds a machine as a socket would. */
static void
feed(epx__handshake_t *shake, epx__outbox_t *out, size_t step,
     const uint8_t *data, size_t size)
{
    while (size > 0 && epx__handshake_want(shake) > 0) {
        size_t bytes = epx__handshake_want(shake);

        require(bytes <= sizeof(shake->in) - shake->in_bytes);
        bytes = bytes < step ? bytes : step;
        bytes = bytes < size ? bytes : size;
        memcpy(shake->in + shake->in_bytes, data, bytes);
        epx__handshake_got(shake, bytes, out);
        require(out->small_bytes <= sizeof(out->small));
        data += bytes;
        size -= bytes;
    }
}

static void
fuzz_stranger(bool to_root, size_t step, const uint8_t *data, size_t size)
{
    epx__identity_t identity = identity_make(to_root ? 0 : 5);
    epx__outbox_t out = { 0 };
    epx__handshake_t shake;

    if (to_root) {
        epx__handshake_accept(&shake, &identity, nonce);
    } else {
        epx__handshake_connect(&shake, &identity, nonce, &out);
    }
    feed(&shake, &out, step, data, size);
    require(shake.state != EPX__HANDSHAKE_PROVEN &&
            shake.state != EPX__HANDSHAKE_JUDGED);
    require((shake.state == EPX__HANDSHAKE_FAILED) ==
            (shake.failure != EPX__FAILURE_NONE));
}

static bool
is_taken(const void *context, int32_t rank)
{
    (void)context;
    require(rank > 0 && rank < NUM_RANKS);
    return rank % 2 == 0;
}

/* Input: rank (4 bytes), num_ranks (4), what is added to the job's hash (1). */
static void
fuzz_holder(size_t step, const uint8_t *data, size_t size)
{
    epx__identity_t root_identity = identity_make(0);
    epx__identity_t leaf_identity = identity_make(0);
    epx__outbox_t from_root = { 0 };
    epx__outbox_t from_leaf = { 0 };
    epx__handshake_t root;
    epx__handshake_t leaf;
    epx__verdict_t verdict;
    uint32_t rank;
    unsigned char root_key[EPX__KEY_BYTES];
    unsigned char leaf_key[EPX__KEY_BYTES];
    bool right;

    if (size < 9) {
        return;
    }
    rank = (uint32_t)epx__get_le(data, 4);
    leaf_identity.rank = (int32_t)rank;
    leaf_identity.num_ranks = (int32_t)(uint32_t)epx__get_le(data + 4, 4);
    leaf_identity.job[31] = data[8];
    epx__handshake_accept(&root, &root_identity, nonce);
    epx__handshake_connect(&leaf, &leaf_identity, nonce, &from_leaf);
    feed(&root, &from_root, step, from_leaf.small, EPX__HELLO_BYTES);
    feed(&leaf, &from_leaf, step, from_root.small, EPX__CHALLENGE_BYTES);
    feed(&root, &from_root, step, from_leaf.small + EPX__HELLO_BYTES,
         EPX__PROOF_MSG_BYTES);
    require(root.state == EPX__HANDSHAKE_PROVEN);
    verdict = epx__handshake_judge(&root, is_taken, NULL, &from_root);
    feed(&leaf, &from_leaf, step, from_root.small + EPX__CHALLENGE_BYTES,
         EPX__VERDICT_BYTES);
    require(leaf.state == EPX__HANDSHAKE_JUDGED && leaf.verdict == verdict);
    epx__handshake_key(&root, root_key);
    epx__handshake_key(&leaf, leaf_key);
    require(memcmp(root_key, leaf_key, sizeof(root_key)) == 0);
    right = leaf_identity.job[31] == 0 &&
            leaf_identity.num_ranks == NUM_RANKS && rank < NUM_RANKS &&
            rank % 2 == 1;
    require((verdict == EPX__VERDICT_WELCOME) == right);
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    size_t step;

    if (size < 2) {
        return 0;
    }
    step = data[1] == 0 ? 1 : data[1];
    switch (data[0] % 3) {
    case 0:
        fuzz_stranger(true, step, data + 2, size - 2);
        break;
    case 1:
        fuzz_stranger(false, step, data + 2, size - 2);
        break;
    default:
        fuzz_holder(step, data + 2, size - 2);
        break;
    }
    return 0;
}
