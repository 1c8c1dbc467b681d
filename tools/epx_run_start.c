/* SPDX-License-Identifier: MIT */
#include "epx_run_start.h"

#include "epx_run_hosts.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#define SECRET_BYTES 32 /* what the rendezvous asks for */
#define JOB_ID_BYTES 16

/* Where ports of another host are drawn from: below those that systems give to
 * connections. */
#define FIRST_PORT 20000
#define NUM_PORTS  10000

static bool
set_number(const char *name, int value)
{
    char text[16];

    (void)snprintf(text, sizeof(text), "%d", value);
    return setenv(name, text, 1) == 0;
}

static bool
set_random_hex(const char *name, size_t count)
{
    unsigned char bytes[SECRET_BYTES];
    char text[2 * SECRET_BYTES + 1];

    if (getrandom(bytes, count, 0) != (ssize_t)count) {
        return false;
    }
    for (size_t i = 0; i < count; i++) {
        (void)snprintf(text + 2 * i, 3, "%02x", bytes[i]);
    }
    return setenv(name, text, 1) == 0;
}

/* A TCP socket on a port of the system's choice. */
static int
bind_any_port(int *port_p)
{
    struct sockaddr_in address = { .sin_family = AF_INET };
    socklen_t length = sizeof(address);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

    if (fd < 0) {
        return -1;
    }
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (bind(fd, (struct sockaddr *)&address, sizeof(address)) != 0 ||
        getsockname(fd, (struct sockaddr *)&address, &length) != 0) {
        (void)close(fd);
        return -1;
    }
    *port_p = ntohs(address.sin_port);
    return fd;
}

/* Both are held at once, so that they differ. */
static bool
set_ports(void)
{
    int master_port = 0;
    int epx_port = 0;
    int master_fd = bind_any_port(&master_port);
    int epx_fd = bind_any_port(&epx_port);
    bool found = master_fd >= 0 && epx_fd >= 0;

    if (master_fd >= 0) {
        (void)close(master_fd);
    }
    if (epx_fd >= 0) {
        (void)close(epx_fd);
    }
    return found && set_number("MASTER_PORT", master_port) &&
           set_number("EPX_PORT", epx_port);
}

/* Nobody here knows which are free there; where one is not, rank 0 says so. */
static bool
set_ports_of_host(int port)
{
    unsigned drawn = 0;

    if (port == 0) {
        if (getrandom(&drawn, sizeof(drawn), 0) != (ssize_t)sizeof(drawn)) {
            return false;
        }
        port = FIRST_PORT + (int)(drawn % (NUM_PORTS - 1));
    }
    return set_number("MASTER_PORT", port) && set_number("EPX_PORT", port + 1);
}

static bool
set_environment(const epx__start_t *start, const char **what_p)
{
    const epx__hosts_t *hosts = start->hosts;

    *what_p = "set the environment";
    if (start->is_member) {
        return unsetenv("EPX_SECRET_FILE") == 0 &&
               set_number("LOCAL_WORLD_SIZE", start->num_ranks);
    }
    *what_p = "find a free port on 127.0.0.1";
    if (hosts != NULL ? !set_ports_of_host(hosts->port) : !set_ports()) {
        return false;
    }
    *what_p = "make the job's secret";
    if (!set_random_hex("EPX_SECRET", SECRET_BYTES) ||
        !set_random_hex("EPX_JOB_ID", JOB_ID_BYTES)) {
        return false;
    }
    *what_p = "set the environment";
    return unsetenv("EPX_SECRET_FILE") == 0 &&
           setenv("MASTER_ADDR", hosts != NULL ? hosts->address : "127.0.0.1",
                  1) == 0 &&
           set_number("WORLD_SIZE",
                      hosts != NULL ? hosts->num_ranks : start->num_ranks) &&
           set_number("LOCAL_WORLD_SIZE", start->num_ranks);
}

/* Pipes must not land on 0, 1 or 2, where the ranks' own streams go. */
static bool
open_standard_streams(void)
{
    int fd;

    do {
        fd = open("/dev/null", O_RDWR);
    } while (fd >= 0 && fd <= STDERR_FILENO);
    return fd >= 0 && close(fd) == 0;
}

/* Processes that the ranks leave behind are found by way of /proc. */
static bool
proc_is_ours(void)
{
    char link[16] = "";
    ssize_t length = readlink("/proc/self", link, sizeof(link) - 1);

    if (length >= 0 && strtol(link, NULL, 10) != (long)getpid()) {
        errno = ESRCH;
        length = -1;
    }
    return length >= 0;
}

static bool
raise_file_limit(struct rlimit *original)
{
    struct rlimit raised;

    if (getrlimit(RLIMIT_NOFILE, original) != 0) {
        return false;
    }
    raised = *original;
    raised.rlim_cur = raised.rlim_max;
    return setrlimit(RLIMIT_NOFILE, &raised) == 0;
}

bool
epx__start_prepare(epx__start_t *start, const char **what_p)
{
    start->launcher = getpid();
    *what_p = "open /dev/null";
    if (!open_standard_streams()) {
        return false;
    }
    *what_p = "find itself in /proc";
    if (!proc_is_ours()) {
        return false;
    }
    *what_p = "become the parent of orphaned processes";
    if (prctl(PR_SET_CHILD_SUBREAPER, 1L) != 0) {
        return false;
    }
    *what_p = "raise the limit on open files";
    return raise_file_limit(&start->num_files) &&
           set_environment(start, what_p);
}

/* ------------------------------------------------------------------------- */
/* In the new process                                                        */
/* ------------------------------------------------------------------------- */

/* The cores that this process may run on.  The kernel refuses a set that is
 * smaller than its own, so look for the size that fits. */
static cpu_set_t *
usable_cores(int *num_bits_p)
{
    for (int num_bits = CPU_SETSIZE; num_bits <= 1 << 20; num_bits *= 2) {
        cpu_set_t *set = CPU_ALLOC((size_t)num_bits);

        if (set == NULL) {
            return NULL;
        }
        if (sched_getaffinity(0, CPU_ALLOC_SIZE((size_t)num_bits), set) == 0) {
            *num_bits_p = num_bits;
            return set;
        }
        CPU_FREE(set);
        if (errno != EINVAL) {
            return NULL;
        }
    }
    return NULL;
}

/* Neighbouring cores where there are enough of them, else one core each, in
 * turn. */
static bool
bind_to_share(int rank, int num_ranks)
{
    int num_bits = 0;
    cpu_set_t *set = usable_cores(&num_bits);
    size_t bytes = CPU_ALLOC_SIZE((size_t)num_bits);
    int num_cores = set == NULL ? 0 : CPU_COUNT_S(bytes, set);
    int begin = rank % (num_cores > 0 ? num_cores : 1);
    int end = begin + 1;
    bool bound;

    if (set == NULL) {
        return false;
    }
    if (num_cores >= num_ranks) {
        begin = (int)((long)num_cores * rank / num_ranks);
        end = (int)((long)num_cores * (rank + 1) / num_ranks);
    }
    for (int core = 0, i = 0; core < num_bits; core++) {
        if (!CPU_ISSET_S((size_t)core, bytes, set)) {
            continue;
        }
        if (i < begin || i >= end) {
            CPU_CLR_S((size_t)core, bytes, set);
        }
        i++;
    }
    bound = sched_setaffinity(0, bytes, set) == 0;
    CPU_FREE(set);
    return bound;
}

/* Rank 0 reads what the launcher was given.  A terminal is not passed on: the
 * ranks are not in its foreground process group, so reading would stop them. */
static bool
redirect(const epx__start_t *start, int rank, int out_fd, int err_fd)
{
    if (start->stdin_fd >= 0) {
        if (dup2(start->stdin_fd, STDIN_FILENO) < 0) {
            return false;
        }
    } else if (rank != 0 || start->is_member || isatty(STDIN_FILENO) == 1) {
        int null = open("/dev/null", O_RDONLY | O_CLOEXEC);

        if (null < 0 || dup2(null, STDIN_FILENO) < 0) {
            return false;
        }
    }
    return dup2(out_fd, STDOUT_FILENO) >= 0 && dup2(err_fd, STDERR_FILENO) >= 0;
}

static bool
become_rank(const epx__start_t *start, int rank, int out_fd, int err_fd)
{
    if (prctl(PR_SET_PDEATHSIG, (unsigned long)SIGKILL) != 0 ||
        setpgid(0, start->group) != 0 ||
        !redirect(start, rank, out_fd, err_fd)) {
        return false;
    }
    if (start->hosts == NULL &&
        (!set_number("RANK", start->first_rank + rank) ||
         !set_number("LOCAL_RANK", rank))) {
        return false;
    }
    if (start->bind && start->hosts == NULL &&
        !bind_to_share(rank, start->num_ranks)) {
        return false;
    }
    return setrlimit(RLIMIT_NOFILE, &start->num_files) == 0 &&
           sigaction(SIGPIPE, &start->sigpipe, NULL) == 0 &&
           sigprocmask(SIG_SETMASK, &start->signal_mask, NULL) == 0;
}

typedef struct report {
    int error;
    bool exec_failed;
} report_t;

static _Noreturn void
run_rank(const epx__start_t *start, int rank, int out_fd, int err_fd,
         int report_fd)
{
    report_t report = { 0 };

    if (become_rank(start, rank, out_fd, err_fd)) {
        /* A launcher that died before the prctl sends no signal any more. */
        if (getppid() != start->launcher) {
            _exit(EXIT_FAILURE);
        }
        (void)execvp(start->argv[0], start->argv);
        report.exec_failed = true;
    }
    report.error = errno;
    if (write(report_fd, &report, sizeof(report)) < 0) {
        _exit(EXIT_FAILURE); /* the launcher is gone */
    }
    _exit(EXIT_FAILURE);
}

pid_t
epx__start_rank(epx__start_t *start, int rank, int out_fd, int err_fd,
                bool *exec_failed_p)
{
    report_t report = { 0 };
    int report_fds[2];
    ssize_t count;
    pid_t pid;

    *exec_failed_p = false;
    if (pipe2(report_fds, O_CLOEXEC) != 0) {
        return -1;
    }
    pid = fork();
    if (pid == 0) {
        run_rank(start, rank, out_fd, err_fd, report_fds[1]);
    }
    if (pid < 0) {
        report.error = errno;
    }
    (void)close(report_fds[1]);
    /* Ends without a report when the program has been started. */
    count = pid < 0 ? 0 : read(report_fds[0], &report, sizeof(report));
    (void)close(report_fds[0]);
    if (pid < 0 || count == sizeof(report)) {
        *exec_failed_p = report.exec_failed;
        errno = report.error;
        return -1;
    }
    if (start->group == 0) {
        start->group = pid;
    }
    return pid;
}
