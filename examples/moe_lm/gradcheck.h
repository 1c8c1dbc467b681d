/* SPDX-License-Identifier: MIT */
/* Checks the gradients against finite differences of the loss. */
#ifndef MOE_LM_GRADCHECK_H
#define MOE_LM_GRADCHECK_H

#include <epx/epx.h>

#include <stdint.h>

/* Returns how many checks failed on this rank: every rank checks the replicated
 * parameters and its own experts.  Collective. */
int gradcheck(epx_group_t *group, uint64_t seed);

#endif
