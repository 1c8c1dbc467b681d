/* SPDX-License-Identifier: MIT */
/*
 * An engine does the work of a group's plans on one kind of device.  The api
 * layer has checked what can be checked without knowing the device, and passes
 * argument structs of the present size.
 */
#ifndef EPX_ENGINE_ENGINE_H
#define EPX_ENGINE_ENGINE_H

#include "core/group.h"

#include <epx/epx.h>

typedef struct epx__engine_ops {
    const char *name;
    epx_device_t device;
    /* The kernels in use on this machine, for people. */
    const char *(*isa)(void);
    /* Whether a stream is one of the group's; NULL always is. */
    epx_status_t (*check_stream)(const epx_group_t *group, epx_stream_t stream);
    /* What has to be set up once per group: workers, device. */
    epx_status_t (*open)(epx_group_t *group);
    void (*close)(epx_group_t *group);

    /* A plan without routing yet.  args has been checked and completed. */
    epx_status_t (*plan_open)(epx_group_t *group, const epx_plan_args_t *args,
                              epx_plan_t **plan_p);
    /* Undoes plan_open; waits for what is queued. */
    epx_status_t (*plan_close)(epx_plan_t *plan);
    /* Take in routing and tell the peers this rank's counts. */
    epx_status_t (*plan_route)(epx_plan_t *plan, int64_t num_tokens,
                               const void *topk_idx, epx_stream_t stream);
    epx_status_t (*plan_counts)(epx_plan_t *plan, epx_plan_counts_t *counts);

    epx_status_t (*dispatch)(epx_plan_t *plan, const epx_dispatch_args_t *args,
                             epx_stream_t stream);
    epx_status_t (*combine)(epx_plan_t *plan, const epx_combine_args_t *args,
                            epx_stream_t stream);
    epx_status_t (*complete)(epx_plan_t *plan, epx_stream_t stream);
} epx__engine_ops_t;

/* Those of this build; NULL-terminated. */
extern const epx__engine_ops_t *const epx__engines[];

/* The engine of a device; NULL when this build has none. */
const epx__engine_ops_t *epx__engine_find(epx_device_t device);

extern const epx__engine_ops_t epx__engine_cpu;

#endif
