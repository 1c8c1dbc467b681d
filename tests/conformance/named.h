/* SPDX-License-Identifier: MIT */
#ifndef TESTS_CONFORMANCE_NAMED_H
#define TESTS_CONFORMANCE_NAMED_H

#include "conformance/shape.h"

/* The ugly shapes, by name; the last has none. */
extern const wish_t named_shapes[];

#endif
