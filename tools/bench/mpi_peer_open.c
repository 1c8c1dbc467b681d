/* SPDX-License-Identifier: MIT */
#include "mpi_peer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void
give_up(const char *why)
{
    fprintf(stderr, "epx-bench-mpi-peer: %s\n", why);
    MPI_Abort(MPI_COMM_WORLD, 1);
}

/* Touched, so that no timed pass meets a new page. */
static void *
get(int64_t count, size_t bytes)
{
    size_t all = ((size_t)count * bytes + 64) / 64 * 64;
    void *ptr = aligned_alloc(64, all);
    if (!ptr) {
        give_up("no memory for the buffers");
        exit(1);
    }
    memset(ptr, MPI_PEER_FILL, all);
    return ptr;
}

int32_t
mpi_peer_owner(const struct mpi_peer *peer, int64_t expert)
{
    int64_t q = peer->head.experts / peer->head.ranks;
    int64_t m = peer->head.experts % peer->head.ranks;
    return (int32_t)(expert < m * (q + 1) ? expert / (q + 1)
                                          : m + (expert - m * (q + 1)) / q);
}

bool
mpi_peer_by_rank(const struct mpi_peer *peer)
{
    return peer->head.layout == EPX_LAYOUT_RANK_MAJOR;
}

static void
read_file(struct mpi_peer *peer, const char *path)
{
    struct mpi_peer_file *head = &peer->head;
    int size = 0;
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    FILE *file = fopen(path, "rbe");
    if (!file || fread(head, sizeof *head, 1, file) != 1 ||
        head->magic != MPI_PEER_MAGIC || head->ranks != size) {
        give_up("the file is not for this run");
        exit(1);
    }
    size_t cells = (size_t)head->tokens_before[size] * (size_t)head->topk;
    int64_t *idx = get((int64_t)cells, sizeof *idx);
    float *weights = get((int64_t)cells, sizeof *weights);
    if (fread(idx, sizeof *idx, cells, file) != cells ||
        fread(weights, sizeof *weights, cells, file) != cells) {
        give_up("the file is too short");
    }
    fclose(file);
    peer->idx = idx;
    peer->weights = weights;
}

bool
mpi_peer_goes_to(const struct mpi_peer *peer, const int64_t *idx, int32_t rank)
{
    for (int32_t k = 0; k < peer->head.topk; k++) {
        if (idx[k] >= 0 && mpi_peer_owner(peer, idx[k]) == rank) {
            return true;
        }
    }
    return false;
}

const int64_t *
mpi_peer_idx_of(const struct mpi_peer *peer, int32_t rank, int64_t token)
{
    return &peer->idx[(peer->head.tokens_before[rank] + token) *
                      peer->head.topk];
}

/* What this rank sends, by peer and then token, and where each token's rows
 * are in it. */
static void
plan_sends(struct mpi_peer *peer)
{
    int32_t ranks = peer->head.ranks;
    int64_t most = peer->tokens * ranks;
    int64_t *next = get(peer->tokens, sizeof *next);
    peer->send_tokens = get(most, sizeof *peer->send_tokens);
    peer->token_first = get(peer->tokens + 1, sizeof *peer->token_first);
    peer->token_rows = get(most, sizeof *peer->token_rows);
    peer->token_first[0] = 0;
    for (int64_t t = 0; t < peer->tokens; t++) {
        int64_t count = 0;
        for (int32_t d = 0; d < ranks; d++) {
            count +=
                mpi_peer_goes_to(peer, mpi_peer_idx_of(peer, peer->rank, t), d);
        }
        next[t] = peer->token_first[t];
        peer->token_first[t + 1] = peer->token_first[t] + count;
    }
    for (int32_t d = 0; d < ranks; d++) {
        peer->send_offsets[d] = (int)peer->sent;
        for (int64_t t = 0; t < peer->tokens; t++) {
            if (mpi_peer_goes_to(peer, mpi_peer_idx_of(peer, peer->rank, t),
                                 d)) {
                peer->send_tokens[peer->sent] = (int32_t)t;
                peer->token_rows[next[t]++] = peer->sent++;
            }
        }
        peer->send_counts[d] = (int)(peer->sent - peer->send_offsets[d]);
    }
    free(next);
}

/* What it receives, and where each of its experts' rows start. */
static void
plan_receives(struct mpi_peer *peer)
{
    const struct mpi_peer_file *head = &peer->head;
    int64_t count = peer->local_experts;
    int64_t *expert_rows = get(count, sizeof *expert_rows);
    memset(expert_rows, 0, (size_t)count * sizeof *expert_rows);
    for (int32_t s = 0; s < head->ranks; s++) {
        int64_t tokens = head->tokens_before[s + 1] - head->tokens_before[s];
        peer->recv_offsets[s] = (int)peer->received;
        for (int64_t t = 0; t < tokens; t++) {
            const int64_t *idx = mpi_peer_idx_of(peer, s, t);
            peer->received += mpi_peer_goes_to(peer, idx, peer->rank);
            for (int32_t k = 0; k < head->topk; k++) {
                int64_t local = idx[k] - peer->first_expert;
                if (local >= 0 && local < count) {
                    expert_rows[local]++;
                }
            }
        }
        peer->recv_counts[s] = (int)(peer->received - peer->recv_offsets[s]);
    }
    peer->expert_base = get(count, sizeof *peer->expert_base);
    peer->cursor = get(count, sizeof *peer->cursor);
    for (int64_t e = 0; e < count; e++) {
        bool slots = head->layout == EPX_LAYOUT_EXPERT_SLOTS;
        peer->expert_base[e] =
            slots ? e * head->ranks * head->max_tokens : peer->rows;
        peer->rows = peer->expert_base[e] + expert_rows[e];
    }
    if (mpi_peer_by_rank(peer)) {
        peer->rows = peer->received;
    }
    free(expert_rows);
}

static void
make_type(size_t bytes, MPI_Datatype *type)
{
    MPI_Type_contiguous((int)bytes, MPI_BYTE, type);
    MPI_Type_commit(type);
}

/* Slots that stay empty are neither touched nor filled. */
static char *
get_rows(const struct mpi_peer *peer, size_t bytes)
{
    size_t all = ((size_t)peer->rows * bytes + 64) / 64 * 64;
    if (peer->head.layout != EPX_LAYOUT_EXPERT_SLOTS) {
        return get(peer->rows, bytes);
    }
    char *ptr = aligned_alloc(64, all);
    if (!ptr) {
        give_up("no memory for the slots");
    }
    return ptr;
}

static void
get_buffers(struct mpi_peer *peer)
{
    size_t topk = (size_t)peer->head.topk;
    size_t scales = 4 * (size_t)peer->head.num_scales;
    bool by_rank = mpi_peer_by_rank(peer);
    size_t row_topk = by_rank ? topk : 1;
    peer->x = get(peer->tokens, peer->row_bytes);
    peer->scales = get(peer->tokens, scales);
    peer->packed = get(peer->sent, peer->row_bytes);
    peer->packed_meta = get(peer->sent, peer->meta_bytes);
    peer->arrived_meta = get(peer->received, peer->meta_bytes);
    peer->place = get(peer->received, topk * sizeof *peer->place);
    peer->recv_x = get_rows(peer, peer->row_bytes);
    peer->recv_idx = get(by_rank ? peer->rows : 0, topk * sizeof(int64_t));
    peer->recv_weights =
        (float *)(void *)get_rows(peer, row_topk * sizeof(float));
    peer->recv_scales = get_rows(peer, scales);
    peer->outputs = get_rows(peer, peer->out_bytes);
    peer->arrived =
        by_rank ? peer->recv_x : get(peer->received, peer->row_bytes);
    peer->partial =
        by_rank ? peer->outputs : get(peer->received, peer->out_bytes);
    peer->returned = get(peer->sent, peer->out_bytes);
    peer->out = get(peer->tokens, peer->out_bytes);
    for (int64_t t = 0; t < peer->tokens; t++) {
        uint64_t mark = mpi_peer_mark(peer->rank, t);
        memcpy(peer->x + (size_t)t * peer->row_bytes, &mark, sizeof mark);
    }
}

void
mpi_peer_open(struct mpi_peer *peer, const char *path)
{
    *peer = (struct mpi_peer){ 0 };
    MPI_Comm_rank(MPI_COMM_WORLD, &peer->rank);
    read_file(peer, path);
    const struct mpi_peer_file *head = &peer->head;
    int32_t q = head->experts / head->ranks;
    int32_t m = head->experts % head->ranks;
    peer->tokens =
        head->tokens_before[peer->rank + 1] - head->tokens_before[peer->rank];
    peer->first_expert = peer->rank * q + (peer->rank < m ? peer->rank : m);
    peer->local_experts = q + (peer->rank < m);
    peer->row_bytes = (size_t)head->hidden * (size_t)head->elem_bytes;
    peer->out_bytes = (size_t)head->hidden * (size_t)head->combine_bytes;
    peer->meta_bytes = (size_t)head->topk * (sizeof(int64_t) + sizeof(float)) +
                       4 * (size_t)head->num_scales;
    make_type(peer->row_bytes, &peer->row_type);
    make_type(peer->out_bytes, &peer->out_type);
    make_type(peer->meta_bytes, &peer->meta_type);
    int **lists[] = { &peer->send_counts, &peer->send_offsets,
                      &peer->recv_counts, &peer->recv_offsets };
    for (int i = 0; i < 4; i++) {
        *lists[i] = get(head->ranks, sizeof(int));
    }
    plan_sends(peer);
    plan_receives(peer);
    get_buffers(peer);
}

void
mpi_peer_close(struct mpi_peer *peer)
{
    if (!mpi_peer_by_rank(peer)) {
        free(peer->arrived);
        free(peer->partial);
    }
    void *all[] = { (void *)(uintptr_t)peer->idx,
                    (void *)(uintptr_t)peer->weights,
                    peer->send_counts,
                    peer->send_offsets,
                    peer->recv_counts,
                    peer->recv_offsets,
                    peer->send_tokens,
                    peer->token_first,
                    peer->token_rows,
                    peer->expert_base,
                    peer->cursor,
                    peer->x,
                    peer->scales,
                    peer->packed,
                    peer->packed_meta,
                    peer->arrived_meta,
                    peer->place,
                    peer->recv_x,
                    peer->recv_idx,
                    peer->recv_weights,
                    peer->recv_scales,
                    peer->outputs,
                    peer->returned,
                    peer->out };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        free(all[i]);
    }
    MPI_Type_free(&peer->row_type);
    MPI_Type_free(&peer->out_type);
    MPI_Type_free(&peer->meta_type);
}
