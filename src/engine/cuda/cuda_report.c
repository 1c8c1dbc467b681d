/* SPDX-License-Identifier: MIT */
/* The errors that kernels have found, as sentences. */
#include "core/agree.h"
#include "core/atomic.h"
#include "core/rank_list.h"
#include "engine/cuda/cuda_engine.h"

#include <inttypes.h>

static const char *
name_of(uint32_t what)
{
    switch (what) {
    case CUDA_IN_COUNTS:
        return "the exchange of a plan's counts";
    case CUDA_IN_DISPATCH:
        return "a dispatch";
    case CUDA_IN_COMBINE:
        return "a combine";
    case CUDA_IN_RAIL:
        return "an operation between nodes";
    default:
        return "a kernel";
    }
}

static bool
is_missing(const void *context, int32_t rank)
{
    const cuda_report_t *report = context;

    return epx__has_rank(report->missing, rank);
}

static bool
is_any_missing(const cuda_report_t *report)
{
    uint64_t any = 0;

    for (int i = 0; i < EPX_MAX_RANKS / 64; i++) {
        any |= report->missing[i];
    }
    return any != 0;
}

static epx_status_t
timed_out(const epx_group_t *group, const cuda_report_t *report)
{
    double seconds = (double)group->timeout_ns * 1e-9;
    epx__rank_list_t list =
        epx__rank_list_make(group->num_ranks, is_missing, report);

    if (report->what == CUDA_IN_GRID) {
        return epx__fail(EPX_ERR_TIMEOUT,
                         "rank %d timed out after %.3f s waiting for the other "
                         "blocks of its own kernel: its %d SMs are not free",
                         group->rank, seconds, group->num_workers);
    }
    if (report->what == CUDA_IN_RAIL && !is_any_missing(report)) {
        return epx__fail(EPX_ERR_TIMEOUT,
                         "rank %d timed out after %.3f s waiting for other "
                         "nodes to acknowledge what it has sent",
                         group->rank, seconds);
    }
    return epx__fail(EPX_ERR_TIMEOUT,
                     "rank %d timed out in %s after %.3f s, waiting for %s",
                     group->rank, name_of(report->what), seconds, list.text);
}

static epx_status_t
mismatched(const epx_group_t *group, const cuda_report_t *report)
{
    const char *what = name_of(report->what);

    for (int i = 0; i < 2; i++) {
        if (report->posts[i].step != report->step) {
            return epx__agree_not(report->rank[i], group->rank, what);
        }
    }
    return epx__agree_signatures(what, report->rank[0],
                                 &report->posts[0].signature, report->rank[1],
                                 &report->posts[1].signature);
}

/* The device's error, as this thread's last; EPX_OK: none, or it is known. */
static epx_status_t
find_error(epx_group_t *group)
{
    const cuda_report_t *report = cuda_engine(group)->view.report;
    epx_status_t status;

    /* Released by report_publish in cuda_step.cuh. */
    status = (epx_status_t) -
             (int32_t)__atomic_load_n(&report->status, __ATOMIC_ACQUIRE);
    if (status == EPX_OK || epx__group_is_broken(group)) {
        return EPX_OK;
    }
    if (epx__load_u32(&report->status) == 0) {
        return EPX_OK; /* of an epoch that has ended this moment */
    }
    switch (status) {
    case EPX_ERR_TIMEOUT:
        status = timed_out(group, report);
        break;
    case EPX_ERR_MISMATCH:
        status = mismatched(group, report);
        break;
    default:
        status = epx__fail(
            EPX_ERR_PEER_DATA,
            "rank %d sent numbers in %s that cannot be: %" PRIu64
            " rows of x at offset %" PRIu64 ", scales at %" PRIu64,
            report->rank[0], name_of(report->what), report->posts[0].num_rows,
            report->posts[0].offset[EPX__ARRAY_X],
            report->posts[0].offset[EPX__ARRAY_SCALES]);
    }
    if (status == EPX_OK) { /* what the device saw has changed since */
        status = epx__fail(EPX_ERR_PEER_DATA,
                           "the ranks disagreed in %s, but no longer do",
                           name_of(report->what));
    }
    return status;
}

epx_status_t
cuda_check(epx_group_t *group)
{
    epx_status_t status = find_error(group);

    return status == EPX_OK ? EPX_OK : epx__group_break(group, status);
}

void
cuda_look(epx_group_t *group)
{
    epx_status_t status = find_error(group);

    if (status != EPX_OK) {
        epx__group_end(group, status);
    }
}

static epx_status_t
bad_expert(const cuda_plan_t *plan, const cuda_refusal_t *refusal)
{
    uint64_t entry = refusal->bad_entry - 1;
    uint32_t topk = plan->base.key.topk;

    return epx__fail(EPX_ERR_EXPERT,
                     "topk_idx of rank %d has expert %" PRId64
                     " for token %" PRIu64 ", k %" PRIu64
                     "; allowed are -1 to %u, each expert once in a token",
                     refusal->rank, refusal->bad_expert, entry / topk,
                     entry % topk, plan->base.key.num_experts - 1);
}

epx_status_t
cuda_refused(cuda_plan_t *plan)
{
    epx_group_t *group = plan->base.group;
    const cuda_refusal_t *refusal = &plan->seat->record->refusal;
    uint64_t capacity = plan->base.key.recv_capacity;
    epx_status_t status;

    if (!cuda_counts_refused(plan, &status)) {
        return EPX_OK;
    }
    switch (status) {
    case EPX_ERR_EXPERT:
        return bad_expert(plan, refusal);
    case EPX_ERR_CAPACITY:
        return epx__fail(
            EPX_ERR_CAPACITY,
            "rank %d would receive %" PRIu64 " rows; the plan's %s %" PRIu64,
            refusal->rank, refusal->rows,
            capacity > 0 ? "recv_capacity is" : "device can number",
            capacity > 0 ? capacity : (uint64_t)UINT32_MAX);
    case EPX_ERR_MISMATCH: {
        epx__plan_key_t own = plan->base.key;

        own.plan_id = refusal->own_plan_id;
        /* Only some ranks may have seen it: nobody can go on. */
        return epx__group_break(
            group, refusal->key.plan_id == 0
                       ? epx__agree_not(refusal->rank, group->rank,
                                        name_of(CUDA_IN_COUNTS))
                       : epx__agree_keys(group->rank, &own, refusal->rank,
                                         &refusal->key));
    }
    default:
        return epx__group_break(
            group, epx__fail(EPX_ERR_PEER_DATA,
                             "the counts of rank %d cannot be those of its "
                             "tokens with topk %u",
                             refusal->rank, plan->base.key.topk));
    }
}
