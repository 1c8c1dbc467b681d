/* SPDX-License-Identifier: MIT */
#ifndef EPX_BENCH_MPI_PEER_SUM_H
#define EPX_BENCH_MPI_PEER_SUM_H

#include <stdint.h>

/* out = sum of weights[i] * rows[i] (NULL: 1), summed in float32; elements are
 * bf16 (elem_bytes 2) or f32 (4). */
void mpi_peer_sum(int32_t elem_bytes, void *out, const char *const *rows,
                  const float *weights, int32_t count, int64_t hidden);

float mpi_peer_from_bf16(uint16_t bits);

#endif
