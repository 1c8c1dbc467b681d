/* SPDX-License-Identifier: MIT */
/* Strict reading of environment variables: a bad value is an error that names
 * the variable, the value and the range, never a silent default. */
#ifndef EPX_CORE_ENV_H
#define EPX_CORE_ENV_H

#include <epx/epx.h>
#include <stdint.h>

/* Decimal digits only.  `name` is what the sentence calls the text: a variable,
 * or what else it came from.  *value_p changes only on success. */
epx_status_t epx__parse_uint(const char *name, const char *text, uint64_t min,
                             uint64_t max, uint64_t *value_p);

/* NULL when unset or when the process runs with raised privileges. */
const char *epx__env_string(const char *name);

#endif
