/* SPDX-License-Identifier: MIT */
#include "fabric_pair.h"

#include "core/clock.h"

#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

/* A value that shows whose segment this is. */
static uint64_t *
nameplate(const pair_t *pair, int rank, int of)
{
    const pair_rank_t *viewer = &pair->ranks[rank];

    return (uint64_t *)(void *)(viewer->peers[of].base +
                                viewer->group.map.heap);
}

pair_t *
pair_open(void)
{
    const int32_t node_of[PAIR_RANKS] = { 0 };
    pair_t *pair = calloc(1, sizeof(*pair));

    assert_non_null(pair);
    for (int r = 0; r < PAIR_RANKS; r++) {
        pair_rank_t *rank = &pair->ranks[r];

        rank->group.rank = r;
        rank->group.num_ranks = PAIR_RANKS;
        rank->group.max_experts = PAIR_EXPERTS;
        rank->group.job_id[0] = 11;
        rank->group.job_id[1] = 22;
        rank->group.map = epx__map_make(PAIR_RANKS, PAIR_EXPERTS);
        rank->group.reach.peers = rank->peers;
        rank->group.peers = rank->peers;
        rank->cards = pair->cards;
        WORKS(epx__nodes_open(&rank->group.nodes, r, PAIR_RANKS, node_of));
        pair->bytes = rank->group.map.heap + PAIR_HEAP;
        WORKS(epx__fabric_shm.open(&rank->group, &rank->group.reach,
                                   pair->bytes, &pair->cards[r]));
        *nameplate(pair, r, r) = 1000 + (uint64_t)r;
    }
    return pair;
}

void
pair_close(pair_t *pair)
{
    for (int r = 0; r < PAIR_RANKS; r++) {
        epx__fabric_shm.close(&pair->ranks[r].group,
                              &pair->ranks[r].group.reach);
        epx__nodes_close(&pair->ranks[r].group.nodes);
    }
    free(pair);
}

static void *
connect_rank(void *arg)
{
    pair_rank_t *rank = arg;
    epx_status_t status = epx__fabric_shm.connect(
        &rank->group, &rank->group.reach, rank->cards, rank->deadline_ns);

    epx__error_save(&rank->result, status); /* "" when all is well */
    return NULL;
}

void
pair_start_connect(pair_t *pair, int rank, int64_t timeout_ms)
{
    pair_rank_t *self = &pair->ranks[rank];

    self->deadline_ns = epx__now_ns() + timeout_ms * EPX__NS_PER_MS;
    assert_int_equal(pthread_create(&self->thread, NULL, connect_rank, self),
                     0);
}

void
pair_end_connect(pair_t *pair, int rank)
{
    assert_int_equal(pthread_join(pair->ranks[rank].thread, NULL), 0);
}

void
pair_assert_fails(pair_t *pair, int rank, epx_status_t status, const char *word)
{
    const epx__error_t *result = &pair->ranks[rank].result;

    pair_end_connect(pair, rank);
    if (result->status != status || strstr(result->text, word) == NULL) {
        fail_msg("expected status %d and '%s', got %d and '%s'", status, word,
                 result->status, result->text);
    }
}

void
pair_assert_joins(pair_t *pair)
{
    const struct timespec late = { 0, 20000000 };

    pair_start_connect(pair, 1, 10000);
    (void)nanosleep(&late, NULL);
    pair_start_connect(pair, 0, 10000);
    for (int r = 0; r < PAIR_RANKS; r++) {
        pair_end_connect(pair, r);
    }
    for (int r = 0; r < PAIR_RANKS; r++) {
        if (pair->ranks[r].result.status != EPX_OK) {
            fail_msg("rank 0: %s; rank 1: %s", pair->ranks[0].result.text,
                     pair->ranks[1].result.text);
        }
        for (int of = 0; of < PAIR_RANKS; of++) {
            assert_int_equal(*nameplate(pair, r, of), 1000 + of);
        }
    }
}

pair_hello_t
pair_right_hello(const pair_t *pair)
{
    pair_hello_t hello = { EPX__SEGMENT_MAGIC, { 11, 22 }, { 0 }, 1, 0 };

    memcpy(hello.token, pair->cards[1].token, sizeof(hello.token));
    return hello;
}

int
pair_connect_to(const pair_t *pair, int rank)
{
    const char *address = pair->cards[rank].address;
    struct sockaddr_un name = { .sun_family = AF_UNIX };
    size_t length = strlen(address);
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

    memcpy(name.sun_path + 1, address, length);
    if (fd >= 0 && connect(fd, (struct sockaddr *)&name,
                           (socklen_t)(offsetof(struct sockaddr_un, sun_path) +
                                       1 + length)) != 0) {
        (void)close(fd);
        fd = -1;
    }
    return fd;
}

void
pair_say(int connection, const void *data, size_t bytes, const int *fds,
         int num_fds)
{
    struct iovec iov = { (void *)(uintptr_t)data, bytes };
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(4 * sizeof(int))] = { 0 };
    struct msghdr message = { .msg_iov = &iov, .msg_iovlen = 1 };

    if (num_fds > 0) {
        struct cmsghdr *cmsg = (struct cmsghdr *)(void *)control;

        message.msg_control = control;
        message.msg_controllen = CMSG_SPACE((size_t)num_fds * sizeof(int));
        cmsg->cmsg_level = SOL_SOCKET;
        cmsg->cmsg_type = SCM_RIGHTS;
        cmsg->cmsg_len = CMSG_LEN((size_t)num_fds * sizeof(int));
        memcpy(CMSG_DATA(cmsg), fds, (size_t)num_fds * sizeof(int));
    }
    assert_int_equal(sendmsg(connection, &message, MSG_NOSIGNAL), bytes);
}

int
pair_make_decoy(const pair_t *pair, size_t bytes, int seals)
{
    int fd = memfd_create("decoy", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    epx__segment_header_t header =
        *(const epx__segment_header_t *)(void *)pair->ranks[1].peers[1].base;

    assert_true(fd >= 0);
    assert_int_equal(ftruncate(fd, (off_t)bytes), 0);
    assert_int_equal(pwrite(fd, &header, sizeof(header), 0), sizeof(header));
    assert_int_equal(fcntl(fd, F_ADD_SEALS, seals), 0);
    return fd;
}
