/* SPDX-License-Identifier: MIT */
/*
 * Ranks that are processes of one host.  A segment is a memfd, sealed so that
 * no peer can resize it; it has no name, so nothing is left behind and nobody
 * can open it.  Each rank pushes the descriptor of its segment to every peer's
 * Unix socket: the socket's address (in the abstract namespace) and a token for
 * each rank came through the bootstrap, and the kernel vouches for the user.
 */
#include "core/clock.h"
#include "core/rank_list.h"
#include "fabric/fabric.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

/* How often a wait looks at its deadline. */
#define POLL_MS 100

#define REQUIRED_SEALS (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)

/* What travels with the descriptor. */
typedef struct hello {
    uint64_t magic;
    uint64_t job_id[2];
    uint64_t token[4]; /* of the sender's card */
    uint32_t rank;
    uint32_t unused;
} hello_t;

typedef struct shm_state {
    int segment_fd;
    int listener;
} shm_state_t;

static const char *
shm_obstacle(const epx__fabric_place_t *a, const epx__fabric_place_t *b)
{
    if (memcmp(a->host, b->host, sizeof(a->host)) != 0) {
        return "they are on different hosts";
    }
    if (a->net_ns != b->net_ns) {
        return "they are on one host but in different network namespaces "
               "(containers), which the shm fabric does not cross";
    }
    return NULL;
}

static void
close_fd(int *fd)
{
    if (*fd >= 0) {
        (void)close(*fd);
        *fd = -1;
    }
}

static epx_status_t
map_segment(int fd, uint64_t bytes, epx__peer_t *peer)
{
    void *base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

    if (base == MAP_FAILED) {
        return epx__fail(EPX_ERR_NO_MEMORY,
                         "cannot map a heap of %" PRIu64 " bytes: %m", bytes);
    }
    (void)madvise(base, bytes, MADV_HUGEPAGE); /* only a hint */
    *peer = (epx__peer_t){ base, bytes };
    return EPX_OK;
}

static epx_status_t
create_segment(epx_group_t *group, shm_state_t *state, uint64_t bytes)
{
    state->segment_fd =
        memfd_create("epx-segment", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (state->segment_fd < 0) {
        return epx__fail(EPX_ERR_SYSTEM, "memfd_create failed: %m");
    }
    if (ftruncate(state->segment_fd, (off_t)bytes) != 0) {
        return epx__fail(EPX_ERR_NO_MEMORY,
                         "cannot make a heap of %" PRIu64 " bytes: %m", bytes);
    }
    if (fcntl(state->segment_fd, F_ADD_SEALS, REQUIRED_SEALS) != 0) {
        return epx__fail(EPX_ERR_SYSTEM, "cannot seal the heap: %m");
    }
    return map_segment(state->segment_fd, bytes, &group->peers[group->rank]);
}

/* Listen on a fresh abstract address, chosen by the kernel. */
static epx_status_t
create_listener(const epx_group_t *group, shm_state_t *state, char *address)
{
    struct sockaddr_un name = { .sun_family = AF_UNIX };
    socklen_t length = sizeof(sa_family_t);

    state->listener =
        socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (state->listener < 0) {
        return epx__fail(EPX_ERR_SYSTEM, "cannot make a Unix socket: %m");
    }
    if (bind(state->listener, (struct sockaddr *)&name, length) != 0 ||
        listen(state->listener, group->num_ranks + 16) != 0) {
        return epx__fail(EPX_ERR_SYSTEM, "cannot listen on a Unix socket: %m");
    }
    length = sizeof(name);
    if (getsockname(state->listener, (struct sockaddr *)&name, &length) != 0) {
        return epx__fail(EPX_ERR_SYSTEM, "cannot name a Unix socket: %m");
    }
    /* The name starts with a NUL, which is not stored. */
    length -= (socklen_t)offsetof(struct sockaddr_un, sun_path) + 1;
    memcpy(address, name.sun_path + 1, length);
    address[length] = '\0';
    return EPX_OK;
}

static void
shm_close(epx_group_t *group)
{
    shm_state_t *state = group->fabric_state;

    if (state == NULL) {
        return;
    }
    for (int32_t rank = 0; rank < group->num_ranks; rank++) {
        if (group->peers[rank].base != NULL) {
            (void)munmap(group->peers[rank].base, group->peers[rank].bytes);
        }
    }
    close_fd(&state->segment_fd);
    close_fd(&state->listener);
    free(state);
    group->fabric_state = NULL;
}

static epx_status_t
shm_open_segment(epx_group_t *group, uint64_t bytes, epx__fabric_card_t *card)
{
    shm_state_t *state = malloc(sizeof(*state));
    epx_status_t status;

    if (state == NULL) {
        return epx__fail(EPX_ERR_NO_MEMORY, "no memory for a segment");
    }
    *state = (shm_state_t){ -1, -1 };
    group->fabric_state = state;
    status = create_segment(group, state, bytes);
    if (status == EPX_OK) {
        status = create_listener(group, state, card->address);
    }
    if (status == EPX_OK && getrandom(card->token, sizeof(card->token), 0) !=
                                (ssize_t)sizeof(card->token)) {
        status = epx__fail(EPX_ERR_SYSTEM, "no random bytes: %m");
    }
    card->segment_bytes = bytes;
    return status;
}

/* Whether the process at the other end is of our user, as the kernel tells. */
static bool
is_same_user(int connection)
{
    struct ucred peer;
    socklen_t length = sizeof(peer);

    return getsockopt(connection, SOL_SOCKET, SO_PEERCRED, &peer, &length) ==
               0 &&
           peer.uid == geteuid();
}

/* *connected_p stays false, without an error, while the peer's queue is full:
 * strangers may have filled it, and the peer will drain it. */
static epx_status_t
connect_to_peer(int fd, const epx__fabric_card_t *peer, int32_t peer_rank,
                bool *connected_p)
{
    struct sockaddr_un name = { .sun_family = AF_UNIX };
    size_t length = strnlen(peer->address, sizeof(peer->address) - 1);
    size_t bytes = offsetof(struct sockaddr_un, sun_path) + 1 + length;

    *connected_p = false;
    memcpy(name.sun_path + 1, peer->address, length);
    if (fd < 0 ||
        connect(fd, (struct sockaddr *)&name, (socklen_t)bytes) != 0) {
        return fd >= 0 && errno == EAGAIN
                   ? EPX_OK
                   : epx__fail(EPX_ERR_PEER_LOST,
                               "cannot reach the socket of rank %d: %m",
                               peer_rank);
    }
    /* The name may have passed to a stranger since the peer's death. */
    if (!is_same_user(fd)) {
        return epx__fail(EPX_ERR_AUTH,
                         "the socket of rank %d belongs to another user; only "
                         "uid %u is given the heap",
                         peer_rank, (unsigned)geteuid());
    }
    *connected_p = true;
    return EPX_OK;
}

/* Send our descriptor to one peer.  Connecting and sending do not wait for the
 * peer to accept: the kernel queues both.  *pushed_p stays false when strangers
 * have filled the peer's queue, which it will drain. */
static epx_status_t
push_segment(const epx_group_t *group, const epx__fabric_card_t *own,
             const epx__fabric_card_t *peer, int32_t peer_rank, bool *pushed_p)
{
    const shm_state_t *state = group->fabric_state;
    hello_t hello = { EPX__SEGMENT_MAGIC,
                      { group->job_id[0], group->job_id[1] },
                      { own->token[0], own->token[1], own->token[2],
                        own->token[3] },
                      (uint32_t)group->rank,
                      0 };
    struct iovec data = { &hello, sizeof(hello) };
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(int))] = { 0 };
    struct msghdr message = { .msg_iov = &data,
                              .msg_iovlen = 1,
                              .msg_control = control,
                              .msg_controllen = sizeof(control) };
    struct cmsghdr *cmsg = CMSG_FIRSTHDR(&message);
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    epx_status_t status = EPX_OK;

    cmsg->cmsg_level = SOL_SOCKET;
    cmsg->cmsg_type = SCM_RIGHTS;
    cmsg->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(cmsg), &state->segment_fd, sizeof(int));
    status = connect_to_peer(fd, peer, peer_rank, pushed_p);
    if (*pushed_p &&
        sendmsg(fd, &message, MSG_NOSIGNAL) != (ssize_t)sizeof(hello)) {
        status = epx__fail(EPX_ERR_PEER_LOST,
                           "cannot hand the heap to rank %d: %m", peer_rank);
    }
    close_fd(&fd);
    return status;
}

/* The descriptor that came with the message, or -1; others are closed. */
static int
take_descriptor(struct msghdr *message)
{
    int fd = -1;

    for (struct cmsghdr *c = CMSG_FIRSTHDR(message); c != NULL;
         c = CMSG_NXTHDR(message, c)) {
        size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);

        if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) {
            continue;
        }
        for (size_t i = 0; i < count; i++) {
            int received;

            memcpy(&received, CMSG_DATA(c) + i * sizeof(int), sizeof(int));
            close_fd(&fd);
            fd = received;
        }
    }
    return fd;
}

static bool
tokens_equal(const uint64_t *a, const uint64_t *b)
{
    return ((a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3])) == 0;
}

/* Read one greeting; returns the descriptor and its rank, or -1 for a stranger,
 * who is not worth an error: the real peer may still come. */
static int
receive_hello(const epx_group_t *group, const epx__fabric_card_t *cards,
              int connection, int32_t *rank_p)
{
    hello_t hello;
    struct iovec data = { &hello, sizeof(hello) };
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(int))];
    struct msghdr message = { .msg_iov = &data,
                              .msg_iovlen = 1,
                              .msg_control = control,
                              .msg_controllen = sizeof(control) };
    ssize_t bytes = recvmsg(connection, &message, MSG_CMSG_CLOEXEC);
    int fd;

    if (bytes < 0) {
        return -1;
    }
    fd = take_descriptor(&message);
    if (bytes != (ssize_t)sizeof(hello) || hello.magic != EPX__SEGMENT_MAGIC ||
        hello.job_id[0] != group->job_id[0] ||
        hello.job_id[1] != group->job_id[1] ||
        hello.rank >= (uint32_t)group->num_ranks ||
        !tokens_equal(hello.token, cards[hello.rank].token)) {
        close_fd(&fd);
    }
    if (fd >= 0) {
        *rank_p = (int32_t)hello.rank;
    }
    return fd;
}

static epx_status_t
attach_segment(epx_group_t *group, int fd, int32_t rank, uint64_t bytes)
{
    struct stat info;
    int seals = fcntl(fd, F_GET_SEALS);
    epx_status_t status;

    if (fstat(fd, &info) != 0 || (uint64_t)info.st_size != bytes || seals < 0 ||
        (seals & REQUIRED_SEALS) != REQUIRED_SEALS) {
        return epx__fail(EPX_ERR_PEER_DATA,
                         "the segment of rank %d has %" PRId64
                         " bytes and seals %#x; expected %" PRIu64
                         " bytes and seals %#x",
                         rank, (int64_t)info.st_size, (unsigned)seals, bytes,
                         REQUIRED_SEALS);
    }
    status = map_segment(fd, bytes, &group->peers[rank]);
    return status == EPX_OK ? epx__fabric_check_segment(group, rank, bytes)
                            : status;
}

static bool
not_attached(const void *context, int32_t rank)
{
    const epx_group_t *group = context;

    return group->peers[rank].base == NULL;
}

static bool
is_readable(int fd, int timeout_ms)
{
    struct pollfd entry = { fd, POLLIN, 0 };

    return poll(&entry, 1, timeout_ms) > 0;
}

/* The greeting of a connection of our own user, who may be slow to send it;
 * others may not make us wait. */
static bool
wait_for_hello(int connection, int64_t deadline_ns)
{
    if (!is_same_user(connection)) {
        return false;
    }
    while (!is_readable(connection, POLL_MS)) {
        if (epx__now_ns() >= deadline_ns) {
            return false;
        }
    }
    return true;
}

/* Take in the next peer's segment, if there is one within timeout_ms; EPX_OK
 * also when there is none, or it was a stranger. */
static epx_status_t
accept_one(epx_group_t *group, const epx__fabric_card_t *cards,
           int64_t deadline_ns, int timeout_ms, int32_t *attached_p)
{
    shm_state_t *state = group->fabric_state;
    epx_status_t status = EPX_OK;
    int connection = -1, fd = -1;
    int32_t rank = -1;

    if (is_readable(state->listener, timeout_ms)) {
        connection = accept4(state->listener, NULL, NULL, SOCK_CLOEXEC);
    }
    if (connection >= 0 && wait_for_hello(connection, deadline_ns)) {
        fd = receive_hello(group, cards, connection, &rank);
    }
    if (fd >= 0 && group->peers[rank].base == NULL) {
        status = attach_segment(group, fd, rank, cards[rank].segment_bytes);
        (*attached_p)++;
    }
    close_fd(&fd);
    close_fd(&connection);
    return status;
}

/* peer: the next one that needs our segment. */
static epx_status_t
connect_timed_out(const epx_group_t *group, int32_t attached, int32_t peer)
{
    epx__rank_list_t list =
        epx__rank_list_make(group->num_ranks, not_attached, group);

    if (attached == group->num_ranks) {
        return epx__fail(EPX_ERR_TIMEOUT,
                         "rank %d timed out handing its heap to rank %d, whose "
                         "socket takes no more connections",
                         group->rank, peer);
    }
    return epx__fail(EPX_ERR_TIMEOUT,
                     "rank %d timed out waiting for the heap of %s",
                     group->rank, list.text);
}

static epx_status_t
shm_connect(epx_group_t *group, const epx__fabric_card_t *cards,
            int64_t deadline_ns)
{
    shm_state_t *state = group->fabric_state;
    epx_status_t status = EPX_OK;
    int32_t pushed = 1, attached = 1; /* our own segment */

    /* Both at once: a full queue drains only while its owner accepts. */
    while (status == EPX_OK &&
           (pushed < group->num_ranks || attached < group->num_ranks)) {
        int32_t peer = (group->rank + pushed) % group->num_ranks;
        bool done = false;

        if (pushed < group->num_ranks) {
            status = push_segment(group, &cards[group->rank], &cards[peer],
                                  peer, &done);
            pushed += done;
        }
        if (status == EPX_OK && !done) {
            status =
                accept_one(group, cards, deadline_ns,
                           pushed < group->num_ranks ? 1 : POLL_MS, &attached);
        }
        if (status == EPX_OK && epx__now_ns() >= deadline_ns) {
            status = connect_timed_out(group, attached, peer);
        }
    }
    /* The mappings stay; the descriptors have done their work. */
    close_fd(&state->listener);
    close_fd(&state->segment_fd);
    return status;
}

const epx__fabric_ops_t epx__fabric_shm = {
    .name = "shm",
    .obstacle = shm_obstacle,
    .open = shm_open_segment,
    .connect = shm_connect,
    .close = shm_close,
};
