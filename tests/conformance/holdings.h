/* SPDX-License-Identifier: MIT */
/* What this process holds of the system's, as the system tells. */
#ifndef TESTS_CONFORMANCE_HOLDINGS_H
#define TESTS_CONFORMANCE_HOLDINGS_H

int count_descriptors(void);

/* Takes 20 ms: a thread is listed for a moment after it has been joined. */
int count_threads(void);

#endif
