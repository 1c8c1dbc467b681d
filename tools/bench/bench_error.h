/* SPDX-License-Identifier: MIT */
/* One sentence on what was wrong, filled in by whoever decides that it is. */
#ifndef EPX_BENCH_ERROR_H
#define EPX_BENCH_ERROR_H

#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>

struct bench_error {
    char text[512];
};

/* Always false, so that a check can return it. */
__attribute__((format(printf, 2, 3))) static inline bool
bench_fail(struct bench_error *error, const char *format, ...)
{
    va_list list;
    va_start(list, format);
    vsnprintf(error->text, sizeof error->text, format, list);
    va_end(list);
    return false;
}

#endif
