/* SPDX-License-Identifier: MIT */
/* A report of named values in sections, as aligned text or as one JSON object.
 * A key is written for JSON; text shows it with spaces, and sizes with their
 * unit instead of "_bytes". */
#ifndef EPX_INFO_REPORT_H
#define EPX_INFO_REPORT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define EPX__UNLIMITED UINT64_MAX

void epx__report_begin(bool json);

/* False if it could not be written; errno tells why. */
bool epx__report_end(void);

void epx__report_section(const char *name);

/* NULL: there is none; `absent` is what the text says then. */
void epx__report_string(const char *key, const char *value, const char *absent);

void epx__report_number(const char *key, uint64_t value);

/* EPX__UNLIMITED is null in JSON. */
void epx__report_limit(const char *key, uint64_t value);
void epx__report_bytes(const char *key, uint64_t value);

void epx__report_strings(const char *key, const char *const *values,
                         size_t count);
void epx__report_sizes(const char *key, const uint64_t *values, size_t count);

#endif
