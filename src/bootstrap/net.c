/* SPDX-License-Identifier: MIT */
#include "bootstrap/net.h"

#include "bootstrap/io.h"
#include "core/clock.h"
#include "core/status.h"

#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define RESOLVE_PAUSE_NS (200 * EPX__NS_PER_MS)

void
epx__reason_set(epx__reason_t *why, const char *format, ...)
{
    va_list args;

    va_start(args, format);
    (void)vsnprintf(why->text, sizeof(why->text), format, args);
    va_end(args);
}

static epx__address_text_t
address_text(const epx__address_t *address, bool with_port)
{
    epx__address_text_t text;
    char host[64];
    char port[8];

    if (getnameinfo((const struct sockaddr *)&address->storage, address->bytes,
                    host, sizeof(host), port, sizeof(port),
                    NI_NUMERICHOST | NI_NUMERICSERV) != 0) {
        (void)snprintf(text.text, sizeof(text.text), "an unknown address");
    } else if (!with_port) {
        (void)snprintf(text.text, sizeof(text.text), "%s", host);
    } else {
        (void)snprintf(text.text, sizeof(text.text),
                       address->storage.ss_family == AF_INET6 ? "[%s]:%s"
                                                              : "%s:%s",
                       host, port);
    }
    return text;
}

epx__address_text_t
epx__address_text(const epx__address_t *address)
{
    return address_text(address, true);
}

epx__address_text_t
epx__address_host_text(const epx__address_t *address)
{
    return address_text(address, false);
}

bool
epx__address_is_wildcard(const epx__address_t *address)
{
    const struct sockaddr_in *v4 = (const void *)&address->storage;
    const struct sockaddr_in6 *v6 = (const void *)&address->storage;

    if (address->storage.ss_family == AF_INET) {
        return v4->sin_addr.s_addr == htonl(INADDR_ANY);
    }
    if (IN6_IS_ADDR_V4MAPPED(&v6->sin6_addr)) {
        return memcmp(v6->sin6_addr.s6_addr + 12, "\0\0\0\0", 4) == 0;
    }
    return IN6_IS_ADDR_UNSPECIFIED(&v6->sin6_addr);
}

void
epx__net_no_delay(int fd)
{
    int on = 1;

    /* Only speed is lost without it. */
    (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
}

static int
open_socket(const epx__address_t *address)
{
    int on = 1;
    int fd = socket(address->storage.ss_family,
                    SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

    if (fd >= 0) {
        /* At the listening end: not held up by connections of an earlier job.
         * At the connecting end: a socket whose own port happens to be rank
         * 0's does not keep rank 0 from listening there. */
        (void)setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
    }
    return fd;
}

/* Keeps errno. */
static void
close_failed(int fd)
{
    int saved_errno = errno;

    if (fd >= 0) {
        (void)close(fd);
    }
    errno = saved_errno;
}

static int
listen_at(const epx__address_t *address)
{
    int fd = open_socket(address);

    if (fd >= 0 && (bind(fd, (const struct sockaddr *)&address->storage,
                         address->bytes) != 0 ||
                    listen(fd, SOMAXCONN) != 0)) {
        close_failed(fd);
        return -1;
    }
    return fd;
}

static size_t
resolve_until(const char *host, uint16_t port, int64_t deadline_ns,
              epx__address_t addresses[EPX__MAX_ADDRESSES], epx__reason_t *why)
{
    for (;;) {
        size_t count = epx__resolve(host, port, deadline_ns, addresses, why);
        int64_t now = epx__now_ns();

        if (count > 0 || now >= deadline_ns) {
            return count;
        }
        (void)epx__poll_until(NULL, 0,
                              deadline_ns - now < RESOLVE_PAUSE_NS
                                  ? deadline_ns
                                  : now + RESOLVE_PAUSE_NS);
    }
}

epx_status_t
epx__net_listen(const char *host, uint16_t port, int64_t deadline_ns, int *fd_p,
                epx__address_t *bound)
{
    epx__address_t addresses[EPX__MAX_ADDRESSES];
    epx__reason_t why;
    size_t count = resolve_until(host, port, deadline_ns, addresses, &why);
    int error;

    if (count == 0) {
        return epx__fail(EPX_ERR_ENVIRONMENT, "%s", why.text);
    }
    for (size_t i = 0; i < count; i++) {
        if (epx__address_is_wildcard(&addresses[i])) {
            return epx__fail(EPX_ERR_ENVIRONMENT,
                             "rank 0 cannot listen at %s, which means every "
                             "interface; MASTER_ADDR must name one address of "
                             "its host",
                             host);
        }
        *fd_p = listen_at(&addresses[i]);
        *bound = addresses[i];
        if (*fd_p >= 0) {
            return EPX_OK;
        }
        /* A host's other addresses may be another machine's, or of a family
         * that is not there.  But where somebody else listens, ranks would
         * connect to them. */
        if (errno != EADDRNOTAVAIL && errno != EAFNOSUPPORT) {
            break;
        }
    }
    error = errno;
    return epx__fail(EPX_ERR_SYSTEM, "rank 0 cannot listen at %s: %s%s",
                     epx__address_text(bound).text, strerror(error),
                     error == EADDRINUSE ? "; EPX_PORT chooses another port"
                                         : "");
}

/* A connection attempt to a port of this host, where nobody listens yet, can be
 * given that very port and meet itself. */
static bool
is_connected_to_itself(int fd)
{
    epx__address_t own = { .bytes = sizeof(own.storage) };
    epx__address_t peer = { .bytes = sizeof(peer.storage) };

    return getsockname(fd, (struct sockaddr *)&own.storage, &own.bytes) == 0 &&
           getpeername(fd, (struct sockaddr *)&peer.storage, &peer.bytes) ==
               0 &&
           strcmp(epx__address_text(&own).text,
                  epx__address_text(&peer).text) == 0;
}

static int
finish_connect(int fd, int64_t deadline_ns)
{
    struct pollfd poll_fd = { .fd = fd, .events = POLLOUT };
    int error = 0;
    socklen_t error_bytes = sizeof(error);

    while (epx__poll_until(&poll_fd, 1, deadline_ns) <= 0) {
        if (epx__now_ns() >= deadline_ns) {
            return ETIMEDOUT;
        }
    }
    if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &error_bytes) != 0) {
        return errno;
    }
    return error == 0 && is_connected_to_itself(fd) ? ECONNREFUSED : error;
}

int
epx__net_connect(const epx__address_t *address, int64_t deadline_ns,
                 epx__reason_t *why)
{
    struct linger drop = { .l_onoff = 1, .l_linger = 0 };
    int fd = open_socket(address);
    int error;

    if (fd < 0) {
        epx__reason_set(why, "no socket for %s: %s",
                        epx__address_text(address).text, strerror(errno));
        return -1;
    }
    error = connect(fd, (const struct sockaddr *)&address->storage,
                    address->bytes) == 0
                ? 0
                : errno;
    if (error == 0 || error == EINPROGRESS || error == EINTR) {
        error = finish_connect(fd, deadline_ns);
    }
    if (error != 0) {
        epx__reason_set(why, "%s cannot be reached: %s",
                        epx__address_text(address).text, strerror(error));
        /* Leave no TIME_WAIT behind on what may be rank 0's port. */
        (void)setsockopt(fd, SOL_SOCKET, SO_LINGER, &drop, sizeof(drop));
        (void)close(fd);
        return -1;
    }
    epx__net_no_delay(fd);
    return fd;
}
