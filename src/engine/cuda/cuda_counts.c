/* SPDX-License-Identifier: MIT */
/* A plan's counts, as its kernels tell them: see cuda_record_t. */
#include "core/atomic.h"
#include "core/clock.h"
#include "engine/cuda/cuda_engine.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

/* Those of every group: the verdict, and the counts of ranks and experts. */
static size_t
num_counts(const cuda_plan_t *plan)
{
    return 1 + (size_t)plan->base.group->num_ranks +
           (size_t)plan->base.num_local_experts;
}

/* Then, of some: the most tokens that a rank has, and how many entries were
 * dropped. */
static bool
has_most(const cuda_plan_t *plan)
{
    return cuda_spans_nodes(plan->base.group) &&
           plan->base.key.max_tokens_per_rank == 0;
}

static bool
has_drops(const cuda_plan_t *plan)
{
    return plan->epoch > 0;
}

epx_status_t
cuda_counts_open(cuda_plan_t *plan)
{
    size_t local = (size_t)plan->base.num_local_experts;
    size_t ranks = (size_t)plan->base.group->num_ranks;

    plan->rank_tokens = calloc(ranks + 2 * local + 1, sizeof(int64_t));
    if (plan->rank_tokens == NULL) {
        return epx__fail(EPX_ERR_NO_MEMORY, "no memory for a plan's counts");
    }
    plan->expert_rows = plan->rank_tokens + ranks;
    plan->expert_offsets = plan->expert_rows + local;
    return EPX_OK;
}

void
cuda_counts_close(cuda_plan_t *plan)
{
    free(plan->rank_tokens);
}

void
cuda_counts_clear(cuda_plan_t *plan)
{
    /* Another plan's words could be taken for this one's. */
    memset(plan->seat->record->words, 0,
           (num_counts(plan) + 2) * sizeof(uint64_t));
}

/* Whether word i of the last routing is there; told by word_put. */
static bool
word_is_there(const cuda_plan_t *plan, size_t i, uint32_t *content_p)
{
    uint64_t word = epx__load_acquire_u64(&plan->seat->record->words[i]);

    *content_p = (uint32_t)word;
    return (uint32_t)(word >> 32) == (uint32_t)plan->num_routings;
}

bool
cuda_counts_refused(const cuda_plan_t *plan, epx_status_t *status_p)
{
    uint32_t content;

    if (!word_is_there(plan, 0, &content)) {
        return false; /* not known yet */
    }
    *status_p = (epx_status_t) - (int32_t)content;
    return *status_p != EPX_OK;
}

static int64_t
expert_stride(const cuda_plan_t *plan, int64_t rows)
{
    const epx__plan_key_t *key = &plan->base.key;

    switch ((epx_layout_t)key->layout) {
    case EPX_LAYOUT_RANK_MAJOR:
        return 0;
    case EPX_LAYOUT_EXPERT_SLOTS:
        return (int64_t)epx__rows_per_expert(&plan->base);
    default:
        return (int64_t)epx__round_up((uint64_t)rows, key->expert_alignment);
    }
}

/* What follows from the counts, as cuda_plan.cu reckons it. */
static void
reckon(cuda_plan_t *plan)
{
    bool by_rank = plan->base.key.layout == EPX_LAYOUT_RANK_MAJOR;
    int64_t fixed = (int64_t)epx__plan_fixed_rows(&plan->base);
    int64_t offset = 0;

    plan->num_recv_tokens = 0;
    plan->num_recv_rows = 0;
    for (int32_t r = 0; r < plan->base.group->num_ranks; r++) {
        plan->num_recv_tokens += plan->rank_tokens[r];
    }
    for (int32_t e = 0; e < plan->base.num_local_experts; e++) {
        plan->expert_offsets[e] = offset;
        plan->num_recv_rows += plan->expert_rows[e];
        offset += expert_stride(plan, plan->expert_rows[e]);
    }
    plan->expert_offsets[plan->base.num_local_experts] = offset;
    if (by_rank) {
        plan->num_recv_rows = plan->num_recv_tokens;
        offset = plan->num_recv_tokens;
    }
    plan->num_rows = cuda_plan_is_fixed(plan) ? fixed : offset;
}

/* Take in what the last routing has told, if all of it is there. */
static bool
take_in(cuda_plan_t *plan)
{
    size_t count = num_counts(plan);
    uint32_t content, most = 0, dropped = 0;

    for (size_t i = 1; i < count; i++) {
        if (!word_is_there(plan, i, &content)) {
            return false;
        }
        plan->rank_tokens[i - 1] = content; /* expert_rows follow */
    }
    if ((has_most(plan) && !word_is_there(plan, count, &most)) ||
        (has_drops(plan) && !word_is_there(plan, count + 1, &dropped))) {
        return false;
    }
    plan->most_tokens = most;
    plan->num_dropped = dropped;
    reckon(plan);
    return true;
}

/* Whether the device has told all that it will. */
static bool
is_told(cuda_plan_t *plan)
{
    uint32_t refusal;

    return word_is_there(plan, 0, &refusal) && (refusal != 0 || take_in(plan));
}

/* The stream has run dry without the counts: why? */
static epx_status_t
counts_missing(cuda_plan_t *plan, cudaError_t error)
{
    epx_group_t *group = plan->base.group;
    epx_status_t status = cuda_check(group);

    if (status == EPX_OK) {
        status = epx__group_check(group);
    }
    if (status == EPX_OK && error != cudaSuccess) {
        status = epx__group_break(
            group, epx__cuda_fail(error, "the device has failed"));
    }
    if (status == EPX_OK && !is_told(plan)) {
        status = epx__group_break(
            group, epx__fail(EPX_ERR_SYSTEM, "a plan's kernel ended without "
                                             "telling its counts"));
    }
    return status;
}

epx_status_t
cuda_counts_wait(cuda_plan_t *plan)
{
    int64_t start = epx__now_ns();

    if (plan->is_routed_in_graph && !is_told(plan)) {
        return epx__fail(EPX_ERR_STATE,
                         "the plan's routing is in a graph that has not run "
                         "yet");
    }
    /* Kernels end by their deadlines, and what the caller has queued before
     * them is the caller's to wait for, unless the group fails. */
    while (!is_told(plan)) {
        cudaError_t error;
        struct timespec pause = { 0, 20000 };

        if (epx__now_ns() - start < EPX__NS_PER_MS) {
            continue;
        }
        if (epx__group_is_broken(plan->base.group)) {
            return epx__group_check(plan->base.group);
        }
        error = cudaStreamQuery(plan->stream);
        if (error != cudaErrorNotReady) {
            epx_status_t status = counts_missing(plan, error);

            if (status != EPX_OK) {
                return status;
            }
        }
        (void)cudaGetLastError();
        (void)nanosleep(&pause, NULL);
    }
    return cuda_refused(plan);
}

epx_status_t
cuda_plan_counts(epx_plan_t *base, epx_plan_counts_t *counts)
{
    cuda_plan_t *plan = cuda_plan(base);
    epx_group_t *group = base->group;
    epx_status_t status = epx__group_check(group);

    if (status == EPX_OK) {
        status = cuda_plan_check(plan);
    }
    if (status == EPX_OK) {
        status = epx__cuda_device_enter(group->device_ordinal);
    }
    if (status != EPX_OK) {
        return status;
    }
    status = cuda_counts_wait(plan);
    epx__cuda_device_leave();
    if (status != EPX_OK) {
        return status;
    }
    counts->num_rows = plan->num_rows;
    counts->num_recv_rows = plan->num_recv_rows;
    counts->num_recv_tokens = plan->num_recv_tokens;
    counts->num_dropped = plan->num_dropped;
    counts->first_expert = base->first_expert;
    counts->num_local_experts = base->num_local_experts;
    counts->rank_tokens = plan->rank_tokens;
    counts->expert_rows = plan->expert_rows;
    counts->expert_offsets = plan->expert_offsets;
    return EPX_OK;
}
