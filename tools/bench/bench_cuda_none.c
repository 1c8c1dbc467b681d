/* SPDX-License-Identifier: MIT */
/* In the place of bench_cuda.c where there is no CUDA to build with. */
#include "bench_card.h"

const struct bench_card_ops *const bench_card_cuda = NULL;
