/* SPDX-License-Identifier: MIT */
/*
 * The life of a job:
 *
 *     RUNNING      a rank fails, or a signal comes      -> ENDING
 *     ENDING       the grace time is over               -> TERMINATING
 *     TERMINATING  SIGTERM was sent, TERM_NS is over    -> KILLING
 *     KILLING      SIGKILL, again and again
 *     DRAINING     no process is left; write the rest of the output
 *
 * From any of the first four it goes to DRAINING as soon as no child is left.
 * This process is the reaper of its descendants: when a rank ends, what it
 * started becomes a child here, so nothing can hide.
 */
#include "epx_run_job.h"
#include "epx_run_hosts.h"
#include "epx_run_output.h"
#include "epx_run_start.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define NS_PER_SEC INT64_C(1000000000)
#define NS_PER_MS  INT64_C(1000000)
#define FOREVER    INT64_MAX

#define TERM_NS       (2 * NS_PER_SEC)
#define KILL_AGAIN_NS (100 * NS_PER_MS)
#define GIVE_UP_NS    (30 * NS_PER_SEC) /* much memory takes long to free */
#define ABANDON_NS    (2 * NS_PER_SEC)

typedef enum phase {
    RUNNING,
    ENDING,
    TERMINATING,
    KILLING,
    DRAINING,
    DONE,
} phase_t;

typedef struct job {
    const epx__run_options_t *options;
    epx__start_t start;
    int num_children; /* ranks; or agents, one for each host */
    pid_t *pids;      /* [num_children]; 0 when it has ended */
    int *lifelines;   /* [num_children] of agents; -1: closed, or none */
    int num_running;
    phase_t phase;
    int64_t deadline_ns; /* of the phase */
    int64_t give_up_ns;  /* end of KILLING */
    int status;
    bool interrupted;  /* by a signal */
    bool in_haste;     /* do not wait for long for the reader of our output */
    bool output_lost;  /* a sink has failed */
    bool has_lifeline; /* standard input, from the launcher */
    int signal_fd;
    epx__sink_t out;
    epx__sink_t err;
    int num_sources;
    epx__source_t
        *sources;         /* [2 * num_children]: each one's output and errors */
    struct pollfd *polls; /* [4 + 2 * num_children] */
} job_t;

static int64_t
now_ns(void)
{
    struct timespec ts;

    (void)clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * NS_PER_SEC + ts.tv_nsec;
}

static void
enter(job_t *job, phase_t phase, int64_t wait_ns)
{
    job->phase = phase;
    job->deadline_ns = wait_ns == FOREVER ? FOREVER : now_ns() + wait_ns;
}

/* Goes through the queue of error output, so as not to land inside a line. */
static void __attribute__((format(printf, 2, 3)))
say(job_t *job, const char *format, ...)
{
    char text[512];
    int length = snprintf(text, sizeof(text), "epx-run: ");
    va_list args;

    va_start(args, format);
    (void)vsnprintf(text + length, sizeof(text) - (size_t)length, format, args);
    va_end(args);
    epx__sink_append(&job->err, text, strlen(text));
    epx__sink_append(&job->err, "\n", 1);
}

/* ------------------------------------------------------------------------- */
/* Signalling everything that descends from the job                          */
/* ------------------------------------------------------------------------- */

/* Parent and process group of a process, if it still exists. */
static bool
read_relations(pid_t pid, pid_t *parent_p, pid_t *group_p)
{
    char path[32];
    char text[512];
    const char *name_end;
    ssize_t length;
    int fd;

    (void)snprintf(path, sizeof(path), "/proc/%d/stat", (int)pid);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return false;
    }
    length = read(fd, text, sizeof(text) - 1);
    (void)close(fd);
    if (length <= 0) {
        return false;
    }
    text[length] = '\0';
    /* "PID (NAME) STATE PARENT GROUP ..."; a name may hold anything. */
    name_end = strrchr(text, ')');
    return name_end != NULL &&
           sscanf(name_end, ") %*c %d %d", parent_p, group_p) == 2;
}

/*
 * Sends a signal to the job's process group and to those of our children that
 * have left it.  The group is named only while a child of ours, which keeps the
 * number from being used again, is in it.  Returns the number of children.
 */
static int
signal_all(job_t *job, int signal_number)
{
    DIR *proc = opendir("/proc");
    bool group_lives = false;
    int num_children = 0;
    struct dirent *entry;

    while (proc != NULL && (entry = readdir(proc)) != NULL) {
        pid_t pid = (pid_t)strtol(entry->d_name, NULL, 10);
        pid_t parent;
        pid_t group;

        if (!isdigit((unsigned char)entry->d_name[0]) ||
            !read_relations(pid, &parent, &group) ||
            parent != job->start.launcher) {
            continue;
        }
        num_children++;
        if (group == job->start.group) {
            group_lives = true;
        } else {
            (void)kill(pid, signal_number);
        }
    }
    if (proc != NULL) {
        (void)closedir(proc);
    }
    if (group_lives) {
        (void)kill(-job->start.group, signal_number);
    }
    return num_children;
}

/* A member whose agent does not pass on signals ends its part of the job. */
static void
cut_lifelines(job_t *job)
{
    for (int i = 0; job->lifelines != NULL && i < job->num_children; i++) {
        if (job->lifelines[i] >= 0) {
            (void)close(job->lifelines[i]);
            job->lifelines[i] = -1;
        }
    }
}

static void
terminate(job_t *job)
{
    cut_lifelines(job);
    (void)signal_all(job, SIGTERM);
    (void)signal_all(job, SIGCONT); /* a stopped process would not see it */
    enter(job, TERMINATING, TERM_NS);
}

static void
kill_again(job_t *job)
{
    int num_children = signal_all(job, SIGKILL);

    if (job->phase != KILLING) {
        job->give_up_ns = now_ns() + GIVE_UP_NS;
    } else if (now_ns() >= job->give_up_ns) {
        say(job, "%d processes could not be killed", num_children);
        enter(job, DRAINING, ABANDON_NS);
        return;
    }
    enter(job, KILLING, KILL_AGAIN_NS);
}

/* ------------------------------------------------------------------------- */
/* Events                                                                    */
/* ------------------------------------------------------------------------- */

static void
describe_child(const job_t *job, int child, char *text, size_t size)
{
    const epx__hosts_t *hosts = job->options->hosts;

    if (hosts != NULL) {
        (void)snprintf(text, size, "host %s", hosts->hosts[child].name);
    } else {
        (void)snprintf(text, size, "rank %d", job->options->first_rank + child);
    }
}

static void
describe_end(int wait_status, char *text, size_t size)
{
    if (WIFEXITED(wait_status)) {
        (void)snprintf(text, size, "exited with status %d",
                       WEXITSTATUS(wait_status));
        return;
    }
    (void)snprintf(text, size, "was killed by signal %d (%s%s)",
                   WTERMSIG(wait_status), strsignal(WTERMSIG(wait_status)),
                   WCOREDUMP(wait_status) ? ", core dumped" : "");
}

/* The first failure decides the exit status; the others have the grace time to
 * notice it, say so and end by themselves. */
static void
on_rank_failed(job_t *job, int rank, int wait_status)
{
    double grace = (double)job->options->grace_ns / (double)NS_PER_SEC;
    char who[96];
    char how[96];

    /* What the rank said about it comes first. */
    for (int i = 2 * rank; i < 2 * rank + 2 && i < job->num_sources; i++) {
        while (epx__source_pump(&job->sources[i])) {
        }
    }
    describe_child(job, rank, who, sizeof(who));
    describe_end(wait_status, how, sizeof(how));
    if (job->num_running > 0) {
        say(job, "%s %s; still running: %d of %d, for %g s at most", who, how,
            job->num_running, job->num_children, grace);
    } else {
        say(job, "%s %s", who, how);
    }
    job->status = WIFEXITED(wait_status)
                      ? WEXITSTATUS(wait_status)
                      : EPX__EXIT_SIGNAL + WTERMSIG(wait_status);
    enter(job, ENDING, job->options->grace_ns);
}

static void
on_child_ended(job_t *job, pid_t pid, int wait_status)
{
    for (int rank = 0; rank < job->num_children; rank++) {
        if (job->pids[rank] != pid) {
            continue;
        }
        job->pids[rank] = 0;
        job->num_running--;
        if (wait_status != 0 && job->phase == RUNNING) {
            on_rank_failed(job, rank, wait_status);
        }
        return;
    }
}

static void
reap(job_t *job)
{
    int wait_status;
    pid_t pid;

    while ((pid = waitpid(-1, &wait_status, WNOHANG)) > 0) {
        on_child_ended(job, pid, wait_status);
    }
    if (job->phase >= DRAINING) {
        return;
    }
    if (pid < 0 && errno == ECHILD) {
        enter(job, DRAINING, job->in_haste ? ABANDON_NS : FOREVER);
    } else if (job->num_running == 0 && job->phase < TERMINATING) {
        terminate(job); /* the ranks left something behind */
    }
}

static void
on_interrupt(job_t *job, int signal_number)
{
    if (job->phase == DRAINING) {
        job->phase = DONE;
        return;
    }
    if (job->interrupted) {
        kill_again(job);
        return;
    }
    job->interrupted = true;
    job->in_haste = true;
    if (job->status == 0) {
        job->status = EPX__EXIT_SIGNAL + signal_number;
    }
    say(job, "got signal %d (%s); ending the job", signal_number,
        strsignal(signal_number));
    (void)signal_all(job, signal_number);
    if (job->phase < TERMINATING) {
        enter(job, ENDING, job->options->grace_ns);
    }
}

/* Ctrl-Z stops the launcher and the job, and both go on together. */
static void
suspend(job_t *job)
{
    (void)signal_all(job, SIGSTOP);
    (void)raise(SIGSTOP);
    (void)signal_all(job, SIGCONT);
}

static void
read_signals(job_t *job)
{
    struct signalfd_siginfo info;

    while (read(job->signal_fd, &info, sizeof(info)) == sizeof(info)) {
        if (info.ssi_signo == SIGCHLD) {
            reap(job);
        } else if (info.ssi_signo == SIGTSTP) {
            suspend(job);
        } else {
            on_interrupt(job, (int)info.ssi_signo);
        }
    }
}

/* The launcher, on another host, says nothing more after the job. */
static void
read_lifeline(job_t *job)
{
    char bytes[64];
    ssize_t count = read(STDIN_FILENO, bytes, sizeof(bytes));

    if (count > 0 || (count < 0 && errno == EINTR)) {
        return;
    }
    job->has_lifeline = false;
    job->in_haste = true;
    if (job->phase < TERMINATING) {
        say(job, "the launcher wants no more of this host's ranks, or is gone");
        job->status = job->status != 0 ? job->status : EPX__EXIT_LAUNCHER;
        terminate(job);
    }
}

static void
on_deadline(job_t *job)
{
    switch (job->phase) {
    case RUNNING:
        say(job, "the job did not end within %g s",
            (double)job->options->timeout_ns / (double)NS_PER_SEC);
        job->status = EPX__EXIT_TIMEOUT;
        job->in_haste = true;
        terminate(job);
        break;
    case ENDING:
        say(job, "still running: %d of %d; ending them", job->num_running,
            job->num_children);
        terminate(job);
        break;
    case TERMINATING:
    case KILLING:
        kill_again(job);
        break;
    case DRAINING:
    case DONE:
        job->phase = DONE;
        break;
    }
}

/* ------------------------------------------------------------------------- */
/* Output                                                                    */
/* ------------------------------------------------------------------------- */

static void
check_sinks(job_t *job)
{
    int error = job->out.error != 0 ? job->out.error : job->err.error;

    if (error == 0 || job->output_lost) {
        return;
    }
    say(job, "cannot write the ranks' output: %s", strerror(error));
    job->output_lost = true;
    if (job->status == 0) {
        job->status = EPX__EXIT_LAUNCHER;
    }
    if (job->phase < TERMINATING) {
        terminate(job);
    }
}

/* No process is left, so what the pipes hold is all there will be. */
static void
drain(job_t *job)
{
    bool drained = true;

    for (int i = 0; i < job->num_sources; i++) {
        epx__source_t *source = &job->sources[i];

        while (epx__sink_has_room(source->sink) && epx__source_pump(source)) {
        }
        if (epx__sink_has_room(source->sink)) {
            epx__source_close(source);
        }
        drained = drained && source->fd < 0;
    }
    if (drained && epx__sink_pending(&job->out) == 0 &&
        epx__sink_pending(&job->err) == 0) {
        job->phase = DONE;
    }
}

static int
poll_timeout_ms(const job_t *job)
{
    int64_t left_ns;

    if (job->deadline_ns == FOREVER) {
        return -1;
    }
    left_ns = job->deadline_ns - now_ns();
    if (left_ns <= 0) {
        return 0;
    }
    left_ns = (left_ns + NS_PER_MS - 1) / NS_PER_MS;
    return left_ns > INT_MAX ? INT_MAX : (int)left_ns;
}

static struct pollfd
poll_sink(const epx__sink_t *sink)
{
    return (struct pollfd){ .fd = epx__sink_pending(sink) > 0 ? sink->fd : -1,
                            .events = POLLOUT };
}

/* Sources of a full sink are left alone, and so their ranks wait for whoever
 * reads our output, as they would on a pipe of their own. */
static void
wait_for_events(job_t *job)
{
    struct pollfd *polls = job->polls;

    polls[0] = (struct pollfd){ .fd = job->signal_fd, .events = POLLIN };
    polls[1] = poll_sink(&job->out);
    polls[2] = poll_sink(&job->err);
    for (int i = 0; i < job->num_sources; i++) {
        const epx__source_t *source = &job->sources[i];
        bool wanted = job->phase < DRAINING && epx__sink_has_room(source->sink);

        polls[3 + i] =
            (struct pollfd){ .fd = wanted ? source->fd : -1, .events = POLLIN };
    }
    polls[3 + job->num_sources] =
        (struct pollfd){ .fd = job->has_lifeline ? STDIN_FILENO : -1,
                         .events = POLLIN };
    if (poll(polls, 4 + (nfds_t)job->num_sources, poll_timeout_ms(job)) < 0) {
        /* Only EINTR and ENOMEM are possible, and both can pass. */
        for (int i = 0; i < 4 + job->num_sources; i++) {
            polls[i].revents = 0;
        }
    }
}

static void
run_events(job_t *job)
{
    while (job->phase != DONE) {
        wait_for_events(job);
        for (int i = 0; i < job->num_sources; i++) {
            if (job->polls[3 + i].revents != 0) {
                (void)epx__source_pump(&job->sources[i]);
            }
        }
        if (job->polls[0].revents != 0) {
            read_signals(job);
        }
        if (job->polls[3 + job->num_sources].revents != 0) {
            read_lifeline(job);
        }
        epx__sink_flush(&job->out);
        epx__sink_flush(&job->err);
        check_sinks(job);
        if (job->phase == DRAINING) {
            drain(job);
        }
        if (now_ns() >= job->deadline_ns) {
            on_deadline(job);
        }
    }
}

/* ------------------------------------------------------------------------- */
/* Start                                                                     */
/* ------------------------------------------------------------------------- */

/* Those of our signals that were not ignored when we started (nohup, or a
 * shell's background job). */
static void
choose_signals(sigset_t *set)
{
    static const int numbers[] = { SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGTSTP };

    (void)sigemptyset(set);
    (void)sigaddset(set, SIGCHLD);
    for (size_t i = 0; i < sizeof(numbers) / sizeof(*numbers); i++) {
        struct sigaction action;

        if (sigaction(numbers[i], NULL, &action) == 0 &&
            action.sa_handler != SIG_IGN) {
            (void)sigaddset(set, numbers[i]);
        }
    }
}

static bool
take_signals(job_t *job)
{
    struct sigaction ignore = { .sa_handler = SIG_IGN };
    struct sigaction standard = { .sa_handler = SIG_DFL };
    sigset_t set;

    choose_signals(&set);
    if (sigprocmask(SIG_BLOCK, &set, &job->start.signal_mask) != 0 ||
        sigaction(SIGPIPE, &ignore, &job->start.sigpipe) != 0 ||
        sigaction(SIGCHLD, &standard, NULL) != 0) {
        return false;
    }
    job->signal_fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    return job->signal_fd >= 0;
}

/* The pipe that carries one stream of a rank; its writing end is returned. */
static int
open_source(job_t *job, int rank, epx__sink_t *sink)
{
    epx__source_t *source = &job->sources[job->num_sources];
    int fds[2];

    if (pipe2(fds, O_CLOEXEC) != 0) {
        return -1;
    }
    if (fcntl(fds[0], F_SETFL, O_NONBLOCK) != 0) {
        (void)close(fds[0]);
        (void)close(fds[1]);
        return -1;
    }
    source->fd = fds[0];
    source->sink = sink;
    if (job->options->hosts == NULL) { /* members see to it themselves */
        (void)snprintf(source->prefix, sizeof(source->prefix), "[%d] ",
                       job->options->first_rank + rank);
    }
    job->num_sources++;
    return fds[1];
}

static bool
start_rank(job_t *job, int rank, bool *exec_failed_p)
{
    int out_fd = STDOUT_FILENO;
    int err_fd = STDERR_FILENO;
    pid_t pid = -1;
    int error;

    *exec_failed_p = false;
    if (job->options->prefix) {
        out_fd = open_source(job, rank, &job->out);
        err_fd = out_fd < 0 ? -1 : open_source(job, rank, &job->err);
    }
    if (err_fd >= 0) {
        pid = epx__start_rank(&job->start, rank, out_fd, err_fd, exec_failed_p);
    }
    error = errno;
    if (out_fd > STDERR_FILENO) {
        (void)close(out_fd);
    }
    if (err_fd > STDERR_FILENO) {
        (void)close(err_fd);
    }
    if (pid < 0) {
        errno = error;
        return false;
    }
    job->pids[rank] = pid;
    job->num_running++;
    return true;
}

/* The program of an agent, and its standard input; false with errno. */
static bool
prepare_agent(job_t *job, int host)
{
    job->start.argv = epx__hosts_command(job->options->hosts, host);
    if (job->start.argv == NULL) {
        errno = ENOMEM;
        return false;
    }
    job->start.stdin_fd =
        epx__hosts_send(job->options, host, &job->lifelines[host]);
    return job->start.stdin_fd >= 0;
}

static bool
start_agent(job_t *job, int host, bool *exec_failed_p)
{
    bool started =
        prepare_agent(job, host) && start_rank(job, host, exec_failed_p);
    int error = errno;

    if (job->start.stdin_fd >= 0) {
        (void)close(job->start.stdin_fd);
        job->start.stdin_fd = -1;
    }
    free(job->start.argv);
    job->start.argv = NULL;
    errno = error;
    return started;
}

/* Nothing is reaped in between, so that the job's process group, which is named
 * after rank 0, exists until the last rank has joined it. */
static void
start_ranks(job_t *job)
{
    const epx__hosts_t *hosts = job->options->hosts;
    const char *program = hosts != NULL ? hosts->agent[0] : job->start.argv[0];
    bool exec_failed = false;
    char who[96];

    for (int child = 0; child < job->num_children; child++) {
        if (hosts != NULL ? start_agent(job, child, &exec_failed)
                          : start_rank(job, child, &exec_failed)) {
            continue;
        }
        if (exec_failed) {
            job->status =
                errno == ENOENT ? EPX__EXIT_NOT_FOUND : EPX__EXIT_CANNOT_RUN;
            say(job, "cannot run %s: %s", program, strerror(errno));
        } else {
            job->status = EPX__EXIT_LAUNCHER;
            describe_child(job, child, who, sizeof(who));
            say(job, "cannot start %s: %s", who, strerror(errno));
        }
        terminate(job);
        break;
    }
    /* SIGCHLD says nothing when there was no child to begin with. */
    reap(job);
}

static bool
prepare(job_t *job, const char **what_p)
{
    const epx__hosts_t *hosts = job->options->hosts;
    size_t num_children =
        (size_t)(hosts != NULL ? hosts->num_hosts : job->options->num_ranks);

    job->num_children = (int)num_children;
    job->has_lifeline = job->options->is_member;
    job->start.argv = job->options->argv;
    job->start.num_ranks = job->options->num_ranks;
    job->start.first_rank = job->options->first_rank;
    job->start.is_member = job->options->is_member;
    job->start.hosts = hosts;
    job->start.stdin_fd = -1;
    job->start.bind = job->options->bind;
    job->out.fd = STDOUT_FILENO;
    job->err.fd = STDERR_FILENO;
    *what_p = "allocate memory";
    job->pids = calloc(num_children, sizeof(*job->pids));
    job->lifelines = malloc(num_children * sizeof(*job->lifelines));
    job->sources = calloc(2 * num_children, sizeof(*job->sources));
    job->polls = calloc(4 + 2 * num_children, sizeof(*job->polls));
    for (size_t i = 0; job->lifelines != NULL && i < num_children; i++) {
        job->lifelines[i] = -1;
    }
    if (job->pids == NULL || job->lifelines == NULL || job->sources == NULL ||
        job->polls == NULL || !epx__start_prepare(&job->start, what_p)) {
        return false;
    }
    *what_p = "take over the signals";
    return take_signals(job);
}

static void
release(job_t *job)
{
    for (int i = 0; i < job->num_sources; i++) {
        epx__source_close(&job->sources[i]);
    }
    if (job->signal_fd >= 0) {
        (void)close(job->signal_fd);
    }
    epx__sink_free(&job->out);
    epx__sink_free(&job->err);
    cut_lifelines(job);
    free(job->polls);
    free(job->sources);
    free(job->lifelines);
    free(job->pids);
}

int
epx__job_run(const epx__run_options_t *options)
{
    job_t job = { .options = options, .signal_fd = -1 };
    const char *what;

    if (prepare(&job, &what)) {
        enter(&job, RUNNING,
              options->timeout_ns == 0 ? FOREVER : options->timeout_ns);
        start_ranks(&job);
        run_events(&job);
    } else {
        (void)fprintf(stderr, "epx-run: cannot %s: %s\n", what,
                      strerror(errno));
        job.status = EPX__EXIT_LAUNCHER;
    }
    release(&job);
    return job.status;
}
