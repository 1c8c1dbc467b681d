/* SPDX-License-Identifier: MIT */
/*
 * The inner loops of the CPU engine.  cpu_kernels.c is compiled once for each
 * instruction set; all of them give the same bits.
 */
#ifndef EPX_ENGINE_CPU_KERNELS_H
#define EPX_ENGINE_CPU_KERNELS_H

#include <epx/epx.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* What a row is to a sum in LogFMT-10. */
typedef enum epx__row_kind {
    EPX__ROW_PLAIN = 0, /* bf16 */
    EPX__ROW_LOGFMT,    /* bf16 that counts as what its codes decode to */
    EPX__ROW_PACKED,    /* by common/logfmt.h; any alignment */
} epx__row_kind_t;

/* The rows that one token is the sum of, in order, and where the sum goes. */
typedef struct epx__reduce {
    const void *const *rows;
    const uint8_t *kinds; /* reduce_logfmt: epx__row_kind_t of each row */
    const float *weights; /* one for each row, or NULL */
    int num_rows;
    void *out;
    size_t count; /* elements */
    bool streams; /* write out past the caches; as for copy_stream */
    bool packs;   /* reduce_logfmt: out is packed; count is a multiple of 8 */
} epx__reduce_t;

typedef struct epx__kernels {
    const char *isa;
    /* Copy past the caches.  dst and bytes are multiples of 16.  Weakly
     * ordered: epx__kernels_fence() before anything is signalled. */
    void (*copy_stream)(void *dst, const void *src, size_t bytes);
    /* bf16 -> e4m3 by the rules of epx_quantize_t; scales is [S]. */
    void (*quantize)(epx_quantize_t quantize, const uint16_t *x, size_t count,
                     uint8_t *out, uint32_t *scales);
    /* The sum that epx_combine_args_t defines, for one token; a bias is a row
     * of weight 1. */
    void (*reduce_f32)(const epx__reduce_t *reduce);
    void (*reduce_f16)(const epx__reduce_t *reduce);
    void (*reduce_bf16)(const epx__reduce_t *reduce);
    void (*reduce_logfmt)(const epx__reduce_t *reduce);
} epx__kernels_t;

/* The best that this machine runs. */
const epx__kernels_t *epx__kernels_get(void);

/* Order the stores of copy_stream before what follows. */
static inline void
epx__kernels_fence(void)
{
#if defined(__x86_64__)
    __builtin_ia32_sfence();
#endif
}

extern const epx__kernels_t epx__kernels_base;
#if defined(__x86_64__)
extern const epx__kernels_t epx__kernels_avx2;
extern const epx__kernels_t epx__kernels_avx512;
#endif

#endif
