/* SPDX-License-Identifier: MIT */
#include "hosts.h"

#include "world.h"

#include <fcntl.h>
#include <sched.h>
#include <stdarg.h>
#include <string.h>
#include <sys/mount.h>

static int base; /* the parent's pid, which names the namespaces */

static bool
run(const char *format, ...)
{
    char command[512];
    va_list args;

    va_start(args, format);
    (void)vsnprintf(command, sizeof(command), format, args);
    va_end(args);
    return system(command) == 0;
}

bool
hosts_make(void)
{
    bool made;

    base = (int)getpid();
    if (geteuid() != 0 || !run("ip netns add epx-%d-0 2>/dev/null", base)) {
        fprintf(stderr, "SKIPPED: no right to make network namespaces\n");
        return false;
    }
    made =
        run("ip netns add epx-%d-1", base) &&
        run("ip -n epx-%d-0 link add " HOSTS_DEVICE
            " type veth peer name " HOSTS_DEVICE " netns epx-%d-1 2>/dev/null",
            base, base);
    for (int i = 0; i < 2 && made; i++) {
        made = run("ip -n epx-%d-%d addr add 10.77.0.%d/24 dev " HOSTS_DEVICE,
                   base, i, i + 1) &&
               run("ip -n epx-%d-%d link set " HOSTS_DEVICE " up", base, i) &&
               run("ip -n epx-%d-%d link set lo up", base, i);
    }
    if (!made) {
        fprintf(stderr, "SKIPPED: no pair of interfaces can be made\n");
        hosts_remove();
    }
    return made;
}

void
hosts_remove(void)
{
    (void)run("ip netns del epx-%d-0 2>/dev/null", base);
    (void)run("ip netns del epx-%d-1 2>/dev/null", base);
}

void
hosts_enter(int32_t rank)
{
    char path[64];
    int fd;

    (void)snprintf(path, sizeof(path), "/run/netns/epx-%d-%d", base, rank % 2);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    CHECK(fd >= 0 && setns(fd, CLONE_NEWNET) == 0, "%s: %m", path);
    (void)close(fd);
    /* UCX finds interfaces in /sys, which is that of the namespace in which it
     * was mounted. */
    CHECK(unshare(CLONE_NEWNS) == 0 &&
              mount("", "/", "none", MS_SLAVE | MS_REC, NULL) == 0 &&
              mount("sysfs", "/sys", "sysfs", 0, NULL) == 0,
          "/sys: %m");
}

bool
hosts_cut(int32_t host)
{
    return run("ip netns exec epx-%d-%d nft 'add table ip cut; "
               "add chain ip cut in { type filter hook input priority 0; "
               "policy drop; }; add chain ip cut out { type filter hook "
               "output priority 0; policy drop; }'",
               base, host);
}
