/* SPDX-License-Identifier: MIT */
#include "engine/cpu/cpu_lane.h"

#include "core/clock.h"
#include "engine/cpu/cpu.h"
#include "net/net_group.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define BLOCK_ALIGN ((uint64_t)1 << 21)

static epx_status_t
block_grow(cpu_block_t *block, uint64_t bytes)
{
    uint64_t rounded = epx__round_up(bytes, BLOCK_ALIGN);
    void *memory;

    if (bytes <= block->bytes) {
        return EPX_OK;
    }
    memory = mmap(NULL, rounded, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (rounded < bytes || memory == MAP_FAILED) {
        return epx__fail(EPX_ERR_NO_MEMORY,
                         "no memory for %" PRIu64
                         " bytes of what goes between nodes",
                         bytes);
    }
    (void)madvise(memory, rounded, MADV_HUGEPAGE); /* only a hint */
    if (block->memory != NULL) {
        (void)munmap(block->memory, block->bytes);
    }
    *block = (cpu_block_t){ memory, rounded };
    return EPX_OK;
}

static void
block_free(cpu_block_t *block)
{
    if (block->memory != NULL) {
        (void)munmap(block->memory, block->bytes);
    }
}

static void
find_sources(const epx_group_t *group, cpu_rails_t *rails,
             const uint64_t *masked)
{
    const epx__nodes_t *nodes = &group->nodes;
    int32_t *sources = rails->sources[EPX__LANE_OUT];

    rails->num_sources[EPX__LANE_OUT] = 0;
    for (int32_t r = 0; r < group->num_ranks; r++) {
        if (!epx__is_near(nodes, r) && !epx__has_rank(masked, r) &&
            epx__rail(nodes, masked, r, nodes->own) == group->rank) {
            sources[rails->num_sources[EPX__LANE_OUT]++] = r;
        }
    }
    rails->num_sources[EPX__LANE_BACK] = nodes->num_nodes;
    for (int32_t n = 0; n < nodes->num_nodes; n++) {
        rails->sources[EPX__LANE_BACK][n] =
            n == nodes->own ? -1 : epx__rail(nodes, masked, group->rank, n);
    }
}

/* ---- going on without some ranks ---- */

/* A peer that lives answers at once; one that does not is noticed in that time.
 */
static epx_status_t
rest(epx_group_t *group, const uint64_t *masked, uint64_t *last_step_p)
{
    epx__net_rest(epx__group_net(group), masked,
                  epx__deadline_ns(epx__group_patience_ns(group)));
    *last_step_p = group->last_step;
    return EPX_OK;
}

static epx_status_t
renew(epx_group_t *group, const uint64_t *masked, uint64_t last_step)
{
    cpu_rails_t *rails = cpu_engine(group)->rails;
    epx__net_t *net = epx__group_net(group);
    int64_t deadline = epx__deadline_ns(group->timeout_ns);
    epx_status_t status = epx__net_renew(net, masked, last_step, deadline);

    for (int i = 0; i < EPX__NUM_LANES * CPU_LANES && status == EPX_OK; i++) {
        cpu_lane_t *lane = &rails->lanes[i / CPU_LANES][i % CPU_LANES];

        lane->is_taken = false;
        lane->chunk_bytes = 0;
        status = epx__net_forget(net, &lane->done, deadline);
    }
    if (status == EPX_OK) {
        find_sources(group, rails, masked);
    }
    return status;
}

epx_status_t
cpu_rails_open(epx_group_t *group)
{
    static const epx__renewal_t renewal = { rest, renew };
    size_t num_ranks = (size_t)group->num_ranks;
    cpu_rails_t *rails;

    if (group->nodes.num_nodes == 1) {
        return EPX_OK;
    }
    rails = calloc(1, sizeof(*rails));
    cpu_engine(group)->rails = rails;
    if (rails != NULL) {
        rails->sources[EPX__LANE_OUT] = calloc(num_ranks, sizeof(int32_t));
        rails->sources[EPX__LANE_BACK] = calloc(num_ranks, sizeof(int32_t));
        rails->wanted = calloc(num_ranks, sizeof(bool));
        rails->weights = calloc(num_ranks, sizeof(*rails->weights));
    }
    if (rails == NULL || rails->sources[EPX__LANE_OUT] == NULL ||
        rails->sources[EPX__LANE_BACK] == NULL || rails->wanted == NULL ||
        rails->weights == NULL) {
        return epx__fail(EPX_ERR_NO_MEMORY, "no memory for %d ranks",
                         group->num_ranks);
    }
    find_sources(group, rails, group->masked);
    group->renewal = &renewal;
    for (uint32_t kind = 0; kind < EPX__NUM_LANES; kind++) {
        for (uint32_t i = 0; i < CPU_LANES; i++) {
            rails->lanes[kind][i].kind = (epx__lane_t)kind;
            rails->lanes[kind][i].channel = (kind * CPU_LANES + i) * CPU_CHUNKS;
        }
    }
    return EPX_OK;
}

void
cpu_rails_close(cpu_rails_t *rails)
{
    if (rails == NULL) {
        return;
    }
    for (int kind = 0; kind < EPX__NUM_LANES; kind++) {
        for (int i = 0; i < CPU_LANES; i++) {
            block_free(&rails->lanes[kind][i].in);
            block_free(&rails->lanes[kind][i].out);
        }
        free(rails->sources[kind]);
    }
    free(rails->weights);
    free(rails->wanted);
    free(rails);
}

/* Calls for every slot of a lane. */
static epx_status_t
each_slot(epx_group_t *group, cpu_lane_t *lane,
          epx_status_t (*call)(epx_group_t *group, cpu_lane_t *lane,
                               int32_t index, int chunk, int32_t source))
{
    const cpu_rails_t *rails = cpu_engine(group)->rails;
    epx_status_t status = EPX_OK;

    for (int32_t i = 0; i < rails->num_sources[lane->kind]; i++) {
        int32_t source = rails->sources[lane->kind][i];

        for (int c = 0; c < CPU_CHUNKS && source >= 0 && status == EPX_OK;
             c++) {
            status = call(group, lane, i, c, source);
        }
    }
    return status;
}

static epx_status_t
open_slot(epx_group_t *group, cpu_lane_t *lane, int32_t index, int chunk,
          int32_t source)
{
    /* The next turn comes only after the next post, when this one is over. */
    char *at = cpu_lane_chunk(lane, index, chunk);
    void *const halves[2] = { at, at };

    return epx__net_slot_open(epx__group_net(group),
                              lane->channel + (uint32_t)chunk, source,
                              lane->turn + 1, halves, lane->chunk_bytes);
}

static epx_status_t
close_slot(epx_group_t *group, cpu_lane_t *lane, int32_t index, int chunk,
           int32_t source)
{
    (void)index;
    return epx__net_slot_close(epx__group_net(group),
                               lane->channel + (uint32_t)chunk, source,
                               epx__deadline_ns(group->timeout_ns));
}

static epx_status_t
release_slot(epx_group_t *group, cpu_lane_t *lane, int32_t index, int chunk,
             int32_t source)
{
    (void)index;
    epx__net_slot_release(epx__group_net(group),
                          lane->channel + (uint32_t)chunk, source, lane->turn);
    return EPX_OK;
}

/* Nobody sends to a lane that is not taken.  Its slots are closed whether all
 * of them are open or not: what has failed before may have left some, and until
 * then the memory is kept. */
static epx_status_t
lane_grow(epx_group_t *group, cpu_lane_t *lane, uint64_t chunk_bytes)
{
    const cpu_rails_t *rails = cpu_engine(group)->rails;
    uint64_t regions = (uint64_t)rails->num_sources[lane->kind] * CPU_CHUNKS;
    uint64_t rounded = epx__round_up(chunk_bytes, EPX__PAGE);
    uint64_t bytes;
    epx_status_t status;

    if (rounded < chunk_bytes ||
        __builtin_mul_overflow(rounded, regions, &bytes)) {
        return epx__fail(EPX_ERR_SHAPE,
                         "%" PRIu64 " chunks of %" PRIu64
                         " bytes between nodes exceed 2^64 bytes",
                         regions, chunk_bytes);
    }
    lane->chunk_bytes = 0;
    status = each_slot(group, lane, close_slot);
    if (status == EPX_OK) {
        status = block_grow(&lane->in, bytes);
    }
    if (status == EPX_OK) {
        lane->chunk_bytes = rounded;
        status = each_slot(group, lane, open_slot);
    }
    if (status != EPX_OK) {
        lane->chunk_bytes = 0;
    }
    return status;
}

/* An error of the net breaks the group, if it is not the echo of what did. */
static epx_status_t
settle(epx_group_t *group, epx_status_t status)
{
    if (status == EPX_OK) {
        return EPX_OK;
    }
    return epx__group_is_broken(group) ? epx__group_restore(group)
                                       : epx__group_break(group, status);
}

/* Until all that was sent from the lane has been acknowledged. */
static epx_status_t
wait_acknowledged(epx_group_t *group, cpu_lane_t *lane, const char *what)
{
    epx_status_t status =
        epx__net_done_wait(epx__group_net(group), &lane->done,
                           epx__deadline_ns(group->timeout_ns), what);

    return settle(group, status);
}

/* The first that nothing is sent from any more, if there is one. */
static int
find_free(const cpu_lane_t *lanes)
{
    int first = CPU_LANES;

    for (int i = CPU_LANES - 1; i >= 0; i--) {
        if (!lanes[i].is_taken &&
            (first == CPU_LANES || epx__net_done_test(&lanes[i].done))) {
            first = i;
        }
    }
    return first;
}

epx_status_t
cpu_lane_take(epx_group_t *group, epx__lane_t kind, uint64_t chunk_bytes,
              cpu_lane_t **lane_p)
{
    cpu_lane_t *lanes = cpu_engine(group)->rails->lanes[kind];
    uint64_t least = chunk_bytes < EPX__PAGE ? EPX__PAGE : chunk_bytes;
    epx_status_t status;
    int i = find_free(lanes);

    if (i == CPU_LANES) {
        return epx__window_full();
    }
    status = wait_acknowledged(group, &lanes[i], "sending to other nodes");
    if (status == EPX_OK && lanes[i].chunk_bytes < least) {
        status = lane_grow(group, &lanes[i], least);
    }
    if (status == EPX_OK) {
        lanes[i].is_taken = true;
        lanes[i].lends = false;
        lanes[i].turn++;
        lanes[i].done = (epx__net_done_t){ 0 };
        *lane_p = &lanes[i];
    }
    return status;
}

void
cpu_lane_give(epx_group_t *group, cpu_lane_t *lane)
{
    if (lane == NULL) {
        return;
    }
    if (epx__group_is_broken(group)) {
        /* What was sent may lie in the caller's arrays. */
        epx__net_abandon(epx__group_net(group), &lane->done,
                         epx__deadline_ns(epx__group_patience_ns(group)));
        return;
    }
    (void)each_slot(group, lane, release_slot);
    lane->is_taken = false;
}

char *
cpu_lane_chunk(const cpu_lane_t *lane, int32_t source, int chunk)
{
    return lane->in.memory + ((uint64_t)source * CPU_CHUNKS + (uint64_t)chunk) *
                                 lane->chunk_bytes;
}

epx_status_t
cpu_lane_reserve(cpu_lane_t *lane, uint64_t bytes)
{
    lane->out_used = 0;
    return block_grow(&lane->out, bytes);
}

void *
cpu_lane_out(cpu_lane_t *lane, uint64_t bytes)
{
    char *at = lane->out.memory + lane->out_used;

    lane->out_used += epx__round_up(bytes, EPX__LINE);
    return at;
}

void
cpu_lane_announce(const cpu_lane_t *lane, epx__post_t *post)
{
    post->lane_channel[lane->kind] = lane->channel;
    post->lane_turn[lane->kind] = lane->turn;
}

epx_status_t
cpu_lane_check(int32_t rank, epx__lane_t kind, const epx__post_t *post)
{
    uint32_t first = (uint32_t)kind * CPU_LANES * CPU_CHUNKS;
    uint32_t channel = post->lane_channel[kind] - first;

    if (channel >= CPU_LANES * CPU_CHUNKS || channel % CPU_CHUNKS != 0 ||
        post->lane_turn[kind] == 0) {
        return epx__fail(EPX_ERR_PEER_DATA,
                         "rank %d posted turn %" PRIu64 " of channel %" PRIu32
                         " for tokens of other nodes, which it cannot have",
                         rank, post->lane_turn[kind], post->lane_channel[kind]);
    }
    return EPX_OK;
}

epx_status_t
cpu_lane_send(epx_group_t *group, cpu_lane_t *lane, int32_t peer,
              cpu_turn_t turn, const struct iovec *ranges, uint32_t num_ranges,
              bool is_for_later)
{
    epx__net_send_t send = {
        .peer = peer,
        .channel = turn.channel,
        .turn = turn.number,
        .ranges = ranges,
        .num_ranges = num_ranges,
        .done = &lane->done,
        .is_for_later = is_for_later,
    };

    for (uint32_t i = 0; i < num_ranges; i++) {
        send.total += ranges[i].iov_len;
    }
    return settle(group, epx__net_send(epx__group_net(group), &send));
}

epx_status_t
cpu_lane_wait_sent(epx_group_t *group, cpu_lane_t *lane, const char *what)
{
    if (!lane->lends) {
        return settle(group, EPX_OK);
    }
    /* Peers most likely lend, too. */
    epx__net_acknowledge(epx__group_net(group));
    return wait_acknowledged(group, lane, what);
}

epx_status_t
cpu_turn_wait(epx_group_t *group, cpu_turn_t turn, const char *what)
{
    epx_status_t status =
        epx__net_wait(epx__group_net(group), turn.channel, turn.number,
                      cpu_engine(group)->rails->wanted,
                      epx__deadline_ns(group->timeout_ns), what);

    return settle(group, status);
}

epx_status_t
cpu_turn_check(epx_group_t *group, cpu_turn_t turn, int32_t rank,
               uint64_t bytes)
{
    uint64_t got = 0;

    (void)epx__net_arrived(epx__group_net(group), turn.channel, rank,
                           turn.number, &got);
    if (got != bytes) {
        return epx__group_break(
            group, epx__fail(EPX_ERR_PEER_DATA,
                             "rank %d sent %" PRIu64
                             " bytes of tokens from its node; its counts make "
                             "%" PRIu64,
                             rank, got, bytes));
    }
    return EPX_OK;
}

epx_status_t
cpu_slot_channel_take(epx_group_t *group, uint32_t *channel_p, uint64_t *turn_p)
{
    cpu_rails_t *rails = cpu_engine(group)->rails;
    uint32_t i = 0;

    while (i < CPU_NUM_SLOT_CHANNELS && rails->slot_channels[i].is_taken) {
        i++;
    }
    if (i == CPU_NUM_SLOT_CHANNELS) {
        return epx__fail(EPX_ERR_STATE,
                         "the group has %d plans with send_only_row_bytes, as "
                         "many as there can be across nodes; destroy one first",
                         CPU_NUM_SLOT_CHANNELS);
    }
    rails->slot_channels[i].is_taken = true;
    *channel_p = CPU_SLOT_CHANNEL + i;
    *turn_p = rails->slot_channels[i].turn + 1;
    return EPX_OK;
}

void
cpu_slot_channel_give(epx_group_t *group, uint32_t channel, uint64_t turn)
{
    cpu_rails_t *rails = cpu_engine(group)->rails;
    uint32_t i = channel - CPU_SLOT_CHANNEL;

    rails->slot_channels[i].turn = turn;
    rails->slot_channels[i].is_taken = false;
}
