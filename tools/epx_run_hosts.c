/* SPDX-License-Identifier: MIT */
#include "epx_run_hosts.h"

#include <epx/epx.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* A pipe holds no more, for users without privileges. */
#define MAX_JOB_BYTES ((size_t)1 << 20)

/* What goes through an agent's shell, if it has one, unchanged. */
#define PLAIN                                                           \
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789@%_" \
    "+=:,./-"

/* ---- the list of hosts ---- */

static bool
parse_host(epx__hosts_t *hosts, char *text)
{
    char *colon = strchr(text, ':');
    char *end = NULL;
    long ranks = 1;

    if (colon != NULL) {
        *colon = '\0';
        errno = 0;
        ranks = colon[1] >= '0' && colon[1] <= '9' ? strtol(colon + 1, &end, 10)
                                                   : 0;
        if (end == NULL || *end != '\0' || errno != 0) {
            ranks = 0;
        }
    }
    if (text[0] == '\0' || text[0] == '-' ||
        text[strspn(text, PLAIN)] != '\0' || ranks < 1 ||
        ranks > EPX_MAX_RANKS - hosts->num_ranks) {
        (void)fprintf(stderr,
                      "epx-run: --hosts names \"%.60s%s%.20s\"; a host is a "
                      "name, then a colon and its ranks, all together 1 to "
                      "%d\n",
                      text, colon != NULL ? ":" : "",
                      colon != NULL ? colon + 1 : "", EPX_MAX_RANKS);
        return false;
    }
    hosts->hosts[hosts->num_hosts++] =
        (epx__host_t){ text, hosts->num_ranks, (int)ranks };
    hosts->num_ranks += (int)ranks;
    return true;
}

bool
epx__hosts_parse(epx__hosts_t *hosts, const char *list)
{
    size_t count = 1;
    char *text = strdup(list);
    char *next = text;

    for (const char *at = list; *at != '\0'; at++) {
        count += *at == ',';
    }
    free(hosts->hosts);
    hosts->num_hosts = 0;
    hosts->num_ranks = 0;
    hosts->hosts = calloc(count, sizeof(*hosts->hosts));
    if (text == NULL || hosts->hosts == NULL) {
        (void)fprintf(stderr, "epx-run: no memory for the hosts\n");
        free(text);
        return false;
    }
    while (next != NULL) { /* the names stay in text */
        char *here = strsep(&next, ",");

        if (!parse_host(hosts, here)) {
            return false;
        }
    }
    return true;
}

static bool
split_agent(epx__hosts_t *hosts, const char *agent)
{
    char *text = strdup(agent);
    char *next = text;
    size_t count = 0;

    hosts->agent = calloc(strlen(agent) / 2 + 2, sizeof(*hosts->agent));
    if (text == NULL || hosts->agent == NULL) {
        free(text);
        return false;
    }
    while (next != NULL) {
        char *word = strsep(&next, " ");

        if (word[0] != '\0') {
            hosts->agent[count++] = word;
        }
    }
    return count > 0;
}

bool
epx__hosts_complete(epx__hosts_t *hosts, const char *agent)
{
    ssize_t length =
        readlink("/proc/self/exe", hosts->program, sizeof(hosts->program) - 1);
    const char *user;

    hosts->program[length > 0 ? length : 0] = '\0';
    if (length <= 0 || hosts->program[strspn(hosts->program, PLAIN)] != '\0') {
        (void)fprintf(stderr,
                      "epx-run: it lies in \"%.200s\", which a shell would "
                      "not take as it is\n",
                      hosts->program);
        return false;
    }
    if (!split_agent(hosts, agent)) {
        (void)fprintf(stderr,
                      "epx-run: --agent is \"%.60s\"; it must be a "
                      "command\n",
                      agent);
        return false;
    }
    if (hosts->address == NULL) {
        user = strchr(hosts->hosts[0].name, '@');
        hosts->address = user != NULL ? user + 1 : hosts->hosts[0].name;
    }
    return true;
}

void
epx__hosts_free(epx__hosts_t *hosts)
{
    if (hosts->agent != NULL) {
        free(hosts->agent[0]);
    }
    if (hosts->hosts != NULL) {
        free((void *)(uintptr_t)hosts->hosts[0].name);
    }
    free(hosts->agent);
    free(hosts->hosts);
    free(hosts->names);
}

char **
epx__hosts_command(const epx__hosts_t *hosts, int host)
{
    size_t count = 0;
    char **words;

    while (hosts->agent[count] != NULL) {
        count++;
    }
    words = calloc(count + 4, sizeof(*words));
    if (words != NULL) {
        memcpy(words, hosts->agent, count * sizeof(*words));
        words[count] = (char *)(uintptr_t)hosts->hosts[host].name;
        words[count + 1] = (char *)(uintptr_t)hosts->program;
        words[count + 2] = (char *)(uintptr_t) "--member";
    }
    return words;
}

/* ---- the job, as strings that end with NUL each ---- */

typedef struct text {
    char *data;
    size_t bytes;
    size_t room;
    bool failed;
} text_t;

static void
put(text_t *text, const char *string)
{
    size_t bytes = strlen(string) + 1;

    if (text->failed || bytes > MAX_JOB_BYTES - text->bytes) {
        text->failed = true;
        return;
    }
    if (text->bytes + bytes > text->room) {
        size_t room = 2 * (text->bytes + bytes);
        char *data = realloc(text->data, room);

        if (data == NULL) {
            text->failed = true;
            return;
        }
        text->data = data;
        text->room = room;
    }
    memcpy(text->data + text->bytes, string, bytes);
    text->bytes += bytes;
}

static void
put_number(text_t *text, long long number)
{
    char digits[24];

    (void)snprintf(digits, sizeof(digits), "%lld", number);
    put(text, digits);
}

static bool
is_passed_on(const epx__hosts_t *hosts, const char *variable)
{
    static const char *const always[] = { "EPX_", "UCX_", "MASTER_ADDR=",
                                          "MASTER_PORT=", "WORLD_SIZE=" };
    size_t length = strcspn(variable, "=");

    for (size_t i = 0; i < sizeof(always) / sizeof(*always); i++) {
        if (strncmp(variable, always[i], strlen(always[i])) == 0) {
            return true;
        }
    }
    for (char **name = hosts->names; name != NULL && *name != NULL; name++) {
        if (strlen(*name) == length && strncmp(variable, *name, length) == 0) {
            return true;
        }
    }
    return false;
}

static void
write_job(text_t *text, const epx__run_options_t *options, int host)
{
    const epx__hosts_t *hosts = options->hosts;
    char folder[4096] = "/";
    int count = 0;

    if (getcwd(folder, sizeof(folder)) == NULL) {
        text->failed = true;
    }
    while (options->argv[count] != NULL) {
        count++;
    }
    put_number(text, hosts->hosts[host].first_rank);
    put_number(text, hosts->hosts[host].num_ranks);
    put_number(text, options->prefix);
    put_number(text, options->bind);
    put_number(text, options->grace_ns);
    put(text, folder);
    put_number(text, count);
    for (int i = 0; i < count; i++) {
        put(text, options->argv[i]);
    }
    for (char **variable = environ; *variable != NULL; variable++) {
        if (is_passed_on(hosts, *variable)) {
            put(text, *variable);
        }
    }
}

int
epx__hosts_send(const epx__run_options_t *options, int host, int *lifeline_p)
{
    text_t job = { 0 };
    char head[64];
    int fds[2];
    int length;
    bool sent = false;

    write_job(&job, options, host);
    length = snprintf(head, sizeof(head), "epx-run %d.%d.%d %zu\n",
                      EPX_VERSION_MAJOR, EPX_VERSION_MINOR, EPX_VERSION_PATCH,
                      job.bytes);
    if (job.failed || pipe2(fds, O_CLOEXEC) != 0) {
        errno = job.failed ? E2BIG : errno;
        free(job.data);
        return -1;
    }
    /* All of it, before anybody reads: a pipe that is too small is refused. */
    (void)fcntl(fds[1], F_SETPIPE_SZ, (int)(job.bytes + sizeof(head)));
    if (fcntl(fds[1], F_SETFL, O_NONBLOCK) == 0) {
        sent = write(fds[1], head, (size_t)length) == length &&
               write(fds[1], job.data, job.bytes) == (ssize_t)job.bytes;
    }
    free(job.data);
    if (!sent) {
        (void)close(fds[0]);
        (void)close(fds[1]);
        errno = E2BIG;
        return -1;
    }
    *lifeline_p = fds[1];
    return fds[0];
}

/* ---- the member ---- */

static bool
refuse(const char *why)
{
    (void)fprintf(stderr,
                  "epx-run: --member, which epx-run --hosts starts: "
                  "%s\n",
                  why);
    return false;
}

static bool
read_all(char *to, size_t bytes)
{
    while (bytes > 0) {
        ssize_t count = read(STDIN_FILENO, to, bytes);

        if (count < 0 && errno == EINTR) {
            continue;
        }
        if (count <= 0) {
            return false;
        }
        to += count;
        bytes -= (size_t)count;
    }
    return true;
}

/* The line in front, a byte at a time: what follows is not ours to take. */
static bool
read_head(size_t *bytes_p)
{
    char line[64];
    char wanted[32];
    size_t at = 0;
    size_t length = (size_t)snprintf(wanted, sizeof(wanted),
                                     "epx-run %d.%d.%d ", EPX_VERSION_MAJOR,
                                     EPX_VERSION_MINOR, EPX_VERSION_PATCH);

    do {
        if (at == sizeof(line) - 1 || !read_all(line + at, 1)) {
            return refuse("no job came on its standard input");
        }
    } while (line[at++] != '\n');
    line[at] = '\0';
    if (strncmp(line, wanted, length) != 0) {
        return refuse("the launcher is of another version");
    }
    *bytes_p = strtoul(line + length, NULL, 10);
    return (*bytes_p > 0 && *bytes_p <= MAX_JOB_BYTES) ||
           refuse("the job has a size that cannot be");
}

/* The next string; NULL behind the last. */
static char *
next(text_t *job)
{
    char *string = job->data + job->room;

    if (job->room >= job->bytes) {
        return NULL;
    }
    job->room += strlen(string) + 1;
    return string;
}

static long long
next_number(text_t *job, long long max)
{
    const char *string = next(job);
    long long number = string == NULL ? -1 : strtoll(string, NULL, 10);

    job->failed |= number < 0 || number > max;
    return number;
}

static bool
read_job(text_t *job, epx__run_options_t *options)
{
    const char *folder;
    char *variable;
    long long count;

    options->first_rank = (int)next_number(job, EPX_MAX_RANKS - 1);
    options->num_ranks = (int)next_number(job, EPX_MAX_RANKS);
    options->prefix = next_number(job, 1) == 1;
    options->bind = next_number(job, 1) == 1;
    options->grace_ns = next_number(job, INT64_MAX);
    folder = next(job);
    count = next_number(job, (long long)MAX_JOB_BYTES);
    if (job->failed || count < 1 || options->num_ranks < 1) {
        return refuse("the job is not whole");
    }
    options->argv = calloc((size_t)count + 1, sizeof(*options->argv));
    for (long long i = 0; options->argv != NULL && i < count; i++) {
        options->argv[i] = next(job);
        job->failed |= options->argv[i] == NULL;
    }
    if (job->failed || options->argv == NULL) {
        return refuse("the job is not whole");
    }
    if (chdir(folder) != 0) {
        (void)fprintf(stderr, "epx-run: cannot enter %.200s: %s\n", folder,
                      strerror(errno));
        return false;
    }
    while ((variable = next(job)) != NULL) {
        if (strchr(variable, '=') == NULL || putenv(variable) != 0) {
            return refuse("a variable cannot be set");
        }
    }
    return true;
}

bool
epx__hosts_receive(epx__run_options_t *options)
{
    text_t job = { 0 };

    if (!read_head(&job.bytes)) {
        return false;
    }
    /* Kept: the environment and the arguments lie in it. */
    job.data = malloc(job.bytes + 1);
    if (job.data == NULL || !read_all(job.data, job.bytes)) {
        free(job.data);
        return refuse("the job is not whole");
    }
    job.data[job.bytes] = '\0';
    return read_job(&job, options);
}
