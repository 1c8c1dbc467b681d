/* SPDX-License-Identifier: MIT */
/*
 * The sum of epx_combine_args_t for one element type.  Included by
 * cpu_kernels.c once for each, with
 *     REDUCE_TYPE        the element as stored
 *     REDUCE_NAME(name)  a name of its own for each type
 *     REDUCE_LOAD(x)     element to float32
 *     REDUCE_ROUND(x)    float32 to element
 * No include guard, for that reason.
 */

/*
 * out[0..length-1] = the sums at elements `at` and on.  With a constant length
 * the sums live in registers from the first row to the rounding.
 */
static ALWAYS_INLINE void
REDUCE_NAME(sum_block)(const epx__reduce_t *reduce, size_t at, size_t length,
                       REDUCE_TYPE *restrict out)
{
    float sums[REDUCE_BLOCK];

    for (size_t i = 0; i < length; i++) {
        sums[i] = 0.0f;
    }
    for (int r = 0; reduce->weights == NULL && r < reduce->num_rows; r++) {
        const REDUCE_TYPE *row = (const REDUCE_TYPE *)reduce->rows[r] + at;

        for (size_t i = 0; i < length; i++) {
            sums[i] += REDUCE_LOAD(row[i]);
        }
    }
    for (int r = 0; reduce->weights != NULL && r < reduce->num_rows; r++) {
        const REDUCE_TYPE *row = (const REDUCE_TYPE *)reduce->rows[r] + at;
        float weight = reduce->weights[r];

        for (size_t i = 0; i < length; i++) {
            sums[i] = fmaf(weight, REDUCE_LOAD(row[i]), sums[i]);
        }
    }
    for (size_t i = 0; i < length; i++) {
        out[i] = REDUCE_ROUND(sums[i]);
    }
}

static void
REDUCE_NAME(reduce)(const epx__reduce_t *reduce)
{
    _Alignas(LINE) REDUCE_TYPE rounded[REDUCE_CHUNK];
    REDUCE_TYPE *out = reduce->out;

    for (size_t begin = 0; begin < reduce->count; begin += REDUCE_CHUNK) {
        size_t left = reduce->count - begin;
        size_t length = left < REDUCE_CHUNK ? left : REDUCE_CHUNK;
        REDUCE_TYPE *to = reduce->streams ? rounded : out + begin;
        size_t i = 0;

        for (; i + REDUCE_BLOCK <= length; i += REDUCE_BLOCK) {
            REDUCE_NAME(sum_block)(reduce, begin + i, REDUCE_BLOCK, to + i);
        }
        REDUCE_NAME(sum_block)(reduce, begin + i, length - i, to + i);
        if (reduce->streams) {
            copy_stream(out + begin, rounded, length * sizeof(*out));
        }
    }
}

#undef REDUCE_TYPE
#undef REDUCE_NAME
#undef REDUCE_LOAD
#undef REDUCE_ROUND
