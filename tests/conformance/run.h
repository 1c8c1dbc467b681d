/* SPDX-License-Identifier: MIT */
#ifndef TESTS_CONFORMANCE_RUN_H
#define TESTS_CONFORMANCE_RUN_H

#include "conformance/shape.h"
#include "conformance/world.h"

/* What one rank does with a shape: a world_fn, whose context is the shape. */
void run_rank(world_rank_t *self, void *shape);

#endif
