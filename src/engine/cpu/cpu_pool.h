/* SPDX-License-Identifier: MIT */
/* The worker threads of one rank. */
#ifndef EPX_ENGINE_CPU_CPU_POOL_H
#define EPX_ENGINE_CPU_CPU_POOL_H

#include <epx/epx.h>
#include <stdbool.h>
#include <stdint.h>

typedef struct epx__pool epx__pool_t;

/* worker is 0 for the calling thread. */
typedef void (*epx__work_fn_t)(void *context, int32_t worker);

/* What the calling thread does while others are at work still; false: nothing.
 */
typedef bool (*epx__meanwhile_fn_t)(void *context);

/* num_workers - 1 threads, asleep until there is work.  Who waits for others
 * sleeps after spin_ns; until then the calling thread calls `meanwhile`, which
 * may be NULL. */
epx_status_t epx__pool_open(int32_t num_workers, int64_t spin_ns,
                            epx__meanwhile_fn_t meanwhile, void *context,
                            epx__pool_t **pool_p);
void epx__pool_close(epx__pool_t *pool);

/* Run fn on the calling thread, and on up to num_workers - 1 others, which take
 * numbers from 1 on as they come; wait until all of them have returned.  One
 * that has not come when the caller's own fn returns is not waited for, since
 * to wake it may take longer than the work: so fn must be done once any of its
 * callers has returned, but for what others are at. */
void epx__pool_run(epx__pool_t *pool, int32_t num_workers, epx__work_fn_t fn,
                   void *context);

#endif
