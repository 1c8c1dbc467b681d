/* SPDX-License-Identifier: MIT */
/* epx-run: starts the ranks of a job on this host.  See epx-run(1). */
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
    "\n"
    "Starts N ranks of PROGRAM on this host and waits for them.\n"
    "\n"
    "  -n, --ranks N          ranks to start, 1 to %d\n"
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
};

static const struct option long_options[] = {
    { "ranks", required_argument, NULL, 'n' },
    { "no-prefix", no_argument, NULL, OPTION_NO_PREFIX },
    { "bind", no_argument, NULL, OPTION_BIND },
    { "grace", required_argument, NULL, OPTION_GRACE },
    { "timeout", required_argument, NULL, OPTION_TIMEOUT },
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
parse_ranks(const char *text, int *num_ranks_p)
{
    char *end = NULL;
    long value;

    errno = 0;
    value = looks_like_number(text) ? strtol(text, &end, 10) : 0;
    if (end == NULL || *end != '\0' || errno != 0 || value < 1 ||
        value > EPX_MAX_RANKS) {
        (void)fprintf(stderr,
                      "epx-run: -n is \"%.40s\"; it must be a whole number "
                      "from 1 to %d\n",
                      text, EPX_MAX_RANKS);
        return false;
    }
    *num_ranks_p = (int)value;
    return true;
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
        return parse_ranks(optarg, &options->num_ranks);
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
    if (options->num_ranks == 0) {
        (void)fprintf(stderr,
                      "epx-run: -n N, the number of ranks, is missing\n");
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

    if (!parse_options(argc, argv, &options)) {
        (void)fprintf(stderr, "Try 'epx-run --help'.\n");
        return EPX__EXIT_LAUNCHER;
    }
    return epx__job_run(&options);
}
