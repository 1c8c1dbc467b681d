/* SPDX-License-Identifier: MIT */
/* The proxy's thread, and the steps that exchange counts. */
#include "engine/cuda/cuda_proxy.h"

#include "core/atomic.h"
#include "core/clock.h"

#include <inttypes.h>
#include <string.h>

/* How long it looks again at once after there was something to do, how long it
 * sleeps then, and longer when there has been nothing for a while. */
#define SPIN_NS  50000
#define PAUSE_NS 20000
#define LONG_NS  EPX__NS_PER_MS
#define IDLE_NS  EPX__NS_PER_SEC

/* ---- words and signals ---- */

bool
cuda_words_read(const uint64_t *words, uint64_t step, size_t count, void *to)
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

epx_status_t
cuda_signal_all(const cuda_proxy_t *proxy, uint64_t step, epx__gate_t gate,
                epx__payload_t payload, const void *from, size_t bytes)
{
    epx_status_t status = EPX_OK;

    for (int32_t i = 0; i < proxy->num_far && status == EPX_OK; i++) {
        if (!cuda_is_out(proxy, proxy->far[i])) {
            status = epx__net_signal(cuda_proxy_net(proxy), proxy->far[i], step,
                                     gate, payload, from, bytes, false);
        }
    }
    return status;
}

epx_status_t
cuda_has_signalled(const cuda_proxy_t *proxy, const cuda_errand_t *errand,
                   int32_t rank, epx__gate_t gate, bool *is_there)
{
    const epx_group_t *group = proxy->group;
    uint64_t step = epx__load_acquire_u64(epx__map_arrival(
        &group->map, group->net_control, errand->step, gate, (uint32_t)rank));

    *is_there = step == errand->step;
    return step <= errand->step ? EPX_OK
                                : epx__fail(EPX_ERR_PEER_DATA,
                                            "rank %d signalled step %" PRIu64
                                            " in what is step %" PRIu64,
                                            rank, step, errand->step);
}

/* ---- counts ---- */

#define ROW_WORDS (sizeof(epx__count_row_t) / sizeof(uint32_t))

static epx__count_row_t *
row_of(const cuda_proxy_t *proxy, uint64_t step, int32_t rank)
{
    return epx__map_counts(&proxy->group->map, proxy->group->net_control, step,
                           (uint32_t)rank);
}

/* The numbers that follow a row. */
static size_t
num_counts(const cuda_proxy_t *proxy, const cuda_errand_t *errand)
{
    return (size_t)proxy->group->num_ranks + errand->num_experts;
}

bool
cuda_counts_read(cuda_proxy_t *proxy, uint64_t step)
{
    const uint64_t *words =
        cuda_words(proxy, step, proxy->group->rank) + EPX__POST_WORDS;
    cuda_errand_t *errand = cuda_errand(proxy, step);
    epx__count_row_t *row = row_of(proxy, step, proxy->group->rank);

    if (!cuda_words_read(words, step, ROW_WORDS, row)) {
        return false;
    }
    errand->num_experts = row->key.num_experts;
    return cuda_words_read(words + ROW_WORDS, step, num_counts(proxy, errand),
                           row + 1);
}

epx_status_t
cuda_counts_send(cuda_proxy_t *proxy, uint64_t step, epx__gate_t gate)
{
    const epx__count_row_t *row = row_of(proxy, step, proxy->group->rank);
    size_t count = num_counts(proxy, cuda_errand(proxy, step));

    return cuda_signal_all(proxy, step, gate, EPX__PAYLOAD_COUNTS, row,
                           sizeof(*row) + count * sizeof(uint32_t));
}

void
cuda_counts_take(const cuda_proxy_t *proxy, const cuda_errand_t *errand,
                 int32_t rank)
{
    uint64_t *words = cuda_words(proxy, errand->step, rank) + EPX__POST_WORDS;

    /* As many as this rank's kernels look at: they compare the plans. */
    tell_words(words, errand->step, ROW_WORDS + num_counts(proxy, errand),
               row_of(proxy, errand->step, rank));
}

static epx_status_t
go_on_counts(const cuda_proxy_t *proxy, cuda_errand_t *errand, bool *busy_p)
{
    bool all = true;

    for (int32_t i = 0; i < proxy->num_far; i++) {
        int32_t rank = proxy->far[i];
        bool is_there = errand->is_met[rank] || cuda_is_out(proxy, rank);
        epx_status_t status = EPX_OK;

        if (!is_there) {
            status = cuda_has_signalled(proxy, errand, rank, EPX__GATE_READY,
                                        &is_there);
        }
        if (status != EPX_OK) {
            return status;
        }
        if (is_there && !errand->is_met[rank] && !cuda_is_out(proxy, rank)) {
            cuda_counts_take(proxy, errand, rank);
            errand->is_met[rank] = true;
            *busy_p = true;
        }
        all = all && is_there;
    }
    errand->step = all ? 0 : errand->step;
    return EPX_OK;
}

/* ---- the thread ---- */

static void
begin_errand(const cuda_proxy_t *proxy, cuda_errand_t *errand, uint64_t step)
{
    size_t num_ranks = (size_t)proxy->group->num_ranks;

    errand->step = step;
    errand->is_counts = false;
    errand->done = (epx__net_done_t){ 0 };
    memset(errand->is_met, 0, num_ranks);
    for (int lane = 0; lane < EPX__NUM_LANES; lane++) {
        memset(errand->has_sent[lane], 0, num_ranks);
        memset(errand->has_come[lane], 0, num_ranks);
    }
}

/* Whether a step of counts has begun to be told. */
static bool
has_counts(const cuda_proxy_t *proxy, uint64_t step)
{
    const uint64_t *words = cuda_words(proxy, step, proxy->group->rank);

    return (uint32_t)(epx__load_acquire_u64(&words[EPX__POST_WORDS]) >> 32) ==
           (uint32_t)step;
}

/* The next step, if this rank's kernels have begun it and all that they tell is
 * there.  Trips begin before anything is told. */
static epx_status_t
take_up(cuda_proxy_t *proxy, bool *busy_p)
{
    uint64_t step = proxy->last_step + 1;
    cuda_errand_t *errand = cuda_errand(proxy, step);
    /* In this order: a step that is both has begun before it tells counts.
     * Released by begin_trip in cuda_rail.cu. */
    bool is_told = has_counts(proxy, step);
    bool is_op = epx__load_acquire_u64(&cuda_trip(proxy, step)->begun) == step;
    epx_status_t status = EPX_OK;
    bool taken;

    /* While the slot's last step is open, its kernels wait, too: wait_free. */
    if (errand->step != 0 || (!is_op && !is_told)) {
        return EPX_OK;
    }
    begin_errand(proxy, errand, step);
    if (is_op) {
        taken = cuda_op_take_up(proxy, step, &status);
    } else {
        taken = cuda_counts_read(proxy, step);
    }
    if (!taken) {
        errand->step = 0;
        return EPX_OK;
    }
    if (!is_op) {
        errand->is_counts = true;
        epx__net_step_begin(cuda_proxy_net(proxy), step);
        status = cuda_counts_send(proxy, step, EPX__GATE_READY);
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
        cuda_errand_t *errand = &proxy->errands[i];

        if (errand->step == 0) {
            continue;
        }
        status = errand->is_counts ? go_on_counts(proxy, errand, busy_p)
                                   : cuda_op_go_on(proxy, errand, busy_p);
        *open_p = *open_p || errand->step != 0;
    }
    return status;
}

/* The group is broken, or its device: nothing is sent or waited for any more.
 */
static void
give_up(cuda_proxy_t *proxy)
{
    int64_t deadline = epx__deadline_ns(epx__group_patience_ns(proxy->group));

    for (int i = 0; i < EPX__NUM_SLOTS; i++) {
        cuda_errand_t *errand = &proxy->errands[i];

        if (errand->step != 0 && !errand->is_counts) {
            epx__net_abandon(cuda_proxy_net(proxy), &errand->done, deadline);
        }
        errand->step = 0;
    }
}

/* Nothing was to be done, for so long now. */
static void
rest(int64_t idle_ns)
{
    const struct timespec pause = { 0, idle_ns < IDLE_NS ? PAUSE_NS : LONG_NS };

    if (idle_ns < SPIN_NS) {
        epx__pause();
    } else {
        (void)nanosleep(&pause, NULL);
    }
}

void *
cuda_proxy_main(void *argument)
{
    cuda_proxy_t *proxy = argument;
    epx_group_t *group = proxy->group;
    int64_t busy_ns = epx__now_ns();
    int64_t deadline = INT64_MAX; /* once it is to end */
    bool ends, busy, open;

    cuda_enter_thread(group->device_ordinal);
    do {
        epx_status_t status;

        /* First: kernels have all run by then, and what they began is seen. */
        ends = epx__load_u32(&proxy->ends) != 0;
        if (ends && deadline == INT64_MAX) {
            deadline = epx__deadline_ns(group->timeout_ns);
        }
        busy = false;
        status = look_at_all(proxy, &busy, &open);
        if (status != EPX_OK) {
            epx__group_end(group, status);
        }
        cuda_look(group);
        if (epx__group_is_broken(group) || epx__now_ns() >= deadline) {
            break;
        }
        if (busy) {
            busy_ns = epx__now_ns();
        } else {
            rest(epx__now_ns() - busy_ns);
        }
    } while (!ends || open || busy);
    if (open || epx__group_is_broken(group)) {
        give_up(proxy);
    }
    return NULL;
}
