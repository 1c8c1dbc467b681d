/* SPDX-License-Identifier: MIT */
/*
 * The proxy: a thread of the host that moves between nodes what the kernels of
 * this rank have packed, and shows them what has come (cuda_rail.h).  It never
 * waits: it looks at every step that is open, and does what can be done.
 *
 *     a step of counts    this rank's words become a count row, which goes to
 *                         the ranks of other nodes; theirs become words
 *     a dispatch or       posts are exchanged and compared; parcels are sent
 *     combine             once they are packed and their receiver's post tells
 *                         that it is there
 *
 * Each lane of a step has a channel of its own, by the step's number: at most
 * EPX__MAX_OPEN are open.  Turns are the steps.  A slot is opened before the
 * post goes out, so who has the post may send.
 */
#include "core/agree.h"
#include "core/atomic.h"
#include "core/clock.h"
#include "core/thread.h"
#include "engine/cuda/cuda_engine.h"
#include "engine/cuda/cuda_pinned.h"
#include "net/net_group.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

/* How long it looks again at once after there was something to do; and how
 * long it sleeps then. */
#define SPIN_NS  50000
#define PAUSE_NS 20000
/* How long the end of a failed operation waits for the network. */
#define ABANDON_NS ((uint64_t)EPX__NS_PER_SEC / 2)

typedef struct errand {
    uint64_t step; /* 0: none */
    bool is_counts;
    bool is_combine;
    epx__signature_t signature;
    cuda_rail_t rail;
    uint32_t num_experts;
    bool *is_met;                  /* [R] its post or counts are here */
    bool *has_sent[EPX__NUM_LANES]; /* [N - 1] OUT, [F] BACK */
    bool *has_come[EPX__NUM_LANES]; /* [F] OUT, [N - 1] BACK */
    struct iovec *ranges[EPX__NUM_LANES]; /* of what is sent */
    epx__net_done_t done;
} errand_t;

typedef struct cuda_proxy {
    epx_group_t *group;
    cuda_relay_t *relay;
    char *mail;
    int32_t num_far; /* ranks of other nodes, */
    int32_t *far;    /* ascending */
    int32_t num_forwards;
    int32_t *forwards; /* the ranks that this one is the rail of */
    int32_t num_nodes; /* other ones, */
    int32_t *rails;    /* this rank's rail on each */
    pthread_t thread;
    bool is_running;
    uint32_t ends;      /* atomic: once nothing is left to do */
    uint64_t last_step; /* that it has taken up */
    errand_t errands[EPX__NUM_SLOTS];
} cuda_proxy_t;

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

static epx__net_t *
net_of(const cuda_proxy_t *proxy)
{
    return epx__group_net(proxy->group);
}

static cuda_trip_t *
trip_of(const cuda_proxy_t *proxy, uint64_t step)
{
    return &proxy->relay->trips[epx__slot(step)];
}

static uint32_t
channel_of(epx__lane_t lane, uint64_t step)
{
    return (uint32_t)lane * EPX__MAX_OPEN + (uint32_t)(step % EPX__MAX_OPEN);
}

/* ---- words ---- */

static uint64_t *
words_of(const cuda_proxy_t *proxy, uint64_t step, int32_t source)
{
    return epx__map_words(&proxy->group->map, proxy->mail, step,
                          (uint32_t)source);
}

/* Read words that this rank's kernels have told; false: some are not there. */
static bool
read_words(const uint64_t *words, uint64_t step, size_t count, void *to)
{
    for (size_t i = 0; i < count; i++) {
        uint64_t word = epx__load_acquire_u64(&words[i]);
        uint32_t content = (uint32_t)word;

        if ((uint32_t)(word >> 32) != (uint32_t)step) {
            return false;
        }
        memcpy((char *)to + i * sizeof(content), &content, sizeof(content));
    }
    return true;
}

static void
tell_words(uint64_t *words, uint64_t step, size_t count, const void *from)
{
    for (size_t i = 0; i < count; i++) {
        uint32_t content;

        memcpy(&content, (const char *)from + i * sizeof(content),
               sizeof(content));
        epx__store_release_u64(&words[i], step << 32 | content);
    }
}

/* ---- the parts of every step ---- */

/* Send this rank's row of the step, which is in its control region. */
static epx_status_t
signal_all(const cuda_proxy_t *proxy, uint64_t step, epx__payload_t payload,
           const void *from, size_t bytes)
{
    epx_status_t status = EPX_OK;

    for (int32_t i = 0; i < proxy->num_far && status == EPX_OK; i++) {
        status = epx__net_signal(net_of(proxy), proxy->far[i], step,
                                 EPX__GATE_READY, payload, from, bytes);
    }
    return status;
}

/* Whether a rank's row of the step has come. */
static epx_status_t
has_signalled(const cuda_proxy_t *proxy, const errand_t *errand, int32_t rank,
              bool *is_there)
{
    const epx_group_t *group = proxy->group;
    uint64_t step = epx__load_acquire_u64(
        epx__map_arrival(&group->map, group->net_control, errand->step,
                         EPX__GATE_READY, (uint32_t)rank));

    *is_there = step == errand->step;
    return step <= errand->step
               ? EPX_OK
               : epx__fail(EPX_ERR_PEER_DATA,
                           "rank %d signalled step %" PRIu64
                           " in what is step %" PRIu64,
                           rank, step, errand->step);
}

/* Take in what ranks of other nodes have told; *all_p: nobody is missing. */
static epx_status_t
meet(const cuda_proxy_t *proxy, errand_t *errand, bool *busy_p, bool *all_p,
     epx_status_t (*take)(const cuda_proxy_t *proxy, errand_t *errand,
                          int32_t rank))
{
    epx_status_t status = EPX_OK;

    *all_p = true;
    for (int32_t i = 0; i < proxy->num_far && status == EPX_OK; i++) {
        int32_t rank = proxy->far[i];
        bool is_there = false;

        if (errand->is_met[rank]) {
            continue;
        }
        status = has_signalled(proxy, errand, rank, &is_there);
        if (status == EPX_OK && is_there) {
            status = take(proxy, errand, rank);
            errand->is_met[rank] = true;
            *busy_p = true;
        }
        *all_p = *all_p && is_there;
    }
    return status;
}

static bool
has_all(const bool *flags, int32_t count)
{
    bool all = true;

    for (int32_t i = 0; i < count; i++) {
        all = all && flags[i];
    }
    return all;
}

/* ---- counts ---- */

#define ROW_WORDS (sizeof(epx__count_row_t) / sizeof(uint32_t))

/* Whether the step has begun, and is one of counts. */
static bool
take_up_counts(cuda_proxy_t *proxy, uint64_t step, epx_status_t *status_p)
{
    const epx_group_t *group = proxy->group;
    const uint64_t *words =
        words_of(proxy, step, group->rank) + EPX__POST_WORDS;
    errand_t *errand = &proxy->errands[epx__slot(step)];
    epx__count_row_t *row = epx__map_counts(&group->map, group->net_control,
                                            step, (uint32_t)group->rank);
    size_t num_counts;

    if (!read_words(words, step, ROW_WORDS, row)) {
        return false;
    }
    num_counts = (size_t)group->num_ranks + row->key.num_experts;
    if (!read_words(words + ROW_WORDS, step, num_counts, row + 1)) {
        return false;
    }
    errand->is_counts = true;
    errand->num_experts = row->key.num_experts;
    epx__net_step_begin(net_of(proxy), step);
    *status_p = signal_all(proxy, step, EPX__PAYLOAD_COUNTS, row,
                           sizeof(*row) + num_counts * sizeof(uint32_t));
    return true;
}

static epx_status_t
take_counts(const cuda_proxy_t *proxy, errand_t *errand, int32_t rank)
{
    const epx_group_t *group = proxy->group;
    epx__count_row_t *row =
        epx__map_counts(&group->map, group->net_control, errand->step,
                        (uint32_t)rank);
    uint64_t *words = words_of(proxy, errand->step, rank) + EPX__POST_WORDS;

    /* As many as this rank's kernels look at: they compare the plans. */
    tell_words(words, errand->step,
               ROW_WORDS + (size_t)group->num_ranks + errand->num_experts, row);
    return EPX_OK;
}

/* ---- a dispatch or combine ---- */

/* Calls for every slot of a lane that this step opens. */
static epx_status_t
each_slot(const cuda_proxy_t *proxy, errand_t *errand, epx__lane_t lane,
          epx_status_t (*call)(const cuda_proxy_t *proxy, errand_t *errand,
                               epx__lane_t lane, int32_t source, char *region,
                               uint64_t bytes))
{
    bool is_out = lane == EPX__LANE_OUT;
    const cuda_regions_t *regions =
        is_out ? &errand->rail.by_forward[lane] : &errand->rail.by_node[lane];
    const int32_t *sources = is_out ? proxy->forwards : proxy->rails;
    int32_t count = is_out ? proxy->num_forwards : proxy->num_nodes;
    epx_status_t status = EPX_OK;

    for (int32_t i = 0; i < count && status == EPX_OK; i++) {
        status = call(proxy, errand, lane, sources[i], cuda_region(regions, i),
                      regions->bytes);
    }
    return status;
}

static epx_status_t
open_slot(const cuda_proxy_t *proxy, errand_t *errand, epx__lane_t lane,
          int32_t source, char *region, uint64_t bytes)
{
    void *const halves[2] = { region, region };

    return epx__net_slot_open(net_of(proxy), channel_of(lane, errand->step),
                              source, errand->step, halves, bytes);
}

static epx_status_t
close_slot(const cuda_proxy_t *proxy, errand_t *errand, epx__lane_t lane,
           int32_t source, char *region, uint64_t bytes)
{
    (void)region;
    (void)bytes;
    /* Its turn has come whole: nothing writes to it. */
    return epx__net_slot_close(net_of(proxy), channel_of(lane, errand->step),
                               source,
                               epx__deadline_ns(proxy->group->timeout_ns));
}

static bool
take_up_op(cuda_proxy_t *proxy, uint64_t step, epx_status_t *status_p)
{
    const epx_group_t *group = proxy->group;
    const cuda_trip_t *trip = trip_of(proxy, step);
    errand_t *errand = &proxy->errands[epx__slot(step)];
    epx__post_t *post = epx__map_post(&group->map, group->net_control, step,
                                      (uint32_t)group->rank);

    /* Released by begin_trip in cuda_rail.cu. */
    if (epx__load_acquire_u64(&trip->begun) != step ||
        !read_words(words_of(proxy, step, group->rank), step, EPX__POST_WORDS,
                    post)) {
        return false;
    }
    errand->is_counts = false;
    errand->is_combine = trip->kind == EPX__STEP_COMBINE;
    errand->rail = trip->rail;
    errand->signature = post->signature;
    *status_p = each_slot(proxy, errand, EPX__LANE_OUT, open_slot);
    if (*status_p == EPX_OK && errand->is_combine) {
        *status_p = each_slot(proxy, errand, EPX__LANE_BACK, open_slot);
    }
    if (*status_p == EPX_OK) {
        epx__net_step_begin(net_of(proxy), step);
        *status_p = signal_all(proxy, step, EPX__PAYLOAD_POST, post,
                               sizeof(*post));
    }
    return true;
}

static const char *
name_of(const errand_t *errand)
{
    return errand->is_combine ? "a combine" : "a dispatch";
}

/* Of ranks of one node their kernels compare the posts. */
static epx_status_t
take_post(const cuda_proxy_t *proxy, errand_t *errand, int32_t rank)
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

static uint64_t
bytes_of(const errand_t *errand, epx__lane_t lane, const char *region)
{
    const cuda_parcel_head_t *head = (const void *)region;

    return cuda_parcel(&errand->rail.kinds[lane], head->has_weights,
                       head->count)
        .bytes;
}

/* Send the parcels of a lane whose receivers are ready. */
static epx_status_t
send_lane(const cuda_proxy_t *proxy, errand_t *errand, epx__lane_t lane,
          bool *busy_p)
{
    bool is_out = lane == EPX__LANE_OUT;
    const cuda_regions_t *regions =
        is_out ? &errand->rail.by_node[lane] : &errand->rail.by_forward[lane];
    const int32_t *peers = is_out ? proxy->rails : proxy->forwards;
    int32_t count = is_out ? proxy->num_nodes : proxy->num_forwards;
    epx_status_t status = EPX_OK;

    for (int32_t i = 0; i < count && status == EPX_OK; i++) {
        char *region = cuda_region(regions, i);
        struct iovec *range = &errand->ranges[lane][i];
        epx__net_send_t send = {
            .peer = peers[i],
            .channel = channel_of(lane, errand->step),
            .turn = errand->step,
            .ranges = range,
            .num_ranges = 1,
            .done = &errand->done,
        };

        if (errand->has_sent[lane][i] || !errand->is_met[peers[i]]) {
            continue;
        }
        send.total = bytes_of(errand, lane, region);
        *range = (struct iovec){ region, send.total };
        status = epx__net_send(net_of(proxy), &send);
        errand->has_sent[lane][i] = true;
        *busy_p = true;
    }
    return status;
}

/* A peer's parcel, whose numbers are checked before a kernel sees them.  With
 * `sent`, it answers that one. */
static epx_status_t
check_parcel(const errand_t *errand, epx__lane_t lane, int32_t rank,
             const char *region, uint64_t bytes, const char *sent)
{
    const cuda_parcel_head_t *head = (const void *)region;
    const cuda_parcel_head_t *asked = (const void *)sent;
    bool ok = bytes >= sizeof(*head) && head->step == errand->step &&
              head->count <= bytes && bytes_of(errand, lane, region) == bytes;

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

/* See which parcels of a lane have come. */
static epx_status_t
receive_lane(const cuda_proxy_t *proxy, errand_t *errand, epx__lane_t lane,
             bool *busy_p)
{
    bool is_out = lane == EPX__LANE_OUT;
    const cuda_regions_t *regions =
        is_out ? &errand->rail.by_forward[lane] : &errand->rail.by_node[lane];
    const int32_t *sources = is_out ? proxy->forwards : proxy->rails;
    int32_t count = is_out ? proxy->num_forwards : proxy->num_nodes;
    epx_status_t status = EPX_OK;

    for (int32_t i = 0; i < count && status == EPX_OK; i++) {
        uint64_t bytes = 0;

        if (errand->has_come[lane][i] ||
            !epx__net_arrived(net_of(proxy), channel_of(lane, errand->step),
                              sources[i], errand->step, &bytes)) {
            continue;
        }
        status = check_parcel(
            errand, lane, sources[i], cuda_region(regions, i), bytes,
            is_out ? NULL
                   : cuda_region(&errand->rail.by_node[EPX__LANE_OUT], i));
        errand->has_come[lane][i] = true;
        *busy_p = true;
    }
    return status;
}

static void
note_missing(uint64_t *missing, const int32_t *ranks, const bool *flags,
             int32_t count)
{
    for (int32_t i = 0; i < count; i++) {
        if (!flags[i]) {
            missing[ranks[i] / 64] |= UINT64_C(1) << ranks[i] % 64;
        }
    }
}

/* Whom a kernel waits for, should it have to say so. */
static void
tell_missing(const cuda_proxy_t *proxy, const errand_t *errand)
{
    cuda_trip_t *trip = trip_of(proxy, errand->step);
    uint64_t missing[EPX_MAX_RANKS / 64] = { 0 };

    for (int32_t i = 0; i < proxy->num_far; i++) {
        int32_t rank = proxy->far[i];

        note_missing(missing, &rank, &errand->is_met[rank], 1);
    }
    note_missing(missing, proxy->forwards, errand->has_come[EPX__LANE_OUT],
                 proxy->num_forwards);
    if (errand->is_combine) {
        note_missing(missing, proxy->rails, errand->has_come[EPX__LANE_BACK],
                     proxy->num_nodes);
    }
    for (int i = 0; i < EPX_MAX_RANKS / 64; i++) {
        epx__store_release_u64(&trip->missing[i], missing[i]);
    }
}

static epx_status_t
finish_op(const cuda_proxy_t *proxy, errand_t *errand)
{
    epx_status_t status = each_slot(proxy, errand, EPX__LANE_OUT, close_slot);

    if (status == EPX_OK && errand->is_combine) {
        status = each_slot(proxy, errand, EPX__LANE_BACK, close_slot);
    }
    if (status == EPX_OK) {
        /* Acquired by wait_free in cuda_rail.cu, and cuda_rail_is_busy. */
        epx__store_release_u64(&errand->rail.marks[CUDA_MARK_FREE],
                               errand->step);
        epx__store_release_u64(&trip_of(proxy, errand->step)->closed,
                               errand->step);
        errand->step = 0;
    }
    return status;
}

static epx_status_t
do_op(const cuda_proxy_t *proxy, errand_t *errand, bool *busy_p)
{
    cuda_trip_t *trip = trip_of(proxy, errand->step);
    bool busy = false, has_met, is_sent, has_come;
    epx_status_t status = meet(proxy, errand, &busy, &has_met, take_post);

    for (int lane = 0; lane < EPX__NUM_LANES && status == EPX_OK; lane++) {
        const uint64_t *ready =
            lane == EPX__LANE_OUT ? &trip->packed : &trip->summed;

        if (lane == EPX__LANE_BACK && !errand->is_combine) {
            continue;
        }
        /* Released by turn_kernel in cuda_rail.cu. */
        if (epx__load_acquire_u64(ready) == errand->step) {
            status = send_lane(proxy, errand, (epx__lane_t)lane, &busy);
        }
        if (status == EPX_OK) {
            status = receive_lane(proxy, errand, (epx__lane_t)lane, &busy);
        }
        has_come = has_all(errand->has_come[lane],
                           lane == EPX__LANE_OUT ? proxy->num_forwards
                                                 : proxy->num_nodes);
        if (status == EPX_OK && has_met && has_come) {
            /* Acquired by trip_wait in cuda_trip.cuh. */
            epx__store_release_u64(&trip->came[lane], errand->step);
        }
    }
    if (busy) {
        tell_missing(proxy, errand);
        *busy_p = true;
    }
    is_sent = has_all(errand->has_sent[EPX__LANE_OUT], proxy->num_nodes) &&
              (!errand->is_combine || has_all(errand->has_sent[EPX__LANE_BACK],
                                              proxy->num_forwards));
    if (status == EPX_OK && is_sent && epx__net_done_test(&errand->done) &&
        epx__load_acquire_u64(&trip->ended) == errand->step) {
        status = errand->done.status == EPX_OK
                     ? finish_op(proxy, errand)
                     : epx__fail((epx_status_t)errand->done.status,
                                 "rank %d is lost in %s", errand->done.rank,
                                 name_of(errand));
        *busy_p = true;
    }
    return status;
}

/* ---- the thread ---- */

static void
begin_errand(const cuda_proxy_t *proxy, errand_t *errand, uint64_t step)
{
    errand->step = step;
    errand->done = (epx__net_done_t){ 0 };
    memset(errand->is_met, 0, (size_t)proxy->group->num_ranks);
    for (int lane = 0; lane < EPX__NUM_LANES; lane++) {
        memset(errand->has_sent[lane], 0, (size_t)proxy->group->num_ranks);
        memset(errand->has_come[lane], 0, (size_t)proxy->group->num_ranks);
    }
}

/* The next step, if this rank's kernels have begun it. */
static epx_status_t
take_up(cuda_proxy_t *proxy, bool *busy_p)
{
    uint64_t step = proxy->last_step + 1;
    errand_t *errand = &proxy->errands[epx__slot(step)];
    epx_status_t status = EPX_OK;

    if (errand->step != 0) {
        return EPX_OK; /* its kernels wait, too: see wait_free */
    }
    begin_errand(proxy, errand, step);
    if (!take_up_counts(proxy, step, &status) &&
        !take_up_op(proxy, step, &status)) {
        errand->step = 0;
        return EPX_OK;
    }
    if (!errand->is_counts) {
        tell_missing(proxy, errand);
    }
    proxy->last_step = step;
    *busy_p = true;
    return status;
}

static epx_status_t
look_at_all(cuda_proxy_t *proxy, bool *busy_p, bool *open_p)
{
    epx_status_t status = take_up(proxy, busy_p);

    *open_p = false;
    for (int i = 0; i < EPX__NUM_SLOTS && status == EPX_OK; i++) {
        errand_t *errand = &proxy->errands[i];
        bool all;

        if (errand->step == 0) {
            continue;
        }
        if (errand->is_counts) {
            status = meet(proxy, errand, busy_p, &all, take_counts);
            errand->step = all ? 0 : errand->step;
        } else {
            status = do_op(proxy, errand, busy_p);
        }
        *open_p = *open_p || errand->step != 0;
    }
    return status;
}

/* The group is broken: nothing is sent or waited for any more. */
static void
give_up(cuda_proxy_t *proxy)
{
    int64_t deadline = epx__deadline_ns(ABANDON_NS);

    epx__store_release_u64(&proxy->relay->failed, 1);
    for (int i = 0; i < EPX__NUM_SLOTS; i++) {
        errand_t *errand = &proxy->errands[i];

        if (errand->step != 0 && !errand->is_counts) {
            epx__net_abandon(net_of(proxy), &errand->done, deadline);
        }
        errand->step = 0;
    }
}

static void *
proxy_main(void *argument)
{
    cuda_proxy_t *proxy = argument;
    epx_group_t *group = proxy->group;
    int64_t busy_ns = epx__now_ns();
    bool busy = true, open = true;

    /* Kernels have all run when it is to end; it has to see what they began. */
    while (epx__load_u32(&proxy->ends) == 0 || open || busy) {
        const struct timespec pause = { 0, PAUSE_NS };
        epx_status_t status;

        busy = false;
        status = look_at_all(proxy, &busy, &open);
        if (status != EPX_OK) {
            epx__group_end(group, status);
        }
        cuda_look(group);
        if (epx__group_is_broken(group)) {
            break;
        }
        if (busy) {
            busy_ns = epx__now_ns();
        } else if (epx__now_ns() - busy_ns < SPIN_NS) {
            epx__pause();
        } else {
            (void)nanosleep(&pause, NULL);
        }
    }
    if (epx__group_is_broken(group)) {
        give_up(proxy);
    }
    return NULL;
}

/* ---- setting up ---- */

static void
find_peers(cuda_proxy_t *proxy)
{
    const epx__nodes_t *nodes = &proxy->group->nodes;
    int32_t rank = proxy->group->rank;

    for (int32_t r = 0; r < proxy->group->num_ranks; r++) {
        if (epx__is_near(nodes, r)) {
            continue;
        }
        proxy->far[proxy->num_far++] = r;
        if (epx__rail(nodes, r, nodes->own) == rank) {
            proxy->forwards[proxy->num_forwards++] = r;
        }
    }
    for (int32_t n = 0; n < nodes->num_nodes; n++) {
        if (n != nodes->own) {
            proxy->rails[proxy->num_nodes++] = epx__rail(nodes, rank, n);
        }
    }
}

/* Arrays of a size that any of them fits, in one allocation each. */
static bool
open_arrays(cuda_proxy_t *proxy)
{
    size_t ranks = (size_t)proxy->group->num_ranks;
    int32_t *lists = calloc(3 * ranks, sizeof(*lists));
    bool *flags = calloc(EPX__NUM_SLOTS * 5 * ranks, sizeof(*flags));
    struct iovec *ranges = calloc(EPX__NUM_SLOTS * EPX__NUM_LANES * ranks,
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
        errand_t *errand = &proxy->errands[i];

        errand->is_met = flags;
        flags += ranks;
        for (int lane = 0; lane < EPX__NUM_LANES; lane++) {
            errand->has_sent[lane] = flags;
            errand->has_come[lane] = flags + ranks;
            errand->ranges[lane] = ranges;
            flags += 2 * ranks;
            ranges += ranks;
        }
    }
    return true;
}

static epx_status_t
open_memory(cuda_proxy_t *proxy)
{
    size_t bytes = proxy->group->map.heap;
    cudaError_t error =
        cuda_pinned_take(sizeof(*proxy->relay), (void **)&proxy->relay);

    if (error == cudaSuccess) {
        error = cuda_pinned_take(bytes, (void **)&proxy->mail);
    }
    if (error != cudaSuccess) {
        return epx__cuda_fail(error, "no pinned memory for other nodes");
    }
    proxy->group->net_control = calloc(1, bytes);
    return proxy->group->net_control != NULL
               ? EPX_OK
               : epx__fail(EPX_ERR_NO_MEMORY, "no memory for other nodes");
}

epx_status_t
cuda_proxy_open(epx_group_t *group)
{
    cuda_engine_t *engine = cuda_engine(group);
    cuda_proxy_t *proxy;
    epx_status_t status;

    engine->view.nodes.num_nodes = group->nodes.num_nodes;
    engine->view.nodes.own = group->nodes.own;
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
    status = open_memory(proxy);
    engine->view.nodes.far_rank = proxy->far[0];
    engine->view.nodes.num_forwards = proxy->num_forwards;
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
    status = epx__thread_start(&proxy->thread, proxy_main, proxy,
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
cuda_proxy_close(epx_group_t *group)
{
    cuda_proxy_t *proxy = proxy_of(group);

    if (proxy == NULL) {
        return;
    }
    cuda_pinned_give(proxy->relay);
    cuda_pinned_give(proxy->mail);
    free(group->net_control);
    group->net_control = NULL;
    free(proxy->far);
    free(proxy->errands[0].is_met);
    free(proxy->errands[0].ranges[0]);
    free(proxy);
    cuda_engine(group)->proxy = NULL;
}
