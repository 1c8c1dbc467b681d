/* SPDX-License-Identifier: MIT */
#include "core/thread.h"
#include "net/net_internal.h"

#include <errno.h>
#include <inttypes.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

/* This rank's place among those of its host, and how many they are. */
static int32_t
place_on_host(const epx__net_config_t *config, int32_t rank, int32_t *count_p)
{
    int32_t place = 0;

    *count_p = 1; /* the rank itself */
    for (int32_t r = 0; r < config->num_ranks; r++) {
        if (r != rank && config->hosts != NULL &&
            config->hosts[r] == config->hosts[rank]) {
            place += r < rank;
            *count_p += 1;
        }
    }
    return place;
}

/* Each rank has one partner on each other host, and a host with more ranks
 * several to one: so every rank is watched from every host. */
static bool
is_partner(const epx__net_config_t *config, int32_t rank)
{
    int32_t own_count, count;
    int32_t own_place = place_on_host(config, config->rank, &own_count);
    int32_t place = place_on_host(config, rank, &count);

    return own_count >= count ? own_place % count == place
                              : place % own_count == own_place;
}

static epx_status_t
check_config(const epx__net_config_t *config)
{
    if (config->num_ranks < 1 || config->num_ranks > EPX_MAX_RANKS ||
        config->rank < 0 || config->rank >= config->num_ranks) {
        return epx__fail(EPX_ERR_INVALID,
                         "rank %d of %d; there are at most %d ranks",
                         config->rank, config->num_ranks, EPX_MAX_RANKS);
    }
    if (config->lost_after_ns == 0 ||
        config->lost_after_ns > (uint64_t)INT64_MAX / 2 ||
        config->beat_ns > config->lost_after_ns / 2) {
        return epx__fail(EPX_ERR_INVALID,
                         "a peer cannot be lost after %" PRIu64 " ns of "
                         "silence with a heartbeat every %" PRIu64
                         " ns; it must be at least two of them",
                         config->lost_after_ns, config->beat_ns);
    }
    return EPX_OK;
}

static epx_status_t
make_peer(epx__net_t *net, int32_t rank)
{
    epx__net_peer_t *peer = &net->peers[rank];

    peer->slots = calloc(net->config.num_channels + 1, sizeof(*peer->slots));
    peer->rings = calloc(2, sizeof(*peer->rings));
    peer->outgoing = calloc(EPX__NET_WINDOW, sizeof(*peer->outgoing));
    peer->landings = calloc(EPX__NET_WINDOW, sizeof(*peer->landings));
    if (peer->slots == NULL || peer->rings == NULL || peer->outgoing == NULL ||
        peer->landings == NULL) {
        return epx__fail(EPX_ERR_NO_MEMORY, "no memory for a link to rank %d",
                         rank);
    }
    if (net->puts != NULL) {
        size_t num_halves = 2 * (size_t)net->config.num_channels;

        peer->puts = calloc(EPX__NET_WINDOW + 1, sizeof(*peer->puts));
        peer->slots_there = calloc(num_halves, sizeof(*peer->slots_there));
        peer->lent = calloc(num_halves, sizeof(*peer->lent));
    }
    if (net->puts != NULL && (peer->puts == NULL || peer->slots_there == NULL ||
                              peer->lent == NULL)) {
        return epx__fail(EPX_ERR_NO_MEMORY, "no memory for puts to rank %d",
                         rank);
    }
    epx__net_ring_init(&peer->rings[0]);
    epx__net_ring_init(&peer->rings[1]);
    peer->next_sent = 1;
    peer->next_acked = 1;
    peer->next_received = 1;
    peer->state = EPX__PEER_UP;
    peer->beat.is_partner =
        net->config.beat_ns > 0 && is_partner(&net->config, rank);
    return EPX_OK;
}

static epx_status_t
make_peers(epx__net_t *net)
{
    size_t num_ranks = (size_t)net->config.num_ranks;
    epx_status_t status = EPX_OK;

    net->peers = calloc(num_ranks, sizeof(*net->peers));
    net->ready = calloc(num_ranks / 64 + 1, sizeof(*net->ready));
    if (net->peers == NULL || net->ready == NULL) {
        return epx__fail(EPX_ERR_NO_MEMORY, "no memory for %zu peers",
                         num_ranks);
    }
    for (int32_t rank = 0; rank < net->config.num_ranks; rank++) {
        net->peers[rank].beat.fd = -1;
    }
    for (int32_t rank = 0; rank < net->config.num_ranks && status == EPX_OK;
         rank++) {
        if (epx__net_is_apart(&net->config, net->config.rank, rank)) {
            status = make_peer(net, rank);
        }
    }
    return status;
}

static epx_status_t
watch(epx__net_t *net, int fd)
{
    struct epoll_event event = { .events = EPOLLIN };

    if (fd >= 0 && epoll_ctl(net->epoll_fd, EPOLL_CTL_ADD, fd, &event) != 0) {
        return epx__fail(EPX_ERR_SYSTEM, "cannot watch a descriptor: %m");
    }
    return EPX_OK;
}

static epx_status_t
make_descriptors(epx__net_t *net)
{
    net->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    net->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (net->epoll_fd < 0 || net->wake_fd < 0) {
        return epx__fail(EPX_ERR_SYSTEM, "no descriptor for the network: %m");
    }
    return watch(net, net->wake_fd);
}

/* net->config.wire becomes the one that is used, and so do its pieces. */
static epx_status_t
choose_wire(epx__net_t *net)
{
    epx__net_config_t *config = &net->config;
    const epx__net_puts_t *puts = config->backend->puts;

    if (config->wire == EPX__NET_WIRE_RMA && puts == NULL) {
        return epx__fail(EPX_ERR_UNSUPPORTED,
                         "the network %s has no second wire",
                         config->backend->name);
    }
    if (config->wire == EPX__NET_WIRE_AUTO) {
        config->wire = puts != NULL && puts->are_native(config)
                           ? EPX__NET_WIRE_RMA
                           : EPX__NET_WIRE_AM;
    }
    net->puts = config->wire == EPX__NET_WIRE_RMA ? puts : NULL;
    net->piece_bytes = config->backend->piece_bytes != NULL
                           ? config->backend->piece_bytes(config)
                           : EPX__NET_PIECE_BYTES;
    return EPX_OK;
}

/* Whether the network can be let at this rank's card; the backend is open. */
static bool
may_reach_card(const epx__net_t *net, const char **why_p)
{
    const epx__net_config_t *config = &net->config;

    if (!config->card_net.orders_puts) {
        *why_p = "the card does not order what others write to it";
        return false;
    }
    if (net->puts == NULL) {
        *why_p = "the host copies active messages; puts it does not: "
                 "EPX_NET_WIRE=rma";
        return false;
    }
    return net->puts->reaches_card(net->state, config, config->gpudirect < 0,
                                   why_p);
}

/* That it says it can is not all: it may have no room for the memory. */
static bool
can_share_card(const epx__net_t *net, const char **why_p)
{
    const epx__net_config_t *config = &net->config;
    epx__net_note_t note = { 0 };
    void *share;

    if (net->puts->share(net->state, config->card_net.block,
                         config->card_net.block_bytes, true, &note,
                         &share) != EPX_OK) {
        *why_p = epx_last_error();
        return false;
    }
    net->puts->unshare(net->state, share);
    return true;
}

static epx_status_t
look_for_card(epx__net_t *net)
{
    const epx__net_config_t *config = &net->config;
    const char *why = "";
    char text[256];

    if (config->gpudirect == 0 || config->card_net.num_channels == 0) {
        return EPX_OK;
    }
    net->reaches_card = may_reach_card(net, &why) && can_share_card(net, &why);
    if (net->reaches_card || config->gpudirect < 0) {
        return EPX_OK;
    }
    (void)snprintf(text, sizeof(text), "%s", why);
    return epx__fail(EPX_ERR_UNSUPPORTED,
                     "the network cannot be let at the memory of rank %d's "
                     "card (gpudirect is 1): %s",
                     config->rank, text);
}

bool
epx__net_reaches_card(const epx__net_t *net)
{
    return net->reaches_card;
}

epx_status_t
epx__net_open_alone(epx__net_t *net, epx__net_card_t *card)
{
    const epx__net_config_t *config = &net->config;
    size_t address_bytes = 0;
    epx_status_t status = check_config(config);

    if (status == EPX_OK) {
        status = choose_wire(net);
    }
    if (status == EPX_OK) {
        status = make_peers(net);
    }
    if (status == EPX_OK) {
        status = make_descriptors(net);
    }
    if (status == EPX_OK) {
        status = net->backend->open(net, config, &net->state, card->address,
                                    &address_bytes, &net->backend_fd);
    }
    if (status == EPX_OK) {
        status = look_for_card(net);
    }
    if (status == EPX_OK) {
        status = watch(net, net->backend_fd);
    }
    if (status == EPX_OK && net->puts != NULL) {
        status = epx__net_boxes_open(net, &card->boxes);
    }
    if (status == EPX_OK && config->beat_ns > 0) {
        status = epx__net_beats_open(net);
    }
    card->address_bytes = (uint32_t)address_bytes;
    card->wire = config->wire;
    card->beat_address = net->beats.address;
    memcpy(card->beat_token, net->beats.token, sizeof(card->beat_token));
    return status;
}

static void
pin(epx__net_t *net)
{
    cpu_set_t cores;

    CPU_ZERO(&cores);
    if (net->config.core >= 0 && net->config.core < CPU_SETSIZE) {
        CPU_SET(net->config.core, &cores);
        if (pthread_setaffinity_np(net->thread, sizeof(cores), &cores) != 0) {
            epx__log(EPX__LOG_WARN,
                     "the network's thread cannot be pinned to core %d",
                     net->config.core);
        }
    }
}

static void
release(epx__net_t *net)
{
    if (net->state != NULL) {
        net->backend->close(net->state);
    }
    epx__net_beats_close(net);
    epx__net_boxes_close(net);
    for (int32_t rank = 0; net->peers != NULL && rank < net->config.num_ranks;
         rank++) {
        epx__net_peer_t *peer = &net->peers[rank];

        free(peer->slots);
        free(peer->rings);
        free(peer->outgoing);
        free(peer->landings);
    }
    if (net->wake_fd >= 0) {
        (void)close(net->wake_fd);
    }
    if (net->epoll_fd >= 0) {
        (void)close(net->epoll_fd);
    }
    free(net->ready);
    free(net->statuses);
    free(net->peers);
    free(net);
}

/* The thread delivers what there is until then. */
static void
stop(epx__net_t *net, int64_t close_by_ns)
{
    net->close_by_ns = close_by_ns;
    epx__store_u32(&net->closing, 1);
    if (net->has_thread) {
        epx__net_mark(net, net->config.rank);
        (void)pthread_join(net->thread, NULL);
    }
}

static epx__net_t *
new_net(const epx__net_config_t *config)
{
    epx__net_t *net = calloc(1, sizeof(*net));

    if (net == NULL) {
        return NULL;
    }
    net->config = *config;
    net->group = config->group_id[0] ^
                 (config->group_id[1] << 32 | config->group_id[1] >> 32);
    net->map = *config->map;
    net->backend = config->backend;
    net->epoll_fd = -1;
    net->wake_fd = -1;
    net->backend_fd = -1;
    net->beats.listener = -1;
    for (int i = 0; i < EPX__NET_STRANGERS; i++) {
        net->beats.strangers[i].fd = -1;
    }
    return net;
}

epx_status_t
epx__net_open(epx__net_t **net_p, const epx__net_config_t *config)
{
    int64_t deadline = epx__deadline_ns(config->timeout_ns);
    epx__net_t *net;
    epx_status_t status;

    *net_p = NULL;
    /* Before ranks that are threads part ways: see there. */
    if (config->backend->prepare != NULL) {
        config->backend->prepare();
    }
    net = new_net(config);
    if (net == NULL) {
        return epx__fail(EPX_ERR_NO_MEMORY, "no memory for the network");
    }
    status = epx__net_meet(net, config, deadline);
    if (status != EPX_OK) {
        goto fail;
    }
    net->tick_ns = (int64_t)(config->beat_ns > 0 ? config->beat_ns / 2
                                                 : config->lost_after_ns / 8) +
                   1;
    net->last_tick_ns = epx__now_ns();
    if (config->beat_ns > 0) {
        epx__net_beats_connect(net);
    }
    if (!config->is_manual) {
        status = epx__thread_start(&net->thread, epx__net_thread_main, net,
                                   "the network's thread");
        net->has_thread = status == EPX_OK;
    }
    if (net->has_thread) {
        pin(net);
    }
    if (net->backend->settle != NULL) {
        status = epx__net_settle(net, config, status, deadline);
    }
    if (status != EPX_OK) {
        goto fail;
    }
    *net_p = net;
    return EPX_OK;

fail:
    stop(net, 0);
    release(net);
    return status;
}

void
epx__net_close(epx__net_t *net)
{
    bool has_failed;

    if (net == NULL) {
        return;
    }
    /* Then there is nothing more to deliver than that. */
    has_failed = epx__load_u32(&net->is_interrupted) != 0;
    stop(net, epx__deadline_ns(has_failed ? 2 * net->config.beat_ns
                                          : net->config.timeout_ns));
    release(net);
}

void
epx__net_stats_get(epx__net_t *net, epx__net_stats_t *stats)
{
    const uint64_t *from = (const uint64_t *)&net->stats;
    uint64_t *to = (uint64_t *)stats;

    for (size_t i = 0; i < sizeof(*stats) / sizeof(*to); i++) {
        to[i] = __atomic_load_n(&from[i], __ATOMIC_RELAXED);
    }
}
