/* SPDX-License-Identifier: MIT */
/* A peer that does the wrong thing fast would be no peer: its result is looked
 * at once, after the timing. */
#include "mpi_peer.h"
#include "mpi_peer_sum.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* bf16 partial sums round twice. */
#define TOLERANCE 0.02f

static bool
row_is(const struct mpi_peer *peer, int64_t row, int32_t source, int64_t token,
       char *text, size_t bytes)
{
    uint64_t want = mpi_peer_mark(source, token);
    uint64_t got;
    memcpy(&got, peer->recv_x + (size_t)row * peer->row_bytes, sizeof got);
    if (got != want) {
        snprintf(text, bytes, "row %lld starts with %llx, not with %llx",
                 (long long)row, (unsigned long long)got,
                 (unsigned long long)want);
    }
    return got == want;
}

/* One token that has come here: its row, or its row for each expert. */
static bool
token_arrived(const struct mpi_peer *peer, int32_t source, int64_t token,
              int64_t row, char *text, size_t bytes)
{
    const int64_t *idx = mpi_peer_idx_of(peer, source, token);
    const float *weights = peer->weights + (idx - peer->idx);
    int32_t topk = peer->head.topk;
    if (mpi_peer_by_rank(peer)) {
        return row_is(peer, row, source, token, text, bytes);
    }
    for (int32_t k = 0; k < topk; k++) {
        int64_t place = peer->place[row * topk + k];
        bool here = idx[k] >= 0 && mpi_peer_owner(peer, idx[k]) == peer->rank;
        if (here != (place >= 0)) {
            snprintf(text, bytes, "row %lld, expert %d: place %lld",
                     (long long)row, k, (long long)place);
            return false;
        }
        if (!here) {
            continue;
        }
        if (peer->recv_weights[place] != weights[k]) {
            snprintf(text, bytes, "row %lld: weight %g, not %g",
                     (long long)place, (double)peer->recv_weights[place],
                     (double)weights[k]);
            return false;
        }
        if (!row_is(peer, place, source, token, text, bytes)) {
            return false;
        }
    }
    return true;
}

static float
element(const struct mpi_peer *peer, const char *row, int64_t i)
{
    float value;
    uint16_t bits;
    if (peer->head.combine_bytes == 2) {
        memcpy(&bits, row + i * 2, sizeof bits);
        return mpi_peer_from_bf16(bits);
    }
    memcpy(&value, row + i * 4, sizeof value);
    return value;
}

static bool
token_combined(const struct mpi_peer *peer, int64_t token, char *text,
               size_t bytes)
{
    const int64_t *idx = mpi_peer_idx_of(peer, peer->rank, token);
    const float *weights = peer->weights + (idx - peer->idx);
    const char *out = peer->out + (size_t)token * peer->out_bytes;
    char fill[4];
    float want = 0;
    memset(fill, MPI_PEER_FILL, sizeof fill);
    for (int32_t k = 0; k < peer->head.topk; k++) {
        want += idx[k] >= 0 ? weights[k] : 0.0f;
    }
    if (mpi_peer_by_rank(peer)) {
        want = (float)(peer->token_first[token + 1] - peer->token_first[token]);
    }
    want *= element(peer, fill, 0);
    for (int64_t i = 0; i < peer->head.hidden; i++) {
        float got = element(peer, out, i);
        if (!(fabsf(got - want) <= TOLERANCE * fabsf(want))) {
            snprintf(text, bytes, "token %lld, element %lld: %g, not %g",
                     (long long)token, (long long)i, (double)got, (double)want);
            return false;
        }
    }
    return true;
}

bool
mpi_peer_check(const struct mpi_peer *peer, char *text, size_t bytes)
{
    const int64_t *before = peer->head.tokens_before;
    int64_t row = 0;
    for (int32_t s = 0; s < peer->head.ranks; s++) {
        for (int64_t t = 0; t < before[s + 1] - before[s]; t++) {
            if (!mpi_peer_goes_to(peer, mpi_peer_idx_of(peer, s, t),
                                  peer->rank)) {
                continue;
            }
            if (!token_arrived(peer, s, t, row++, text, bytes)) {
                return false;
            }
        }
    }
    for (int64_t t = 0; t < peer->tokens; t++) {
        if (!token_combined(peer, t, text, bytes)) {
            return false;
        }
    }
    return true;
}
