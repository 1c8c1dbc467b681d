/* SPDX-License-Identifier: MIT */
/*
 * An engine does the work of a group's plans on one kind of device.  The api
 * layer has checked what can be checked without knowing the device, and passes
 * argument structs of the present size.
 */
#ifndef EPX_ENGINE_ENGINE_H
#define EPX_ENGINE_ENGINE_H

#include "fabric/fabric.h"

#include <epx/epx.h>

/* What a module was built against: raised with any change to this table, to the
 * structs behind it or to the functions of src/core and src/fabric. */
#define EPX__ENGINE_ABI 10

typedef struct epx__engine_ops {
    uint32_t abi; /* EPX__ENGINE_ABI */
    const char *name;
    epx_device_t device;
    /* What reaches this engine's memory, in order of preference;
     * NULL-terminated. */
    const epx__fabric_ops_t *const *fabrics;
    bool spans_nodes; /* whether its groups may have several nodes */
    /* The kernels in use on this machine, for people. */
    const char *(*isa)(void);
    /* The device for people; all of info but its size. */
    epx_status_t (*device_info)(int32_t ordinal, epx_device_info_t *info);
    /* Check the config's device, and fill in place->device. */
    epx_status_t (*place)(const epx_group_config_t *config,
                          epx__fabric_place_t *place);
    /* Set group->num_workers and spin_ns from what all ranks asked for: places
     * is [R].  Ranks may come to different verdicts. */
    epx_status_t (*choose_workers)(epx_group_t *group,
                                   const epx__fabric_place_t *places);
    /* Whether a stream is one of the group's; NULL always is. */
    epx_status_t (*check_stream)(const epx_group_t *group, epx_stream_t stream);
    /* What has to be set up once per group: workers, device. */
    epx_status_t (*open)(epx_group_t *group);
    void (*close)(epx_group_t *group);
    /* Until the device has done what peers wait for, and before the net is
     * closed, which nothing may use any more.  NULL: nothing happens outside of
     * calls. */
    void (*leave)(epx_group_t *group);
    /* Break the group if the device has found an error since; does not block.
     * NULL: errors are found by the calls themselves. */
    epx_status_t (*check)(epx_group_t *group);

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

    /* The heap is full: give back what the engine keeps for later; may wait for
     * the last operation.  NULL, both: it keeps nothing. */
    void (*reclaim)(epx_group_t *group);
    uint64_t (*idle_bytes)(const epx_group_t *group);
} epx__engine_ops_t;

/* The engine of a device; EPX_ERR_UNSUPPORTED tells why there is none. */
epx_status_t epx__engine_find(epx_device_t device,
                              const epx__engine_ops_t **engine_p);

/* The same, for those who only look: NULL, and *why_p a sentence. */
const epx__engine_ops_t *epx__engine_look(epx_device_t device,
                                          const char **why_p);

/* engine_module.c: the engine of the module for CUDA, which is loaded once and
 * stays; NULL, and *why_p a sentence. */
const epx__engine_ops_t *epx__engine_module(const char **why_p);

extern const epx__engine_ops_t epx__engine_cpu;

#endif
