/* SPDX-License-Identifier: MIT */
#include "fabric/fd_exchange.h"

#include "core/clock.h"
#include "core/rank_list.h"

#include <errno.h>
#include <poll.h>
#include <stddef.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

/* How often a wait looks at its deadline. */
#define POLL_MS 100

/* What travels with the descriptor. */
typedef struct hello {
    uint64_t magic;
    uint64_t job_id[2];
    uint64_t token[4]; /* of the sender's card */
    uint32_t rank;
    uint32_t unused;
} hello_t;

/* What the steps of an exchange share. */
typedef struct run {
    const epx__fd_exchange_t *exchange;
    epx_group_t *group;
    epx__reach_t *reach;
    const epx__fabric_card_t *cards;
    int64_t deadline_ns;
    epx__fd_attach_t *attach;
    int32_t pushed;   /* peers that have our descriptor */
    int32_t attached; /* segments that we have */
} run_t;

const char *
epx__fd_exchange_obstacle(const epx__fabric_place_t *a,
                          const epx__fabric_place_t *b)
{
    if (!epx__fabric_same_host(a, b)) {
        return "are on different hosts";
    }
    if (a->net_ns != b->net_ns) {
        return "are on one host but in different network namespaces "
               "(containers), which it does not cross";
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

void
epx__fd_exchange_close(epx__fd_exchange_t *exchange)
{
    close_fd(&exchange->fd);
    close_fd(&exchange->listener);
}

/* Listen on a fresh abstract address, chosen by the kernel. */
static epx_status_t
create_listener(epx__fd_exchange_t *exchange, int backlog, char *address)
{
    struct sockaddr_un name = { .sun_family = AF_UNIX };
    socklen_t length = sizeof(sa_family_t);

    exchange->listener =
        socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (exchange->listener < 0) {
        return epx__fail(EPX_ERR_SYSTEM, "cannot make a Unix socket: %m");
    }
    if (bind(exchange->listener, (struct sockaddr *)&name, length) != 0 ||
        listen(exchange->listener, backlog) != 0) {
        return epx__fail(EPX_ERR_SYSTEM, "cannot listen on a Unix socket: %m");
    }
    length = sizeof(name);
    if (getsockname(exchange->listener, (struct sockaddr *)&name, &length) !=
        0) {
        return epx__fail(EPX_ERR_SYSTEM, "cannot name a Unix socket: %m");
    }
    /* The name starts with a NUL, which is not stored. */
    length -= (socklen_t)offsetof(struct sockaddr_un, sun_path) + 1;
    memcpy(address, name.sun_path + 1, length);
    address[length] = '\0';
    return EPX_OK;
}

epx_status_t
epx__fd_exchange_open(epx__fd_exchange_t *exchange, const epx_group_t *group,
                      epx__fabric_card_t *card)
{
    /* Some room for strangers. */
    epx_status_t status =
        create_listener(exchange, group->num_ranks + 16, card->address);

    if (status == EPX_OK && getrandom(card->token, sizeof(card->token), 0) !=
                                (ssize_t)sizeof(card->token)) {
        status = epx__fail(EPX_ERR_SYSTEM, "no random bytes: %m");
    }
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
    if (fd < 0) {
        return epx__fail(EPX_ERR_SYSTEM, "cannot make a Unix socket: %m");
    }
    if (connect(fd, (struct sockaddr *)&name, (socklen_t)bytes) != 0) {
        return errno == EAGAIN
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
push_descriptor(const run_t *run, int32_t peer, bool *pushed_p)
{
    const epx_group_t *group = run->group;
    const uint64_t *token = run->cards[group->rank].token;
    hello_t hello = { EPX__SEGMENT_MAGIC,
                      { group->job_id[0], group->job_id[1] },
                      { token[0], token[1], token[2], token[3] },
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
    memcpy(CMSG_DATA(cmsg), &run->exchange->fd, sizeof(int));
    status = connect_to_peer(fd, &run->cards[peer], peer, pushed_p);
    if (*pushed_p &&
        sendmsg(fd, &message, MSG_NOSIGNAL) != (ssize_t)sizeof(hello)) {
        status = epx__fail(EPX_ERR_PEER_LOST,
                           "cannot hand the heap to rank %d: %m", peer);
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

/* Read one greeting; returns the descriptor and its rank; -1 and a rank when
 * its descriptor could not be taken in; and -1 alone for a stranger, who is not
 * worth an error: the real peer may still come. */
static int
receive_hello(const run_t *run, int connection, int32_t *rank_p)
{
    const epx_group_t *group = run->group;
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
        !epx__is_near(&group->nodes, (int32_t)hello.rank) ||
        !tokens_equal(hello.token, run->cards[hello.rank].token)) {
        close_fd(&fd);
        return -1;
    }
    if (fd >= 0 || (message.msg_flags & MSG_CTRUNC) != 0) {
        *rank_p = (int32_t)hello.rank;
    }
    return fd;
}

static bool
not_attached(const void *context, int32_t rank)
{
    const run_t *run = context;

    return epx__is_near(&run->group->nodes, rank) &&
           run->reach->peers[rank].base == NULL;
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
accept_one(run_t *run, int timeout_ms)
{
    epx_status_t status = EPX_OK;
    int connection = -1, fd = -1;
    int32_t rank = -1;

    if (is_readable(run->exchange->listener, timeout_ms)) {
        connection = accept4(run->exchange->listener, NULL, NULL, SOCK_CLOEXEC);
        if (connection < 0 && (errno == EMFILE || errno == ENFILE)) {
            return epx__fail(EPX_ERR_SYSTEM, "cannot let a peer connect: %m");
        }
    }
    if (connection >= 0 && wait_for_hello(connection, run->deadline_ns)) {
        fd = receive_hello(run, connection, &rank);
    }
    if (fd < 0 && rank >= 0) {
        status = epx__fail(EPX_ERR_SYSTEM,
                           "rank %d sent its heap, but this process has no "
                           "descriptor left to take it",
                           rank);
    }
    if (fd >= 0 && run->reach->peers[rank].base == NULL) {
        status =
            run->attach(run->group, run->reach, fd, rank, &run->cards[rank]);
        run->attached++;
    }
    close_fd(&fd);
    close_fd(&connection);
    return status;
}

/* peer: the next one that needs our segment. */
static epx_status_t
timed_out(const run_t *run, int32_t peer)
{
    const epx_group_t *group = run->group;
    epx__rank_list_t list =
        epx__rank_list_make(group->num_ranks, not_attached, run);

    if (run->attached == epx__node_size(&group->nodes, group->nodes.own)) {
        return epx__fail(EPX_ERR_TIMEOUT,
                         "rank %d timed out handing its heap to rank %d, whose "
                         "socket takes no more connections",
                         group->rank, peer);
    }
    return epx__fail(EPX_ERR_TIMEOUT,
                     "rank %d timed out waiting for the heap of %s",
                     group->rank, list.text);
}

epx_status_t
epx__fd_exchange_run(epx__fd_exchange_t *exchange, epx_group_t *group,
                     epx__reach_t *reach, const epx__fabric_card_t *cards,
                     int64_t deadline_ns, epx__fd_attach_t *attach)
{
    run_t run = { exchange, group, reach, cards, deadline_ns, attach, 1, 1 };
    const epx__nodes_t *nodes = &group->nodes;
    const int32_t *ranks = epx__node_ranks(nodes, nodes->own);
    int32_t count = epx__node_size(nodes, nodes->own);
    epx_status_t status = EPX_OK;

    /* Both at once: a full queue drains only while its owner accepts. */
    while (status == EPX_OK && (run.pushed < count || run.attached < count)) {
        int32_t peer =
            ranks[(nodes->index_of[group->rank] + run.pushed) % count];
        bool done = false;

        if (run.pushed < count) {
            status = push_descriptor(&run, peer, &done);
            run.pushed += done;
        }
        if (status == EPX_OK && !done) {
            status = accept_one(&run, run.pushed < count ? 1 : POLL_MS);
        }
        if (status == EPX_OK) {
            status = epx__group_check(group); /* a peer may have died */
        }
        if (status == EPX_OK && epx__now_ns() >= deadline_ns) {
            status = timed_out(&run, peer);
        }
    }
    /* What was attached stays; the descriptors have done their work. */
    epx__fd_exchange_close(exchange);
    return status;
}
