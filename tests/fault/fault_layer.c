/* SPDX-License-Identifier: MIT */
/* A layer whose every received row and every sum is known beforehand: experts
 * give back what they get, and all numbers are small whole ones. */
#include "conformance/rng.h"
#include "fault.h"

#ifdef EPX_TEST_CUDA
#include <cuda_runtime_api.h>
#endif
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { TOPK = 3, EXPERTS = 7, MOST_TOKENS = 12 };

struct fault_layers {
    const fault_round_t *round;
    epx_group_t *group;
    epx_group_info_t info;
    epx_queue_t *queue;
    epx_plan_t *plan;
    void (*at)(void *context, int32_t layer, fault_point_t point);
    void *context;
    int64_t num_rows; /* that recv holds */
    int64_t num_tokens;
    int64_t topk_idx[MOST_TOKENS * TOPK];
    float *x;   /* [MOST_TOKENS, H] */
    float *out; /* [MOST_TOKENS, H] */
    float *recv;
    int32_t *src_token;
    int32_t masked[FAULT_MAX_RANKS + FAULT_MAX_NEWCOMERS];
    uint8_t dropped[MOST_TOKENS * TOPK];
    uint64_t free_bytes; /* of the heap, without a plan */
    bool is_first;       /* the next layer is its epoch's, after a mask */
};

/* Whether routing comes with the dispatch.  With a plan of an earlier epoch
 * only when all must have one: a card's may be made while a peer's is not. */
static bool
routing_rides(const fault_layers_t *l)
{
    const fault_round_t *round = l->round;
    bool all_have_plans = round->phase == FAULT_AT_SIGNAL && round->which > 8;

    return l->plan != NULL && round->routes_ride &&
           (!l->is_first || all_have_plans);
}

static float
value_of(int32_t rank, int64_t token, int32_t layer, int64_t h)
{
    switch (h) {
    case 0:
        return (float)rank;
    case 1:
        return (float)token;
    case 2:
        return (float)layer;
    default:
        return (float)(rank * 100 + token * 7 + layer % 11 + h % 13);
    }
}

/* Some tokens, each to some experts, no expert twice. */
static void
draw_routing(fault_layers_t *l, int32_t layer)
{
    rng_t rng = rng_of(l->round->seed, (uint64_t)l->info.rank, (uint64_t)layer);

    l->num_tokens = rng_int(&rng, 0, MOST_TOKENS);
    for (int64_t t = 0; t < l->num_tokens; t++) {
        int64_t first = rng_int(&rng, 0, EXPERTS - 1);
        int64_t stride = rng_int(&rng, 1, 2);

        for (int64_t k = 0; k < TOPK; k++) {
            l->topk_idx[t * TOPK + k] =
                rng_one_in(&rng, 8) ? -1 : (first + k * stride) % EXPERTS;
        }
        for (int64_t h = 0; h < l->round->hidden; h++) {
            l->x[t * l->round->hidden + h] =
                value_of(l->info.rank, t, layer, h);
        }
    }
}

static int32_t
rank_of_expert(const fault_layers_t *l, int64_t expert)
{
    for (int32_t rank = 0;; rank++) {
        int32_t first = 0, count = 0;

        (void)epx_local_experts(EXPERTS, l->info.num_ranks, rank, &first,
                                &count);
        if (expert < first + count) {
            return rank;
        }
    }
}

/* How often the token's row comes back. */
static int32_t
multiplicity(const fault_layers_t *l, int64_t t)
{
    const int64_t *experts = &l->topk_idx[t * TOPK];
    int32_t count = 0;

    for (int k = 0; k < TOPK; k++) {
        bool counts =
            experts[k] >= 0 && l->masked[rank_of_expert(l, experts[k])] == 0;

        for (int j = 0; j < k && counts; j++) {
            counts =
                l->round->layout != EPX_LAYOUT_RANK_MAJOR || experts[j] < 0 ||
                rank_of_expert(l, experts[j]) != rank_of_expert(l, experts[k]);
        }
        count += counts;
    }
    return count;
}

static const char *
check_out(const fault_layers_t *l, int32_t layer)
{
    for (int64_t t = 0; t < l->num_tokens; t++) {
        float times = (float)multiplicity(l, t);

        for (int64_t h = 0; h < l->round->hidden; h++) {
            if (l->out[t * l->round->hidden + h] !=
                times * value_of(l->info.rank, t, layer, h)) {
                return "a sum of a combine is wrong";
            }
        }
    }
    return NULL;
}

static const char *
check_dropped(const fault_layers_t *l, const epx_plan_counts_t *counts)
{
    int64_t num_dropped = 0;

    for (int64_t i = 0; i < l->num_tokens * TOPK; i++) {
        int64_t expert = l->topk_idx[i];
        uint8_t drops =
            expert >= 0 && l->masked[rank_of_expert(l, expert)] != 0;

        num_dropped += drops;
        if (l->dropped[i] != drops) {
            return "an entry is dropped, or not, against the masks";
        }
    }
    return counts->num_dropped == num_dropped ? NULL : "num_dropped is wrong";
}

/* A row that says whose it is must be all that. */
static bool
row_is_right(const fault_layers_t *l, int64_t row, int32_t rank, int32_t layer)
{
    const float *x = &l->recv[row * l->round->hidden];

    for (int64_t h = 0; h < l->round->hidden; h++) {
        if (x[h] != value_of(rank, l->src_token[row], layer, h)) {
            return false;
        }
    }
    return true;
}

static const char *
check_received(const fault_layers_t *l, const epx_plan_counts_t *counts,
               int32_t layer)
{
    int64_t row = 0;

    if (l->round->layout == EPX_LAYOUT_RANK_MAJOR) {
        for (int32_t rank = 0; rank < l->info.num_ranks; rank++) {
            if (l->masked[rank] != 0 && counts->rank_tokens[rank] != 0) {
                return "a masked rank has sent tokens";
            }
            for (int64_t i = 0; i < counts->rank_tokens[rank]; i++, row++) {
                if (!row_is_right(l, row, rank, layer)) {
                    return "a received row is wrong";
                }
            }
        }
        return NULL;
    }
    for (int32_t e = 0; e < counts->num_local_experts; e++) {
        for (row = counts->expert_offsets[e];
             row < counts->expert_offsets[e] + counts->expert_rows[e]; row++) {
            float rank = l->recv[row * l->round->hidden];

            if (rank < 0 || rank >= (float)l->info.num_ranks ||
                l->masked[(int32_t)rank] != 0 ||
                !row_is_right(l, row, (int32_t)rank, layer)) {
                return "a received row of an expert is wrong";
            }
        }
    }
    return NULL;
}

#ifdef EPX_TEST_CUDA

static epx_status_t
settle(const fault_layers_t *l, epx_status_t status)
{
    (void)cudaStreamSynchronize(NULL);
    return status == EPX_OK ? epx_group_status(l->group) : status;
}

#else

/* With a queue, wait for what the call has queued. */
static epx_status_t
settle(const fault_layers_t *l, epx_status_t status)
{
    return status == EPX_OK && l->queue != NULL
               ? epx_queue_synchronize(l->queue)
               : status;
}

#endif

/* Unless the routing comes with the dispatch. */
static epx_status_t
plan_and_count(fault_layers_t *l, int32_t layer, epx_plan_counts_t *counts)
{
    epx_plan_args_t args = EPX_PLAN_ARGS_INIT;
    epx_status_t status;

    draw_routing(l, layer);
    l->at(l->context, layer, POINT_BEFORE_PLAN);
    if (routing_rides(l)) {
        return EPX_OK;
    }
    if (l->plan == NULL) {
        args.layout = l->round->layout;
        args.num_experts = EXPERTS;
        args.topk = TOPK;
        args.num_tokens = l->num_tokens;
        args.topk_idx = l->topk_idx;
        args.max_tokens_per_rank = MOST_TOKENS;
        if (l->round->is_split && l->round->has_slots) {
            args.send_only_row_bytes =
                (int64_t)sizeof(float) * l->round->hidden;
        }
        status = epx_plan_create(l->group, &args, l->queue, &l->plan);
    } else {
        status = epx_plan_update(l->plan, l->num_tokens, l->topk_idx, l->queue);
    }
    status = settle(l, status);
    l->at(l->context, layer, POINT_BEFORE_COUNTS);
    return status == EPX_OK ? epx_plan_counts(l->plan, counts) : status;
}

/* The second half of a send-only operation. */
static epx_status_t
complete(fault_layers_t *l, int32_t layer, fault_point_t point,
         epx_status_t status)
{
    status = settle(l, status);
    if (status != EPX_OK || !l->round->is_split) {
        return status;
    }
    l->at(l->context, layer, point);
    return settle(l, epx_complete(l->plan, l->queue));
}

epx_status_t
fault_layers_run(fault_layers_t *l, int32_t layer, const char **wrong_p)
{
    epx_plan_counts_t counts = EPX_PLAN_COUNTS_INIT;
    epx_dispatch_args_t dispatch = EPX_DISPATCH_ARGS_INIT;
    epx_combine_args_t combine = EPX_COMBINE_ARGS_INIT;
    bool rides = routing_rides(l);
    epx_status_t status = plan_and_count(l, layer, &counts);

    l->is_first = false;
    *wrong_p = NULL;
    if (status != EPX_OK) {
        return status;
    }
    dispatch.x = l->x;
    dispatch.hidden = l->round->hidden;
    dispatch.dtype = EPX_F32;
    dispatch.recv_x = l->recv;
    dispatch.recv_rows = l->num_rows;
    dispatch.recv_src_token = l->src_token;
    dispatch.dropped = l->dropped;
    dispatch.flags = (l->round->is_split ? EPX_SEND_ONLY : 0) |
                     (rides ? EPX_NEW_ROUTING : 0);
    dispatch.num_tokens = rides ? l->num_tokens : 0;
    dispatch.topk_idx = rides ? l->topk_idx : NULL;
    l->at(l->context, layer, POINT_BEFORE_DISPATCH);
    status = complete(l, layer, POINT_IN_DISPATCH_HOOK,
                      epx_dispatch(l->plan, &dispatch, l->queue));
    if (status == EPX_OK && rides) {
        status = epx_plan_counts(l->plan, &counts);
    }
    if (status != EPX_OK) {
        return status;
    }
    *wrong_p = check_received(l, &counts, layer);
    if (*wrong_p == NULL) {
        *wrong_p = check_dropped(l, &counts);
    }
    l->at(l->context, layer, POINT_BETWEEN);
    combine.x = l->recv;
    combine.num_rows = l->num_rows;
    combine.hidden = l->round->hidden;
    combine.dtype = EPX_F32;
    combine.out = l->out;
    combine.flags = l->round->is_split ? EPX_SEND_ONLY : 0;
    status = complete(l, layer, POINT_IN_COMBINE_HOOK,
                      epx_combine(l->plan, &combine, l->queue));
    if (status == EPX_OK && *wrong_p == NULL) {
        *wrong_p = check_out(l, layer);
    }
    if (status == EPX_OK) {
        l->at(l->context, layer, POINT_AFTER_COMBINE);
    }
    return status;
}

#if FAULT_ON_CARD

/* Zeroed, and seen by the host and by the card. */
static void *
take_shared(size_t bytes)
{
    void *memory = NULL;

    return cudaMallocManaged(&memory, bytes, cudaMemAttachGlobal) == cudaSuccess
               ? memset(memory, 0, bytes)
               : NULL;
}

static void
give_shared(void *memory)
{
    (void)cudaFree(memory);
}

#else

static void *
take_shared(size_t bytes)
{
    return calloc(1, bytes);
}

static void
give_shared(void *memory)
{
    free(memory);
}

#endif

/* In the heap or elsewhere. */
static void *
take(const fault_layers_t *l, size_t bytes)
{
    void *memory = NULL;

    if (l->round->in_heap) {
        return epx_mem_alloc(l->group, bytes, &memory) == EPX_OK ? memory
                                                                 : NULL;
    }
    return take_shared(bytes);
}

static void
give(const fault_layers_t *l, void *memory)
{
    if (!l->round->in_heap) {
        give_shared(memory);
    }
}

static uint64_t
free_bytes(epx_group_t *group)
{
    epx_group_info_t info = EPX_GROUP_INFO_INIT;

    (void)epx_group_query(group, &info);
    return info.heap_free_bytes;
}

fault_layers_t *
fault_layers_open(fault_round_t *round, epx_group_t *group,
                  void (*at)(void *context, int32_t layer, fault_point_t point),
                  void *context)
{
    fault_layers_t *l = take_shared(sizeof(*l)); /* arrays are part of it */
    size_t row = (size_t)round->hidden * sizeof(float);

    if (l == NULL) {
        return NULL;
    }
    *l = (fault_layers_t){ .round = round,
                           .group = group,
                           .info = EPX_GROUP_INFO_INIT,
                           .at = at,
                           .context = context };
    (void)epx_group_query(group, &l->info);
    l->num_rows = (int64_t)EXPERTS * l->info.num_ranks * MOST_TOKENS;
    l->x = take(l, MOST_TOKENS * row);
    l->out = take(l, MOST_TOKENS * row);
    l->recv = take(l, (size_t)l->num_rows * row);
    l->src_token = take(l, (size_t)l->num_rows * sizeof(int32_t));
    if (l->x == NULL || l->out == NULL || l->recv == NULL ||
        l->src_token == NULL ||
        (round->is_queued && epx_queue_create(group, &l->queue) != EPX_OK)) {
        fault_layers_close(l);
        return NULL;
    }
    l->free_bytes = free_bytes(group);
    return l;
}

void
fault_layers_mask(fault_layers_t *l, const int32_t *masked)
{
    memcpy(l->masked, masked, (size_t)l->info.num_ranks * sizeof(*masked));
    l->is_first = true;
    if (!l->round->keeps_plan) {
        (void)epx_plan_destroy(l->plan);
        l->plan = NULL;
    }
}

bool
fault_layers_are_clean(fault_layers_t *l)
{
    int64_t give_up = fault_now_ns() + INT64_C(10000000000);
    bool is_clean;

    (void)epx_plan_destroy(l->plan);
    l->plan = NULL;
    do { /* what the victim could write to is free once its end is noticed */
        (void)usleep(100);
        is_clean = free_bytes(l->group) == l->free_bytes ||
                   epx_group_status(l->group) != EPX_OK;
    } while (!is_clean && fault_now_ns() < give_up);
    return is_clean;
}

void
fault_layers_close(fault_layers_t *l)
{
    (void)epx_plan_destroy(l->plan);
    (void)epx_queue_destroy(l->queue);
    give(l, l->x);
    give(l, l->out);
    give(l, l->recv);
    give(l, l->src_token);
    give_shared(l);
}
