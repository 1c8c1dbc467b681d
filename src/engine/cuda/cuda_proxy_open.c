/* SPDX-License-Identifier: MIT */
/* What the proxy needs, and its beginning and end. */
#include "engine/cuda/cuda_proxy.h"

#include "core/atomic.h"
#include "core/clock.h"
#include "core/thread.h"
#include "engine/cuda/cuda_kept.h"
#include "fabric/cuda/cuda_driver.h"

#include <stdlib.h>

static cuda_proxy_t *
proxy_of(const epx_group_t *group)
{
    return cuda_engine(group)->proxy;
}

char *
cuda_proxy_mail(const epx_group_t *group)
{
    return proxy_of(group) == NULL ? NULL : proxy_of(group)->mail;
}

/* Who goes through this rank, and through whom it goes, without masked ranks;
 * and whom its kernels tell what is for all ranks of other nodes. */
static void
find_rails(cuda_proxy_t *proxy, const uint64_t *masked)
{
    const epx_group_t *group = proxy->group;
    const epx__nodes_t *nodes = &group->nodes;
    cuda_nodes_t *view = &cuda_engine(group)->view.nodes;

    proxy->num_forwards = 0;
    view->far_rank = -1;
    for (int32_t i = 0; i < proxy->num_far; i++) {
        int32_t r = proxy->far[i];

        if (epx__has_rank(masked, r)) {
            continue;
        }
        view->far_rank = view->far_rank < 0 ? r : view->far_rank;
        if (epx__rail(nodes, masked, r, nodes->own) == group->rank) {
            proxy->forwards[proxy->num_forwards++] = r;
        }
    }
    if (view->far_rank < 0) {
        view->far_rank = proxy->far[0]; /* the proxy wants to know */
    }
    view->num_forwards = proxy->num_forwards;
    for (int32_t n = 0; n < nodes->num_nodes; n++) {
        if (n != nodes->own) {
            proxy->rails[cuda_far_node(n, nodes->own)] =
                epx__rail(nodes, masked, group->rank, n);
        }
    }
}

static void
find_peers(cuda_proxy_t *proxy)
{
    const epx__nodes_t *nodes = &proxy->group->nodes;

    for (int32_t r = 0; r < proxy->group->num_ranks; r++) {
        if (!epx__is_near(nodes, r)) {
            proxy->far[proxy->num_far++] = r;
        }
    }
    proxy->num_rails = nodes->num_nodes - 1;
    find_rails(proxy, proxy->group->masked);
}

/* Arrays of a size that any of them fits, in one allocation each. */
static bool
open_arrays(cuda_proxy_t *proxy)
{
    size_t ranks = (size_t)proxy->group->num_ranks;
    int32_t *lists = calloc(3 * ranks, sizeof(*lists));
    bool *flags = calloc((size_t)EPX__NUM_SLOTS * 5 * ranks, sizeof(*flags));
    struct iovec *ranges =
        calloc((size_t)EPX__NUM_SLOTS * EPX__NUM_LANES * CUDA_NUM_PARTS * ranks,
               sizeof(*ranges));

    proxy->far = lists;
    proxy->errands[0].is_met = flags;
    proxy->errands[0].ranges[0] = ranges;
    if (lists == NULL || flags == NULL || ranges == NULL) {
        return false;
    }
    proxy->forwards = lists + ranks;
    proxy->rails = lists + 2 * ranks;
    for (int i = 0; i < EPX__NUM_SLOTS; i++) {
        cuda_errand_t *errand = &proxy->errands[i];

        errand->is_met = flags;
        flags += ranks;
        for (int lane = 0; lane < EPX__NUM_LANES; lane++) {
            errand->has_sent[lane] = flags;
            errand->has_come[lane] = flags + ranks;
            errand->ranges[lane] = ranges;
            flags += 2 * ranks;
            ranges += CUDA_NUM_PARTS * ranks;
        }
    }
    return true;
}

static epx_status_t
open_memory(cuda_proxy_t *proxy)
{
    size_t bytes = proxy->group->map.heap;
    cudaError_t error =
        cuda_kept_take(CUDA_KEPT_PINNED, sizeof(*proxy->relay),
                       sizeof(*proxy->relay), (void **)&proxy->relay);

    if (error == cudaSuccess) {
        error = cuda_kept_take(CUDA_KEPT_PINNED, bytes, bytes,
                               (void **)&proxy->mail);
    }
    if (error != cudaSuccess) {
        return epx__cuda_fail(error, "no pinned memory for other nodes");
    }
    proxy->group->net_control = calloc(1, bytes);
    return proxy->group->net_control != NULL
               ? EPX_OK
               : epx__fail(EPX_ERR_NO_MEMORY, "no memory for other nodes");
}

/* What a net tries whether it can be let at the card with. */
#define TRIAL_BYTES ((size_t)1 << 21)

/* What the network writes to the card, and then tells the host of, a kernel may
 * not see at once.  Some cards keep that order, but not where the host's memory
 * is reached by another way than the card's; so they are asked, if they can be.
 */
static epx_status_t
open_card_net(cuda_proxy_t *proxy)
{
    epx_group_t *group = proxy->group;
    epx__card_net_t *net = &group->card_net;
    CUdevice card;
    CUresult result =
        epx__cuda_driver()->device_get(&card, group->device_ordinal);

    if (result != CUDA_SUCCESS) {
        return epx__cuda_driver_fail(result, "cannot find the card");
    }
    proxy->needs_flush =
        (epx__cuda_attribute(
             card, CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS) &
         CU_FLUSH_GPU_DIRECT_RDMA_WRITES_OPTION_HOST) != 0;
    net->orders_puts =
        proxy->needs_flush ||
        epx__cuda_attribute(
            card, CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING) >=
            CU_GPU_DIRECT_RDMA_WRITES_ORDERING_OWNER;
    net->exports_dmabuf =
        epx__cuda_attribute(card, CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED) != 0;
    net->num_channels = CUDA_ROW_CHANNELS;
    net->enter_thread = cuda_enter_thread;
    net->ordinal = group->device_ordinal;
    net->block_bytes = TRIAL_BYTES;
    return epx__cuda_check(
        cuda_kept_take(group->device_ordinal, TRIAL_BYTES, 0, &net->block),
        "no memory of the card for rows between nodes");
}

epx_status_t
cuda_proxy_open(epx_group_t *group)
{
    cuda_engine_t *engine = cuda_engine(group);
    cuda_proxy_t *proxy;
    epx_status_t status;

    engine->view.nodes.num_nodes = group->nodes.num_nodes;
    engine->view.nodes.own = group->nodes.own;
    engine->view.nodes.all_near = !cuda_spans_nodes(group);
    engine->view.nodes.far_rank = -1;
    if (!cuda_spans_nodes(group)) {
        return EPX_OK;
    }
    proxy = calloc(1, sizeof(*proxy));
    engine->proxy = proxy;
    if (proxy == NULL) {
        return epx__fail(EPX_ERR_NO_MEMORY, "no memory for other nodes");
    }
    proxy->group = group;
    if (!open_arrays(proxy)) {
        return epx__fail(EPX_ERR_NO_MEMORY, "no memory for %d ranks",
                         group->num_ranks);
    }
    find_peers(proxy);
    status = open_card_net(proxy);
    if (status == EPX_OK) {
        status = open_memory(proxy);
    }
    engine->view.nodes.relay = proxy->relay;
    return status;
}

epx_status_t
cuda_proxy_start(epx_group_t *group)
{
    cuda_proxy_t *proxy = proxy_of(group);
    epx_status_t status;

    if (proxy == NULL || proxy->is_running) {
        return EPX_OK;
    }
    status = epx__thread_start(&proxy->thread, cuda_proxy_main, proxy,
                               "the proxy of a CUDA group");
    proxy->is_running = status == EPX_OK;
    return status;
}

void
cuda_proxy_leave(epx_group_t *group)
{
    cuda_proxy_t *proxy = proxy_of(group);

    if (proxy != NULL && proxy->is_running) {
        epx__store_u32(&proxy->ends, 1);
        (void)pthread_join(proxy->thread, NULL);
        proxy->is_running = false;
    }
}

void
cuda_proxy_rest(epx_group_t *group, const uint64_t *masked)
{
    if (proxy_of(group) != NULL) {
        cuda_proxy_leave(group);
        epx__net_rest(epx__group_net(group), masked,
                      epx__deadline_ns(epx__group_patience_ns(group)));
    }
}

epx_status_t
cuda_proxy_renew(epx_group_t *group, const uint64_t *masked, uint64_t last_step)
{
    cuda_proxy_t *proxy = proxy_of(group);
    epx__net_t *net = epx__group_net(group);
    int64_t deadline = epx__deadline_ns(group->timeout_ns);
    epx_status_t status;

    if (proxy == NULL) {
        return EPX_OK;
    }
    status = epx__net_renew(net, masked, last_step, deadline);
    for (int i = 0; i < EPX__NUM_SLOTS && status == EPX_OK; i++) {
        cuda_trip_t *trip = &proxy->relay->trips[i];

        status = epx__net_forget(net, &proxy->errands[i].done, deadline);
        proxy->errands[i].step = 0;
        trip->closed = trip->begun; /* no kernel runs */
    }
    if (status == EPX_OK) {
        proxy->last_step = last_step;
        epx__store_u32(&proxy->ends, 0);
        find_rails(proxy, masked);
    }
    return status;
}

void
cuda_proxy_close(epx_group_t *group)
{
    cuda_proxy_t *proxy = proxy_of(group);

    if (proxy == NULL) {
        return;
    }
    cuda_kept_give(proxy->relay);
    cuda_kept_give(proxy->mail);
    cuda_kept_give(group->card_net.block);
    free(group->net_control);
    group->net_control = NULL;
    free(proxy->far);
    free(proxy->errands[0].is_met);
    free(proxy->errands[0].ranges[0]);
    free(proxy);
    cuda_engine(group)->proxy = NULL;
}
