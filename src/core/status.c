/* SPDX-License-Identifier: MIT */
#include "core/status.h"

#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static _Thread_local char last_error[sizeof(((epx__error_t *)0)->text)];

static epx__log_level_t log_level = EPX__LOG_NONE;
static char unknown_level[32]; /* what EPX_LOG is when it is no level */
static pthread_once_t log_once = PTHREAD_ONCE_INIT;

static const char *const level_names[] = {
    "none",
    "error",
    "warn",
    "info",
};

const char *
epx_status_string(epx_status_t status)
{
    switch (status) {
#define STATUS_CASE(name, value, text) \
    case name:                         \
        return text;
        EPX_STATUS_MAP(STATUS_CASE)
#undef STATUS_CASE
    }
    return "unknown status";
}

const char *
epx_last_error(void)
{
    return last_error;
}

/* One write() per line, so that lines of several processes do not mix. */
static void
log_line(epx__log_level_t level, const char *text)
{
    char line[640];
    int length = snprintf(line, sizeof(line), "epx[%d] %s: %s\n", (int)getpid(),
                          level_names[level], text);

    if (length >= (int)sizeof(line)) {
        length = (int)sizeof(line) - 1;
        line[length - 1] = '\n';
    }
    if (length > 0 && write(STDERR_FILENO, line, (size_t)length) < 0) {
        return; /* there is nobody left to tell */
    }
}

static void
log_read_environment(void)
{
    const char *value = secure_getenv("EPX_LOG");

    if (value == NULL) {
        return;
    }
    for (size_t i = 0; i < sizeof(level_names) / sizeof(*level_names); i++) {
        if (strcmp(value, level_names[i]) == 0) {
            log_level = (epx__log_level_t)i;
            return;
        }
    }
    (void)snprintf(unknown_level, sizeof(unknown_level), "%s",
                   value[0] == '\0' ? "empty" : value);
}

epx_status_t
epx__log_check(void)
{
    (void)pthread_once(&log_once, log_read_environment);
    return unknown_level[0] == '\0'
               ? EPX_OK
               : epx__fail(EPX_ERR_ENVIRONMENT,
                           "EPX_LOG is \"%s\"; allowed are none, error, warn "
                           "and info",
                           unknown_level);
}

void
epx__log(epx__log_level_t level, const char *format, ...)
{
    char text[512];
    va_list args;

    (void)pthread_once(&log_once, log_read_environment);
    if (level > log_level) {
        return;
    }
    va_start(args, format);
    (void)vsnprintf(text, sizeof(text), format, args);
    va_end(args);
    log_line(level, text);
}

void
epx__error_set(const char *format, ...)
{
    int saved_errno = errno;
    va_list args;

    (void)pthread_once(&log_once, log_read_environment);
    errno = saved_errno; /* for %m */
    va_start(args, format);
    (void)vsnprintf(last_error, sizeof(last_error), format, args);
    va_end(args);
    if (log_level >= EPX__LOG_ERROR) {
        log_line(EPX__LOG_ERROR, last_error);
    }
    errno = saved_errno;
}

void
epx__error_save(epx__error_t *error, epx_status_t status)
{
    error->status = status;
    (void)snprintf(error->text, sizeof(error->text), "%s", last_error);
}

epx_status_t
epx__error_restore(const epx__error_t *error)
{
    (void)snprintf(last_error, sizeof(last_error), "%s", error->text);
    return error->status;
}

void
epx__error_clear(void)
{
    last_error[0] = '\0';
}
