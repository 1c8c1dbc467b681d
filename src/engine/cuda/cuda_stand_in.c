/* SPDX-License-Identifier: MIT */
/* Arrays that peers must reach: in the heap, or stood in for there.
 *
 * Operations follow each other on the device, and peers write to a block, or
 * read it, only while the operation runs that has told them of it.  So a block
 * is free for the group's next operation as soon as this one is on its way,
 * but for those that a send-only operation needs until epx_complete, and those
 * that a graph has come to know.  To the heap blocks go back with the last
 * plan, or when it is full. */
#include "core/atomic.h"
#include "engine/cuda/cuda_engine.h"

#include <inttypes.h>
#include <stdlib.h>

#define FINEST EPX__PAGE
#define SLACK  ((uint64_t)1 << 16)

typedef struct cuda_stand_in {
    struct cuda_stand_in *next;
    cuda_block_t block;
    const cuda_plan_t *plan; /* that has it; NULL: it is idle */
    bool is_new;             /* taken by the operation that is being prepared */
    bool in_graph;
} cuda_stand_in_t;

/* ---- the heap ---- */

static void
count_idle(cuda_engine_t *engine)
{
    uint64_t bytes = 0;

    for (const cuda_stand_in_t *it = engine->stand_ins; it != NULL;
         it = it->next) {
        bytes += it->plan == NULL ? it->block.bytes : 0;
    }
    epx__store_release_u64(&engine->idle_bytes, bytes);
}

uint64_t
cuda_idle_bytes(const epx_group_t *group)
{
    return epx__load_acquire_u64(&cuda_engine(group)->idle_bytes);
}

/* Nothing runs that could use them. */
static void
free_idle(epx_group_t *group)
{
    cuda_stand_in_t **link = &cuda_engine(group)->stand_ins;

    while (*link != NULL) {
        cuda_stand_in_t *it = *link;

        if (it->plan != NULL) {
            link = &it->next;
            continue;
        }
        *link = it->next;
        epx__group_heap_free(group, it->block.base);
        free(it);
    }
    count_idle(cuda_engine(group));
}

static void
reclaim_locked(epx_group_t *group)
{
    cuda_plans_reclaim(group, true);
    if (cuda_idle_bytes(group) > 0 &&
        cuda_wait_for_last(cuda_engine(group)) == cudaSuccess) {
        /* What the kernels found decides whether peers may still write. */
        (void)cuda_check(group);
        free_idle(group);
    }
}

void
cuda_reclaim(epx_group_t *group)
{
    if (epx__cuda_device_enter(group->device_ordinal) != EPX_OK) {
        return;
    }
    (void)pthread_mutex_lock(&group->op_lock);
    reclaim_locked(group);
    (void)pthread_mutex_unlock(&group->op_lock);
    epx__cuda_device_leave();
}

epx_status_t
cuda_heap_alloc(epx_group_t *group, uint64_t bytes, const char *what,
                void **block_p)
{
    epx_status_t status = epx__heap_alloc(&group->heap, bytes, what, block_p);

    if (status == EPX_ERR_HEAP_EXHAUSTED) {
        reclaim_locked(group);
        status = epx__heap_alloc(&group->heap, bytes, what, block_p);
    }
    return status;
}

/* ---- blocks ---- */

/* The smallest that is free for the operation; none that is so large that
 * another array will want it. */
static cuda_stand_in_t *
find(const cuda_op_t *op, uint64_t bytes)
{
    cuda_stand_in_t *best = NULL;

    for (cuda_stand_in_t *it = cuda_engine(op->plan->base.group)->stand_ins;
         it != NULL; it = it->next) {
        bool is_free = it->plan == NULL ||
                       (it->plan == op->plan && it->in_graph && !it->is_new);

        if (is_free && it->block.bytes >= bytes &&
            it->block.bytes <= 2 * bytes + SLACK &&
            (best == NULL || it->block.bytes < best->block.bytes)) {
            best = it;
        }
    }
    return best;
}

/* Rounded up to a few sizes, so that batches that differ a little share them.
 */
static uint64_t
size_for(uint64_t bytes)
{
    uint64_t unit = FINEST;

    while (unit < bytes / 16) {
        unit *= 2;
    }
    return epx__round_up(bytes, unit);
}

static epx_status_t
make(epx_group_t *group, const char *name, uint64_t bytes,
     cuda_stand_in_t **made_p)
{
    cuda_engine_t *engine = cuda_engine(group);
    cuda_stand_in_t *made = calloc(1, sizeof(*made));
    uint64_t rounded = bytes > UINT64_MAX / 2 ? bytes : size_for(bytes);
    epx_status_t status;

    if (made == NULL) {
        return epx__fail(EPX_ERR_NO_MEMORY, "no memory to stage %s", name);
    }
    made->block.bytes = rounded;
    status = epx__heap_alloc(&group->heap, rounded, name, &made->block.base);
    if (status == EPX_ERR_HEAP_EXHAUSTED) {
        made->block.bytes = bytes;
        status = cuda_heap_alloc(group, bytes, name, &made->block.base);
    }
    if (status != EPX_OK) {
        free(made);
        return status;
    }
    made->next = engine->stand_ins;
    engine->stand_ins = made;
    *made_p = made;
    return EPX_OK;
}

static epx_status_t
stand_in(const cuda_op_t *op, const char *name, uint64_t bytes, char **heap_p)
{
    epx_group_t *group = op->plan->base.group;
    cuda_stand_in_t *it = find(op, bytes);
    epx_status_t status = it == NULL ? make(group, name, bytes, &it) : EPX_OK;

    if (status == EPX_OK) {
        it->plan = op->plan;
        it->is_new = true;
        *heap_p = it->block.base;
    }
    return status;
}

void
cuda_stand_ins_settle(const cuda_op_t *op, bool launched)
{
    cuda_engine_t *engine = cuda_engine(op->plan->base.group);
    bool is_open = op->plan->pending != EPX__PENDING_NONE;

    if (engine->stand_ins == NULL) {
        return;
    }
    for (cuda_stand_in_t *it = engine->stand_ins; it != NULL; it = it->next) {
        if (it->plan != op->plan) {
            continue;
        }
        it->in_graph =
            it->in_graph || (it->is_new && op->is_captured && launched);
        it->is_new = false;
        it->plan = it->in_graph || is_open ? it->plan : NULL;
    }
    count_idle(engine);
}

void
cuda_stand_ins_leave(const cuda_plan_t *plan)
{
    epx_group_t *group = plan->base.group;
    cuda_engine_t *engine = cuda_engine(group);

    for (cuda_stand_in_t *it = engine->stand_ins; it != NULL; it = it->next) {
        if (it->plan == plan) {
            it->plan = NULL;
            it->in_graph = false;
        }
    }
    if (engine->num_plans == 0) {
        free_idle(group); /* which counts */
    } else {
        count_idle(engine);
    }
}

void
cuda_stand_ins_retire(epx_group_t *group)
{
    cuda_engine_t *engine = cuda_engine(group);

    for (cuda_stand_in_t *it = engine->stand_ins; it != NULL; it = it->next) {
        epx__group_heap_free_old(group, it->block.base);
    }
    cuda_stand_ins_close(engine);
    count_idle(engine);
}

void
cuda_stand_ins_close(cuda_engine_t *engine)
{
    while (engine->stand_ins != NULL) {
        cuda_stand_in_t *it = engine->stand_ins;

        engine->stand_ins = it->next;
        free(it);
    }
}

/* ---- arrays ---- */

epx_status_t
cuda_reachable(const cuda_op_t *op, const char *name, const void *user,
               uint64_t bytes, uint64_t alignment, char **heap_p)
{
    uint64_t left;

    *heap_p = NULL;
    if (user == NULL || bytes == 0) {
        return EPX_OK;
    }
    if (!epx__heap_find(&op->plan->base.group->heap, user, &left)) {
        return stand_in(op, name, bytes, heap_p);
    }
    if (left < bytes) {
        return epx__fail(EPX_ERR_TOO_SMALL,
                         "%s needs %" PRIu64
                         " bytes, but its EPX memory ends after %" PRIu64,
                         name, bytes, left);
    }
    if ((uintptr_t)user % alignment != 0) {
        return stand_in(op, name, bytes, heap_p);
    }
    *heap_p = (char *)(uintptr_t)user;
    return EPX_OK;
}

void
cuda_stage_add(cuda_stage_args_t *stage, const void *user, char *heap,
               uint64_t row_bytes)
{
    uint64_t unit = 16;

    if (heap == NULL || heap == user) {
        return;
    }
    while ((uintptr_t)user % unit != 0 || row_bytes % unit != 0) {
        unit /= 2;
    }
    stage->arrays[stage->num_arrays++] = (cuda_staged_t){
        .user = (char *)(uintptr_t)user,
        .heap = heap,
        .row_bytes = row_bytes,
        .unit = unit,
    };
}

uint64_t
cuda_heap_offset(const cuda_plan_t *plan, const char *heap)
{
    return heap == NULL
               ? 0
               : (uint64_t)(heap - epx__group_segment(plan->base.group));
}
