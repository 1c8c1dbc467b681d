/* SPDX-License-Identifier: MIT */
/* Frames that no honest rank sends, and frames that were changed on their way:
 * refused, and nothing written that should not be. */
#include "bootstrap_util.h"

#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define BYTES  16
#define CANARY 0xa5
#define KEY    { 42, 1, 2, 3 }

typedef struct bad_frame {
    const char *what;
    uint32_t magic;
    uint16_t kind;
    uint16_t rank;
    uint64_t sequence;
    uint64_t bytes;
    epx_status_t status;
} bad_frame_t;

/* What rank 1 of 2 may send wrong in the join, sequence 0, or in the first
 * allgather. */
static const bad_frame_t to_root[] = {
    { "magic", 0, EPX__FRAME_DATA, 1, 1, BYTES, EPX_ERR_PEER_DATA },
    { "kind 0", EPX__FRAME_MAGIC, 0, 1, 1, BYTES, EPX_ERR_PEER_DATA },
    { "kind 6", EPX__FRAME_MAGIC, 6, 1, 1, BYTES, EPX_ERR_PEER_DATA },
    { "kind max", EPX__FRAME_MAGIC, UINT16_MAX, 1, 1, BYTES,
      EPX_ERR_PEER_DATA },
    { "a report", EPX__FRAME_MAGIC, EPX__FRAME_WAITING, 1, 1, BYTES,
      EPX_ERR_PEER_DATA },
    { "late before data", EPX__FRAME_MAGIC, EPX__FRAME_LATE, 1, 1,
      EPX__RANK_SET_BYTES, EPX_ERR_PEER_DATA },
    { "rank 0", EPX__FRAME_MAGIC, EPX__FRAME_DATA, 0, 1, BYTES,
      EPX_ERR_PEER_DATA },
    { "rank 2", EPX__FRAME_MAGIC, EPX__FRAME_DATA, 2, 1, BYTES,
      EPX_ERR_PEER_DATA },
    { "rank max", EPX__FRAME_MAGIC, EPX__FRAME_DATA, UINT16_MAX, 1, BYTES,
      EPX_ERR_PEER_DATA },
    { "sequence 0", EPX__FRAME_MAGIC, EPX__FRAME_DATA, 1, 0, BYTES,
      EPX_ERR_PEER_DATA },
    { "sequence 2", EPX__FRAME_MAGIC, EPX__FRAME_DATA, 1, 2, BYTES,
      EPX_ERR_PEER_DATA },
    { "sequence max", EPX__FRAME_MAGIC, EPX__FRAME_DATA, 1, UINT64_MAX, BYTES,
      EPX_ERR_PEER_DATA },
    { "0 bytes", EPX__FRAME_MAGIC, EPX__FRAME_DATA, 1, 1, 0, EPX_ERR_MISMATCH },
    { "a byte more", EPX__FRAME_MAGIC, EPX__FRAME_DATA, 1, 1, BYTES + 1,
      EPX_ERR_MISMATCH },
    { "2^32 bytes", EPX__FRAME_MAGIC, EPX__FRAME_DATA, 1, 1, UINT64_C(1) << 32,
      EPX_ERR_MISMATCH },
    { "2^63 bytes", EPX__FRAME_MAGIC, EPX__FRAME_DATA, 1, 1, UINT64_C(1) << 63,
      EPX_ERR_MISMATCH },
    { "2^64-1 bytes", EPX__FRAME_MAGIC, EPX__FRAME_DATA, 1, 1, UINT64_MAX,
      EPX_ERR_MISMATCH },
};

static const bad_frame_t to_leaf[] = {
    { "magic", 0, EPX__FRAME_DATA, 0, 1, 2 * BYTES, EPX_ERR_PEER_DATA },
    { "kind 0", EPX__FRAME_MAGIC, 0, 0, 1, 2 * BYTES, EPX_ERR_PEER_DATA },
    { "kind 6", EPX__FRAME_MAGIC, 6, 0, 1, 2 * BYTES, EPX_ERR_PEER_DATA },
    { "rank 1", EPX__FRAME_MAGIC, EPX__FRAME_DATA, 1, 1, 2 * BYTES,
      EPX_ERR_PEER_DATA },
    { "sequence 2", EPX__FRAME_MAGIC, EPX__FRAME_DATA, 0, 2, 2 * BYTES,
      EPX_ERR_PEER_DATA },
    { "2^63 bytes", EPX__FRAME_MAGIC, EPX__FRAME_DATA, 0, 1, UINT64_C(1) << 63,
      EPX_ERR_MISMATCH },
    { "a byte more", EPX__FRAME_MAGIC, EPX__FRAME_DATA, 0, 1, 2 * BYTES + 1,
      EPX_ERR_MISMATCH },
    { "a long report", EPX__FRAME_MAGIC, EPX__FRAME_WAITING, 0, 1,
      EPX__RANK_SET_BYTES + 1, EPX_ERR_PEER_DATA },
    { "an endless report", EPX__FRAME_MAGIC, EPX__FRAME_LOST, 0, 1, UINT64_MAX,
      EPX_ERR_PEER_DATA },
};

static void
put_frame(int fd, const bad_frame_t *bad)
{
    unsigned char bytes[EPX__FRAME_BYTES + 4 * BYTES];

    memset(bytes, 0xff, sizeof(bytes));
    epx__put_le(bytes, bad->magic, 4);
    epx__put_le(bytes + 4, bad->kind, 2);
    epx__put_le(bytes + 6, bad->rank, 2);
    epx__put_le(bytes + 8, bad->sequence, 8);
    epx__put_le(bytes + 16, bad->bytes, 8);
    assert_int_equal(write(fd, bytes, sizeof(bytes)), sizeof(bytes));
}

/* A star of two with this end's `rank`; *far is the other end. */
static epx__star_t *
star_make(int32_t rank, epx__link_t *far)
{
    epx__link_t links[2] = { { .fd = -1 }, { .fd = -1 } };
    epx__star_t *star;
    int ends[2];

    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, ends),
                     0);
    links[rank == 0 ? 1 : 0] = (epx__link_t){ .fd = ends[0], .key = KEY };
    *far = (epx__link_t){ .fd = ends[1], .key = KEY };
    assert_int_equal(epx__star_create(rank, 2, links, &star), EPX_OK);
    if (rank != 0) {
        const epx__frame_t welcome = { .kind = EPX__FRAME_DATA };
        const epx__digest_t digest = epx__digest(NULL, 0);

        epx__link_add(far, &welcome, NULL, &digest);
        assert_int_equal(epx__outbox_flush(&far->out, far->fd), EPX__IO_DONE);
    }
    assert_int_equal(epx__star_start(star, in_ms(5000)), EPX_OK);
    return star;
}

static void
check_refused(int32_t rank, const bad_frame_t *bad)
{
    unsigned char send[BYTES] = "fifteen letters";
    unsigned char recv[4 * BYTES];
    epx__link_t far;
    epx__star_t *star = star_make(rank, &far);
    epx_status_t status;

    memset(recv, CANARY, sizeof(recv));
    put_frame(far.fd, bad);
    status = epx__star_allgather(star, send, recv, BYTES, in_ms(5000));
    if (status != bad->status) {
        fail_msg("%s: status %d, \"%s\"; expected %d", bad->what, status,
                 epx_last_error(), bad->status);
    }
    /* Of the result only rank 0's own block may be there. */
    for (size_t i = rank == 0 ? BYTES : 0; i < sizeof(recv); i++) {
        assert_int_equal(recv[i], CANARY);
    }
    assert_int_equal(epx__star_allgather(star, send, recv, BYTES, in_ms(5000)),
                     EPX_ERR_BROKEN);
    epx__star_destroy(star);
    (void)close(far.fd);
}

static void
test_rank_0_refuses(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof(to_root) / sizeof(*to_root); i++) {
        check_refused(0, &to_root[i]);
    }
}

static void
test_other_ranks_refuse(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof(to_leaf) / sizeof(*to_leaf); i++) {
        check_refused(1, &to_leaf[i]);
    }
}

/* Reports without end keep nobody past the deadline. */
static void
test_endless_reports(void **state)
{
    unsigned char send[BYTES] = "fifteen letters";
    unsigned char recv[2 * BYTES];
    epx__link_t far;
    epx__star_t *star = star_make(1, &far);
    epx__rank_set_t ranks = { { 2 } };
    epx_status_t status;

    (void)state;
    for (int i = 0; i < 200; i++) {
        epx__link_report(&far, 0, EPX__FRAME_WAITING, 1, &ranks);
    }
    status = epx__star_allgather(star, send, recv, BYTES, in_ms(300));
    assert_int_equal(status, EPX_ERR_TIMEOUT);
    assert_non_null(strstr(epx_last_error(), "rank 1 of 2"));
    epx__star_destroy(star);
    (void)close(far.fd);
}

static void
test_arguments(void **state)
{
    char byte = 'x';
    char recv[2];
    epx__link_t far;
    epx__star_t *star = star_make(1, &far);

    (void)state;
    assert_int_equal(epx__star_allgather(star, NULL, recv, 1, in_ms(5000)),
                     EPX_ERR_NULL);
    assert_int_equal(epx__star_allgather(star, &byte, NULL, 1, in_ms(5000)),
                     EPX_ERR_NULL);
    assert_int_equal(
        epx__star_allgather(star, &byte, recv, SIZE_MAX / 2, in_ms(5000)),
        EPX_ERR_INVALID);
    /* Nothing has happened yet; now the peer goes. */
    (void)close(far.fd);
    assert_int_equal(epx__star_allgather(star, &byte, recv, 1, in_ms(5000)),
                     EPX_ERR_PEER_LOST);
    epx__star_destroy(star);
}

typedef struct message {
    unsigned char bytes[EPX__REPORT_BYTES];
    size_t count;
} message_t;

/* What an honest end sends: a frame with its block. */
static message_t
message_make(epx__link_t *from, epx__frame_kind_t kind, int32_t rank,
             const void *block, size_t bytes)
{
    const epx__frame_t frame = {
        .kind = kind, .rank = rank, .sequence = 1, .bytes = bytes
    };
    const epx__digest_t digest = epx__digest(block, bytes);
    message_t message = { .count = EPX__FRAME_BYTES + bytes };

    from->out = (epx__outbox_t){ 0 };
    epx__link_add(from, &frame, block, &digest);
    memcpy(message.bytes, from->out.small, EPX__FRAME_BYTES);
    if (bytes > 0) {
        memcpy(message.bytes + EPX__FRAME_BYTES, block, bytes);
    }
    return message;
}

static void
message_put(int fd, const message_t *message)
{
    assert_int_equal(write(fd, message->bytes, message->count), message->count);
}

/* An allgather that fails, with `status`, naming the peer when that is
 * EPX_ERR_AUTH; of what came, nothing is left. */
static void
gather_fails(epx__star_t *star, int32_t rank, size_t bytes, epx_status_t wanted,
             const char *what)
{
    unsigned char send[BYTES] = "fifteen letters";
    unsigned char recv[2 * BYTES] = { 0 };
    epx_status_t status =
        epx__star_allgather(star, send, recv, bytes, in_ms(5000));

    if (status != wanted) {
        fail_msg("%s: status %d, \"%s\"; expected %d", what, status,
                 epx_last_error(), wanted);
    }
    if (status == EPX_ERR_AUTH) {
        assert_non_null(strstr(epx_last_error(),
                               rank == 0 ? "rank 1's part" : "rank 0's part"));
    }
    for (size_t i = rank == 0 ? BYTES : 0; i < sizeof(recv); i++) {
        assert_int_equal(recv[i], 0);
    }
}

/* The header says what is waited for, or fails at once; all else is the MAC's.
 */
static epx_status_t
flip_status(epx__frame_kind_t kind, size_t byte, size_t bit)
{
    if (byte >= EPX__FRAME_MAC) {
        return EPX_ERR_AUTH;
    }
    if (kind == EPX__FRAME_DATA) {
        return byte >= 16 ? EPX_ERR_MISMATCH : EPX_ERR_PEER_DATA;
    }
    /* WAITING, 2, may become LATE, 3, but for its MAC. */
    return byte == 4 && bit == 0 ? EPX_ERR_AUTH : EPX_ERR_PEER_DATA;
}

static void
check_flips(int32_t rank, epx__frame_kind_t kind, size_t bytes)
{
    unsigned char block[EPX__RANK_SET_BYTES] = { 0x55, 0xaa, 1, 2, 3 };

    for (size_t flip = 0; flip < 8 * (EPX__FRAME_BYTES + bytes); flip++) {
        epx__link_t far;
        epx__star_t *star = star_make(rank, &far);
        message_t message = message_make(&far, kind, 1 - rank, block, bytes);
        char what[80];

        (void)snprintf(what, sizeof(what), "kind %d, byte %zu, bit %zu", kind,
                       flip / 8, flip % 8);
        message.bytes[flip / 8] ^= (unsigned char)(1u << flip % 8);
        message_put(far.fd, &message);
        gather_fails(star, rank, BYTES, flip_status(kind, flip / 8, flip % 8),
                     what);
        epx__star_destroy(star);
        (void)close(far.fd);
    }
}

static void
test_every_flipped_bit_is_noticed(void **state)
{
    (void)state;
    check_flips(0, EPX__FRAME_DATA, BYTES);
    check_flips(1, EPX__FRAME_WAITING, EPX__RANK_SET_BYTES);
}

/* The result, too. */
static void
test_changed_result(void **state)
{
    static const size_t flips[] = { EPX__FRAME_MAC, EPX__FRAME_BYTES - 1,
                                    EPX__FRAME_BYTES,
                                    EPX__FRAME_BYTES + 2 * BYTES - 1 };
    unsigned char block[2 * BYTES] = "fifteen letters";

    (void)state;
    for (size_t i = 0; i < sizeof(flips) / sizeof(*flips); i++) {
        epx__link_t far;
        epx__star_t *star = star_make(1, &far);
        message_t message =
            message_make(&far, EPX__FRAME_DATA, 0, block, sizeof(block));

        message.bytes[flips[i]] ^= 0x80;
        message_put(far.fd, &message);
        gather_fails(star, 1, BYTES, EPX_ERR_AUTH, "a changed result");
        epx__star_destroy(star);
        (void)close(far.fd);
    }
}

/* What rank 1 says comes back to it, as if rank 0 had said it. */
static void
test_reflected_frame(void **state)
{
    (void)state;
    for (int patched = 0; patched < 2; patched++) {
        epx__link_t far;
        epx__star_t *star = star_make(1, &far);
        /* The second of its direction, as the one awaited is. */
        epx__link_t own = { .key = KEY, .num_sent = 1 };
        message_t message = message_make(&own, EPX__FRAME_DATA, 1, NULL, 0);

        if (patched) {
            message.bytes[6] = 0; /* the sender's rank */
        }
        message_put(far.fd, &message);
        gather_fails(star, 1, 0, patched ? EPX_ERR_AUTH : EPX_ERR_PEER_DATA,
                     "reflected");
        epx__star_destroy(star);
        (void)close(far.fd);
    }
}

/* A report that was true once is not true twice. */
static void
test_repeated_frame(void **state)
{
    unsigned char ranks[EPX__RANK_SET_BYTES] = { 2 };
    epx__link_t far;
    epx__star_t *star = star_make(1, &far);
    message_t message =
        message_make(&far, EPX__FRAME_WAITING, 0, ranks, sizeof(ranks));

    (void)state;
    message_put(far.fd, &message);
    message_put(far.fd, &message);
    gather_fails(star, 1, BYTES, EPX_ERR_AUTH, "repeated");
    epx__star_destroy(star);
    (void)close(far.fd);
}

/* The right frame at the right time, of a connection with another key. */
static void
test_frame_of_another_connection(void **state)
{
    unsigned char block[BYTES] = "fifteen letters";

    (void)state;
    for (int32_t rank = 0; rank < 2; rank++) {
        epx__link_t far;
        epx__star_t *star = star_make(rank, &far);
        message_t message;

        far.key[EPX__KEY_BYTES - 1] ^= 1;
        message = message_make(&far, EPX__FRAME_DATA, 1 - rank, block,
                               rank == 0 ? BYTES : 0);
        message_put(far.fd, &message);
        gather_fails(star, rank, rank == 0 ? BYTES : 0, EPX_ERR_AUTH,
                     "another connection");
        epx__star_destroy(star);
        (void)close(far.fd);
    }
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rank_0_refuses),
        cmocka_unit_test(test_other_ranks_refuse),
        cmocka_unit_test(test_endless_reports),
        cmocka_unit_test(test_arguments),
        cmocka_unit_test(test_every_flipped_bit_is_noticed),
        cmocka_unit_test(test_changed_result),
        cmocka_unit_test(test_reflected_frame),
        cmocka_unit_test(test_repeated_frame),
        cmocka_unit_test(test_frame_of_another_connection),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
