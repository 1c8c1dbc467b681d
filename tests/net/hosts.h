/* SPDX-License-Identifier: MIT */
/* Two hosts of their own, as far as the network can tell: network namespaces,
 * joined by a pair of interfaces. */
#ifndef EPX_TESTS_NET_HOSTS_H
#define EPX_TESTS_NET_HOSTS_H

#include <stdbool.h>
#include <stdint.h>

/* The name of the interface, in both. */
#define HOSTS_DEVICE "epx0"

/* False, with a line that says why, where that is not possible. */
bool hosts_make(void);
void hosts_remove(void);

/* Move this process to host rank % 2. */
void hosts_enter(int32_t rank);

/* From now on every packet that reaches that host vanishes. */
bool hosts_cut(int32_t host);

#endif
