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
epx_status_t epx__fail(epx_status_t status, const char *format, ...)
    __attribute__((format(printf, 2, 3), cold));

/* Carry an error from the thread where it arose to the one that reports it. */
typedef struct epx__error {
    epx_status_t status;
    char text[512];
} epx__error_t;

void epx__error_save(epx__error_t *error, epx_status_t status);
epx_status_t epx__error_restore(const epx__error_t *error);
void epx__error_clear(void);

/* The log goes to stderr when EPX_LOG is error, warn, info or debug. */
typedef enum epx__log_level {
    EPX__LOG_NONE = 0,
    EPX__LOG_ERROR,
    EPX__LOG_WARN,
    EPX__LOG_INFO,
    EPX__LOG_DEBUG,
} epx__log_level_t;

void epx__log(epx__log_level_t level, const char *format, ...)
    __attribute__((format(printf, 2, 3), cold));

#endif
