/* SPDX-License-Identifier: MIT */
#include "conformance/holdings.h"

#include <dirent.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { LOOKS = 20 }; /* a millisecond apart */

static int
count_entries(const char *path)
{
    DIR *directory = opendir(path);
    int count = 0;

    if (directory == NULL) {
        perror(path);
        abort();
    }
    while (readdir(directory) != NULL) {
        count++;
    }
    (void)closedir(directory);
    return count;
}

int
count_descriptors(void)
{
    return count_entries("/proc/self/fd");
}

int
count_threads(void)
{
    const struct timespec nap = { 0, 1000000 };
    int least = count_entries("/proc/self/task");

    for (int i = 0; i < LOOKS; i++) {
        int count;

        (void)nanosleep(&nap, NULL);
        count = count_entries("/proc/self/task");
        least = count < least ? count : least;
    }
    return least;
}

/* Bound, and not listening. */
static int
bind_any_port(const struct addrinfo *at, uint16_t *port_p)
{
    struct sockaddr_storage address;
    socklen_t bytes = sizeof(address);
    int fd = socket(at->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    int on = 1;

    if (fd < 0) {
        return -1;
    }
    if (setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on)) != 0 ||
        bind(fd, at->ai_addr, at->ai_addrlen) != 0 ||
        getsockname(fd, (struct sockaddr *)&address, &bytes) != 0) {
        (void)close(fd);
        return -1;
    }
    /* sin_port and sin6_port lie at the same place. */
    *port_p = ntohs(((const struct sockaddr_in *)&address)->sin_port);
    return fd;
}

int
port_reserve(const char *numeric, uint16_t *port_p)
{
    const struct addrinfo hints = { .ai_flags = AI_NUMERICHOST,
                                    .ai_socktype = SOCK_STREAM };
    struct addrinfo *at;
    int fd;

    if (getaddrinfo(numeric, NULL, &hints, &at) != 0) {
        fprintf(stderr, "%s is not a numeric address\n", numeric);
        abort();
    }
    fd = bind_any_port(at, port_p);
    freeaddrinfo(at);
    return fd;
}
