/* SPDX-License-Identifier: MIT */
/*
 * The arithmetic of the model: matrix product, RMS norm, softmax, random
 * numbers.
 *
 * Every result is made by one fixed sequence of IEEE operations per element,
 * whatever the number of rows in the call.  A token's numbers therefore do not
 * depend on which other tokens share its rank, and training on one rank and on
 * four gives the same bits.
 */
#ifndef MOE_LM_OPS_H
#define MOE_LM_OPS_H

#include <stddef.h>
#include <stdint.h>

/* Zeroed memory, freed with free(); ends the program when there is none. */
void *ops_alloc(int64_t count, size_t size);
float *ops_floats(int64_t count);

/* c[m, n] = a[m, k] * b[k, n], added to what c holds if `add`.  Element (i, j)
 * of a is a[i * a_row + j * a_col], so that a may be transposed, or have rows
 * that overlap.  b and c have rows of b_row and c_row floats.  n is a multiple
 * of 4. */
typedef struct ops_gemm {
    int64_t m, n, k;
    const float *a;
    int64_t a_row, a_col;
    const float *b;
    int64_t b_row;
    float *c;
    int64_t c_row;
    int add;
} ops_gemm_t;

void ops_gemm(const ops_gemm_t *g);

/* c[m, n] = a[m, k] * b[k, n], each without gaps. */
void ops_matmul(int64_t m, int64_t n, int64_t k, const float *a, const float *b,
                float *c);

/* c[m, n] += a[k, m] transposed * b[k, n]: the gradient of a matrix c, from
 * its k inputs and the gradients of its k outputs. */
void ops_matmul_grad(int64_t m, int64_t n, int64_t k, const float *a,
                     const float *b, float *c);

/* y[n, m] = x[m, n] transposed. */
void ops_transpose(int64_t m, int64_t n, const float *x, float *y);

/* y = gain * x / rms(x), over one row of n floats; returns 1 / rms(x).  n is a
 * multiple of 4. */
float ops_rmsnorm(int64_t n, const float *x, const float *gain, float *y);

/* Adds to dx and dgain what the gradient dy of that row means for them. */
void ops_rmsnorm_backward(int64_t n, const float *x, const float *gain,
                          float inv_rms, const float *dy, float *dx,
                          float *dgain);

/* The dot product of two rows; n is a multiple of 4. */
float ops_dot(int64_t n, const float *x, const float *y);

/* x becomes softmax(x). */
void ops_softmax(int64_t n, float *x);

/* The same 64 random bits for the same arguments, on every rank. */
uint64_t ops_random(uint64_t seed, uint64_t stream, uint64_t index);

/* A random matrix [m, n], the same for the same seed and stream: m inputs of
 * variance 1 give n outputs of variance 1. */
void ops_init_matrix(int64_t m, int64_t n, float *x, uint64_t seed,
                     uint64_t stream);

/* Seconds of a clock that only goes forward. */
double ops_seconds(void);

#endif
