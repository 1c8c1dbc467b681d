/* SPDX-License-Identifier: MIT */
/* The proxy's part in a dispatch or combine. */
#include "engine/cuda/cuda_proxy.h"

#include "core/agree.h"
#include "core/atomic.h"
#include "core/clock.h"

#include <inttypes.h>

static uint32_t
channel_of(epx__lane_t lane, int part, uint64_t step)
{
    uint32_t first =
        part == CUDA_ROWS ? EPX__GROUP_CHANNELS - CUDA_ROW_CHANNELS : 0;

    return first + (uint32_t)lane * EPX__NUM_SLOTS + epx__slot(step);
}

static const char *
name_of(const cuda_errand_t *errand)
{
    return errand->is_combine ? "a combine" : "a dispatch";
}

/* ---- whom parcels go to, and where from they come ---- */

typedef struct lane_end {
    const int32_t *ranks; /* [count], none with a lane that is not used */
    int32_t count;
    const cuda_regions_t *regions;
} lane_end_t;

static lane_end_t
to_rails(const cuda_proxy_t *proxy, const cuda_errand_t *errand,
         epx__lane_t lane)
{
    return (lane_end_t){ proxy->rails, proxy->num_rails,
                         &errand->rail.by_node[lane] };
}

static lane_end_t
to_forwards(const cuda_proxy_t *proxy, const cuda_errand_t *errand,
            epx__lane_t lane)
{
    return (lane_end_t){ proxy->forwards, proxy->num_forwards,
                         &errand->rail.by_forward[lane] };
}

static lane_end_t
to_far(const cuda_proxy_t *proxy, const cuda_regions_t *regions)
{
    return (lane_end_t){ proxy->far, proxy->num_far, regions };
}

static lane_end_t
sent_by(const cuda_proxy_t *proxy, const cuda_errand_t *errand,
        epx__lane_t lane)
{
    if (lane == EPX__LANE_BACK) {
        return errand->is_combine ? to_forwards(proxy, errand, lane)
                                  : (lane_end_t){ 0 };
    }
    return errand->rail.is_slots != 0
               ? to_far(proxy, &errand->rail.by_node[lane])
               : to_rails(proxy, errand, lane);
}

static lane_end_t
received_by(const cuda_proxy_t *proxy, const cuda_errand_t *errand,
            epx__lane_t lane)
{
    if (lane == EPX__LANE_BACK) {
        return errand->is_combine ? to_rails(proxy, errand, lane)
                                  : (lane_end_t){ 0 };
    }
    return errand->rail.is_slots != 0
               ? to_far(proxy, &errand->rail.by_forward[lane])
               : to_forwards(proxy, errand, lane);
}

/* ---- the beginning ---- */

/* A slot for one part of the i-th parcel of a lane. */
static epx_status_t
open_part(const cuda_proxy_t *proxy, const cuda_errand_t *errand,
          epx__lane_t lane, int part, const lane_end_t *end, int32_t i)
{
    bool is_rows = part == CUDA_ROWS;
    char *region = is_rows ? cuda_region_rows(end->regions, i)
                           : cuda_region(end->regions, i);
    void *const halves[2] = { region, region };
    uint64_t bytes = is_rows ? end->regions->row_bytes : end->regions->bytes;

    return bytes == 0
               ? EPX_OK
               : epx__net_slot_open(cuda_proxy_net(proxy),
                                    channel_of(lane, part, errand->step),
                                    end->ranks[i], errand->step, halves, bytes);
}

static epx_status_t
open_lane(const cuda_proxy_t *proxy, const cuda_errand_t *errand,
          epx__lane_t lane)
{
    lane_end_t end = received_by(proxy, errand, lane);
    epx_status_t status = EPX_OK;

    for (int32_t i = 0; i < end.count && status == EPX_OK; i++) {
        if (cuda_is_out(proxy, end.ranks[i])) {
            continue;
        }
        for (int part = 0; part < CUDA_NUM_PARTS && status == EPX_OK; part++) {
            status = open_part(proxy, errand, lane, part, &end, i);
        }
    }
    return status;
}

static epx_status_t
close_lane(const cuda_proxy_t *proxy, const cuda_errand_t *errand,
           epx__lane_t lane)
{
    lane_end_t end = received_by(proxy, errand, lane);
    epx_status_t status = EPX_OK;

    for (int32_t i = 0; i < end.count && status == EPX_OK; i++) {
        if (cuda_is_out(proxy, end.ranks[i])) {
            continue;
        }
        for (int part = 0; part < CUDA_NUM_PARTS && status == EPX_OK; part++) {
            /* Its turn has come whole: nothing writes to it. */
            status = epx__net_slot_close(
                cuda_proxy_net(proxy), channel_of(lane, part, errand->step),
                end.ranks[i], epx__deadline_ns(proxy->group->timeout_ns));
        }
    }
    return status;
}

/* ---- for reports ---- */

typedef struct rank_bits {
    uint64_t words[EPX_MAX_RANKS / 64];
} rank_bits_t;

static void
note_rank(rank_bits_t *bits, int32_t rank)
{
    bits->words[rank / 64] |= UINT64_C(1) << rank % 64;
}

static void
tell_ranks(uint64_t *words, const rank_bits_t *bits)
{
    for (int i = 0; i < EPX_MAX_RANKS / 64; i++) {
        epx__store_release_u64(&words[i], bits->words[i]);
    }
}

/* Whom a kernel waits for, should it have to say so. */
static void
tell_missing(const cuda_proxy_t *proxy, const cuda_errand_t *errand)
{
    cuda_trip_t *trip = cuda_trip(proxy, errand->step);
    rank_bits_t absent = { 0 };

    for (int32_t i = 0; i < proxy->num_far; i++) {
        if (!errand->is_met[proxy->far[i]] &&
            !cuda_is_out(proxy, proxy->far[i])) {
            note_rank(&absent, proxy->far[i]);
        }
    }
    tell_ranks(trip->absent, &absent);
    for (int lane = 0; lane < EPX__NUM_LANES; lane++) {
        lane_end_t end = received_by(proxy, errand, (epx__lane_t)lane);
        rank_bits_t owing = absent;

        for (int32_t i = 0; i < end.count; i++) {
            if (!errand->has_come[lane][i] &&
                !cuda_is_out(proxy, end.ranks[i])) {
                note_rank(&owing, end.ranks[i]);
            }
        }
        tell_ranks(trip->owing[lane], &owing);
    }
}

bool
cuda_op_take_up(cuda_proxy_t *proxy, uint64_t step, epx_status_t *status_p)
{
    const epx_group_t *group = proxy->group;
    const cuda_trip_t *trip = cuda_trip(proxy, step);
    cuda_errand_t *errand = cuda_errand(proxy, step);
    epx__post_t *post = epx__map_post(&group->map, group->net_control, step,
                                      (uint32_t)group->rank);

    if (!cuda_words_read(cuda_words(proxy, step, group->rank), step,
                         EPX__POST_WORDS, post) ||
        (trip->rail.is_slots != 0 && !cuda_counts_read(proxy, step))) {
        return false;
    }
    errand->is_combine = trip->kind == EPX__STEP_COMBINE;
    errand->rail = trip->rail;
    errand->signature = post->signature;
    *status_p = open_lane(proxy, errand, EPX__LANE_OUT);
    if (*status_p == EPX_OK) {
        *status_p = open_lane(proxy, errand, EPX__LANE_BACK);
    }
    if (*status_p == EPX_OK) {
        epx__net_step_begin(cuda_proxy_net(proxy), step);
        *status_p = cuda_signal_all(proxy, step, EPX__GATE_READY,
                                    EPX__PAYLOAD_POST, post, sizeof(*post));
    }
    if (*status_p == EPX_OK && errand->rail.is_slots != 0) {
        /* The other gate is free, since parcels tell by themselves. */
        *status_p = cuda_counts_send(proxy, step, EPX__GATE_DONE);
    }
    tell_missing(proxy, errand);
    return true;
}

/* ---- the peers' posts ---- */

/* Of ranks of one node their kernels compare the posts. */
static epx_status_t
check_post(const cuda_proxy_t *proxy, const cuda_errand_t *errand, int32_t rank)
{
    const epx_group_t *group = proxy->group;
    epx__post_t post;

    epx__copy_in(&post,
                 epx__map_post(&group->map, group->net_control, errand->step,
                               (uint32_t)rank),
                 sizeof(post));
    return post.step == errand->step
               ? epx__agree_signatures(name_of(errand), group->rank,
                                       &errand->signature, rank,
                                       &post.signature)
               : epx__agree_not(rank, group->rank, name_of(errand));
}

static epx_status_t
meet(const cuda_proxy_t *proxy, cuda_errand_t *errand, int32_t rank)
{
    bool is_there = false;
    epx_status_t status =
        cuda_has_signalled(proxy, errand, rank, EPX__GATE_READY, &is_there);

    if (status == EPX_OK && is_there && errand->rail.is_slots != 0) {
        status =
            cuda_has_signalled(proxy, errand, rank, EPX__GATE_DONE, &is_there);
    }
    if (status != EPX_OK || !is_there) {
        return status;
    }
    if (errand->rail.is_slots != 0) {
        cuda_counts_take(proxy, errand, rank);
    }
    errand->is_met[rank] = true;
    return check_post(proxy, errand, rank);
}

/* *busy_p: somebody has come; *all_p: nobody is missing. */
static epx_status_t
meet_all(const cuda_proxy_t *proxy, cuda_errand_t *errand, bool *busy_p,
         bool *all_p)
{
    epx_status_t status = EPX_OK;

    *all_p = true;
    for (int32_t i = 0; i < proxy->num_far && status == EPX_OK; i++) {
        int32_t rank = proxy->far[i];

        if (cuda_is_out(proxy, rank)) {
            continue;
        }
        if (!errand->is_met[rank]) {
            status = meet(proxy, errand, rank);
            *busy_p = *busy_p || errand->is_met[rank];
        }
        *all_p = *all_p && errand->is_met[rank];
    }
    return status;
}

/* ---- parcels ---- */

static cuda_parcel_t
parcel_of(const cuda_errand_t *errand, epx__lane_t lane, const char *region)
{
    const cuda_parcel_head_t *head = (const void *)region;

    return cuda_parcel(&errand->rail.kinds[lane], head->has_weights,
                       head->count);
}

static epx_status_t
send_part(const cuda_proxy_t *proxy, cuda_errand_t *errand, epx__lane_t lane,
          int part, int32_t peer, struct iovec *range)
{
    const epx__net_send_t send = {
        .peer = peer,
        .channel = channel_of(lane, part, errand->step),
        .turn = errand->step,
        .total = range->iov_len,
        .ranges = range,
        .num_ranges = 1,
        .done = &errand->done,
    };

    return epx__net_send(cuda_proxy_net(proxy), &send);
}

/* Send the parcels of a lane whose receivers are ready. */
static epx_status_t
send_lane(const cuda_proxy_t *proxy, cuda_errand_t *errand, epx__lane_t lane,
          bool *busy_p)
{
    lane_end_t end = sent_by(proxy, errand, lane);
    epx_status_t status = EPX_OK;

    for (int32_t i = 0; i < end.count && status == EPX_OK; i++) {
        char *region = cuda_region(end.regions, i);
        struct iovec *ranges =
            errand->ranges[lane] + (ptrdiff_t)CUDA_NUM_PARTS * i;
        cuda_parcel_t parcel;

        if (cuda_is_out(proxy, end.ranks[i]) || errand->has_sent[lane][i] ||
            !errand->is_met[end.ranks[i]]) {
            continue;
        }
        parcel = parcel_of(errand, lane, region);
        ranges[CUDA_HEADS] = (struct iovec){ region, parcel.bytes };
        ranges[CUDA_ROWS] = (struct iovec){ cuda_region_rows(end.regions, i),
                                            parcel.row_bytes };
        for (int part = 0; part < CUDA_NUM_PARTS && status == EPX_OK; part++) {
            if (ranges[part].iov_len > 0) {
                status = send_part(proxy, errand, lane, part, end.ranks[i],
                                   &ranges[part]);
            }
        }
        errand->has_sent[lane][i] = true;
        *busy_p = true;
    }
    return status;
}

/* The head of a peer's parcel, before a kernel sees it and before its rows are
 * waited for.  With `sent`, it answers that one. */
static epx_status_t
check_parcel(const cuda_errand_t *errand, epx__lane_t lane, int32_t rank,
             const cuda_regions_t *regions, const char *region, uint64_t bytes,
             const char *sent)
{
    const cuda_parcel_head_t *head = (const void *)region;
    const cuda_parcel_head_t *asked = (const void *)sent;
    bool ok = bytes >= sizeof(*head) && head->step == errand->step &&
              head->count <= regions->max_tokens &&
              parcel_of(errand, lane, region).bytes == bytes;

    if (ok && asked != NULL) {
        ok = head->count == asked->count &&
             (head->has_weights != 0) == (asked->wants_weights != 0);
    }
    return ok ? EPX_OK
              : epx__fail(EPX_ERR_PEER_DATA,
                          "rank %d sent %" PRIu64
                          " bytes of tokens in %s, which its head does not "
                          "account for",
                          rank, bytes, name_of(errand));
}

/* Whether the i-th parcel of a lane has come whole. */
static epx_status_t
has_come(const cuda_proxy_t *proxy, const cuda_errand_t *errand,
         epx__lane_t lane, const lane_end_t *end, int32_t i, bool *has_come_p)
{
    epx__net_t *net = cuda_proxy_net(proxy);
    int32_t rank = end->ranks[i];
    const char *region = cuda_region(end->regions, i);
    const char *sent =
        lane == EPX__LANE_BACK
            ? cuda_region(&errand->rail.by_node[EPX__LANE_OUT], i)
            : NULL;
    uint64_t bytes = 0, row_bytes = 0, promised;
    epx_status_t status;

    *has_come_p = false;
    if (!epx__net_arrived(net, channel_of(lane, CUDA_HEADS, errand->step), rank,
                          errand->step, &bytes)) {
        return EPX_OK;
    }
    status =
        check_parcel(errand, lane, rank, end->regions, region, bytes, sent);
    if (status != EPX_OK) {
        return status;
    }
    promised = parcel_of(errand, lane, region).row_bytes;
    *has_come_p =
        promised == 0 ||
        epx__net_arrived(net, channel_of(lane, CUDA_ROWS, errand->step), rank,
                         errand->step, &row_bytes);
    return row_bytes == promised || !*has_come_p
               ? EPX_OK
               : epx__fail(EPX_ERR_PEER_DATA,
                           "rank %d sent %" PRIu64 " bytes of rows in %s, and "
                           "told of %" PRIu64,
                           rank, row_bytes, name_of(errand), promised);
}

/* See which parcels of a lane have come. */
static epx_status_t
receive_lane(const cuda_proxy_t *proxy, cuda_errand_t *errand, epx__lane_t lane,
             bool *busy_p)
{
    lane_end_t end = received_by(proxy, errand, lane);
    epx_status_t status = EPX_OK;

    for (int32_t i = 0; i < end.count && status == EPX_OK; i++) {
        bool *is_here = &errand->has_come[lane][i];

        if (cuda_is_out(proxy, end.ranks[i]) || *is_here) {
            continue;
        }
        status = has_come(proxy, errand, lane, &end, i, is_here);
        *busy_p = *busy_p || *is_here;
    }
    return status;
}

/* Whether something is set for all of an end. */
static bool
has_all(const cuda_proxy_t *proxy, const bool *flags, lane_end_t end)
{
    bool all = true;

    for (int32_t i = 0; i < end.count; i++) {
        all = all && (flags[i] || cuda_is_out(proxy, end.ranks[i]));
    }
    return all;
}

/* ---- going on ---- */

/* What the network has written to the card is there for kernels that are told
 * of it now. */
static epx_status_t
flush_puts(const cuda_proxy_t *proxy)
{
    return proxy->needs_flush && epx__net_reaches_card(cuda_proxy_net(proxy))
               ? epx__cuda_check(
                     cudaDeviceFlushGPUDirectRDMAWrites(
                         cudaFlushGPUDirectRDMAWritesTargetCurrentDevice,
                         cudaFlushGPUDirectRDMAWritesToOwner),
                     "cannot see to what the network has written to the card")
               : EPX_OK;
}

static epx_status_t
go_on_lane(const cuda_proxy_t *proxy, cuda_errand_t *errand, epx__lane_t lane,
           bool has_met, bool *busy_p)
{
    cuda_trip_t *trip = cuda_trip(proxy, errand->step);
    const uint64_t *ready =
        lane == EPX__LANE_OUT ? &trip->packed : &trip->summed;
    epx_status_t status = EPX_OK;

    /* Released by turn_kernel in cuda_rail.cu. */
    if (epx__load_acquire_u64(ready) == errand->step) {
        status = send_lane(proxy, errand, lane, busy_p);
    }
    if (status == EPX_OK) {
        status = receive_lane(proxy, errand, lane, busy_p);
    }
    if (status != EPX_OK || !has_met || trip->came[lane] == errand->step ||
        !has_all(proxy, errand->has_come[lane],
                 received_by(proxy, errand, lane))) {
        return status;
    }
    status = flush_puts(proxy);
    if (status == EPX_OK) {
        /* Acquired by trip_wait in cuda_trip.cuh. */
        epx__store_release_u64(&trip->came[lane], errand->step);
    }
    return status;
}

/* Whether its kernels are done with the step, and all has been delivered. */
static bool
is_over(const cuda_proxy_t *proxy, const cuda_errand_t *errand)
{
    bool is_sent = true;

    for (int lane = 0; lane < EPX__NUM_LANES; lane++) {
        is_sent = is_sent && has_all(proxy, errand->has_sent[lane],
                                     sent_by(proxy, errand, (epx__lane_t)lane));
    }
    return is_sent && epx__net_done_test(&errand->done) &&
           epx__load_acquire_u64(&cuda_trip(proxy, errand->step)->ended) ==
               errand->step;
}

static epx_status_t
finish(const cuda_proxy_t *proxy, cuda_errand_t *errand)
{
    epx_status_t status = errand->done.status == EPX_OK
                              ? close_lane(proxy, errand, EPX__LANE_OUT)
                              : epx__fail((epx_status_t)errand->done.status,
                                          "rank %d is lost in %s",
                                          errand->done.rank, name_of(errand));

    if (status == EPX_OK) {
        status = close_lane(proxy, errand, EPX__LANE_BACK);
    }
    if (status == EPX_OK) {
        /* Acquired by wait_free in cuda_rail.cu, and cuda_rail_is_busy. */
        epx__store_release_u64(&errand->rail.marks[CUDA_MARK_FREE],
                               errand->step);
        epx__store_release_u64(&cuda_trip(proxy, errand->step)->closed,
                               errand->step);
        errand->step = 0;
    }
    return status;
}

epx_status_t
cuda_op_go_on(const cuda_proxy_t *proxy, cuda_errand_t *errand, bool *busy_p)
{
    bool busy = false, has_met;
    epx_status_t status = meet_all(proxy, errand, &busy, &has_met);

    for (int lane = 0; lane < EPX__NUM_LANES && status == EPX_OK; lane++) {
        status = go_on_lane(proxy, errand, (epx__lane_t)lane, has_met, &busy);
    }
    if (busy) {
        tell_missing(proxy, errand);
        *busy_p = true;
    }
    if (status == EPX_OK && is_over(proxy, errand)) {
        status = finish(proxy, errand);
        *busy_p = true;
    }
    return status;
}
