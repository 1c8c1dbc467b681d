/* SPDX-License-Identifier: MIT */
/* The handshake, without a network: who is let in, and who is not. */
#include "bootstrap_util.h"

#include <string.h>

typedef struct pair {
    epx__identity_t root_identity;
    epx__identity_t leaf_identity;
    epx__handshake_t root;
    epx__handshake_t leaf;
    epx__outbox_t from_root;
    epx__outbox_t from_leaf;
    int32_t taken; /* a rank that has joined already */
} pair_t;

static bool
is_taken(const void *context, int32_t rank)
{
    const pair_t *pair = context;

    return rank == pair->taken;
}

static void
pair_make(pair_t *pair)
{
    unsigned char root_nonce[EPX__NONCE_BYTES];
    unsigned char leaf_nonce[EPX__NONCE_BYTES];

    memset(root_nonce, 1, sizeof(root_nonce));
    memset(leaf_nonce, 2, sizeof(leaf_nonce));
    memset(pair, 0, sizeof(*pair));
    pair->root_identity = identity_make(0, 8);
    pair->leaf_identity = identity_make(5, 8);
    pair->taken = -1;
    epx__handshake_accept(&pair->root, &pair->root_identity, root_nonce);
    epx__handshake_connect(&pair->leaf, &pair->leaf_identity, leaf_nonce,
                           &pair->from_leaf);
}

/* Carries what one end has said to the other, `step` bytes at a time; byte
 * `flip` of it, counted from *count_p, arrives wrong. */
static void
carry(epx__outbox_t *from, epx__handshake_t *to, epx__outbox_t *answer,
      size_t step, int64_t flip, int64_t *count_p)
{
    while (!epx__outbox_empty(from) && epx__handshake_want(to) > 0) {
        size_t bytes = from->small_bytes - from->sent;

        if (bytes > step) {
            bytes = step;
        }
        if (bytes > epx__handshake_want(to)) {
            bytes = epx__handshake_want(to);
        }
        for (size_t i = 0; i < bytes; i++) {
            unsigned char mask = (*count_p)++ == flip ? 0x10 : 0;

            to->in[to->in_bytes + i] = from->small[from->sent + i] ^ mask;
        }
        from->sent += bytes;
        epx__handshake_got(to, bytes, answer);
    }
}

/* Runs a handshake to its end; returns how many bytes travelled. */
static int64_t
converse(pair_t *pair, size_t step, int64_t flip)
{
    int64_t count = 0;

    for (int round = 0; round < 4; round++) {
        carry(&pair->from_leaf, &pair->root, &pair->from_root, step, flip,
              &count);
        if (pair->root.state == EPX__HANDSHAKE_PROVEN && round == 1) {
            (void)epx__handshake_judge(&pair->root, is_taken, pair,
                                       &pair->from_root);
        }
        carry(&pair->from_root, &pair->leaf, &pair->from_leaf, step, flip,
              &count);
    }
    return count;
}

static void
test_holders_of_the_secret_meet(void **state)
{
    static const size_t steps[] = { 1, 7, 8, 9, 1000 };
    pair_t pair;

    (void)state;
    for (size_t i = 0; i < sizeof(steps) / sizeof(*steps); i++) {
        pair_make(&pair);
        assert_int_equal(converse(&pair, steps[i], -1),
                         EPX__HELLO_BYTES + EPX__CHALLENGE_BYTES +
                             EPX__PROOF_MSG_BYTES + EPX__VERDICT_BYTES);
        assert_int_equal(pair.root.state, EPX__HANDSHAKE_PROVEN);
        assert_int_equal(pair.leaf.state, EPX__HANDSHAKE_JUDGED);
        assert_int_equal(pair.leaf.verdict, EPX__VERDICT_WELCOME);
    }
}

/* Any byte, of any message: nobody is let in who should not be, and no end
 * believes what has been changed. */
static void
test_every_changed_byte_is_noticed(void **state)
{
    pair_t pair;
    int64_t all;

    (void)state;
    pair_make(&pair);
    all = converse(&pair, 1000, -1);
    for (int64_t flip = 0; flip < all; flip++) {
        bool in_verdict = flip >= all - EPX__VERDICT_BYTES;

        pair_make(&pair);
        (void)converse(&pair, 1000, flip);
        if (pair.leaf.state == EPX__HANDSHAKE_JUDGED ||
            (pair.root.state == EPX__HANDSHAKE_PROVEN) != in_verdict) {
            fail_msg("byte %d changed: root in state %d, leaf in state %d",
                     (int)flip, pair.root.state, pair.leaf.state);
        }
    }
}

/* The key is the same at both ends, and another for another rank, nonce or
 * secret. */
static void
test_keys(void **state)
{
    unsigned char keys[4][EPX__KEY_BYTES];
    unsigned char key[EPX__KEY_BYTES];

    (void)state;
    for (int i = 0; i < 4; i++) {
        unsigned char nonce[EPX__NONCE_BYTES] = { i == 1 };
        pair_t pair;

        pair_make(&pair);
        pair.leaf_identity.rank = i == 2 ? 6 : 5;
        pair.leaf_identity.secret[0] ^= i == 3;
        pair.root_identity.secret[0] ^= i == 3;
        pair.from_leaf = (epx__outbox_t){ 0 };
        epx__handshake_connect(&pair.leaf, &pair.leaf_identity, nonce,
                               &pair.from_leaf);
        (void)converse(&pair, 1000, -1);
        assert_int_equal(pair.leaf.state, EPX__HANDSHAKE_JUDGED);
        epx__handshake_key(&pair.root, keys[i]);
        epx__handshake_key(&pair.leaf, key);
        assert_memory_equal(keys[i], key, sizeof(key));
        for (int j = 0; j < i; j++) {
            assert_memory_not_equal(keys[i], keys[j], sizeof(key));
        }
    }
}

static void
test_wrong_secret(void **state)
{
    pair_t pair;

    (void)state;
    pair_make(&pair);
    pair.leaf_identity.secret[31] ^= 1;
    (void)converse(&pair, 1000, -1);
    assert_int_equal(pair.leaf.state, EPX__HANDSHAKE_FAILED);
    assert_int_equal(pair.leaf.failure, EPX__FAILURE_SECRET);
    assert_int_equal(pair.root.state, EPX__HANDSHAKE_WANT_PROOF);
}

/* Rank 0's own proof, sent back to it, proves nothing. */
static void
test_reflection(void **state)
{
    pair_t pair;
    unsigned char *challenge = pair.from_root.small;
    unsigned char *proof;
    int64_t count = 0;

    (void)state;
    pair_make(&pair);
    carry(&pair.from_leaf, &pair.root, &pair.from_root, 1000, -1, &count);
    assert_int_equal(pair.from_root.small_bytes, EPX__CHALLENGE_BYTES);
    proof = epx__outbox_add(&pair.from_leaf, EPX__PROOF_MSG_BYTES);
    epx__prefix_encode(proof, EPX__PROOF);
    memcpy(proof + EPX__PROOF_PROOF, challenge + EPX__CHALLENGE_PROOF,
           EPX__PROOF_BYTES);
    carry(&pair.from_leaf, &pair.root, &pair.from_root, 1000, -1, &count);
    assert_int_equal(pair.root.state, EPX__HANDSHAKE_FAILED);
    assert_int_equal(pair.root.failure, EPX__FAILURE_SECRET);
}

static void
check_verdict(pair_t *pair, epx__verdict_t verdict, uint32_t value)
{
    (void)converse(pair, 1000, -1);
    assert_int_equal(pair->leaf.state, EPX__HANDSHAKE_JUDGED);
    assert_int_equal(pair->leaf.verdict, verdict);
    assert_int_equal(pair->leaf.value, value);
}

/* Says hello again, as a rank that believes what the identity now says. */
static void
hello_again(pair_t *pair)
{
    unsigned char nonce[EPX__NONCE_BYTES] = { 3 };

    pair->from_leaf = (epx__outbox_t){ 0 };
    epx__handshake_connect(&pair->leaf, &pair->leaf_identity, nonce,
                           &pair->from_leaf);
}

static void
test_verdicts(void **state)
{
    static const int32_t bad_ranks[] = { 8, 9, 1024, INT32_MAX, -1, INT32_MIN };
    pair_t pair;

    (void)state;
    pair_make(&pair);
    pair.taken = 5;
    check_verdict(&pair, EPX__VERDICT_TAKEN, 5);

    pair_make(&pair);
    pair.leaf_identity.rank = 0;
    hello_again(&pair);
    check_verdict(&pair, EPX__VERDICT_TAKEN, 0);

    pair_make(&pair);
    pair.leaf_identity.num_ranks = 16;
    hello_again(&pair);
    check_verdict(&pair, EPX__VERDICT_OTHER_SIZE, 8);

    pair_make(&pair);
    pair.leaf_identity.job[0] ^= 1;
    hello_again(&pair);
    check_verdict(&pair, EPX__VERDICT_OTHER_JOB, 0);

    for (size_t i = 0; i < sizeof(bad_ranks) / sizeof(*bad_ranks); i++) {
        pair_make(&pair);
        pair.leaf_identity.rank = bad_ranks[i];
        hello_again(&pair);
        check_verdict(&pair, EPX__VERDICT_BAD_RANK, 8);
    }
}

/* Another version is told ours, eight bytes, and nothing else. */
static void
test_other_version(void **state)
{
    pair_t pair;

    (void)state;
    pair_make(&pair);
    pair.from_leaf.small[4] = 9;
    (void)converse(&pair, 1000, -1);
    assert_int_equal(pair.root.state, EPX__HANDSHAKE_FAILED);
    assert_int_equal(pair.root.failure, EPX__FAILURE_VERSION);
    assert_int_equal(pair.root.peer_version, 9);
    assert_int_equal(pair.from_root.small_bytes, EPX__PREFIX_BYTES);

    pair_make(&pair);
    epx__prefix_encode(epx__outbox_add(&pair.from_root, EPX__PREFIX_BYTES),
                       EPX__CHALLENGE);
    pair.from_root.small[4] = 9;
    (void)converse(&pair, 1000, -1);
    assert_int_equal(pair.leaf.state, EPX__HANDSHAKE_FAILED);
    assert_int_equal(pair.leaf.failure, EPX__FAILURE_VERSION);
    assert_int_equal(pair.leaf.peer_version, 9);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_holders_of_the_secret_meet),
        cmocka_unit_test(test_every_changed_byte_is_noticed),
        cmocka_unit_test(test_keys),
        cmocka_unit_test(test_wrong_secret),
        cmocka_unit_test(test_reflection),
        cmocka_unit_test(test_verdicts),
        cmocka_unit_test(test_other_version),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
