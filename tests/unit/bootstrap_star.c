/* SPDX-License-Identifier: MIT */
/* Frames that no honest rank sends: refused, and nothing written that should
 * not be. */
#include "bootstrap_util.h"

#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define BYTES  16
#define CANARY 0xa5

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

/* A star of two with this end's `rank`; the other end is *fd_p. */
static epx__star_t *
star_make(int32_t rank, int *fd_p)
{
    epx__link_t links[2] = { { .fd = -1 }, { .fd = -1 } };
    epx__star_t *star;
    int ends[2];

    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, ends),
                     0);
    links[rank == 0 ? 1 : 0].fd = ends[0];
    assert_int_equal(epx__star_create(rank, 2, links, &star), EPX_OK);
    if (rank != 0) {
        const epx__frame_t welcome = { .kind = EPX__FRAME_DATA };
        unsigned char bytes[EPX__FRAME_BYTES];

        epx__frame_encode(bytes, &welcome);
        assert_int_equal(write(ends[1], bytes, sizeof(bytes)), sizeof(bytes));
    }
    assert_int_equal(epx__star_start(star, in_ms(5000)), EPX_OK);
    *fd_p = ends[1];
    return star;
}

static void
check_refused(int32_t rank, const bad_frame_t *bad)
{
    unsigned char send[BYTES] = "fifteen letters";
    unsigned char recv[4 * BYTES];
    int fd;
    epx__star_t *star = star_make(rank, &fd);
    epx_status_t status;

    memset(recv, CANARY, sizeof(recv));
    put_frame(fd, bad);
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
    (void)close(fd);
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
    int fd;
    epx__star_t *star = star_make(1, &fd);
    epx__link_t link = { .fd = fd };
    epx__rank_set_t ranks = { { 2 } };
    epx_status_t status;

    (void)state;
    for (int i = 0; i < 200; i++) {
        epx__link_report(&link, 0, EPX__FRAME_WAITING, 1, &ranks);
    }
    status = epx__star_allgather(star, send, recv, BYTES, in_ms(300));
    assert_int_equal(status, EPX_ERR_TIMEOUT);
    assert_non_null(strstr(epx_last_error(), "rank 1 of 2"));
    epx__star_destroy(star);
    (void)close(fd);
}

static void
test_arguments(void **state)
{
    char byte = 'x';
    char recv[2];
    int fd;
    epx__star_t *star = star_make(1, &fd);

    (void)state;
    assert_int_equal(epx__star_allgather(star, NULL, recv, 1, in_ms(5000)),
                     EPX_ERR_NULL);
    assert_int_equal(epx__star_allgather(star, &byte, NULL, 1, in_ms(5000)),
                     EPX_ERR_NULL);
    assert_int_equal(
        epx__star_allgather(star, &byte, recv, SIZE_MAX / 2, in_ms(5000)),
        EPX_ERR_INVALID);
    /* Nothing has happened yet; now the peer goes. */
    (void)close(fd);
    assert_int_equal(epx__star_allgather(star, &byte, recv, 1, in_ms(5000)),
                     EPX_ERR_PEER_LOST);
    epx__star_destroy(star);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rank_0_refuses),
        cmocka_unit_test(test_other_ranks_refuse),
        cmocka_unit_test(test_endless_reports),
        cmocka_unit_test(test_arguments),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
