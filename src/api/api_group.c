/* SPDX-License-Identifier: MIT */
/*
 * Making a group, in three allgathers:
 *     1. who everybody is, and whether this rank can take part (hello)
 *     2. how to reach everybody's segment (card)
 *     3. whether everybody has reached everybody
 * and, with several nodes, two more by which the net joins them.
 * A rank that fails takes part to the end of the allgather at hand, so that all
 * ranks end at once and know whose fault it was.
 */
#include "api/api_args.h"
#include "core/atomic.h"
#include "core/clock.h"
#include "core/env.h"
#include "core/listener.h"
#include "core/lost.h"
#include "core/mask.h"
#include "core/watch.h"
#include "engine/engine.h"
#include "fabric/fabric.h"
#include "net/net_group.h"

#include <inttypes.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#define DEFAULT_HEAP_BYTES  (UINT64_C(1) << 30)
#define MAX_HEAP_BYTES      (UINT64_C(1) << 46)
#define DEFAULT_MAX_EXPERTS 1024
#define MAX_MAX_EXPERTS     (1 << 20)
#define MAX_WORKERS         1024
#define DEFAULT_TIMEOUT_NS  (30 * (uint64_t)EPX__NS_PER_SEC)
#define MIN_TIMEOUT_NS      ((uint64_t)EPX__NS_PER_MS)
#define DEFAULT_LOST_NS     ((uint64_t)EPX__NS_PER_SEC)
#define MIN_LOST_NS         (EPX__BEATS * (uint64_t)EPX__NS_PER_MS)
#define MAX_NODE            INT32_MAX

/* What went wrong on a rank, as its peers are told. */
typedef struct verdict {
    int32_t status;
    char text[252];
} verdict_t;

typedef struct hello {
    verdict_t verdict;
    uint32_t version;
    uint32_t device;
    uint32_t max_experts;
    uint32_t num_ranks;
    uint64_t lost_after_ns;
    uint64_t nonce[2]; /* rank 0's names the job */
    epx__fabric_place_t place;
} hello_t;

typedef struct card {
    verdict_t verdict;
    epx__fabric_card_t segment;
    epx__fabric_card_t control; /* where group->controls has a fabric */
} card_t;

/* What the steps of epx_group_create share. */
typedef struct birth {
    epx_group_config_t config;
    const epx_bootstrap_t *bootstrap;
    epx_bootstrap_t *owned; /* made here; NULL otherwise */
    int64_t deadline_ns;
    epx_network_config_t network;
    const epx__engine_ops_t *engine;
    epx__fabric_place_t *places; /* [R], once all have met */
    epx_group_t *group;
} birth_t;

static void
set_verdict(verdict_t *verdict, epx_status_t status)
{
    verdict->status = status;
    (void)snprintf(verdict->text, sizeof(verdict->text), "%s",
                   status == EPX_OK ? "" : epx_last_error());
}

/* Gather `bytes` of everybody; each element starts with a verdict_t.  Fails on
 * every rank alike if one rank's verdict is an error. */
static epx_status_t
gather(const birth_t *birth, const void *own, void *all, size_t bytes)
{
    const epx_bootstrap_t *bootstrap = birth->bootstrap;
    const verdict_t *verdict = own;
    epx_status_t status;

    epx__error_clear();
    status = bootstrap->allgather(bootstrap->context, own, all, bytes,
                                  birth->deadline_ns);
    if (status != EPX_OK) {
        /* A caller's own allgather may not have said why. */
        return epx_last_error()[0] != '\0'
                   ? status
                   : epx__fail(status, "the bootstrap's allgather failed: %s",
                               epx_status_string(status));
    }
    /* Our own failure has its sentence here already. */
    if (verdict->status != EPX_OK) {
        return epx__fail((epx_status_t)verdict->status, "%s", verdict->text);
    }
    for (int32_t rank = 0; rank < bootstrap->num_ranks; rank++) {
        verdict = (const verdict_t *)(const void *)((const char *)all +
                                                    (size_t)rank * bytes);
        if (verdict->status != EPX_OK) {
            return epx__fail((epx_status_t)verdict->status,
                             "rank %d cannot join the group: %.*s", rank,
                             (int)sizeof(verdict->text) - 1, verdict->text);
        }
    }
    return EPX_OK;
}

static epx_status_t
check_range(const char *name, uint64_t value, uint64_t min, uint64_t max)
{
    return value >= min && value <= max
               ? EPX_OK
               : epx__fail(EPX_ERR_INVALID,
                           "config->%s is %" PRIu64 "; allowed are %" PRIu64
                           " to %" PRIu64 ", and 0 for the default",
                           name, value, min, max);
}

/* Check the fields that concern this rank alone, and fill in defaults. */
static epx_status_t
complete_config(epx_group_config_t *config)
{
    epx_status_t status;

    config->heap_bytes =
        config->heap_bytes == 0 ? DEFAULT_HEAP_BYTES : config->heap_bytes;
    config->max_experts =
        config->max_experts == 0 ? DEFAULT_MAX_EXPERTS : config->max_experts;
    config->timeout_ns =
        config->timeout_ns == 0 ? DEFAULT_TIMEOUT_NS : config->timeout_ns;
    config->lost_after_ns =
        config->lost_after_ns == 0 ? DEFAULT_LOST_NS : config->lost_after_ns;
    status = check_range("heap_bytes", config->heap_bytes, EPX__PAGE,
                         MAX_HEAP_BYTES);
    if (status == EPX_OK) {
        status = check_range("timeout_ns", config->timeout_ns, MIN_TIMEOUT_NS,
                             INT64_MAX);
    }
    if (status == EPX_OK) {
        status = check_range("lost_after_ns", config->lost_after_ns,
                             MIN_LOST_NS, INT64_MAX);
    }
    if (status == EPX_OK &&
        (config->max_experts < 0 || config->max_experts > MAX_MAX_EXPERTS)) {
        status = epx__fail(EPX_ERR_INVALID,
                           "config->max_experts is %d; allowed are 1 to %d, "
                           "and 0 for the default",
                           config->max_experts, MAX_MAX_EXPERTS);
    }
    if (status == EPX_OK &&
        (config->num_workers < 0 || config->num_workers > MAX_WORKERS)) {
        status = epx__fail(EPX_ERR_INVALID,
                           "config->num_workers is %d; allowed are 1 to %d, "
                           "and 0 for the default",
                           config->num_workers, MAX_WORKERS);
    }
    return status;
}

/* What the config leaves to the environment. */
static epx_status_t
choose_node(epx_group_config_t *config)
{
    const char *text = config->node == 0 ? epx__env_string("EPX_NODE") : NULL;
    uint64_t node = (uint64_t)config->node;
    epx_status_t status = EPX_OK;

    if (config->node < 0) {
        return epx__fail(EPX_ERR_INVALID,
                         "config->node is %d; allowed are 0 to %d",
                         config->node, MAX_NODE);
    }
    if (text != NULL) {
        status = epx__parse_uint("EPX_NODE", text, 0, MAX_NODE, &node);
    }
    config->node = (int32_t)node;
    return status;
}

static epx_status_t
complete_network(birth_t *birth)
{
    const epx_network_config_t *given = birth->config.network;
    epx_status_t status = EPX_OK;

    birth->network = (epx_network_config_t)EPX_NETWORK_CONFIG_INIT;
    if (given != NULL) {
        status = epx__args_copy(&birth->network, sizeof(birth->network), given,
                                EPX__BYTES_THROUGH(epx_network_config_t, core),
                                "config->network");
    }
    return status == EPX_OK ? epx__network_complete(&birth->network) : status;
}

static epx_status_t
check_bootstrap(const epx_bootstrap_t *bootstrap)
{
    size_t least = EPX__BYTES_THROUGH(epx_bootstrap_t, context);

    if (bootstrap->size < least) {
        return epx__fail(EPX_ERR_INVALID,
                         "bootstrap->size is %zu; it must be at least %zu "
                         "(start from EPX_BOOTSTRAP_INIT)",
                         bootstrap->size, least);
    }
    if (bootstrap->allgather == NULL) {
        return epx__fail(EPX_ERR_NULL, "bootstrap->allgather is null");
    }
    if (bootstrap->num_ranks < 1 || bootstrap->num_ranks > EPX_MAX_RANKS) {
        return epx__fail(EPX_ERR_INVALID,
                         "bootstrap->num_ranks is %d; allowed are 1 to %d",
                         bootstrap->num_ranks, EPX_MAX_RANKS);
    }
    if (bootstrap->rank < 0 || bootstrap->rank >= bootstrap->num_ranks) {
        return epx__fail(EPX_ERR_INVALID,
                         "bootstrap->rank is %d; allowed are 0 to %d",
                         bootstrap->rank, bootstrap->num_ranks - 1);
    }
    return EPX_OK;
}

static epx_group_t *
group_new(const birth_t *birth)
{
    epx_group_t *group = calloc(1, sizeof(*group));
    epx__peer_t *peers =
        calloc((size_t)birth->bootstrap->num_ranks, sizeof(*peers));

    if (group == NULL || peers == NULL) {
        free(peers);
        free(group);
        return NULL;
    }
    group->reach.peers = peers;
    group->peers = peers;
    group->rank = birth->bootstrap->rank;
    group->num_ranks = birth->bootstrap->num_ranks;
    group->max_experts = birth->config.max_experts;
    group->device = birth->config.device;
    group->device_ordinal = birth->config.device_ordinal;
    group->engine = birth->engine;
    group->timeout_ns = birth->config.timeout_ns;
    group->lost_after_ns = birth->config.lost_after_ns;
    (void)pthread_mutex_init(&group->op_lock, NULL);
    (void)pthread_mutex_init(&group->state_lock, NULL);
    return group;
}

static void
group_free(epx_group_t *group)
{
    if (group == NULL) {
        return;
    }
    /* In this order: the watch may still be telling of a failure, and until
     * then this rank beats, as long as its device may need. */
    if (group->engine_state != NULL && group->engine->leave != NULL) {
        group->engine->leave(group);
    }
    epx__watch_close(group);
    epx__listener_close(group);
    epx__lost_leave(group);
    if (group->remote.close != NULL) {
        group->remote.close(group->remote.context);
    }
    epx__mask_close(group);
    if (group->engine_state != NULL) {
        group->engine->close(group);
    }
    if (group->heap.blocks != NULL) {
        epx__heap_close(&group->heap);
    }
    if (group->controls.fabric != NULL) {
        group->controls.fabric->close(group, &group->controls);
        free(group->controls.peers);
    }
    if (group->reach.fabric != NULL) {
        group->reach.fabric->close(group, &group->reach);
    }
    (void)pthread_mutex_destroy(&group->state_lock);
    (void)pthread_mutex_destroy(&group->op_lock);
    epx__nodes_close(&group->nodes);
    free(group->peers);
    free(group);
}

static epx_status_t
compare_hellos(const hello_t *hellos, int32_t num_ranks)
{
    for (int32_t rank = 0; rank < num_ranks; rank++) {
        const struct {
            const char *name;
            uint64_t theirs, first;
        } fields[] = {
            { "num_ranks", hellos[rank].num_ranks, (uint32_t)num_ranks },
            { "the library version", hellos[rank].version, hellos[0].version },
            { "device", hellos[rank].device, hellos[0].device },
            { "max_experts", hellos[rank].max_experts, hellos[0].max_experts },
            { "lost_after_ns", hellos[rank].lost_after_ns,
              hellos[0].lost_after_ns },
        };

        for (size_t i = 0; i < sizeof(fields) / sizeof(*fields); i++) {
            if (fields[i].theirs != fields[i].first) {
                return epx__fail(
                    EPX_ERR_MISMATCH,
                    "the ranks disagree on the group: %s is "
                    "%" PRIu64 " on rank %d and %" PRIu64 " on rank 0",
                    fields[i].name, fields[i].theirs, rank, fields[i].first);
            }
        }
    }
    return EPX_OK;
}

/* Where hosts reach one another's vitals: in the segments themselves if those
 * are theirs.  Without a fabric for the others this rank's peers are only
 * late. */
static epx_status_t
choose_controls(const birth_t *birth, const int32_t *node_of)
{
    static const epx__fabric_ops_t *const fabrics[] = { &epx__fabric_thread,
                                                        &epx__fabric_shm,
                                                        NULL };
    epx_group_t *group = birth->group;
    const epx__fabric_ops_t *fabric;

    if (group->device == EPX_DEVICE_CPU) {
        group->controls.peers = group->peers;
        return EPX_OK;
    }
    fabric =
        epx__fabric_find(fabrics, birth->places, node_of, group->num_ranks);
    if (fabric == NULL) {
        return EPX_OK;
    }
    group->controls.peers =
        calloc((size_t)group->num_ranks, sizeof(*group->controls.peers));
    if (group->controls.peers == NULL) {
        return epx__fail(EPX_ERR_NO_MEMORY, "no memory for %d ranks",
                         group->num_ranks);
    }
    group->controls.purpose = EPX__FOR_THE_HOST;
    group->controls.fabric = fabric;
    return EPX_OK;
}

/* Which ranks share a node, and the fabric that joins them. */
static epx_status_t
choose_fabric(const birth_t *birth)
{
    epx_group_t *group = birth->group;
    const epx__engine_ops_t *engine = birth->engine;
    int32_t *node_of = calloc((size_t)group->num_ranks, sizeof(*node_of));
    epx_status_t status;

    if (node_of == NULL) {
        return epx__fail(EPX_ERR_NO_MEMORY, "no memory for %d ranks",
                         group->num_ranks);
    }
    if (engine->spans_nodes) {
        epx__fabric_nodes(engine->fabrics, birth->places, group->num_ranks,
                          node_of);
    }
    status = epx__fabric_choose(engine->fabrics, birth->places, node_of,
                                group->num_ranks, &group->reach.fabric);
    if (status == EPX_OK) {
        status = epx__nodes_open(&group->nodes, group->rank, group->num_ranks,
                                 node_of);
    }
    if (status == EPX_OK) {
        status = choose_controls(birth, node_of);
    }
    free(node_of);
    return status;
}

/* 1: tell and learn who everybody is. */
static epx_status_t
meet(birth_t *birth, epx_status_t own_status)
{
    const epx_bootstrap_t *bootstrap = birth->bootstrap;
    hello_t hello = {
        .version = EPX_VERSION_MAJOR << 16 | EPX_VERSION_MINOR,
        .device = birth->config.device,
        .max_experts = (uint32_t)birth->config.max_experts,
        .num_ranks = (uint32_t)bootstrap->num_ranks,
        .lost_after_ns = birth->config.lost_after_ns,
    };
    hello_t *hellos = calloc((size_t)bootstrap->num_ranks, sizeof(*hellos));
    epx__fabric_place_t *places =
        calloc((size_t)bootstrap->num_ranks, sizeof(*places));
    epx_status_t status = own_status;

    birth->places = places;
    if (hellos == NULL || places == NULL) {
        status = epx__fail(EPX_ERR_NO_MEMORY, "no memory for %d ranks",
                           bootstrap->num_ranks);
        goto out; /* nothing to gather into: peers time out, naming us */
    }
    if (status == EPX_OK) {
        status = epx__fabric_place(&hello.place);
    }
    if (status == EPX_OK) {
        status = birth->engine->place(&birth->config, &hello.place);
    }
    hello.place.node = (uint32_t)birth->config.node;
    if (status == EPX_OK && getrandom(hello.nonce, sizeof(hello.nonce), 0) !=
                                (ssize_t)sizeof(hello.nonce)) {
        status = epx__fail(EPX_ERR_SYSTEM, "no random bytes: %m");
    }
    set_verdict(&hello.verdict, status);
    status = gather(birth, &hello, hellos, sizeof(hello));
    if (status == EPX_OK) {
        status = compare_hellos(hellos, bootstrap->num_ranks);
    }
    for (int32_t rank = 0; rank < bootstrap->num_ranks; rank++) {
        places[rank] = hellos[rank].place;
    }
    /* Without a group no gather succeeds, which not every reader can see. */
    if (status == EPX_OK && birth->group != NULL) {
        memcpy(birth->group->job_id, hellos[0].nonce, sizeof(hello.nonce));
        status = choose_fabric(birth);
    }
out:
    free(hellos);
    return status;
}

/* Watch those peers of this node that are other processes. */
static epx_status_t
open_watch(const birth_t *birth)
{
    epx_group_t *group = birth->group;
    const epx__fabric_place_t *own = &birth->places[group->rank];
    epx__watch_peer_t *peers = calloc((size_t)group->num_ranks, sizeof(*peers));
    int32_t count = 0;
    epx_status_t status = EPX_OK;

    if (peers == NULL) {
        return epx__fail(EPX_ERR_NO_MEMORY, "no memory for %d ranks",
                         group->num_ranks);
    }
    for (int32_t rank = 0; rank < group->num_ranks; rank++) {
        const epx__fabric_place_t *place = &birth->places[rank];

        if (epx__is_near(&group->nodes, rank) &&
            !epx__fabric_same_process(own, place)) {
            peers[count++] = (epx__watch_peer_t){
                rank, place->pid_ns == own->pid_ns ? (int32_t)place->pid : 0
            };
        }
    }
    if (count > 0 && epx__lost_vitals(group, group->rank) != NULL) {
        status = epx__watch_open(group, peers, count);
    }
    free(peers);
    return status;
}

/* Settle the workers, and make this rank's segment with its heap. */
static epx_status_t
open_segment(const birth_t *birth, card_t *card)
{
    epx_group_t *group = birth->group;
    uint64_t heap = epx__round_up(birth->config.heap_bytes, EPX__HEAP_ALIGN);
    uint64_t bytes;
    epx_status_t status;

    group->map =
        epx__map_make((uint32_t)group->num_ranks, (uint32_t)group->max_experts);
    bytes = group->map.heap + heap;
    status = group->engine->choose_workers(group, birth->places);
    if (status == EPX_OK) {
        status = group->reach.fabric->open(group, &group->reach, bytes,
                                           &card->segment);
    }
    if (status == EPX_OK && group->controls.fabric != NULL) {
        status = group->controls.fabric->open(
            group, &group->controls, epx__map_control_bytes(&group->map),
            &card->control);
    }
    if (status == EPX_OK) {
        status = epx__heap_open(&group->heap, epx__group_segment(group),
                                group->map.heap, bytes);
    }
    return status == EPX_OK ? open_watch(birth) : status;
}

static epx_status_t
connect_segments(const birth_t *birth, const card_t *cards)
{
    epx_group_t *group = birth->group;
    size_t num_ranks = (size_t)group->num_ranks;
    epx__fabric_card_t *fabric_cards = calloc(num_ranks, sizeof(*fabric_cards));
    epx__error_t error;
    epx_status_t status;

    if (fabric_cards == NULL) {
        return epx__fail(EPX_ERR_NO_MEMORY, "no memory for %d ranks",
                         group->num_ranks);
    }
    for (size_t rank = 0; rank < num_ranks; rank++) {
        fabric_cards[rank] = cards[rank].segment;
    }
    status = group->reach.fabric->connect(group, &group->reach, fabric_cards,
                                          birth->deadline_ns);
    epx__error_save(&error, status);
    for (size_t rank = 0; rank < num_ranks; rank++) {
        fabric_cards[rank] = cards[rank].control;
    }
    /* After a failure, too: the others wait for this rank in it. */
    if (group->controls.fabric != NULL) {
        status = group->controls.fabric->connect(
            group, &group->controls, fabric_cards, birth->deadline_ns);
    }
    if (error.status != EPX_OK) {
        status = epx__error_restore(&error);
    }
    free(fabric_cards);
    return status;
}

/* All segments are there. */
static epx_status_t
open_joined(epx_group_t *group)
{
    epx_status_t status = epx__mask_open(group);

    epx__store_u32(&group->is_joined, 1);
    if (status == EPX_OK && group->controls.fabric != NULL) {
        status = epx__listener_open(group);
    }
    return status == EPX_OK ? group->engine->open(group) : status;
}

/* 2 and 3: reach everybody's segment, and make sure that all have. */
static epx_status_t
join_segments(const birth_t *birth)
{
    epx_group_t *group = birth->group;
    size_t num_ranks = (size_t)group->num_ranks;
    card_t own = { 0 };
    card_t *cards = calloc(num_ranks, sizeof(*cards));
    verdict_t *verdicts = calloc(num_ranks, sizeof(*verdicts));
    verdict_t verdict = { 0 };
    epx_status_t status;

    if (cards == NULL || verdicts == NULL) {
        status = epx__fail(EPX_ERR_NO_MEMORY, "no memory for %d ranks",
                           group->num_ranks);
        goto out;
    }
    set_verdict(&own.verdict, open_segment(birth, &own));
    status = gather(birth, &own, cards, sizeof(own));
    if (status != EPX_OK) {
        goto out;
    }
    status = connect_segments(birth, cards);
    if (status != EPX_OK && epx__group_is_broken(group)) {
        goto out; /* a peer has died, and would be missed in the gather, too */
    }
    if (status == EPX_OK) {
        status = open_joined(group);
    }
    set_verdict(&verdict, status);
    status = gather(birth, &verdict, verdicts, sizeof(verdict));
    if (status == EPX_OK && group->nodes.num_nodes > 1) {
        status =
            epx__group_join_nodes(group, birth->bootstrap, &birth->network);
    }
out:
    free(verdicts);
    free(cards);
    return status;
}

/* With a bootstrap in hand, everything else. */
static epx_status_t
group_join(birth_t *birth, epx_status_t config_status)
{
    epx_status_t status = check_bootstrap(birth->bootstrap);

    if (status != EPX_OK) {
        return status;
    }
    birth->group = group_new(birth);
    if (birth->group == NULL) {
        config_status = epx__fail(EPX_ERR_NO_MEMORY, "no memory for a group");
    }
    status = meet(birth, config_status);
    return status == EPX_OK ? join_segments(birth) : status;
}

epx_status_t
epx_group_create(const epx_group_config_t *config, epx_group_t **group_p)
{
    birth_t birth = { 0 };
    epx_status_t status, config_status;

    if (group_p == NULL) {
        return epx__fail(EPX_ERR_NULL, "group_p is null");
    }
    status =
        epx__args_copy(&birth.config, sizeof(birth.config), config,
                       EPX__BYTES_THROUGH(epx_group_config_t, node), "config");
    if (status != EPX_OK) {
        return status;
    }
    config_status = epx__log_check();
    if (config_status == EPX_OK) {
        config_status = epx__engine_find(birth.config.device, &birth.engine);
    }
    if (config_status == EPX_OK) {
        config_status = complete_config(&birth.config);
    }
    if (config_status == EPX_OK) {
        config_status = choose_node(&birth.config);
    }
    if (config_status == EPX_OK) {
        config_status = complete_network(&birth);
    }
    if (config_status != EPX_OK) {
        birth.config.timeout_ns = DEFAULT_TIMEOUT_NS; /* to tell the others */
    }
    birth.bootstrap = birth.config.bootstrap;
    if (birth.bootstrap == NULL) {
        status =
            epx_bootstrap_env_create(birth.config.timeout_ns, &birth.owned);
        birth.bootstrap = birth.owned;
    }
    if (status == EPX_OK) {
        birth.deadline_ns = epx__deadline_ns(birth.config.timeout_ns);
        status = group_join(&birth, config_status);
    }
    epx_bootstrap_destroy(birth.owned);
    free(birth.places);
    if (status != EPX_OK) {
        group_free(birth.group);
        return status;
    }
    epx__log(EPX__LOG_INFO,
             "rank %d of %d, node %d of %d: engine %s (%s), fabric %s, %d "
             "workers, heap of %" PRIu64 " bytes",
             birth.group->rank, birth.group->num_ranks, birth.group->nodes.own,
             birth.group->nodes.num_nodes, birth.group->engine->name,
             birth.group->engine->isa(), birth.group->reach.fabric->name,
             birth.group->num_workers,
             birth.group->heap.end - birth.group->heap.begin);
    *group_p = birth.group;
    return EPX_OK;
}

epx_status_t
epx_group_destroy(epx_group_t *group)
{
    int32_t num_plans, num_queues;

    if (group == NULL) {
        return EPX_OK;
    }
    (void)pthread_mutex_lock(&group->state_lock);
    num_plans = group->num_plans;
    num_queues = group->num_queues;
    (void)pthread_mutex_unlock(&group->state_lock);
    if (num_plans > 0 || num_queues > 0) {
        return epx__fail(EPX_ERR_STATE,
                         "the group still has %d plans and %d queues; destroy "
                         "them first",
                         num_plans, num_queues);
    }
    group_free(group);
    return EPX_OK;
}

epx_status_t
epx_group_abort(epx_group_t *group)
{
    epx__error_t error;
    uint32_t epoch;

    if (group == NULL) {
        return epx__fail(EPX_ERR_NULL, "group is null");
    }
    epx__error_save(
        &error,
        epx__fail(EPX_ERR_ABORTED, "rank %d aborted the group", group->rank));
    epx__lost_abort(group);
    /* An epoch that begins this moment may not have seen that. */
    do {
        epoch = epx__load_u32(&group->epoch);
        epx__group_end_epoch(group, epoch, epx__error_restore(&error));
    } while (epx__load_u32(&group->epoch) != epoch);
    if (group->roll != NULL) {
        /* Peers that this rank has joined begin the next one without it. */
        epx__group_wait_for_tellers(group);
        epx__lost_tell(group, epoch + 1, &error);
    }
    if (epx__load_u32(&group->has_remote) != 0) {
        group->remote.tell(group->remote.context, epoch, &error, true);
    }
    return EPX_OK;
}

epx_status_t
epx_group_status(const epx_group_t *group)
{
    /* The lock is not part of what const promises. */
    epx_group_t *shared = (epx_group_t *)(uintptr_t)group;
    epx__error_t broken;

    if (group == NULL) {
        return epx__fail(EPX_ERR_NULL, "group is null");
    }
    if (group->engine->check != NULL) {
        (void)group->engine->check(shared); /* its error breaks the group */
    }
    (void)epx__group_is_broken(shared);
    (void)pthread_mutex_lock(&shared->state_lock);
    broken = shared->broken;
    (void)pthread_mutex_unlock(&shared->state_lock);
    if (epx__mask_holds(group, group->rank)) {
        return epx__mask_refuse(group);
    }
    return broken.status == EPX_OK ? EPX_OK : epx__error_restore(&broken);
}

epx_status_t
epx_group_query(const epx_group_t *group, epx_group_info_t *info)
{
    epx_group_t *shared = (epx_group_t *)(uintptr_t)group;
    epx_group_info_t now = EPX_GROUP_INFO_INIT;

    if (group == NULL) {
        return epx__fail(EPX_ERR_NULL, "group is null");
    }
    now.rank = group->rank;
    now.num_ranks = group->num_ranks;
    now.num_workers = group->num_workers;
    now.max_experts = group->max_experts;
    now.engine = group->engine->name;
    now.fabric = group->reach.fabric->name;
    now.num_nodes = group->nodes.num_nodes;
    now.node = group->nodes.own;
    now.heap_bytes = group->heap.end - group->heap.begin;
    epx__heap_usage(&shared->heap, &now.heap_free_bytes,
                    &now.heap_largest_free_bytes);
    if (group->engine->idle_bytes != NULL) {
        now.heap_free_bytes += group->engine->idle_bytes(group);
    }
    return epx__args_return(info, &now, sizeof(now),
                            EPX__BYTES_THROUGH(epx_group_info_t, node), "info");
}
