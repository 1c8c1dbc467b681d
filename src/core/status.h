/* SPDX-License-Identifier: MIT */
/* Errors and the log: the one place where a failure gets its sentence. */
#ifndef EPX_CORE_STATUS_H
#define EPX_CORE_STATUS_H

#include <epx/epx.h>

/*
 * Set this thread's last error to the sentence, log it, and return status, so
 * that the function that decides an error writes `return epx__fail(...)`.
 * Callers pass a status on without calling this again.  %m works.
 */
#define epx__fail(status, ...) (epx__error_set(__VA_ARGS__), (status))
void epx__error_set(const char *format, ...)
    __attribute__((format(printf, 1, 2), cold));

/* Carry an error from the thread where it arose to the one that reports it. */
typedef struct epx__error {
    epx_status_t status;
    char text[512];
} epx__error_t;

void epx__error_save(epx__error_t *error, epx_status_t status);
epx_status_t epx__error_restore(const epx__error_t *error);
void epx__error_clear(void);

/* The log goes to stderr when EPX_LOG is error, warn or info. */
typedef enum epx__log_level {
    EPX__LOG_NONE = 0,
    EPX__LOG_ERROR,
    EPX__LOG_WARN,
    EPX__LOG_INFO,
} epx__log_level_t;

/* EPX_ERR_ENVIRONMENT when EPX_LOG is something else. */
epx_status_t epx__log_check(void);

void epx__log(epx__log_level_t level, const char *format, ...)
    __attribute__((format(printf, 2, 3), cold));

#endif
