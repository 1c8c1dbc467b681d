/* SPDX-License-Identifier: MIT */
#include "bench_link.h"

#include <errno.h>
#include <fcntl.h>
#include <ifaddrs.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <unistd.h>

/* Where ip-netns(8) keeps them. */
#define NETNS_FOLDER "/run/netns"

/* ---- what has to cross ---- */

/* In blocks as bench_host_of cuts them. */
int32_t
bench_link_first(const struct bench_options *o, int32_t host)
{
    return (int32_t)(((int64_t)host * o->ranks + o->hosts - 1) / o->hosts);
}

int32_t
bench_link_rail(const struct bench_options *o, int32_t rank, int32_t host)
{
    int32_t first = bench_link_first(o, host);
    int32_t index = rank - bench_link_first(o, bench_host_of(o, rank));
    return first + index % (bench_link_first(o, host + 1) - first);
}

bool
bench_link_rows(const struct bench_shape *shape,
                const struct bench_routing *routing, int32_t rank, bool combine,
                uint64_t *bytes)
{
    const struct bench_options *o = routing->options;
    int64_t tokens = bench_routing_tokens(routing, rank);
    size_t cells = (size_t)tokens * (size_t)routing->topk;
    int64_t *idx = malloc((cells + 1) * sizeof *idx);
    float *weights = malloc((cells + 1) * sizeof *weights);
    int64_t *rows = calloc((size_t)o->hosts, sizeof *rows);
    bool good = idx && weights && rows &&
                bench_routing_fill(routing, rank, 0, idx, weights);
    uint64_t row = bench_shape_row_bytes(shape, combine);
    if (good) {
        bench_routing_by_host(routing, tokens, idx, rows);
        rows[bench_host_of(o, rank)] = 0;
    }
    for (int32_t h = 0; good && h < o->hosts; h++) {
        bytes[h] = (uint64_t)rows[h] * row;
    }
    free(rows);
    free(weights);
    free(idx);
    return good;
}

bool
bench_link_bytes(const struct bench_shape *shape,
                 const struct bench_routing *routing,
                 uint64_t bytes[BENCH_NUM_OPS])
{
    const struct bench_options *o = routing->options;
    uint64_t *to = calloc((size_t)o->hosts, sizeof *to);
    bool good = to != NULL;
    memset(bytes, 0, BENCH_NUM_OPS * sizeof *bytes);
    for (int combine = 0; good && combine < 2; combine++) {
        uint64_t *sum = &bytes[combine ? BENCH_COMBINE : BENCH_DISPATCH];
        for (int32_t r = 0; good && o->hosts > 1 && r < o->ranks; r++) {
            good = bench_link_rows(shape, routing, r, combine, to);
            for (int32_t h = 0; good && h < o->hosts; h++) {
                *sum += to[h];
            }
        }
    }
    free(to);
    return good;
}

/* ---- where it is ---- */

bool
bench_link_netns(const struct bench_options *o, int32_t host, char *name,
                 size_t bytes)
{
    const char *at = o->netns;
    for (; host > 0; host--) {
        at += strcspn(at, ",") + 1;
    }
    int wrote = snprintf(name, bytes, "%.*s", (int)strcspn(at, ","), at);
    return wrote > 0 && (size_t)wrote < bytes;
}

/* UCX finds interfaces in /sys, which shows those of the namespace in which it
 * was mounted. */
static bool
mount_sys(void)
{
    return !unshare(CLONE_NEWNS) &&
           !mount("", "/", "none", MS_SLAVE | MS_REC, NULL) &&
           !mount("sysfs", "/sys", "sysfs", 0, NULL);
}

bool
bench_link_enter(const struct bench_options *o, int32_t rank,
                 struct bench_error *error)
{
    char name[64];
    char path[128];
    if (!o->netns) {
        return true;
    }
    if (!bench_link_netns(o, bench_host_of(o, rank), name, sizeof name)) {
        return bench_fail(error, "--netns is '%s'; a name is too long",
                          o->netns);
    }
    snprintf(path, sizeof path, NETNS_FOLDER "/%s", name);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    bool good = fd >= 0 && !setns(fd, CLONE_NEWNET) && mount_sys();
    if (!good) {
        bench_fail(error, "cannot enter the network namespace '%s': %s", name,
                   strerror(errno));
    }
    if (fd >= 0) {
        close(fd);
    }
    return good;
}

bool
bench_link_device(const struct bench_options *o, char name[IF_NAMESIZE],
                  struct bench_error *error)
{
    const char *given = getenv("EPX_NET_DEVICE");
    struct ifaddrs *list = NULL;
    name[0] = '\0';
    if ((given && *given) || !o->netns) {
        snprintf(name, IF_NAMESIZE, "%s", given && *given ? given : "lo");
        return true;
    }
    if (!getifaddrs(&list)) {
        for (struct ifaddrs *e = list; e && !name[0]; e = e->ifa_next) {
            if (e->ifa_addr && e->ifa_addr->sa_family == AF_INET &&
                (e->ifa_flags & (IFF_UP | IFF_LOOPBACK)) == IFF_UP) {
                snprintf(name, IF_NAMESIZE, "%s", e->ifa_name);
            }
        }
        freeifaddrs(list);
    }
    return name[0] || bench_fail(error, "no interface of its network namespace "
                                        "is up and has an IPv4 address");
}

uint64_t
bench_link_sent(const char *device)
{
    char path[128];
    unsigned long long bytes = 0;
    snprintf(path, sizeof path, "/sys/class/net/%s/statistics/tx_bytes",
             device);
    FILE *file = fopen(path, "re");
    if (file) {
        if (fscanf(file, "%llu", &bytes) != 1) {
            bytes = 0;
        }
        fclose(file);
    }
    return bytes;
}
