/* SPDX-License-Identifier: MIT */
/* The Adam optimiser, for one array of parameters. */
#ifndef MOE_LM_ADAM_H
#define MOE_LM_ADAM_H

#include <stdint.h>

typedef struct adam {
    int64_t count;
    int64_t steps;
    float *mean;   /* [count] running mean of the gradient */
    float *square; /* [count] and of its square */
} adam_t;

void adam_create(int64_t count, adam_t *adam);
void adam_destroy(adam_t *adam);
void adam_step(adam_t *adam, float rate, const float *grads, float *params);

#endif
