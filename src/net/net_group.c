/* SPDX-License-Identifier: MIT */
#include "net/net_group.h"

#include "core/atomic.h"
#include "core/env.h"
#include "core/mask_far.h"
#include "net/net_backend.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

/* Settings of UCX that are numbers here: -1 leaves them to UCX. */
typedef struct number {
    const char *field;
    int32_t value;
    int32_t max;
    const char *names[2]; /* UCX's */
} number_t;

#define NUM_NUMBERS  5
#define MAX_SETTINGS 8

static void
list_numbers(const epx_network_config_t *network, number_t *numbers)
{
    const number_t all[NUM_NUMBERS] = {
        { "service_level", network->service_level, 15, { "IB_SL" } },
        { "traffic_class",
          network->traffic_class,
          255,
          { "IB_TRAFFIC_CLASS" } },
        { "gid_index", network->gid_index, 255, { "IB_GID_INDEX" } },
        { "adaptive_routing",
          network->adaptive_routing,
          1,
          { "IB_AR_ENABLE" } },
        { "num_lanes",
          network->num_lanes,
          16,
          { "MAX_EAGER_LANES", "MAX_RNDV_LANES" } },
    };

    memcpy(numbers, all, sizeof(all));
}

/* By epx__net_wire_t. */
static const char *const wire_names[] = { "auto", "am", "rma" };

#define NUM_WIRES (sizeof(wire_names) / sizeof(*wire_names))

static size_t
find_wire(const char *name)
{
    size_t i = 0;

    while (i < NUM_WIRES && strcmp(name, wire_names[i]) != 0) {
        i++;
    }
    return i;
}

static epx_status_t
complete_wire(epx_network_config_t *network)
{
    bool is_given = network->wire != NULL;

    if (!is_given) {
        network->wire = epx__env_string("EPX_NET_WIRE");
    }
    if (network->wire == NULL) {
        network->wire = wire_names[EPX__NET_WIRE_AUTO];
    }
    return find_wire(network->wire) < NUM_WIRES
               ? EPX_OK
               : epx__fail(is_given ? EPX_ERR_INVALID : EPX_ERR_ENVIRONMENT,
                           "%s is \"%.60s\"; allowed are \"auto\", \"am\" and "
                           "\"rma\"",
                           is_given ? "config->network->wire" : "EPX_NET_WIRE",
                           network->wire);
}

static epx_status_t
complete_gpudirect(epx_network_config_t *network)
{
    const char *text = epx__env_string("EPX_NET_GPUDIRECT");
    uint64_t value;
    epx_status_t status;

    if (network->gpudirect < -1 || network->gpudirect > 1) {
        return epx__fail(EPX_ERR_INVALID,
                         "config->network->gpudirect is %d; allowed are 0 and "
                         "1, and -1 for what the adapter can",
                         network->gpudirect);
    }
    if (network->gpudirect >= 0 || text == NULL) {
        return EPX_OK;
    }
    status = epx__parse_uint("EPX_NET_GPUDIRECT", text, 0, 1, &value);
    if (status == EPX_OK) {
        network->gpudirect = (int32_t)value;
    }
    return status;
}

epx_status_t
epx__network_complete(epx_network_config_t *network)
{
    number_t numbers[NUM_NUMBERS];
    epx_status_t status = complete_wire(network);

    if (status == EPX_OK) {
        status = complete_gpudirect(network);
    }
    if (status != EPX_OK) {
        return status;
    }
    if (network->device == NULL) {
        network->device = epx__env_string("EPX_NET_DEVICE");
    }
    list_numbers(network, numbers);
    for (int i = 0; i < NUM_NUMBERS; i++) {
        if (numbers[i].value < -1 || numbers[i].value > numbers[i].max) {
            return epx__fail(EPX_ERR_INVALID,
                             "config->network->%s is %d; allowed are 0 to %d, "
                             "and -1 for the network library's own",
                             numbers[i].field, numbers[i].value,
                             numbers[i].max);
        }
    }
    if (network->num_lanes == 0) {
        return epx__fail(EPX_ERR_INVALID,
                         "config->network->num_lanes is 0; allowed are 1 to "
                         "16, and -1 for the network library's own");
    }
    return EPX_OK;
}

/* What the config asks of UCX, by UCX's names; texts holds the values. */
static void
list_settings(const epx_network_config_t *network,
              epx__net_setting_t settings[MAX_SETTINGS],
              char texts[NUM_NUMBERS][12])
{
    number_t numbers[NUM_NUMBERS];
    int count = 0;

    list_numbers(network, numbers);
    for (int i = 0; i < NUM_NUMBERS; i++) {
        bool is_switch = strcmp(numbers[i].field, "adaptive_routing") == 0;

        if (numbers[i].value < 0) {
            continue;
        }
        (void)snprintf(texts[i], sizeof(texts[i]), "%d", numbers[i].value);
        for (int n = 0; n < 2 && numbers[i].names[n] != NULL; n++) {
            settings[count++] = (epx__net_setting_t){
                numbers[i].names[n],
                is_switch ? (numbers[i].value != 0 ? "y" : "n") : texts[i]
            };
        }
    }
    settings[count] = (epx__net_setting_t){ NULL, NULL };
}

/* Where the net's work is done; what is told here is only noted. */
static void
peer_is_lost(void *context, int32_t rank, epx_status_t status, const char *text)
{
    if (!epx__is_masked(context, rank)) {
        epx__group_end(context, epx__fail(status, "%s", text));
    }
}

static void
peer_has_failed(void *context, int32_t rank, uint32_t epoch,
                const epx__error_t *error, bool has_aborted)
{
    epx__far_fail(context, rank, epoch, error, has_aborted);
}

static bool
peer_has_pledged(void *context, int32_t rank, const epx__pledge_t *pledge)
{
    return epx__far_hear(context, rank, pledge);
}

static void
remote_step_begin(void *context, uint64_t step)
{
    epx__net_step_begin(context, step);
}

static epx_status_t
remote_signal(void *context, int32_t peer, uint64_t step, epx__gate_t gate,
              epx__payload_t payload, const void *from, size_t bytes)
{
    return epx__net_signal(context, peer, step, gate, payload, from, bytes,
                           payload != EPX__PAYLOAD_NONE);
}

static void
remote_help(void *context)
{
    (void)epx__net_help(context);
}

static void
remote_help_end(void *context)
{
    epx__net_help_end(context);
}

static void
remote_leave(void *context)
{
    epx__net_leave(context);
}

static bool
remote_attend(void *context)
{
    return epx__net_attend(context);
}

static void
remote_tell(void *context, uint32_t epoch, const epx__error_t *error,
            bool has_aborted)
{
    epx__net_tell(context, epoch, error, has_aborted);
}

static void
remote_wake(void *context)
{
    epx__net_interrupt(context);
}

static bool
remote_has_left(void *context, int32_t rank)
{
    return epx__net_has_left(context, rank);
}

static bool
remote_is_gone(void *context, int32_t rank, uint64_t grace_ns)
{
    return epx__net_is_gone(context, rank, grace_ns);
}

static bool
remote_pledge(void *context, int32_t rank, const epx__pledge_t *pledge)
{
    return epx__net_pledge(context, rank, pledge);
}

static bool
remote_is_told(void *context, int32_t rank)
{
    return epx__net_is_pledged(context, rank);
}

static void
remote_close(void *context)
{
    epx__net_close(context);
}

static const epx__remote_t by_net = {
    .step_begin = remote_step_begin,
    .signal = remote_signal,
    .help = remote_help,
    .help_end = remote_help_end,
    .leave = remote_leave,
    .attend = remote_attend,
    .tell = remote_tell,
    .wake = remote_wake,
    .has_left = remote_has_left,
    .is_gone = remote_is_gone,
    .pledge = remote_pledge,
    .is_told = remote_is_told,
    .close = remote_close,
};

epx_status_t
epx__group_join_nodes(epx_group_t *group, const epx_bootstrap_t *bootstrap,
                      const epx_network_config_t *network)
{
    char texts[NUM_NUMBERS][12];
    epx__net_setting_t settings[MAX_SETTINGS];
    epx__net_config_t config = {
        .rank = group->rank,
        .num_ranks = group->num_ranks,
        .hosts = group->nodes.node_of,
        .group_id = { group->job_id[0], group->job_id[1] },
        .allgather = bootstrap->allgather,
        .allgather_context = bootstrap->context,
        .map = &group->map,
        .segment = group->net_control != NULL ? group->net_control
                                              : epx__group_segment(group),
        .num_channels = EPX__GROUP_CHANNELS,
        .card_net = group->card_net,
        .gpudirect = network->gpudirect,
        .timeout_ns = group->timeout_ns,
        .beat_ns = group->lost_after_ns / EPX__BEATS,
        .lost_after_ns = group->lost_after_ns,
        .spin_ns = group->spin_ns,
        .core = network->core,
        .lost = peer_is_lost,
        .failed = peer_has_failed,
        .pledged = peer_has_pledged,
        .lost_context = group,
        .backend = &epx__net_ucx,
        .device = network->device,
        .transports = network->transports,
        .wire = (epx__net_wire_t)find_wire(network->wire),
        .settings = settings,
    };
    epx__net_t *net;
    epx_status_t status;

    list_settings(network, settings, texts);
    status = epx__net_open(&net, &config);
    if (status == EPX_OK) {
        group->remote = by_net;
        group->remote.context = net;
        epx__store_u32(&group->has_remote, 1);
        if (epx__group_is_broken(group)) {
            epx__net_interrupt(net); /* which nobody else has done yet */
        }
    }
    return status;
}
