/* SPDX-License-Identifier: MIT */
#include "hosts.h"

#include "world.h"

#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/wait.h>

/* Processes that do nothing but keep a namespace, which ends with them; and
 * they end with this process. */
static pid_t keepers[2];

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

static pid_t
start_keeper(void)
{
    int ready[2];
    char ok = 0;
    pid_t pid;

    CHECK(pipe(ready) == 0, "%m");
    pid = fork();
    CHECK(pid >= 0, "%m");
    if (pid == 0) {
        (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
        ok = unshare(CLONE_NEWNET) == 0;
        CHECK(write(ready[1], &ok, 1) == 1, "%m");
        for (;;) {
            (void)pause();
        }
    }
    CHECK(read(ready[0], &ok, 1) == 1, "%m");
    (void)close(ready[0]);
    (void)close(ready[1]);
    if (!ok) {
        (void)kill(pid, SIGKILL);
        (void)waitpid(pid, NULL, 0);
        return 0;
    }
    return pid;
}

bool
hosts_make(void)
{
    bool made = true;

    for (int i = 0; i < 2 && made; i++) {
        keepers[i] = start_keeper();
        made = keepers[i] != 0;
    }
    made = made &&
           run("nsenter -n -t %d ip link add " HOSTS_DEVICE
               " type veth peer name " HOSTS_DEVICE " netns %d 2>/dev/null",
               keepers[0], keepers[1]);
    for (int i = 0; i < 2 && made; i++) {
        made = run("nsenter -n -t %d sh -c 'ip addr add 10.77.0.%d/24 "
                   "dev " HOSTS_DEVICE " && ip link set " HOSTS_DEVICE
                   " up && ip link set lo up' 2>/dev/null",
                   keepers[i], i + 1);
    }
    /* The kernel says so only a while after both ends are up. */
    for (int i = 0; i < 2 && made; i++) {
        made = run("nsenter -n -t %d sh -c 'for try in $(seq 50); do "
                   "ip link show " HOSTS_DEVICE
                   " | grep -q \"state UP\" && exit 0; sleep 0.1; done; "
                   "exit 1'",
                   keepers[i]);
    }
    if (!made) {
        fprintf(stderr, "SKIPPED: no right to make network namespaces\n");
        hosts_remove();
    }
    return made;
}

void
hosts_remove(void)
{
    for (int i = 0; i < 2; i++) {
        if (keepers[i] != 0) {
            (void)kill(keepers[i], SIGKILL);
            (void)waitpid(keepers[i], NULL, 0);
            keepers[i] = 0;
        }
    }
}

void
hosts_enter(int32_t rank)
{
    char path[64];
    int fd;

    (void)snprintf(path, sizeof(path), "/proc/%d/ns/net", keepers[rank % 2]);
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
    return run("nsenter -n -t %d nft 'add table ip cut; "
               "add chain ip cut in { type filter hook input priority 0; "
               "policy drop; }; add chain ip cut out { type filter hook "
               "output priority 0; policy drop; }'",
               keepers[host % 2]);
}
