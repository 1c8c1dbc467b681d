/* SPDX-License-Identifier: MIT */
/* How ranks meet: each tells all others how to reach it, and either all go on
 * or none does. */
#include "core/atomic.h"
#include "net/net_internal.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

static const char *const wire_names[] = { "messages", "puts" };

/* What the peer says of itself, before anything of it is used. */
static epx_status_t
check_card(const epx__net_t *net, const epx__net_card_t *own,
           const epx__net_card_t *card, int32_t rank)
{
    if (card->magic != own->magic || card->rank != rank ||
        memcmp(card->group_id, own->group_id, sizeof(card->group_id)) != 0 ||
        card->address_bytes > sizeof(card->address)) {
        return epx__fail(EPX_ERR_PEER_DATA,
                         "rank %d does not say how to reach it in the way that "
                         "rank %d does: another version or another group",
                         rank, net->config.rank);
    }
    if (memcmp(card->backend, own->backend, sizeof(own->backend)) != 0 ||
        card->num_channels != own->num_channels ||
        card->num_card_channels != own->num_card_channels ||
        card->count_row_bytes != own->count_row_bytes) {
        return epx__fail(
            EPX_ERR_MISMATCH,
            "rank %d uses %.16s with %" PRIu32 " channels, %" PRIu32
            " of them for cards, rank %d %.16s with %" PRIu32 " and %" PRIu32,
            net->config.rank, own->backend, own->num_channels,
            own->num_card_channels, rank, card->backend, card->num_channels,
            card->num_card_channels);
    }
    if (card->wire != own->wire) {
        return epx__fail(EPX_ERR_MISMATCH,
                         "rank %d moves bytes by %s, rank %d by %s: their "
                         "devices differ, or their EPX_NET_WIRE",
                         net->config.rank,
                         wire_names[own->wire == EPX__NET_WIRE_RMA], rank,
                         wire_names[card->wire == EPX__NET_WIRE_RMA]);
    }
    return EPX_OK;
}

/* All ranks see the same cards, and so none goes on when one cannot. */
static epx_status_t
check_statuses(const epx__net_t *net, const epx__net_card_t *cards)
{
    for (int32_t rank = 0; rank < net->config.num_ranks; rank++) {
        if (cards[rank].status != EPX_OK) {
            return epx__fail(
                EPX_ERR_PEER_LOST,
                "rank %d cannot take part in the network: %s", rank,
                epx_status_string((epx_status_t)cards[rank].status));
        }
    }
    return EPX_OK;
}

static epx_status_t
connect_all(epx__net_t *net, const epx__net_card_t *cards)
{
    const epx__net_card_t *own = &cards[net->config.rank];
    epx_status_t status = EPX_OK;

    for (int32_t rank = 0; rank < net->config.num_ranks && status == EPX_OK;
         rank++) {
        epx__net_peer_t *peer = &net->peers[rank];

        status = check_card(net, own, &cards[rank], rank);
        if (status != EPX_OK || peer->state == EPX__PEER_NONE) {
            continue;
        }
        peer->beat.address = cards[rank].beat_address;
        memcpy(peer->beat.token, cards[rank].beat_token,
               sizeof(peer->beat.token));
        status = net->backend->connect(net->state, rank, cards[rank].address,
                                       cards[rank].address_bytes);
        if (status == EPX_OK && net->puts != NULL) {
            status = epx__net_boxes_reach(net, rank, &cards[rank].boxes);
        }
    }
    return status;
}

/* All ranks, or none: nobody waits for one that has failed. */
static epx_status_t
agree(epx__net_t *net, const epx__net_config_t *config, epx_status_t status,
      int64_t deadline_ns)
{
    const int32_t own = status;
    epx__error_t error;
    epx_status_t gathered;

    epx__error_save(&error, status);
    gathered = config->allgather(config->allgather_context, &own, net->statuses,
                                 sizeof(own), deadline_ns);
    if (status != EPX_OK) {
        return epx__error_restore(&error);
    }
    for (int32_t rank = 0; gathered == EPX_OK && rank < config->num_ranks;
         rank++) {
        if (net->statuses[rank] != EPX_OK) {
            return epx__fail(
                EPX_ERR_PEER_LOST, "rank %d cannot reach its peers: %s", rank,
                epx_status_string((epx_status_t)net->statuses[rank]));
        }
    }
    return gathered;
}

epx_status_t
epx__net_meet(epx__net_t *net, const epx__net_config_t *config,
              int64_t deadline_ns)
{
    size_t num_ranks = (size_t)config->num_ranks;
    epx__net_card_t *cards = calloc(num_ranks + 1, sizeof(*cards));
    epx__net_card_t *own = cards == NULL ? NULL : &cards[num_ranks];
    epx__error_t error = { .status = EPX_OK };
    epx_status_t status;

    net->statuses = calloc(num_ranks, sizeof(*net->statuses));
    if (cards == NULL || net->statuses == NULL) {
        status = epx__fail(EPX_ERR_NO_MEMORY, "no memory for %zu addresses",
                           num_ranks);
        goto free_cards;
    }
    *own = (epx__net_card_t){
        .magic = EPX__NET_MAGIC | (uint64_t)EPX__NET_VERSION << 32,
        .group_id = { config->group_id[0], config->group_id[1] },
        .rank = config->rank,
        .num_channels = config->num_channels,
        .num_card_channels = config->card_net.num_channels,
        .count_row_bytes = config->map->count_row_bytes
    };
    (void)strncpy(own->backend, net->backend->name, sizeof(own->backend) - 1);
    own->status = epx__net_open_alone(net, own);
    epx__error_save(&error, own->status);
    status = config->allgather(config->allgather_context, own, cards,
                               sizeof(*own), deadline_ns);
    if (error.status != EPX_OK) {
        status = epx__error_restore(&error);
    } else if (status == EPX_OK) {
        status = check_statuses(net, cards);
        if (status == EPX_OK) {
            status = connect_all(net, cards);
            status = agree(net, config, status, deadline_ns);
        }
    }
free_cards:
    free(cards);
    return status;
}

static bool
is_settled(epx__net_t *net)
{
    bool is_over;

    epx__net_crank_take(net);
    is_over = net->backend->settle(net->state);
    epx__net_crank_leave(net);
    return is_over;
}

static epx_status_t
check_peers(epx__net_t *net)
{
    for (int32_t rank = 0; rank < net->config.num_ranks; rank++) {
        epx_status_t status = epx__net_peer_status(net, rank);

        if (status != EPX_OK) {
            return status;
        }
    }
    return EPX_OK;
}

epx_status_t
epx__net_settle(epx__net_t *net, const epx__net_config_t *config,
                epx_status_t status, int64_t deadline_ns)
{
    while (status == EPX_OK && !is_settled(net)) {
        const struct timespec nap = { 0, 50000 };

        status = check_peers(net);
        if (status == EPX_OK && epx__now_ns() >= deadline_ns) {
            status = epx__fail(EPX_ERR_TIMEOUT,
                               "rank %d is not connected to all other hosts in "
                               "time",
                               config->rank);
        }
        if (config->is_manual) {
            (void)epx__net_progress(net, epx__now_ns());
        }
        (void)nanosleep(&nap, NULL);
    }
    return agree(net, config, status, deadline_ns);
}
