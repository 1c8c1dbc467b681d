/* SPDX-License-Identifier: MIT */
/* epx-run: starts the ranks of a job, here or on other hosts.  See epx-run(1).
 */
#include "epx_run_hosts.h"
#include "epx_run_job.h"

#include <epx/epx.h>
#include <errno.h>
#include <getopt.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_SECONDS 31536000.0 /* a year */

static const char usage[] =
    "usage: epx-run -n N [options] [--] PROGRAM [ARGUMENT]...\n"
    "       epx-run --hosts A:N,B:N,... [options] [--] PROGRAM "
    "[ARGUMENT]...\n"
    "\n"
    "Starts ranks of PROGRAM, N on this host or N on each of others, and "
    "waits\n"
    "for them.\n"
    "\n"
    "  -n, --ranks N          ranks to start, 1 to %d\n"
    "      --hosts A:N,...    hosts, and how many ranks each starts "
    "(default 1)\n"
    "      --agent COMMAND    what runs a command on a host (default ssh)\n"
    "      --address ADDRESS  of the first host, for the others (default: its\n"
    "                         name)\n"
    "      --port P           P and P + 1 are free on the first host\n"
    "      --env NAME         pass this variable on to the hosts, too\n"
    "      --no-prefix        let the ranks write straight to the launcher's\n"
    "                         output, without \"[rank] \" before each line\n"
    "      --bind             give each rank its share of the usable cores\n"
    "      --grace SECONDS    time that the other ranks have to end when one\n"
    "                         has failed or a signal came (default 5)\n"
    "      --timeout SECONDS  end the job, with status 124, after this time\n"
    "  -h, --help             print this and exit\n"
    "  -V, --version          print the version and exit\n"
    "\n"
    "The exit status is 0 when all ranks succeed, else that of the first rank\n"
    "to fail (128 + N for signal N).  See epx-run(1).\n";

enum {
    OPTION_NO_PREFIX = 256,
    OPTION_BIND,
    OPTION_GRACE,
    OPTION_TIMEOUT,
    OPTION_HOSTS,
    OPTION_AGENT,
    OPTION_ADDRESS,
    OPTION_PORT,
    OPTION_ENV,
    OPTION_MEMBER,
};

/* What concerns hosts; without any, none. */
static epx__hosts_t hosts;
static const char *agent = "ssh";
static bool needs_hosts;
static size_t num_names;

static const struct option long_options[] = {
    { "ranks", required_argument, NULL, 'n' },
    { "no-prefix", no_argument, NULL, OPTION_NO_PREFIX },
    { "bind", no_argument, NULL, OPTION_BIND },
    { "grace", required_argument, NULL, OPTION_GRACE },
    { "timeout", required_argument, NULL, OPTION_TIMEOUT },
    { "hosts", required_argument, NULL, OPTION_HOSTS },
    { "agent", required_argument, NULL, OPTION_AGENT },
    { "address", required_argument, NULL, OPTION_ADDRESS },
    { "port", required_argument, NULL, OPTION_PORT },
    { "env", required_argument, NULL, OPTION_ENV },
    { "member", no_argument, NULL, OPTION_MEMBER },
    { "help", no_argument, NULL, 'h' },
    { "version", no_argument, NULL, 'V' },
    { NULL, 0, NULL, 0 },
};

/* True for text of nothing but digits and points; the strto functions would
 * also take white space, signs and words. */
static bool
looks_like_number(const char *text)
{
    return text[strspn(text, "0123456789.")] == '\0' && text[0] != '\0';
}

static bool
parse_whole(const char *name, const char *text, int max, int *value_p)
{
    char *end = NULL;
    long value;

    errno = 0;
    value = looks_like_number(text) ? strtol(text, &end, 10) : 0;
    if (end == NULL || *end != '\0' || errno != 0 || value < 1 || value > max) {
        (void)fprintf(stderr,
                      "epx-run: %s is \"%.40s\"; it must be a whole number "
                      "from 1 to %d\n",
                      name, text, max);
        return false;
    }
    *value_p = (int)value;
    return true;
}

static bool
add_name(char *name)
{
    char **names = realloc(hosts.names, (num_names + 2) * sizeof(*hosts.names));

    if (names == NULL) {
        (void)fprintf(stderr, "epx-run: no memory for --env\n");
        return false;
    }
    hosts.names = names;
    names[num_names++] = name;
    names[num_names] = NULL;
    return true;
}

static bool
take_hosts_option(int option)
{
    needs_hosts = true;
    switch (option) {
    case OPTION_HOSTS:
        return epx__hosts_parse(&hosts, optarg);
    case OPTION_AGENT:
        agent = optarg;
        return true;
    case OPTION_ADDRESS:
        hosts.address = optarg;
        return true;
    case OPTION_PORT:
        return parse_whole("--port", optarg, UINT16_MAX - 1, &hosts.port);
    default:
        return add_name(optarg);
    }
}

static bool
parse_seconds(const char *name, const char *text, double min, int64_t *ns_p)
{
    char *end = NULL;
    double value = looks_like_number(text) ? strtod(text, &end) : -1.0;

    if (end == NULL || *end != '\0' || value < min || value > MAX_SECONDS) {
        (void)fprintf(stderr,
                      "epx-run: %s is \"%.40s\"; it must be a number of "
                      "seconds from %g to %.0f\n",
                      name, text, min, MAX_SECONDS);
        return false;
    }
    *ns_p = (int64_t)(value * 1e9 + 0.5);
    return true;
}

/* Prints to standard output and leaves. */
static _Noreturn void
finish(const char *format, ...)
{
    va_list args;
    bool printed;

    va_start(args, format);
    printed = vprintf(format, args) >= 0 && fflush(stdout) == 0;
    va_end(args);
    exit(printed ? EXIT_SUCCESS : EPX__EXIT_LAUNCHER);
}

static bool
take_option(int option, epx__run_options_t *options)
{
    switch (option) {
    case 'n':
        return parse_whole("-n", optarg, EPX_MAX_RANKS, &options->num_ranks);
    case OPTION_NO_PREFIX:
        options->prefix = false;
        return true;
    case OPTION_BIND:
        options->bind = true;
        return true;
    case OPTION_GRACE:
        return parse_seconds("--grace", optarg, 0.0, &options->grace_ns);
    case OPTION_TIMEOUT:
        return parse_seconds("--timeout", optarg, 0.001, &options->timeout_ns);
    case OPTION_HOSTS:
    case OPTION_AGENT:
    case OPTION_ADDRESS:
    case OPTION_PORT:
    case OPTION_ENV:
        return take_hosts_option(option);
    case OPTION_MEMBER:
        options->is_member = true;
        return true;
    case 'h':
        finish(usage, EPX_MAX_RANKS);
    case 'V':
        finish("epx-run %d.%d.%d\n", EPX_VERSION_MAJOR, EPX_VERSION_MINOR,
               EPX_VERSION_PATCH);
    default:
        return false; /* getopt has said why */
    }
}

static bool
check_hosts(epx__run_options_t *options)
{
    bool has_hosts = hosts.num_hosts > 0;

    if (!has_hosts && options->num_ranks == 0) {
        (void)fprintf(stderr, "epx-run: -n N, the number of ranks, is missing; "
                              "or --hosts\n");
        return false;
    }
    if (has_hosts && options->num_ranks > 0) {
        (void)fprintf(stderr, "epx-run: -n and --hosts cannot go together\n");
        return false;
    }
    if (!has_hosts && needs_hosts) {
        (void)fprintf(stderr, "epx-run: --agent, --address, --port and --env "
                              "need --hosts\n");
        return false;
    }
    options->hosts = has_hosts ? &hosts : NULL;
    return !has_hosts || epx__hosts_complete(&hosts, agent);
}

static bool
parse_options(int argc, char **argv, epx__run_options_t *options)
{
    int option;

    /* "+": what follows the program's name is the program's. */
    while ((option = getopt_long(argc, argv, "+n:hV", long_options, NULL)) !=
           -1) {
        if (!take_option(option, options)) {
            return false;
        }
    }
    if (options->is_member) {
        return epx__hosts_receive(options);
    }
    if (!check_hosts(options)) {
        return false;
    }
    if (optind == argc) {
        (void)fprintf(stderr, "epx-run: the program to run is missing\n");
        return false;
    }
    options->argv = argv + optind;
    return true;
}

int
main(int argc, char **argv)
{
    epx__run_options_t options = {
        .prefix = true,
        .grace_ns = INT64_C(5000000000),
    };
    int status;

    if (!parse_options(argc, argv, &options)) {
        (void)fprintf(stderr, "Try 'epx-run --help'.\n");
        return EPX__EXIT_LAUNCHER;
    }
    status = epx__job_run(&options);
    epx__hosts_free(&hosts);
    if (options.is_member) {
        free((void *)options.argv);
    }
    return status;
}
