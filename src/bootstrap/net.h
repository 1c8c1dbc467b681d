/* SPDX-License-Identifier: MIT */
/* Addresses and TCP sockets: resolve, listen, connect, each within a deadline.
 */
#ifndef EPX_BOOTSTRAP_NET_H
#define EPX_BOOTSTRAP_NET_H

#include <epx/epx.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>

#define EPX__MAX_ADDRESSES  16
#define EPX__MAX_HOST_BYTES 254 /* a host name and its NUL */

typedef struct epx__address {
    struct sockaddr_storage storage;
    socklen_t bytes;
} epx__address_t;

/* Why something that may still come right has not yet. */
typedef struct epx__reason {
    char text[224];
} epx__reason_t;

void epx__reason_set(epx__reason_t *why, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

typedef struct epx__address_text {
    char text[96];
} epx__address_text_t;

/* "127.0.0.1:29501", "[::1]:29501" */
epx__address_text_t epx__address_text(const epx__address_t *address);

/* The same without a port: who it is, not which connection. */
epx__address_text_t epx__address_host_text(const epx__address_t *address);

/* The addresses of a host; returns their number, 0 with *why when there is none
 * (yet).  The system's resolver knows no deadline, so names are looked up on a
 * thread of their own, which is left behind when it takes too long. */
size_t epx__resolve(const char *host, uint16_t port, int64_t deadline_ns,
                    epx__address_t addresses[EPX__MAX_ADDRESSES],
                    epx__reason_t *why);

/* A listening socket on the first of `host`'s addresses that this machine has,
 * and on no other. */
epx_status_t epx__net_listen(const char *host, uint16_t port,
                             int64_t deadline_ns, int *fd_p,
                             epx__address_t *bound);

/* A connected non-blocking socket, or -1 with *why. */
int epx__net_connect(const epx__address_t *address, int64_t deadline_ns,
                     epx__reason_t *why);

/* Small messages go out at once. */
void epx__net_no_delay(int fd);

/* True for 0.0.0.0 and ::, which mean every interface. */
bool epx__address_is_wildcard(const epx__address_t *address);

#endif
