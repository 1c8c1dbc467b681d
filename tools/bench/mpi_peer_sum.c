/* SPDX-License-Identifier: MIT */
#include "mpi_peer_sum.h"

#include <string.h>

/* Elements that are summed at a time: their sums stay in the first cache. */
#define BLOCK 1024

/* As a user who compiles for the machine at hand would get it. */
#if defined(__x86_64__) && defined(__GNUC__) && __GNUC__ >= 12 && \
    !defined(__clang__)
#define FOR_EACH_CPU \
    __attribute__((  \
        target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_CPU
#endif

float
mpi_peer_from_bf16(uint16_t bits)
{
    uint32_t word = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &word, sizeof value);
    return value;
}

FOR_EACH_CPU static void
add_bf16(float *restrict sum, const uint16_t *restrict row, float weight,
         int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        uint32_t word = (uint32_t)row[i] << 16;
        float value;
        memcpy(&value, &word, sizeof value);
        sum[i] += weight * value;
    }
}

FOR_EACH_CPU static void
add_f32(float *restrict sum, const float *restrict row, float weight,
        int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        sum[i] += weight * row[i];
    }
}

/* To nearest even; there are no NaNs here. */
FOR_EACH_CPU static void
round_bf16(uint16_t *restrict out, const float *restrict sum, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        uint32_t word;
        memcpy(&word, &sum[i], sizeof word);
        out[i] = (uint16_t)((word + 0x7fffu + ((word >> 16) & 1u)) >> 16);
    }
}

void
mpi_peer_sum(int32_t elem_bytes, void *out, const char *const *rows,
             const float *weights, int32_t count, int64_t hidden)
{
    float sum[BLOCK];
    for (int64_t at = 0; at < hidden; at += BLOCK) {
        int64_t part = hidden - at < BLOCK ? hidden - at : BLOCK;
        memset(sum, 0, (size_t)part * sizeof *sum);
        for (int32_t i = 0; i < count; i++) {
            const char *row = rows[i] + at * elem_bytes;
            float weight = weights ? weights[i] : 1.0f;
            if (elem_bytes == 2) {
                add_bf16(sum, (const uint16_t *)(const void *)row, weight,
                         part);
            } else {
                add_f32(sum, (const float *)(const void *)row, weight, part);
            }
        }
        if (elem_bytes == 2) {
            round_bf16((uint16_t *)out + at, sum, part);
        } else {
            memcpy((float *)out + at, sum, (size_t)part * sizeof *sum);
        }
    }
}
