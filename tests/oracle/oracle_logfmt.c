/* SPDX-License-Identifier: MIT */
/* LogFMT-10 from docs/formats.md, by a code for each element. */
#include "oracle/oracle_internal.h"
#include <math.h>

enum { LEVELS = 509, CODE_INF = 510, CODE_NAN = 511 };

static bool
is_number(float x)
{
    return isnormal(x);
}

/* c[0] m + c[1] m^2 + ... + c[n-1] m^n + rest, fused, by Horner's rule. */
static float
polynomial(const float *c, int n, float m, float rest)
{
    float value = c[n - 1];

    for (int i = n - 2; i >= 0; i--) {
        value = fmaf(value, m, c[i]);
    }
    return fmaf(value, m, rest);
}

static float
lg(float x)
{
    static const float c[] = { 0x1.7125f8p+0f, -0x1.6b77acp-1f, 0x1.ac775ap-2f,
                               -0x1.94460ep-3f, 0x1.804636p-5f };
    int e;
    float half = frexpf(x, &e); /* in 0.5 .. 1 */

    return polynomial(c, 5, 2.0f * half - 1.0f, (float)(e - 1));
}

static float
exp2_of(float p)
{
    static const float c[] = { 0x1.62e12ap-1f, 0x1.ec037ep-3f, 0x1.c9fd38p-5f,
                               0x1.3a0184p-7f };
    float n = rintf(p);

    return ldexpf(polynomial(c, 4, p - n, 1.0f), (int)n);
}

/* The range of a block in powers of two. */
static float
range_of(float amax, float amin)
{
    float range = amax > 0 ? lg(amax) - lg(amin) : 0.0f;

    return fminf(fmaxf(range, 0.0f), 32.0f);
}

static int
code_of(float x, float amax, float range)
{
    float step = range * (1.0f / 508.0f);
    float inverse = range > 0 ? 508.0f / range : 0.0f;
    float level;

    if (isnan(x)) {
        return CODE_NAN;
    }
    if (isinf(x)) {
        return CODE_INF;
    }
    if (!is_number(x)) {
        return 0;
    }
    level = rintf(fmaf(lg(amax) - lg(fabsf(x)), inverse, step * 0x1.62e43p-4f));
    return level > 508 ? 0 : LEVELS - (int)level;
}

static float
value_of(int code, float amax, float range)
{
    float step = range * (1.0f / 508.0f);

    switch (code) {
    case 0:
        return 0.0f;
    case CODE_INF:
        return INFINITY;
    case CODE_NAN:
        return NAN;
    default:
        return amax * exp2_of(-((float)(LEVELS - code) * step));
    }
}

static void
block(const uint16_t *bf16, int64_t count, uint16_t *codes, float *decoded)
{
    float amax = 0;
    float amin = INFINITY;
    float range;

    for (int64_t i = 0; i < count; i++) {
        float magnitude = fabsf(oracle_from_bf16(bf16[i]));

        if (is_number(magnitude)) {
            amax = fmaxf(amax, magnitude);
            amin = fminf(amin, magnitude);
        }
    }
    range = range_of(amax, amin);
    for (int64_t i = 0; i < count; i++) {
        float x = oracle_from_bf16(bf16[i]);

        codes[i] = (uint16_t)code_of(x, amax, range);
        decoded[i] = copysignf(value_of(codes[i], amax, range), x);
    }
}

void
oracle_logfmt(const uint16_t *bf16, int64_t hidden, uint16_t *codes,
              float *decoded)
{
    for (int64_t first = 0; first < hidden; first += EPX_LOGFMT_BLOCK) {
        int64_t left = hidden - first;

        block(bf16 + first, left < EPX_LOGFMT_BLOCK ? left : EPX_LOGFMT_BLOCK,
              codes + first, decoded + first);
    }
}
