/* SPDX-License-Identifier: MIT */
#include "sim.h"

#include "core/clock.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

typedef enum what {
    COMES,  /* a message reaches a rank */
    LANDS,  /* its bytes do */
    IS_SENT /* the sender gets its message back */
} what_t;

/* Something that happens to a rank at some time. */
typedef struct item {
    struct item *next;
    int64_t due_ns;
    what_t what;
    int32_t peer; /* the other end */
    epx__net_message_t *message;
    epx__net_header_t header;
    uint64_t landing;
    void *to;
    bool is_slow;
    bool is_cancelled;
    uint64_t bytes;
    unsigned char payload[];
} item_t;

typedef struct node {
    sim_t *sim;
    epx__net_t *net;
    int32_t rank;
    int fd;
    int64_t now_ns;
    item_t *items;     /* by due_ns */
    bool *is_linked;   /* [num_ranks] */
    uint64_t *counter; /* [num_ranks] messages to each */
    bool is_cut;
} node_t;

struct sim {
    pthread_mutex_t mutex;
    int32_t num_ranks;
    uint64_t seed;
    sim_faults_t faults;
    uint64_t num_lost, num_repeated;
    uint64_t num_messages;
    node_t *nodes;
};

static sim_t *used;

void
sim_use(sim_t *sim)
{
    used = sim;
}

static uint64_t
mix(uint64_t x)
{
    x += UINT64_C(0x9e3779b97f4a7c15);
    x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
    return x ^ x >> 31;
}

static uint64_t
draw(uint64_t *state)
{
    return *state = mix(*state);
}

static bool
happens(uint64_t *state, uint32_t per_mille)
{
    return draw(state) % 1000 < per_mille;
}

sim_t *
sim_create(int32_t num_ranks, uint64_t seed, const sim_faults_t *faults)
{
    sim_t *sim = calloc(1, sizeof(*sim));

    (void)pthread_mutex_init(&sim->mutex, NULL);
    sim->num_ranks = num_ranks;
    sim->seed = seed;
    sim->faults = *faults;
    sim->nodes = calloc((size_t)num_ranks, sizeof(*sim->nodes));
    for (int32_t rank = 0; rank < num_ranks; rank++) {
        node_t *node = &sim->nodes[rank];

        node->sim = sim;
        node->rank = rank;
        node->fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        node->is_linked = calloc((size_t)num_ranks, sizeof(bool));
        node->counter = calloc((size_t)num_ranks, sizeof(uint64_t));
    }
    return sim;
}

void
sim_destroy(sim_t *sim)
{
    for (int32_t rank = 0; rank < sim->num_ranks; rank++) {
        node_t *node = &sim->nodes[rank];

        while (node->items != NULL) {
            item_t *item = node->items;

            node->items = item->next;
            free(item);
        }
        (void)close(node->fd);
        free(node->is_linked);
        free(node->counter);
    }
    (void)pthread_mutex_destroy(&sim->mutex);
    free(sim->nodes);
    free(sim);
}

void
sim_cut(sim_t *sim, int32_t rank, bool is_cut)
{
    (void)pthread_mutex_lock(&sim->mutex);
    sim->nodes[rank].is_cut = is_cut;
    (void)pthread_mutex_unlock(&sim->mutex);
}

void
sim_counts(sim_t *sim, uint64_t *lost_p, uint64_t *repeated_p)
{
    (void)pthread_mutex_lock(&sim->mutex);
    *lost_p = sim->num_lost;
    *repeated_p = sim->num_repeated;
    (void)pthread_mutex_unlock(&sim->mutex);
}

/* Behind those of the same time. */
static void
insert(node_t *node, item_t *item)
{
    item_t **at = &node->items;

    while (*at != NULL && (*at)->due_ns <= item->due_ns) {
        at = &(*at)->next;
    }
    item->next = *at;
    *at = item;
}

static item_t *
new_item(what_t what, int32_t peer, int64_t due_ns, uint64_t bytes)
{
    item_t *item = calloc(1, sizeof(*item) + bytes);

    item->what = what;
    item->peer = peer;
    item->due_ns = due_ns;
    item->bytes = bytes;
    return item;
}

static int64_t
delay(const sim_t *sim, uint64_t *state)
{
    return sim->faults.max_delay_ns > 0
               ? (int64_t)(draw(state) % (uint64_t)sim->faults.max_delay_ns)
               : 0;
}

/* One of the copies of a message that reach the peer. */
static void
emit(node_t *from, int32_t rank, const epx__net_message_t *message,
     uint64_t *state)
{
    sim_t *sim = from->sim;
    node_t *to = &sim->nodes[rank];
    item_t *item = new_item(COMES, from->rank, from->now_ns + delay(sim, state),
                            message->header.bytes);
    unsigned char *at = item->payload;
    const uint64_t one = 1;

    for (uint32_t i = 0; i < message->num_ranges; i++) {
        memcpy(at, message->ranges[i].iov_base, message->ranges[i].iov_len);
        at += message->ranges[i].iov_len;
    }
    item->header = message->header;
    item->is_slow = happens(state, sim->faults.slow_per_mille);
    if (happens(state, sim->faults.lost_per_mille)) {
        item->due_ns += sim->faults.retransmit_ns;
        sim->num_lost++;
    }
    insert(to, item);
    (void)!write(to->fd, &one, sizeof(one));
}

static void
sim_post(void *argument, int32_t rank, epx__net_message_t *message)
{
    node_t *node = argument;
    sim_t *sim = node->sim;
    uint64_t state;
    bool is_back;

    (void)pthread_mutex_lock(&sim->mutex);
    state = mix(sim->seed ^ mix((uint64_t)node->rank << 32 | (uint32_t)rank) ^
                mix(node->counter[rank]++));
    is_back = happens(&state, 500);
    sim->num_messages++;
    if (sim->num_messages == sim->faults.cut_at) {
        sim->nodes[sim->faults.cut_rank].is_cut = true;
    }
    if (node->is_linked[rank] && sim->num_messages != sim->faults.vanishes_at) {
        emit(node, rank, message, &state);
        if (happens(&state, sim->faults.repeated_per_mille)) {
            emit(node, rank, message, &state);
            sim->num_repeated++;
        }
    }
    if (!is_back) {
        item_t *item =
            new_item(IS_SENT, rank, node->now_ns + delay(sim, &state), 0);

        item->message = message;
        insert(node, item);
    }
    (void)pthread_mutex_unlock(&sim->mutex);
    if (is_back) {
        epx__net_sent(node->net, rank, message);
    }
}

/* The next item that is due, or NULL. */
static item_t *
take(node_t *node, int64_t *wake_ns_p)
{
    item_t *item;

    (void)pthread_mutex_lock(&node->sim->mutex);
    item = node->items;
    if (item != NULL && item->due_ns > node->now_ns) {
        *wake_ns_p = item->due_ns < *wake_ns_p ? item->due_ns : *wake_ns_p;
        item = NULL;
    }
    if (item != NULL) {
        node->items = item->next;
    }
    (void)pthread_mutex_unlock(&node->sim->mutex);
    return item;
}

static void
put_back(node_t *node, item_t *item, int64_t due_ns)
{
    item->due_ns = due_ns;
    (void)pthread_mutex_lock(&node->sim->mutex);
    insert(node, item);
    (void)pthread_mutex_unlock(&node->sim->mutex);
}

/* Returns whether the item is over. */
static bool
come(node_t *node, item_t *item)
{
    sim_t *sim = node->sim;
    bool is_cut;

    (void)pthread_mutex_lock(&sim->mutex);
    is_cut = node->is_cut || sim->nodes[item->peer].is_cut;
    (void)pthread_mutex_unlock(&sim->mutex);
    if (is_cut) {
        put_back(node, item, node->now_ns + EPX__NS_PER_MS);
        return false;
    }
    if (!node->is_linked[item->peer]) {
        return true;
    }
    item->landing = epx__net_came(node->net, item->peer, &item->header,
                                  sizeof(item->header), item->bytes, &item->to);
    if (item->landing == EPX__NET_DROP) {
        return true;
    }
    if (item->is_slow) {
        item->what = LANDS;
        put_back(node, item, node->now_ns + sim->faults.max_delay_ns / 2);
        return false;
    }
    if (item->bytes > 0) {
        memcpy(item->to, item->payload, item->bytes);
    }
    epx__net_landed(node->net, item->peer, item->landing, true);
    return true;
}

static bool
sim_poll(void *argument, int64_t now_ns, bool may_sleep, int64_t *wake_ns_p)
{
    node_t *node = argument;
    bool any = false;
    uint64_t count;
    item_t *item;

    (void)may_sleep;
    (void)!read(node->fd, &count, sizeof(count));
    node->now_ns = now_ns;
    while ((item = take(node, wake_ns_p)) != NULL) {
        bool is_over = true;

        any = true;
        if (item->what == COMES) {
            is_over = come(node, item);
        } else if (item->what == IS_SENT) {
            epx__net_sent(node->net, item->peer, item->message);
        } else {
            if (item->bytes > 0 && !item->is_cancelled) {
                memcpy(item->to, item->payload, item->bytes);
            }
            epx__net_landed(node->net, item->peer, item->landing,
                            !item->is_cancelled);
        }
        if (is_over) {
            free(item);
        }
    }
    return any;
}

static epx_status_t
sim_open(epx__net_t *net, const epx__net_config_t *config, void **state_p,
         void *address, size_t *address_bytes_p, int *fd_p)
{
    sim_t *sim =
        config->backend_context != NULL ? config->backend_context : used;
    node_t *node = &sim->nodes[config->rank];

    node->net = net;
    *state_p = node;
    *(char *)address = 's';
    *address_bytes_p = 1;
    *fd_p = node->fd;
    return EPX_OK;
}

static epx_status_t
sim_connect(void *argument, int32_t rank, const void *address,
            size_t address_bytes)
{
    node_t *node = argument;

    if (address_bytes != 1 || *(const char *)address != 's') {
        return epx__fail(EPX_ERR_PEER_DATA, "rank %d is no simulation", rank);
    }
    node->is_linked[rank] = true;
    return EPX_OK;
}

static void
sim_cancel_peer(void *argument, int32_t rank)
{
    node_t *node = argument;

    node->is_linked[rank] = false;
    (void)pthread_mutex_lock(&node->sim->mutex);
    for (item_t *item = node->items; item != NULL; item = item->next) {
        item->is_cancelled = item->is_cancelled || item->peer == rank;
    }
    (void)pthread_mutex_unlock(&node->sim->mutex);
}

static void
sim_close(void *argument)
{
    node_t *node = argument;

    for (int32_t rank = 0; rank < node->sim->num_ranks; rank++) {
        node->is_linked[rank] = false;
    }
}

const epx__net_backend_t sim_backend = {
    .name = "sim",
    .open = sim_open,
    .connect = sim_connect,
    .post = sim_post,
    .poll = sim_poll,
    .cancel_peer = sim_cancel_peer,
    .close = sim_close,
};
