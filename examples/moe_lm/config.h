/* SPDX-License-Identifier: MIT */
/*
 * The shape of the model and of its training.
 *
 * The batch is cut into shards, and every rank works on whole shards.  What a
 * shard contributes is computed alone and summed in the order of the shards, so
 * the number of ranks changes who computes a number, never the number.
 */
#ifndef MOE_LM_CONFIG_H
#define MOE_LM_CONFIG_H

#include <stdint.h>

#define MAX_LAYERS 4
#define VOCABULARY 256 /* every byte is a word */

typedef struct config {
    int32_t dim;         /* D: floats per token */
    int32_t expert_dim;  /* F: floats in the hidden layer of an expert */
    int32_t num_experts; /* E */
    int32_t topk;        /* K: experts per token */
    int32_t num_layers;
    int32_t taps;       /* W: a layer sees this position and W - 1 before it */
    int32_t seq_len;    /* positions in a sequence */
    int32_t num_seqs;   /* sequences in the batch of all ranks */
    int32_t num_shards; /* of the batch; divides num_seqs */
    float balance;      /* weight of the load balancing loss */
    uint64_t seed;
} config_t;

static inline int64_t
config_shard_tokens(const config_t *c)
{
    return (int64_t)c->num_seqs / c->num_shards * c->seq_len;
}

/* Where the byte of token t is, when a batch holds sequences of seq_len tokens
 * and the byte that follows; the next byte is the one to predict. */
static inline int64_t
config_byte(const config_t *c, int64_t t)
{
    return t / c->seq_len * (c->seq_len + 1) + t % c->seq_len;
}

#endif
