/* SPDX-License-Identifier: MIT */
/* Strict reading of environment variables: a bad value is an error that names
 * the variable, the value and the range, never a silent default. */
#ifndef EPX_CORE_ENV_H
#define EPX_CORE_ENV_H

#include <epx/epx.h>
#include <stdbool.h>
#include <stdint.h>

/* Decimal digits only.  An unset variable gives *found_p = false and leaves
 * *value_p alone. */
epx_status_t epx__env_uint(const char *name, uint64_t min, uint64_t max,
                           uint64_t *value_p, bool *found_p);

/* The same for text that did not come from the environment; `name` is what the
 * sentence calls it. */
epx_status_t epx__parse_uint(const char *name, const char *text, uint64_t min,
                             uint64_t max, uint64_t *value_p);

/* NULL when unset or when the process runs with raised privileges. */
const char *epx__env_string(const char *name);

#endif
