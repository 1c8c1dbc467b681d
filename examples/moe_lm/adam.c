/* SPDX-License-Identifier: MIT */
#include "adam.h"
#include "ops.h"

#include <math.h>
#include <stdlib.h>

#define MEAN_DECAY   0.9f
#define SQUARE_DECAY 0.99f
#define EPSILON      1e-8f

void
adam_create(int64_t count, adam_t *adam)
{
    *adam = (adam_t){ .count = count,
                      .mean = ops_floats(count),
                      .square = ops_floats(count) };
}

void
adam_destroy(adam_t *adam)
{
    free(adam->mean);
    free(adam->square);
}

void
adam_step(adam_t *adam, float rate, const float *grads, float *params)
{
    float *restrict mean = adam->mean;
    float *restrict square = adam->square;

    /* Both means start at zero; these undo that bias. */
    adam->steps++;
    const float mean_scale = rate / (1 - powf(MEAN_DECAY, (float)adam->steps));
    const float square_scale = 1 / (1 - powf(SQUARE_DECAY, (float)adam->steps));

    for (int64_t i = 0; i < adam->count; i++) {
        float g = grads[i];
        mean[i] += (1 - MEAN_DECAY) * (g - mean[i]);
        square[i] += (1 - SQUARE_DECAY) * (g * g - square[i]);
        params[i] -=
            mean[i] * mean_scale / (sqrtf(square[i] * square_scale) + EPSILON);
    }
}
