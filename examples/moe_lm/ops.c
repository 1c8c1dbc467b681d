/* SPDX-License-Identifier: MIT */
#include "ops.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

/* Four floats side by side: one register of every x86-64 and arm64. */
typedef float lanes_t __attribute__((vector_size(16), aligned(4), may_alias));
#define LANES 4
#define TILE  8 /* rows whose sums stay in registers during one pass over b */

void *
ops_alloc(int64_t count, size_t size)
{
    void *memory = calloc(count > 0 ? (size_t)count : 1, size);

    if (memory == NULL) {
        fprintf(stderr, "moe_lm: out of memory for %lld x %zu bytes\n",
                (long long)count, size);
        exit(EXIT_FAILURE);
    }
    return memory;
}

float *
ops_floats(int64_t count)
{
    return ops_alloc(count, sizeof(float));
}

/* `rows` rows and LANES columns of c. */
static inline __attribute__((always_inline)) void
gemm_tile(const ops_gemm_t *g, int rows, int64_t i, int64_t j)
{
    const float *a = g->a + i * g->a_row;
    const float *b = g->b + j;
    lanes_t sum[TILE];

    for (int r = 0; r < rows; r++) {
        sum[r] = (lanes_t){ 0 };
    }
    for (int64_t k = 0; k < g->k; k++) {
        lanes_t b_k = *(const lanes_t *)(b + k * g->b_row);
        for (int r = 0; r < rows; r++) {
            sum[r] += a[r * g->a_row + k * g->a_col] * b_k;
        }
    }
    for (int r = 0; r < rows; r++) {
        lanes_t *c = (lanes_t *)(g->c + (i + r) * g->c_row + j);
        if (g->add) {
            sum[r] += *c;
        }
        *c = sum[r];
    }
}

void
ops_gemm(const ops_gemm_t *gemm)
{
    const ops_gemm_t g = *gemm; /* nothing stored to c can change it */

    for (int64_t j = 0; j < g.n; j += LANES) {
        int64_t i = 0;
        for (; i + TILE <= g.m; i += TILE) {
            gemm_tile(&g, TILE, i, j);
        }
        for (; i < g.m; i++) {
            gemm_tile(&g, 1, i, j);
        }
    }
}

void
ops_matmul(int64_t m, int64_t n, int64_t k, const float *a, const float *b,
           float *c)
{
    ops_gemm(&(ops_gemm_t){ m, n, k, a, k, 1, b, n, c, n, 0 });
}

void
ops_matmul_grad(int64_t m, int64_t n, int64_t k, const float *a, const float *b,
                float *c)
{
    ops_gemm(&(ops_gemm_t){ m, n, k, a, 1, m, b, n, c, n, 1 });
}

void
ops_transpose(int64_t m, int64_t n, const float *x, float *y)
{
    for (int64_t i = 0; i < m; i++) {
        for (int64_t j = 0; j < n; j++) {
            y[j * m + i] = x[i * n + j];
        }
    }
}

float
ops_dot(int64_t n, const float *x, const float *y)
{
    lanes_t sum = { 0 };

    for (int64_t i = 0; i < n; i += LANES) {
        sum += *(const lanes_t *)(x + i) * *(const lanes_t *)(y + i);
    }
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

float
ops_rmsnorm(int64_t n, const float *x, const float *gain, float *y)
{
    float inv_rms = 1 / sqrtf(ops_dot(n, x, x) / (float)n + 1e-6f);

    for (int64_t i = 0; i < n; i++) {
        y[i] = gain[i] * x[i] * inv_rms;
    }
    return inv_rms;
}

void
ops_rmsnorm_backward(int64_t n, const float *x, const float *gain,
                     float inv_rms, const float *dy, float *dx, float *dgain)
{
    float projection = 0;

    for (int64_t i = 0; i < n; i++) {
        projection += dy[i] * gain[i] * x[i];
    }
    projection *= inv_rms * inv_rms / (float)n;
    for (int64_t i = 0; i < n; i++) {
        dx[i] += inv_rms * (dy[i] * gain[i] - projection * x[i]);
        dgain[i] += dy[i] * x[i] * inv_rms;
    }
}

void
ops_softmax(int64_t n, float *x)
{
    float largest = x[0];
    float sum = 0;

    for (int64_t i = 1; i < n; i++) {
        largest = fmaxf(largest, x[i]);
    }
    for (int64_t i = 0; i < n; i++) {
        x[i] = expf(x[i] - largest);
        sum += x[i];
    }
    for (int64_t i = 0; i < n; i++) {
        x[i] /= sum;
    }
}

/* Each argument is mixed in by one round of splitmix64. */
uint64_t
ops_random(uint64_t seed, uint64_t stream, uint64_t index)
{
    const uint64_t parts[] = { seed, stream, index };
    uint64_t z = 0;

    for (int i = 0; i < 3; i++) {
        z += parts[i] + 0x9e3779b97f4a7c15u;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        z ^= z >> 31;
    }
    return z;
}

/* Uniform in +-limit has variance limit^2 / 3. */
void
ops_init_matrix(int64_t m, int64_t n, float *x, uint64_t seed, uint64_t stream)
{
    const float limit = sqrtf(3 / (float)m);

    for (int64_t i = 0; i < m * n; i++) {
        int64_t bits = (int64_t)(ops_random(seed, stream, (uint64_t)i) >> 40);
        x[i] = limit * ((float)(bits - (1 << 23)) / (float)(1 << 23));
    }
}

double
ops_seconds(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}
