/* SPDX-License-Identifier: MIT */
#include "mpi_peer.h"
#include "mpi_peer_sum.h"

#include <string.h>

/* The record that goes with a row: local expert indices, weights, scales. */
static void
pack_meta(const struct mpi_peer *peer, int32_t to, int64_t token, char *record)
{
    int32_t topk = peer->head.topk;
    const int64_t *idx = mpi_peer_idx_of(peer, peer->rank, token);
    const float *weights = peer->weights + (idx - peer->idx);
    size_t scale_bytes = 4 * (size_t)peer->head.num_scales;
    int64_t local[EPX_MAX_TOPK];
    float kept[EPX_MAX_TOPK];
    int64_t q = peer->head.experts / peer->head.ranks;
    int64_t m = peer->head.experts % peer->head.ranks;
    int64_t first = to * q + (to < m ? to : m);
    int64_t count = q + (to < m);
    for (int32_t k = 0; k < topk; k++) {
        bool here = idx[k] >= first && idx[k] < first + count;
        local[k] = here ? idx[k] - first : -1;
        kept[k] = here ? weights[k] : 0.0f;
    }
    memcpy(record, local, (size_t)topk * sizeof *local);
    record += (size_t)topk * sizeof *local;
    memcpy(record, kept, (size_t)topk * sizeof *kept);
    record += (size_t)topk * sizeof *kept;
    memcpy(record, peer->scales + (size_t)token * scale_bytes, scale_bytes);
}

static void
pack(struct mpi_peer *peer)
{
    int64_t row = 0;
    for (int32_t d = 0; d < peer->head.ranks; d++) {
        for (int32_t i = 0; i < peer->send_counts[d]; i++, row++) {
            int64_t token = peer->send_tokens[row];
            memcpy(peer->packed + (size_t)row * peer->row_bytes,
                   peer->x + (size_t)token * peer->row_bytes, peer->row_bytes);
            pack_meta(peer, d, token,
                      peer->packed_meta + (size_t)row * peer->meta_bytes);
        }
    }
}

/* RANK_MAJOR: the rows have come to their places, what goes with them not. */
static void
unpack_by_rank(struct mpi_peer *peer)
{
    size_t topk = (size_t)peer->head.topk;
    size_t scale_bytes = 4 * (size_t)peer->head.num_scales;
    for (int64_t row = 0; row < peer->received; row++) {
        const char *record =
            peer->arrived_meta + (size_t)row * peer->meta_bytes;
        memcpy(peer->recv_idx + (size_t)row * topk, record,
               topk * sizeof(int64_t));
        record += topk * sizeof(int64_t);
        memcpy(peer->recv_weights + (size_t)row * topk, record,
               topk * sizeof(float));
        record += topk * sizeof(float);
        memcpy(peer->recv_scales + (size_t)row * scale_bytes, record,
               scale_bytes);
    }
}

/* Puts one row behind those of each of its local experts. */
static void
unpack_row(struct mpi_peer *peer, int64_t row)
{
    size_t topk = (size_t)peer->head.topk;
    size_t scale_bytes = 4 * (size_t)peer->head.num_scales;
    const char *record = peer->arrived_meta + (size_t)row * peer->meta_bytes;
    const char *weights = record + topk * sizeof(int64_t);
    const char *scales = weights + topk * sizeof(float);
    for (size_t k = 0; k < topk; k++) {
        int64_t local;
        memcpy(&local, record + k * sizeof local, sizeof local);
        int64_t *place = &peer->place[(size_t)row * topk + k];
        *place = -1;
        if (local < 0) {
            continue;
        }
        *place = peer->cursor[local]++;
        memcpy(peer->recv_x + (size_t)*place * peer->row_bytes,
               peer->arrived + (size_t)row * peer->row_bytes, peer->row_bytes);
        memcpy(&peer->recv_weights[*place], weights + k * sizeof(float),
               sizeof(float));
        memcpy(peer->recv_scales + (size_t)*place * scale_bytes, scales,
               scale_bytes);
    }
}

void
mpi_peer_dispatch(struct mpi_peer *peer)
{
    pack(peer);
    MPI_Alltoallv(peer->packed, peer->send_counts, peer->send_offsets,
                  peer->row_type, peer->arrived, peer->recv_counts,
                  peer->recv_offsets, peer->row_type, MPI_COMM_WORLD);
    MPI_Alltoallv(peer->packed_meta, peer->send_counts, peer->send_offsets,
                  peer->meta_type, peer->arrived_meta, peer->recv_counts,
                  peer->recv_offsets, peer->meta_type, MPI_COMM_WORLD);
    if (mpi_peer_by_rank(peer)) {
        unpack_by_rank(peer);
        return;
    }
    memcpy(peer->cursor, peer->expert_base,
           (size_t)peer->local_experts * sizeof *peer->cursor);
    for (int64_t row = 0; row < peer->received; row++) {
        unpack_row(peer, row);
    }
}

void
mpi_peer_set_outputs(struct mpi_peer *peer)
{
    int64_t cells = peer->received * peer->head.topk;
    if (mpi_peer_by_rank(peer)) {
        return; /* filled when it was made */
    }
    for (int64_t i = 0; i < cells; i++) {
        if (peer->place[i] >= 0) {
            memset(peer->outputs + (size_t)peer->place[i] * peer->out_bytes,
                   MPI_PEER_FILL, peer->out_bytes);
        }
    }
}

/* One row for each (token, rank): the weighted sum over the experts here. */
static void
sum_experts(struct mpi_peer *peer)
{
    int32_t topk = peer->head.topk;
    for (int64_t row = 0; row < peer->received; row++) {
        const char *rows[EPX_MAX_TOPK];
        float weights[EPX_MAX_TOPK];
        int32_t count = 0;
        for (int32_t k = 0; k < topk; k++) {
            int64_t place = peer->place[row * topk + k];
            if (place >= 0) {
                rows[count] = peer->outputs + (size_t)place * peer->out_bytes;
                weights[count++] = peer->recv_weights[place];
            }
        }
        mpi_peer_sum(peer->head.combine_bytes,
                     peer->partial + (size_t)row * peer->out_bytes, rows,
                     weights, count, peer->head.hidden);
    }
}

void
mpi_peer_combine(struct mpi_peer *peer)
{
    if (!mpi_peer_by_rank(peer)) {
        sum_experts(peer);
    }
    MPI_Alltoallv(peer->partial, peer->recv_counts, peer->recv_offsets,
                  peer->out_type, peer->returned, peer->send_counts,
                  peer->send_offsets, peer->out_type, MPI_COMM_WORLD);
    for (int64_t t = 0; t < peer->tokens; t++) {
        const char *rows[EPX_MAX_TOPK];
        int32_t count = 0;
        for (int64_t i = peer->token_first[t]; i < peer->token_first[t + 1];
             i++) {
            rows[count++] =
                peer->returned + (size_t)peer->token_rows[i] * peer->out_bytes;
        }
        mpi_peer_sum(peer->head.combine_bytes,
                     peer->out + (size_t)t * peer->out_bytes, rows, NULL, count,
                     peer->head.hidden);
    }
}
