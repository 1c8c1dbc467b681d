/* SPDX-License-Identifier: MIT */
/*
 * Heartbeats: a TCP connection between partners that carries nothing but the
 * sign that the other end's thread is alive.  The lower rank connects, and says
 * who it is; then each end sends a byte now and then.  Its end is the peer's
 * end, unless the peer has said goodbye, or has told that it takes this rank
 * for lost.
 */
#include "net/net_internal.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

/* What is sent once to a peer that is taken for lost; else zeros are. */
#define LET_GO 1

/* How long a stranger may take to say who it is. */
#define STRANGER_NS (5 * EPX__NS_PER_SEC)

/* The tokens came through the authenticated exchange: who has both is of this
 * group. */
typedef struct hello {
    uint64_t magic;
    uint64_t group;
    uint32_t from;
    uint32_t to;
    unsigned char from_token[16];
    unsigned char to_token[16];
} hello_t;

static socklen_t
address_bytes(const struct sockaddr_storage *address)
{
    return address->ss_family == AF_INET6 ? sizeof(struct sockaddr_in6)
                                          : sizeof(struct sockaddr_in);
}

static void
close_fd(int *fd)
{
    if (*fd >= 0) {
        (void)close(*fd);
        *fd = -1;
    }
}

static void
drop(epx__net_peer_t *peer)
{
    peer->beat.state = EPX__BEAT_NONE;
    close_fd(&peer->beat.fd);
}

/* Port 0, which is zero in either family until the kernel chooses one. */
static epx_status_t
own_address(const epx__net_config_t *config, struct sockaddr_storage *address)
{
    struct sockaddr_in *v4 = (void *)address;
    struct sockaddr_in6 *v6 = (void *)address;
    char name[64];

    if (config->address != NULL) {
        memset(address, 0, sizeof(*address));
        if (inet_pton(AF_INET, config->address, &v4->sin_addr) == 1) {
            v4->sin_family = AF_INET;
            return EPX_OK;
        }
        if (inet_pton(AF_INET6, config->address, &v6->sin6_addr) == 1) {
            v6->sin6_family = AF_INET6;
            return EPX_OK;
        }
        return epx__fail(EPX_ERR_INVALID,
                         "\"%.60s\" is no address to listen at; it must be "
                         "numeric, like 10.0.0.1",
                         config->address);
    }
    if (epx__net_interface(config->device, name, sizeof(name), address) ||
        (config->device != NULL &&
         epx__net_interface(NULL, name, sizeof(name), address))) {
        return EPX_OK;
    }
    return epx__fail(EPX_ERR_SYSTEM,
                     "no network interface is up; loopback is used only when "
                     "it is named");
}

epx_status_t
epx__net_beats_open(epx__net_t *net)
{
    epx__net_beats_t *beats = &net->beats;
    socklen_t length = sizeof(beats->address);
    epx_status_t status = own_address(&net->config, &beats->address);

    if (status != EPX_OK) {
        return status;
    }
    if (getrandom(beats->token, sizeof(beats->token), 0) !=
        (ssize_t)sizeof(beats->token)) {
        return epx__fail(EPX_ERR_SYSTEM, "no random bytes: %m");
    }
    beats->listener = socket(beats->address.ss_family,
                             SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (beats->listener < 0 ||
        bind(beats->listener, (const struct sockaddr *)&beats->address,
             address_bytes(&beats->address)) != 0 ||
        listen(beats->listener, SOMAXCONN) != 0 ||
        getsockname(beats->listener, (struct sockaddr *)&beats->address,
                    &length) != 0) {
        return epx__fail(EPX_ERR_SYSTEM,
                         "cannot listen for the heartbeats of peers: %m");
    }
    return EPX_OK;
}

static void
tune(const epx__net_t *net, int fd)
{
    int on = 1;
    unsigned timeout_ms =
        (unsigned)(net->config.lost_after_ns / (uint64_t)EPX__NS_PER_MS);

    /* Without them the deadline still works. */
    (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
    (void)setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &timeout_ms,
                     sizeof(timeout_ms));
}

void
epx__net_beats_connect(epx__net_t *net)
{
    int64_t now = epx__now_ns();

    net->beats.deadline_ns = epx__deadline_ns(net->config.timeout_ns);
    for (int32_t rank = 0; rank < net->config.num_ranks; rank++) {
        epx__net_peer_t *peer = &net->peers[rank];
        int fd;

        if (!peer->beat.is_partner) {
            continue;
        }
        peer->beat.state = EPX__BEAT_CONNECTING;
        peer->beat.heard_ns = now;
        if (rank < net->config.rank) {
            continue; /* which connects to us */
        }
        fd = socket(peer->beat.address.ss_family,
                    SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        peer->beat.fd = fd;
        /* Whether it works is seen later. */
        if (fd >= 0) {
            tune(net, fd);
            (void)!connect(fd, (const struct sockaddr *)&peer->beat.address,
                           address_bytes(&peer->beat.address));
        }
    }
}

/* A connection to a higher rank: once it stands, say who this is. */
static void
finish_connect(epx__net_t *net, int32_t rank, int64_t now)
{
    epx__net_peer_t *peer = &net->peers[rank];
    struct pollfd poll_fd = { .fd = peer->beat.fd, .events = POLLOUT };
    hello_t hello = { .magic = EPX__NET_MAGIC,
                      .group = net->group,
                      .from = (uint32_t)net->config.rank,
                      .to = (uint32_t)rank };
    int error = 0;
    socklen_t error_bytes = sizeof(error);

    if (poll(&poll_fd, 1, 0) <= 0) {
        return;
    }
    memcpy(hello.from_token, net->beats.token, sizeof(hello.from_token));
    memcpy(hello.to_token, peer->beat.token, sizeof(hello.to_token));
    if (getsockopt(peer->beat.fd, SOL_SOCKET, SO_ERROR, &error, &error_bytes) !=
            0 ||
        error != 0 ||
        send(peer->beat.fd, &hello, sizeof(hello), MSG_NOSIGNAL) !=
            (ssize_t)sizeof(hello)) {
        epx__net_link_lost(net, rank, "its heartbeat cannot be reached");
        return;
    }
    peer->beat.state = EPX__BEAT_UP;
    peer->beat.heard_ns = now;
}

/* The rank that the hello proves to be, or -1. */
static int32_t
who_is(epx__net_t *net, const hello_t *hello)
{
    epx__net_peer_t *peer;

    if (hello->magic != EPX__NET_MAGIC || hello->group != net->group ||
        hello->to != (uint32_t)net->config.rank ||
        hello->from >= (uint32_t)net->config.num_ranks) {
        return -1;
    }
    peer = &net->peers[hello->from];
    return peer->beat.state == EPX__BEAT_CONNECTING && peer->beat.fd < 0 &&
                   memcmp(hello->from_token, peer->beat.token,
                          sizeof(hello->from_token)) == 0 &&
                   memcmp(hello->to_token, net->beats.token,
                          sizeof(hello->to_token)) == 0
               ? (int32_t)hello->from
               : -1;
}

static void
hear_stranger(epx__net_t *net, epx__net_stranger_t *stranger, int64_t now)
{
    hello_t hello;
    ssize_t bytes =
        recv(stranger->fd, &hello, sizeof(hello), MSG_PEEK | MSG_DONTWAIT);
    int32_t rank = -1;

    if ((bytes < 0 && errno == EAGAIN) ||
        (bytes > 0 && bytes < (ssize_t)sizeof(hello))) {
        if (now < stranger->deadline_ns) {
            return;
        }
    } else if (bytes == (ssize_t)sizeof(hello)) {
        rank = who_is(net, &hello);
    }
    if (rank < 0) {
        close_fd(&stranger->fd);
        return;
    }
    (void)!recv(stranger->fd, &hello, sizeof(hello), MSG_DONTWAIT);
    tune(net, stranger->fd);
    net->peers[rank].beat.fd = stranger->fd;
    net->peers[rank].beat.state = EPX__BEAT_UP;
    net->peers[rank].beat.heard_ns = now;
    stranger->fd = -1;
}

static void
accept_strangers(epx__net_t *net, int64_t now)
{
    for (int i = 0; i < EPX__NET_STRANGERS; i++) {
        epx__net_stranger_t *stranger = &net->beats.strangers[i];

        if (stranger->fd < 0) {
            stranger->fd = accept4(net->beats.listener, NULL, NULL,
                                   SOCK_CLOEXEC | SOCK_NONBLOCK);
            stranger->deadline_ns = now + STRANGER_NS;
        }
        if (stranger->fd >= 0) {
            hear_stranger(net, stranger, now);
        }
    }
}

/* What the peer has sent; false: the connection has ended. */
static bool
hear(epx__net_peer_t *peer, int64_t now)
{
    char bytes[256];
    ssize_t got;

    do {
        errno = 0;
        got = recv(peer->beat.fd, bytes, sizeof(bytes), MSG_DONTWAIT);
        if (got > 0) {
            peer->beat.heard_ns = now;
            peer->beat.has_let_go = peer->beat.has_let_go ||
                                    memchr(bytes, LET_GO, (size_t)got) != NULL;
        }
    } while (got == (ssize_t)sizeof(bytes));
    return got > 0 || errno == EAGAIN || errno == EINTR;
}

/* A rank that lives lets go first.  A reset is an end, too: of a process with
 * bytes that it had not read. */
static void
hear_peer(epx__net_t *net, int32_t rank, int64_t now)
{
    epx__net_peer_t *peer = &net->peers[rank];
    bool goes_on = hear(peer, now);
    bool has_reset = !goes_on && errno == ECONNRESET;
    bool has_ended = !goes_on && (errno == 0 || has_reset);

    if (peer->beat.has_let_go) {
        epx__net_link_lost(net, rank, "it has let go of this rank");
    } else if (has_ended) {
        epx__store_u32(&peer->has_ended, 1);
    }
    if (!goes_on) {
        epx__net_link_lost(net, rank,
                           has_ended && !has_reset
                               ? "its process ended"
                               : "its heartbeat connection broke");
        drop(peer);
    }
}

void
epx__net_beats_read(epx__net_t *net, int64_t now_ns)
{
    if (net->beats.listener < 0) {
        return;
    }
    accept_strangers(net, now_ns);
    for (int32_t rank = 0; rank < net->config.num_ranks; rank++) {
        epx__net_peer_t *peer = &net->peers[rank];

        if (peer->beat.state == EPX__BEAT_CONNECTING && peer->beat.fd >= 0) {
            finish_connect(net, rank, now_ns);
        }
        if (peer->beat.state >= EPX__BEAT_UP) {
            hear_peer(net, rank, now_ns);
        } else if (peer->beat.state == EPX__BEAT_CONNECTING &&
                   now_ns >= net->beats.deadline_ns) {
            epx__net_link_lost(net, rank, "its heartbeat never came");
        }
    }
}

void
epx__net_beats_send(epx__net_t *net, int64_t now_ns)
{
    if (net->beats.listener < 0 || now_ns < net->beats.next_ns) {
        return;
    }
    net->beats.next_ns = now_ns + (int64_t)net->config.beat_ns;
    for (int32_t rank = 0; rank < net->config.num_ranks; rank++) {
        epx__net_peer_t *peer = &net->peers[rank];

        if (peer->beat.state == EPX__BEAT_UP) {
            /* A connection that takes no more, or none, is late by itself. */
            (void)!send(peer->beat.fd, "", 1, MSG_DONTWAIT | MSG_NOSIGNAL);
        }
    }
}

void
epx__net_beats_let_go(epx__net_t *net, int32_t rank)
{
    const char byte = LET_GO;
    epx__net_peer_t *peer = &net->peers[rank];

    if (peer->beat.state == EPX__BEAT_UP) {
        (void)!send(peer->beat.fd, &byte, 1, MSG_DONTWAIT | MSG_NOSIGNAL);
        peer->beat.state = EPX__BEAT_OVER;
    } else if (peer->beat.state == EPX__BEAT_CONNECTING) {
        drop(peer);
    }
}

void
epx__net_beats_close(epx__net_t *net)
{
    close_fd(&net->beats.listener);
    for (int i = 0; i < EPX__NET_STRANGERS; i++) {
        close_fd(&net->beats.strangers[i].fd);
    }
    for (int32_t rank = 0; net->peers != NULL && rank < net->config.num_ranks;
         rank++) {
        drop(&net->peers[rank]);
    }
}
