/* SPDX-License-Identifier: MIT */
/* What this process holds of the system's. */
#ifndef TESTS_CONFORMANCE_HOLDINGS_H
#define TESTS_CONFORMANCE_HOLDINGS_H

#include <stdint.h>

/* And 3: ".", "..", and the folder that is read. */
int count_descriptors(void);

/* And 2.  Takes 20 ms: a thread is listed for a moment after it has been
 * joined. */
int count_threads(void);

/* A port of a numeric address that the system gives to nobody while the
 * descriptor returned is open; -1 when this machine has no such address.
 * Whoever reuses addresses, too, may bind to it. */
int port_reserve(const char *numeric, uint16_t *port_p);

#endif
