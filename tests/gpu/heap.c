/* SPDX-License-Identifier: MIT */
/* Arrays outside the heap: what stands in for them there is shared by all plans
 * of a group, and given back when the heap is full. */
#include "gpu/layer.h"
#include <stdlib.h>

enum { RANKS = 3, PLANS = 5, PAGE = 4096 };

/* All but what a single array needs, of which much is rounded up. */
static void *
fill_heap(layer_rank_t *rank, uint64_t *room_p)
{
    epx_group_info_t info = EPX_GROUP_INFO_INIT;
    void *ballast = NULL;

    *room_p = rank->layer->recv_bytes * 3 / 2 / PAGE * PAGE;
    if (world_failed(rank->self, epx_group_query(rank->group, &info),
                     "epx_group_query") ||
        world_failed(rank->self,
                     epx_mem_alloc(rank->group,
                                   info.heap_largest_free_bytes - *room_p,
                                   &ballast),
                     "epx_mem_alloc of most of the heap")) {
        return NULL;
    }
    return ballast;
}

static bool
open_plans(layer_rank_t *rank, epx_plan_t **plans)
{
    epx_plan_args_t args = layer_plan_args(rank);

    for (int i = 0; i < PLANS; i++) {
        if (world_failed(rank->self, layer_plan(rank, &args),
                         "epx_plan_create")) {
            return false;
        }
        plans[i] = rank->plan;
    }
    return true;
}

static void
pass_each(layer_rank_t *rank, epx_plan_t **plans)
{
    for (int i = 0; i < PLANS && world_all_well(rank->self); i++) {
        rank->plan = plans[i];
        if (!world_failed(rank->self, layer_dispatch(rank, rank->stream),
                          "epx_dispatch") &&
            layer_experts(rank, rank->stream) &&
            !world_failed(rank->self, layer_combine(rank, rank->stream),
                          "epx_combine") &&
            layer_synchronize(rank, rank->stream)) {
            layer_check(rank, 0, rank->recv_x, rank->out,
                        "what passed through stand-ins");
        }
    }
}

/* The plans are still there, and what stood in is not in the way. */
static void
take_back(layer_rank_t *rank, uint64_t room)
{
    epx_group_info_t info = EPX_GROUP_INFO_INIT;
    void *block = NULL;

    world_failed(rank->self, epx_group_query(rank->group, &info),
                 "epx_group_query");
    if (info.heap_free_bytes < room) {
        world_fail(rank->self, "heap_free_bytes is %llu, not %llu or more",
                   (unsigned long long)info.heap_free_bytes,
                   (unsigned long long)room);
    }
    world_failed(rank->self, epx_mem_alloc(rank->group, room, &block),
                 "epx_mem_alloc of what stood in");
    world_failed(rank->self, epx_mem_free(rank->group, block), "epx_mem_free");
}

static void
heap_rank(world_rank_t *self, void *layer)
{
    epx_plan_t *plans[PLANS] = { 0 };
    layer_rank_t rank;
    void *ballast = NULL;
    uint64_t room = 0;

    if (layer_rank_open(&rank, self, layer, 40) && layer_set(&rank, 0) &&
        open_plans(&rank, plans)) {
        memory_t *memory = rank.memory;

        rank.recv_x = memory->ops->alloc(memory, rank.layer->recv_bytes);
        rank.expert_x = memory->ops->alloc(memory, rank.layer->recv_bytes);
        ballast = fill_heap(&rank, &room);
    }
    if (world_all_well(self)) {
        pass_each(&rank, plans);
    }
    if (world_all_well(self)) {
        take_back(&rank, room);
    }
    for (int i = 0; i < PLANS; i++) {
        world_failed(self, epx_plan_destroy(plans[i]), "epx_plan_destroy");
    }
    rank.plan = NULL;
    world_failed(self, epx_mem_free(rank.group, ballast), "epx_mem_free");
    layer_rank_close(&rank);
}

int
main(void)
{
    layer_need_card();
    return layer_run_each(WORLD_THREAD, RANKS, 1, "heap", heap_rank)
               ? EXIT_FAILURE
               : EXIT_SUCCESS;
}
