/* SPDX-License-Identifier: MIT */
/* What the ready-made bootstraps share. */
#ifndef EPX_BOOTSTRAP_BOOTSTRAP_H
#define EPX_BOOTSTRAP_BOOTSTRAP_H

#include <epx/epx.h>

/* EPX_OK, or what is wrong with an allgather's arguments. */
epx_status_t epx__allgather_check(const void *send, const void *recv,
                                  size_t bytes, int32_t num_ranks);

/* Copies *bootstrap to memory that epx_bootstrap_destroy releases. */
epx_status_t epx__bootstrap_new(const epx_bootstrap_t *bootstrap,
                                epx_bootstrap_t **bootstrap_p);

#endif
