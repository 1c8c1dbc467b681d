/* SPDX-License-Identifier: MIT */
/* Many shapes, one after the other, by the same ranks: for a device that takes
 * long to set up in a process. */
#ifndef TESTS_CONFORMANCE_SERIES_H
#define TESTS_CONFORMANCE_SERIES_H

#include "conformance/shape.h"

/*
 * Runs shapes[0..count-1], all of the same number of ranks and the same device,
 * until one fails.  Returns how many went well; when that is less than count,
 * the next one failed, as text says.
 */
uint64_t series_run(world_kind_t kind, const shape_t *shapes, uint64_t count,
                    char *text, size_t text_bytes);

#endif
