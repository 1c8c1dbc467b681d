/* SPDX-License-Identifier: MIT */
/*
 * Sums a vector over the shards of the batch, on all ranks, with EPX alone.
 *
 * Combine sums rows that lie on several ranks, and dispatch sends a row to
 * several ranks: one after the other they are an allreduce.  The shards play
 * the experts, every rank owns a part of the vector's rows as its tokens, and
 * every token goes to all experts:
 *
 *     combine    my part = sum over shards, in their order   (reduce-scatter)
 *     dispatch   my part to every rank                       (allgather)
 *
 * EXPERT_MAJOR adds in the order of k, here the order of the shards, so that
 * the sum has the same bits on any number of ranks.
 */
#ifndef MOE_LM_GRADIENT_SUM_H
#define MOE_LM_GRADIENT_SUM_H

#include <epx/epx.h>

typedef struct gradient_sum {
    epx_group_t *group;
    epx_plan_t *plan;
    int32_t num_shards; /* that live on this rank */
    int64_t num_rows;   /* of one vector */
    float *vectors;     /* [num_shards, num_rows, ROW] in EPX memory */
    float *part;        /* the rows of the sum that this rank makes */
} gradient_sum_t;

/* A vector of `count` floats for each of num_shards shards; at least one shard
 * per rank.  Collective. */
void gradient_sum_create(epx_group_t *group, int32_t num_shards, int64_t count,
                         gradient_sum_t *sum);
void gradient_sum_destroy(gradient_sum_t *sum);

/* The vector of the rank's i-th shard. */
float *gradient_sum_vector(const gradient_sum_t *sum, int32_t i);

/* Sets all vectors of this rank to zero. */
void gradient_sum_clear(gradient_sum_t *sum);

/* Replaces the vector of every shard by the sum of all.  Collective. */
void gradient_sum_run(gradient_sum_t *sum);

#endif
