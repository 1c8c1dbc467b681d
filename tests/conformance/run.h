/* SPDX-License-Identifier: MIT */
#ifndef TESTS_CONFORMANCE_RUN_H
#define TESTS_CONFORMANCE_RUN_H

#include "conformance/memory.h"
#include "conformance/shape.h"

/* What one rank does with a shape: a world_fn, whose context is the shape. */
void run_rank(world_rank_t *self, void *shape);

/* The same, between opening and closing the rank's memory. */
void run_shape(world_rank_t *self, const shape_t *shape, memory_t *memory);

#endif
