/* SPDX-License-Identifier: MIT */
/*
 * What a careful MPI user would write: rows packed once per destination rank
 * into a buffer that is reused, one MPI_Alltoallv for rows and one for what
 * goes with them, then rows put into the layout of the receiver; back the same
 * way, with a partial sum per (token, rank) where experts have rows of their
 * own.  Counts are known beforehand.
 */
#ifndef EPX_BENCH_MPI_PEER_H
#define EPX_BENCH_MPI_PEER_H

#include "mpi_peer_file.h"

#include <mpi.h>
#include <stdbool.h>
#include <stddef.h>

struct mpi_peer {
    struct mpi_peer_file head;
    int32_t rank;
    int64_t tokens;        /* T */
    const int64_t *idx;    /* of all ranks, [all tokens, K] */
    const float *weights;  /* likewise */
    int32_t first_expert;  /* of this rank */
    int32_t local_experts; /* L */
    size_t row_bytes;      /* dispatched */
    size_t out_bytes;      /* combined */
    size_t meta_bytes;     /* K local indices, K weights and the scales */
    MPI_Datatype row_type;
    MPI_Datatype out_type;
    MPI_Datatype meta_type;

    /* Rows by peer, in token order; [R] and [R]. */
    int *send_counts;
    int *send_offsets;
    int *recv_counts;
    int *recv_offsets;
    int64_t sent;         /* rows in all */
    int64_t received;     /* rows in all */
    int32_t *send_tokens; /* [sent] the token of each row */
    int64_t *token_first; /* [T + 1] first entry of each token in: */
    int64_t *token_rows;  /* [sent] its rows, by rank */
    int64_t *expert_base; /* [L] first row of each local expert */
    int64_t *cursor;      /* [L] next row, while unpacking */
    int64_t rows;         /* that recv_x has room for */

    char *x;      /* [T, H] */
    char *scales; /* [T, S] */
    char *packed; /* [sent, H] */
    char *packed_meta;
    char *arrived; /* [received, H]; the same as recv_x in RANK_MAJOR */
    char *arrived_meta;
    int64_t *place; /* [received, K] row of each local expert, -1 for none */
    char *recv_x;   /* [rows, H] */
    int64_t *recv_idx;
    float *recv_weights;
    char *recv_scales;
    char *outputs;  /* [rows, H] of the experts */
    char *partial;  /* [received, H]; the same as outputs in RANK_MAJOR */
    char *returned; /* [sent, H] */
    char *out;      /* [T, H] */
};

/* The byte that fills every buffer: 0.747 or close to it in bf16 and f32, a
 * finite value in fp8. */
#define MPI_PEER_FILL 0x3f

/* What a token's row starts with, so that it can be known where it arrives. */
static inline uint64_t
mpi_peer_mark(int32_t rank, int64_t token)
{
    return (uint64_t)rank << 40 | (uint64_t)token;
}

/* Ends the job when the file or the memory is not as it must be. */
void mpi_peer_open(struct mpi_peer *peer, const char *path);
void mpi_peer_close(struct mpi_peer *peer);

void mpi_peer_dispatch(struct mpi_peer *peer);
void mpi_peer_combine(struct mpi_peer *peer);

/* After a dispatch: fills the rows that the experts would have filled. */
void mpi_peer_set_outputs(struct mpi_peer *peer);

/* Whether dispatch and combine have left behind what they must; else *text
 * says what is wrong. */
bool mpi_peer_check(const struct mpi_peer *peer, char *text, size_t bytes);

/* The rank of an expert; whether rows are per (token, rank); a token's
 * experts; whether those make it go to a rank. */
int32_t mpi_peer_owner(const struct mpi_peer *peer, int64_t expert);
bool mpi_peer_by_rank(const struct mpi_peer *peer);
const int64_t *mpi_peer_idx_of(const struct mpi_peer *peer, int32_t rank,
                               int64_t token);
bool mpi_peer_goes_to(const struct mpi_peer *peer, const int64_t *idx,
                      int32_t rank);

#endif
