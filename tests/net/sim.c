/* SPDX-License-Identifier: MIT */
#include "sim.h"
#include "sim_card.h"

#include "core/clock.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

typedef enum what {
    COMES,   /* a message reaches a rank */
    LANDS,   /* its bytes do */
    IS_SENT, /* the sender gets its message back */
    IS_PUT,  /* bytes get into a peer's memory, behind its back */
    FLUSHES, /* all that was put before has */
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
    bool is_bundle;
    bool is_cancelled;
    uint64_t bytes;
    epx__net_put_t *put;
    uint64_t number; /* of puts and flushes of this rank */
    uint64_t address;
    const char *from;
    bool is_from_card;
    unsigned char payload[];
} item_t;

/* Memory that peers may put to. */
typedef struct share {
    struct share *next;
    uint64_t address;
    uint64_t bytes;
} share_t;

typedef struct node {
    sim_t *sim;
    epx__net_t *net;
    int32_t rank;
    int fd;
    int64_t now_ns;
    item_t *items;     /* by due_ns */
    bool *is_linked;   /* [num_ranks] */
    uint64_t *counter; /* [num_ranks] messages to each */
    uint64_t num_puts;
    share_t *shares;
    uint64_t num_shared; /* ever */
    bool is_cut;
    bool *is_parted; /* [num_ranks] from each */
} node_t;

struct sim {
    pthread_mutex_t mutex;
    int32_t num_ranks;
    uint64_t seed;
    sim_faults_t faults;
    uint64_t num_lost, num_repeated;
    uint64_t num_messages;
    sim_tamper_fn_t *tamper;
    void *tamper_context;
    node_t *nodes;
};

static sim_t *used;

void
sim_use(sim_t *sim)
{
    used = sim;
    sim_card_use(sim != NULL);
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
        node->is_parted = calloc((size_t)num_ranks, sizeof(bool));
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
        while (node->shares != NULL) {
            share_t *share = node->shares;

            node->shares = share->next;
            free(share);
        }
        (void)close(node->fd);
        free(node->is_linked);
        free(node->is_parted);
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
sim_part(sim_t *sim, int32_t a, int32_t b, bool is_parted)
{
    (void)pthread_mutex_lock(&sim->mutex);
    sim->nodes[a].is_parted[b] = is_parted;
    sim->nodes[b].is_parted[a] = is_parted;
    (void)pthread_mutex_unlock(&sim->mutex);
}

/* With the mutex held. */
static bool
is_cut_from(const node_t *node, int32_t peer)
{
    return node->is_cut || node->sim->nodes[peer].is_cut ||
           node->is_parted[peer];
}

void
sim_counts(sim_t *sim, uint64_t *lost_p, uint64_t *repeated_p)
{
    (void)pthread_mutex_lock(&sim->mutex);
    *lost_p = sim->num_lost;
    *repeated_p = sim->num_repeated;
    (void)pthread_mutex_unlock(&sim->mutex);
}

int
sim_num_shares(sim_t *sim, int32_t rank)
{
    int count = 0;

    (void)pthread_mutex_lock(&sim->mutex);
    for (const share_t *share = sim->nodes[rank].shares; share != NULL;
         share = share->next) {
        count++;
    }
    (void)pthread_mutex_unlock(&sim->mutex);
    return count;
}

void
sim_tamper(sim_t *sim, sim_tamper_fn_t *fn, void *context)
{
    sim->tamper = fn;
    sim->tamper_context = context;
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

/* All that follows the first header. */
static uint64_t
bundle_bytes(const epx__net_message_t *message)
{
    uint64_t bytes = message->header.bytes;

    while ((message = message->next) != NULL) {
        bytes += sizeof(message->header) + message->header.bytes;
    }
    return bytes;
}

/* The header, and the payload to `at`; returns where that ends. */
static unsigned char *
pack(const node_t *from, const epx__net_message_t *message,
     epx__net_header_t *header, unsigned char *at)
{
    const sim_t *sim = from->sim;
    unsigned char *end = at;

    for (uint32_t i = 0; i < message->num_ranges; i++) {
        memcpy(end, message->ranges[i].iov_base, message->ranges[i].iov_len);
        end += message->ranges[i].iov_len;
    }
    *header = message->header;
    if (sim->tamper != NULL) {
        sim->tamper(sim->tamper_context, from->rank, header, at);
    }
    return end;
}

/* One of the copies of a bundle that reach the peer. */
static void
emit(node_t *from, int32_t rank, const epx__net_message_t *message,
     uint64_t *state)
{
    sim_t *sim = from->sim;
    node_t *to = &sim->nodes[rank];
    item_t *item = new_item(COMES, from->rank, from->now_ns + delay(sim, state),
                            bundle_bytes(message));
    unsigned char *at = item->payload;
    const uint64_t one = 1;

    item->is_bundle = message->next != NULL;
    at = pack(from, message, &item->header, at);
    while ((message = message->next) != NULL) {
        epx__net_header_t header;
        unsigned char *next = pack(from, message, &header, at + sizeof(header));

        memcpy(at, &header, sizeof(header));
        at = next;
    }
    item->is_slow = happens(state, sim->faults.slow_per_mille);
    if (happens(state, sim->faults.lost_per_mille)) {
        item->due_ns += sim->faults.retransmit_ns;
        sim->num_lost++;
    }
    insert(to, item);
    (void)!write(to->fd, &one, sizeof(one));
}

/* To the sender, all of a bundle. */
static void
give_back(const node_t *node, int32_t rank, epx__net_message_t *message)
{
    while (message != NULL) {
        epx__net_message_t *next = message->next;

        epx__net_sent(node->net, rank, message);
        message = next;
    }
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
        give_back(node, rank, message);
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

static int64_t
landing_ns(const sim_t *sim)
{
    return sim->faults.landing_ns > 0 ? sim->faults.landing_ns
                                      : sim->faults.max_delay_ns / 2;
}

/* Returns whether the item is over. */
static bool
come(node_t *node, item_t *item)
{
    sim_t *sim = node->sim;
    bool is_cut;

    (void)pthread_mutex_lock(&sim->mutex);
    is_cut = is_cut_from(node, item->peer);
    (void)pthread_mutex_unlock(&sim->mutex);
    if (is_cut) {
        put_back(node, item, node->now_ns + EPX__NS_PER_MS);
        return false;
    }
    if (!node->is_linked[item->peer]) {
        return true;
    }
    if (item->is_bundle || !item->is_slow) {
        epx__net_came_whole(node->net, item->peer, &item->header,
                            sizeof(item->header), item->payload, item->bytes);
        return true;
    }
    item->landing = epx__net_came(node->net, item->peer, &item->header,
                                  sizeof(item->header), item->bytes, &item->to);
    if (item->landing == EPX__NET_DROP) {
        return true;
    }
    item->what = LANDS;
    put_back(node, item, node->now_ns + landing_ns(sim));
    return false;
}

/* --- Puts -------------------------------------------------------------- */

/* Whether the peer has lent the bytes; locked. */
static bool
is_lent(const node_t *to, uint64_t address, uint64_t bytes)
{
    for (const share_t *share = to->shares; share != NULL;
         share = share->next) {
        if (address >= share->address &&
            address - share->address <= share->bytes &&
            bytes <= share->bytes - (address - share->address)) {
            return true;
        }
    }
    return false;
}

static void
write_there(uint64_t address, const char *from, uint64_t bytes,
            bool is_from_card)
{
    char *to = (char *)(uintptr_t)address;

    if (sim_card_put(address, from, bytes, is_from_card)) {
        return;
    }
    if (bytes == sizeof(uint64_t)) { /* words land whole */
        uint64_t word;

        memcpy(&word, from, sizeof(word));
        __atomic_store_n((uint64_t *)(void *)to, word, __ATOMIC_RELEASE);
    } else {
        memcpy(to, from, bytes);
    }
}

/* As a network card does it: the peer's threads are not asked. */
static bool
come_to_put(node_t *node, item_t *item)
{
    sim_t *sim = node->sim;
    node_t *to = &sim->nodes[item->peer];
    uint64_t bytes = item->is_slow ? item->bytes / 2 : item->bytes;
    bool is_linked, is_cut, ok;

    (void)pthread_mutex_lock(&sim->mutex);
    is_cut = is_cut_from(node, item->peer);
    is_linked = node->is_linked[item->peer] && to->is_linked[node->rank];
    ok = is_linked && !item->is_cancelled &&
         is_lent(to, item->address, item->bytes);
    if (ok && !is_cut) {
        write_there(item->address, item->from, bytes, item->is_from_card);
    }
    (void)pthread_mutex_unlock(&sim->mutex);
    if (ok && (is_cut || item->is_slow)) {
        if (!is_cut) { /* the rest comes later */
            item->address += bytes;
            item->from += bytes;
            item->bytes -= bytes;
            item->is_slow = false;
        }
        put_back(node, item,
                 node->now_ns + sim->faults.max_delay_ns / 2 +
                     (is_cut ? EPX__NS_PER_MS : 0));
        return false;
    }
    epx__net_put_ended(item->put, ok);
    return true;
}

static bool
come_to_flush(node_t *node, item_t *item)
{
    bool is_behind = false;

    (void)pthread_mutex_lock(&node->sim->mutex);
    for (const item_t *at = node->items; at != NULL; at = at->next) {
        is_behind =
            is_behind || (at->what == IS_PUT && at->peer == item->peer &&
                          at->number < item->number);
    }
    (void)pthread_mutex_unlock(&node->sim->mutex);
    if (is_behind && !item->is_cancelled) {
        put_back(node, item, node->now_ns + EPX__NS_PER_MS / 50);
        return false;
    }
    epx__net_put_ended(item->put, !item->is_cancelled);
    return true;
}

static void
sim_start(node_t *node, item_t *item, epx__net_put_t *put)
{
    sim_t *sim = node->sim;
    uint64_t state;

    (void)pthread_mutex_lock(&sim->mutex);
    item->put = put;
    item->number = node->num_puts++;
    state =
        mix(sim->seed ^ mix((uint64_t)node->rank << 32) ^ mix(item->number));
    item->due_ns = node->now_ns + delay(sim, &state);
    item->is_cancelled = !node->is_linked[item->peer];
    if (item->what == IS_PUT) {
        /* In two parts, but for words. */
        item->is_slow = item->bytes > sizeof(uint64_t) &&
                        happens(&state, sim->faults.slow_per_mille);
        if (happens(&state, sim->faults.lost_per_mille)) {
            item->due_ns += sim->faults.retransmit_ns;
            sim->num_lost++;
        }
        sim->num_messages++;
        if (sim->num_messages == sim->faults.cut_at) {
            sim->nodes[sim->faults.cut_rank].is_cut = true;
        }
        if (sim->num_messages == sim->faults.vanishes_at) {
            item->due_ns = INT64_MAX; /* until it is cancelled */
        }
    }
    insert(node, item);
    (void)pthread_mutex_unlock(&sim->mutex);
}

static void
sim_put(void *argument, int32_t rank, void *reach, uint64_t address,
        const struct iovec *range, bool is_on_card, epx__net_put_t *put)
{
    item_t *item = new_item(IS_PUT, rank, 0, 0);

    (void)reach;
    sim_card_check(range->iov_base, is_on_card);
    item->is_from_card = is_on_card;
    item->address = address;
    item->from = range->iov_base;
    item->bytes = range->iov_len;
    sim_start(argument, item, put);
}

static void
sim_flush(void *argument, int32_t rank, epx__net_put_t *put)
{
    sim_start(argument, new_item(FLUSHES, rank, 0, 0), put);
}

static bool
sim_are_native(const epx__net_config_t *config)
{
    (void)config;
    return false; /* only when asked for */
}

static bool
sim_reaches_card(void *argument, const epx__net_config_t *config, bool is_short,
                 const char **why_p)
{
    (void)argument;
    (void)config;
    (void)is_short;
    (void)why_p;
    return true;
}

static epx_status_t
sim_share(void *argument, void *memory, uint64_t bytes, bool is_on_card,
          epx__net_note_t *note, void **share_p)
{
    node_t *node = argument;
    share_t *share;

    sim_card_check(memory, is_on_card);
    if (++node->num_shared == node->sim->faults.unshared_at) {
        return epx__fail(EPX_ERR_SYSTEM, "the memory cannot be shared");
    }
    share = calloc(1, sizeof(*share));
    *share = (share_t){ node->shares, (uint64_t)(uintptr_t)memory, bytes };
    note->address = share->address;
    note->bytes = bytes;
    note->key_bytes = sizeof(bytes);
    memcpy(note->key, &bytes, sizeof(bytes));
    (void)pthread_mutex_lock(&node->sim->mutex);
    node->shares = share;
    (void)pthread_mutex_unlock(&node->sim->mutex);
    *share_p = share;
    return EPX_OK;
}

static void
sim_unshare(void *argument, void *share)
{
    node_t *node = argument;
    share_t **at = &node->shares;

    (void)pthread_mutex_lock(&node->sim->mutex);
    while (*at != share) {
        at = &(*at)->next;
    }
    *at = (*at)->next;
    (void)pthread_mutex_unlock(&node->sim->mutex);
    free(share);
}

/* The key of memory is its size. */
static void *
sim_reach(void *argument, int32_t rank, const epx__net_note_t *note, void *old)
{
    node_t *node = argument;

    (void)old;
    return note->key_bytes == sizeof(note->bytes) &&
                   memcmp(note->key, &note->bytes, sizeof(note->bytes)) == 0
               ? &node->sim->nodes[rank]
               : NULL;
}

static const epx__net_puts_t sim_puts = {
    .are_native = sim_are_native,
    .reaches_card = sim_reaches_card,
    .share = sim_share,
    .unshare = sim_unshare,
    .reach = sim_reach,
    .put = sim_put,
    .flush = sim_flush,
};

/* ----------------------------------------------------------------------- */

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
            give_back(node, item->peer, item->message);
        } else if (item->what == IS_PUT) {
            is_over = come_to_put(node, item);
        } else if (item->what == FLUSHES) {
            is_over = come_to_flush(node, item);
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
    (void)pthread_mutex_lock(&node->sim->mutex);
    node->is_linked[rank] = true;
    (void)pthread_mutex_unlock(&node->sim->mutex);
    return EPX_OK;
}

static void
sim_cancel_peer(void *argument, int32_t rank)
{
    node_t *node = argument;

    item_t *items;

    (void)pthread_mutex_lock(&node->sim->mutex);
    node->is_linked[rank] = false;
    items = node->items;
    node->items = NULL;
    while (items != NULL) {
        item_t *item = items;

        items = item->next;
        item->is_cancelled = item->is_cancelled || item->peer == rank;
        if (item->is_cancelled && item->due_ns == INT64_MAX) {
            item->due_ns = node->now_ns;
        }
        insert(node, item);
    }
    (void)pthread_mutex_unlock(&node->sim->mutex);
}

static void
sim_close(void *argument)
{
    node_t *node = argument;

    (void)pthread_mutex_lock(&node->sim->mutex);
    for (int32_t rank = 0; rank < node->sim->num_ranks; rank++) {
        node->is_linked[rank] = false;
    }
    (void)pthread_mutex_unlock(&node->sim->mutex);
}

const epx__net_backend_t sim_backend = {
    .name = "sim",
    .open = sim_open,
    .connect = sim_connect,
    .post = sim_post,
    .poll = sim_poll,
    .cancel_peer = sim_cancel_peer,
    .close = sim_close,
    .puts = &sim_puts,
};
