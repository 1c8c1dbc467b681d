/* SPDX-License-Identifier: MIT */
#include "gradient_sum.h"
#include "check.h"
#include "ops.h"

#include <string.h>

#define ROW 256 /* floats that travel as one token */

/* Every one of the `rows` tokens goes to all shards. */
static epx_plan_t *
create_plan(epx_group_t *group, int32_t num_shards, int64_t rows)
{
    epx_plan_args_t args = EPX_PLAN_ARGS_INIT;
    int32_t *shard = ops_alloc(rows * num_shards, sizeof(*shard));
    epx_plan_t *plan;

    for (int64_t i = 0; i < rows * num_shards; i++) {
        shard[i] = (int32_t)(i % num_shards);
    }
    args.layout = EPX_LAYOUT_EXPERT_MAJOR;
    args.num_experts = num_shards;
    args.topk = num_shards;
    args.idx_dtype = EPX_I32;
    args.num_tokens = rows;
    args.topk_idx = shard;
    CHECK(epx_plan_create(group, &args, NULL, &plan));
    free(shard);
    return plan;
}

void
gradient_sum_create(epx_group_t *group, int32_t num_shards, int64_t count,
                    gradient_sum_t *sum)
{
    const int64_t num_rows = (count + ROW - 1) / ROW;
    epx_group_info_t info = EPX_GROUP_INFO_INIT;
    int32_t first;
    int64_t bytes;
    void *memory;

    *sum = (gradient_sum_t){ .group = group, .num_rows = num_rows };
    CHECK(epx_group_query(group, &info));
    CHECK(epx_local_experts(num_shards, info.num_ranks, info.rank, &first,
                            &sum->num_shards));

    int64_t begin = num_rows * info.rank / info.num_ranks;
    int64_t end = num_rows * (info.rank + 1) / info.num_ranks;
    sum->plan = create_plan(group, num_shards, end - begin);
    sum->part = ops_floats((end - begin) * ROW);
    bytes = sum->num_shards * num_rows * ROW * (int64_t)sizeof(float);
    CHECK(epx_mem_alloc(group, (uint64_t)bytes, &memory));
    sum->vectors = memory;
}

void
gradient_sum_destroy(gradient_sum_t *sum)
{
    CHECK(epx_plan_destroy(sum->plan));
    CHECK(epx_mem_free(sum->group, sum->vectors));
    free(sum->part);
}

float *
gradient_sum_vector(const gradient_sum_t *sum, int32_t i)
{
    return sum->vectors + i * sum->num_rows * ROW;
}

void
gradient_sum_clear(gradient_sum_t *sum)
{
    memset(sum->vectors, 0,
           (size_t)(sum->num_shards * sum->num_rows * ROW) * sizeof(float));
}

void
gradient_sum_run(gradient_sum_t *sum)
{
    epx_combine_args_t combine = EPX_COMBINE_ARGS_INIT;
    epx_dispatch_args_t dispatch = EPX_DISPATCH_ARGS_INIT;

    /* By expert, then source rank, then token: that is by shard, then row. */
    combine.x = sum->vectors;
    combine.num_rows = sum->num_shards * sum->num_rows;
    combine.hidden = ROW;
    combine.dtype = EPX_F32;
    combine.out = sum->part;
    CHECK(epx_combine(sum->plan, &combine, NULL));

    dispatch.x = sum->part;
    dispatch.hidden = ROW;
    dispatch.dtype = EPX_F32;
    dispatch.recv_x = sum->vectors;
    dispatch.recv_rows = sum->num_shards * sum->num_rows;
    CHECK(epx_dispatch(sum->plan, &dispatch, NULL));
}
