/* SPDX-License-Identifier: MIT */
/* What engines hand to the net's thread. */
#include "net/net_internal.h"

#include <inttypes.h>
#include <unistd.h>

void
epx__net_wake(epx__net_t *net)
{
    if (epx__load_u32(&net->is_asleep) != 0 &&
        __atomic_exchange_n(&net->is_asleep, 0, __ATOMIC_SEQ_CST) != 0) {
        const uint64_t one = 1;

        /* It cannot fail: the counter is far from full. */
        (void)!write(net->wake_fd, &one, sizeof(one));
    }
}

/* The net's thread sleeps on if it does. */
static void
mark_only(epx__net_t *net, int32_t peer)
{
    uint64_t bit = UINT64_C(1) << peer % 64;

    /* Sequentially consistent, as is the thread's store of is_asleep: either
     * epx__net_wake sees that it sleeps, or its last look sees the bit. */
    (void)__atomic_fetch_or(&net->ready[peer / 64], bit, __ATOMIC_SEQ_CST);
}

void
epx__net_mark(epx__net_t *net, int32_t peer)
{
    mark_only(net, peer);
    epx__net_wake(net);
}

void
epx__net_step_begin(epx__net_t *net, uint64_t step)
{
    epx__store_release_u64(&net->last_step, step);
}

static epx_status_t
check_peer(epx__net_t *net, int32_t rank)
{
    if (!epx__net_has_peer(net, rank)) {
        return epx__fail(EPX_ERR_INVALID,
                         "rank %d has no rank %d on another host",
                         net->config.rank, rank);
    }
    return epx__net_peer_status(net, rank);
}

bool
epx__net_queue(epx__net_t *net, int32_t rank, int ring,
               const epx__net_job_t *job)
{
    bool ok = epx__net_ring_push(&net->peers[rank].rings[ring], job);

    if (ok) {
        (void)epx__add_u32(&net->under_way, 1);
    }
    return ok;
}

/* Rings are emptied at once, but for what a peer's window holds back and what
 * is for later. */
epx_status_t
epx__net_submit(epx__net_t *net, int32_t rank, int ring,
                const epx__net_job_t *job, bool is_for_later)
{
    int64_t deadline = 0;
    epx_status_t status = EPX_OK;

    for (;;) {
        uint32_t event = epx__net_event(net);
        int64_t now;

        if (epx__net_queue(net, rank, ring, job)) {
            /* The caller's thread sends it, unless another is at it. */
            if (is_for_later) {
                mark_only(net, rank);
            } else if (!epx__net_serve_now(net, rank)) {
                epx__net_mark(net, rank);
            }
            return EPX_OK;
        }
        status = epx__net_peer_status(net, rank);
        if (status == EPX_OK) {
            status = epx__net_check_waits(net);
        }
        if (status != EPX_OK) {
            return status;
        }
        now = epx__now_ns();
        if (deadline == 0) {
            deadline = epx__deadline_ns(net->config.timeout_ns);
        } else if (now >= deadline || net->config.is_manual) {
            return epx__fail(EPX_ERR_TIMEOUT,
                             "rank %d has %d messages waiting for rank %d, "
                             "which does not take them",
                             net->config.rank, EPX__NET_RING, rank);
        }
        epx__net_event_wait(
            net, event,
            now + EPX__NS_PER_MS < deadline ? now + EPX__NS_PER_MS : deadline);
    }
}

epx_status_t
epx__net_signal(epx__net_t *net, int32_t peer, uint64_t step, epx__gate_t gate,
                epx__payload_t payload, const void *from, size_t bytes,
                bool is_for_later)
{
    epx__net_job_t job = { .header = { .kind = EPX__NET_KIND_SIGNAL,
                                       .gate = (uint8_t)gate,
                                       .step = step } };
    epx_status_t status = check_peer(net, peer);

    if (status != EPX_OK) {
        return status;
    }
    if (payload != EPX__PAYLOAD_NONE) {
        job.header.kind = payload == EPX__PAYLOAD_POST ? EPX__NET_KIND_POST
                                                       : EPX__NET_KIND_COUNTS;
        job.bytes = bytes;
    }
    /* Nobody writes to what is sent. */
    job.one = (struct iovec){ (void *)(uintptr_t)from, job.bytes };
    job.num_ranges = job.bytes > 0;
    return epx__net_submit(net, peer, 0, &job, is_for_later);
}

/* The bytes of the ranges; false: more than there can be. */
static bool
sum_ranges(const epx__net_send_t *send, uint64_t *bytes_p)
{
    *bytes_p = 0;
    for (uint32_t i = 0; i < send->num_ranges; i++) {
        if (__builtin_add_overflow(*bytes_p, send->ranges[i].iov_len,
                                   bytes_p)) {
            return false;
        }
    }
    return true;
}

epx_status_t
epx__net_send(epx__net_t *net, const epx__net_send_t *send)
{
    epx__net_job_t job = {
        .header = { .kind = EPX__NET_KIND_PIECE,
                    .gate = (uint8_t)(send->arrive_step != 0 ? send->arrive_gate
                                                             : 0),
                    .channel = send->channel,
                    .step = send->arrive_step,
                    .turn = send->turn,
                    .offset = send->offset,
                    .total = send->total },
        .ranges = send->ranges,
        .num_ranges = send->num_ranges,
        .done = send->done,
    };
    epx_status_t status = check_peer(net, send->peer);

    if (status != EPX_OK) {
        return status;
    }
    if (send->channel >= net->config.num_channels) {
        return epx__fail(EPX_ERR_INVALID,
                         "there is no channel %" PRIu32 " to rank %d; there "
                         "are %" PRIu32,
                         send->channel, send->peer, net->config.num_channels);
    }
    if (!sum_ranges(send, &job.bytes) || send->offset > send->total ||
        job.bytes > send->total - send->offset) {
        return epx__fail(EPX_ERR_INVALID,
                         "a part of %" PRIu64 " bytes at %" PRIu64
                         " is outside its turn of %" PRIu64 " bytes",
                         job.bytes, send->offset, send->total);
    }
    if (job.bytes == 0 && send->total > 0) {
        return EPX_OK; /* no part of the turn is missing */
    }
    if (send->done != NULL) {
        (void)epx__add_u32(&send->done->pending, 1);
    }
    status = epx__net_submit(net, send->peer, 1, &job, send->is_for_later);
    if (status != EPX_OK && send->done != NULL) {
        (void)epx__add_u32(&send->done->pending, (uint32_t)-1);
    }
    return status;
}
