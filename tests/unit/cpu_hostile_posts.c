/* SPDX-License-Identifier: MIT */
/* A peer whose posts, in a dispatch or a combine, cannot be. */
#include "cpu_puppet.h"

#include "conformance/rng.h"

#include <inttypes.h>
#include <stdio.h>

#define COUNT(array) (sizeof(array) / sizeof(*(array)))

/* Numbers that are too large for everything, or overflow when multiplied. */
static const uint64_t huge[] = {
    UINT64_C(1) << 20,
    UINT64_C(1) << 32,
    UINT64_C(1) << 60,
    UINT64_C(1) << 62,
    (UINT64_C(1) << 62) + 1,
    UINT64_C(1) << 63,
    (UINT64_C(1) << 63) + 1,
    UINT64_MAX / 3,
    UINT64_C(0x3333333333333334), /* 5 times this is 4 */
    UINT64_C(0xb6db6db6db6db6dc), /* 7 times this is 4 */
    UINT64_MAX / 8 + 1,
    UINT64_MAX - 7,
    UINT64_MAX,
};

/* ---- which operation and plan ---- */

static void
spoil_dispatch_step(puppet_t *puppet, int64_t step)
{
    puppet_post(puppet, STEP_DISPATCH)->step = (uint64_t)step;
}

static void
spoil_combine_step(puppet_t *puppet, int64_t step)
{
    puppet_post(puppet, STEP_COMBINE)->step = (uint64_t)step;
}

static void
posts_of_another_step(void **state)
{
    static const int64_t steps[] = { 0, 1, STEP_DISPATCH + EPX__NUM_SLOTS,
                                     STEP_COMBINE + EPX__NUM_SLOTS, -1 };

    (void)state;
    for (size_t i = 0; i < COUNT(steps); i++) {
        puppet_case_t one = { .name = "step of a dispatch",
                              .spoil = spoil_dispatch_step,
                              .number = steps[i] };

        puppet_check_layouts(one);
        one.send_only = true;
        puppet_check_layouts(one);
        one.send_only = false;
        one.name = "step of a combine";
        one.spoil = spoil_combine_step;
        puppet_check_layouts(one);
    }
}

static void
spoil_dispatch_signature(puppet_t *puppet, int64_t byte)
{
    char *signature = (char *)&puppet_post(puppet, STEP_DISPATCH)->signature;

    signature[byte] ^= 1;
}

static void
spoil_combine_signature(puppet_t *puppet, int64_t byte)
{
    char *signature = (char *)&puppet_post(puppet, STEP_COMBINE)->signature;

    signature[byte] ^= 1;
}

static void
every_byte_of_a_signature_is_compared(void **state)
{
    (void)state;
    for (size_t byte = 0; byte < sizeof(epx__signature_t); byte++) {
        puppet_case_t one = { .name = "signature of a dispatch",
                              .layout = EPX_LAYOUT_RANK_MAJOR,
                              .spoil = spoil_dispatch_signature,
                              .number = (int64_t)byte };

        puppet_check(&one);
        one.name = "signature of a combine";
        one.spoil = spoil_combine_signature;
        puppet_check(&one);
    }
}

/* ---- a dispatch's arrays ---- */

static void
spoil_num_rows(puppet_t *puppet, int64_t num_rows)
{
    puppet_post(puppet, STEP_DISPATCH)->num_rows = (uint64_t)num_rows;
}

static void
too_few_rows(void **state)
{
    (void)state;
    puppet_check_layouts((puppet_case_t){
        .name = "num_rows", .spoil = spoil_num_rows, .number = 0 });
    puppet_check_layouts((puppet_case_t){
        .name = "num_rows", .spoil = spoil_num_rows, .number = 5 });
}

/* array * 2^56 + index in offsets[] below */
static uint64_t
bad_offset(const puppet_t *puppet, int64_t index)
{
    uint64_t heap = puppet->victim->map.heap;
    uint64_t end = heap + PUPPET_HEAP;
    const uint64_t offsets[] = {
        16,
        heap - 16,
        end - 16, /* room for the first row, or for none */
        end,
        end + 16,
        UINT64_C(1) << 32,
        UINT64_C(1) << 62,
        UINT64_C(1) << 63,
        UINT64_MAX - 15,
        UINT64_MAX - 4095,
        0 - heap,
    };

    return offsets[index];
}

enum { NUM_OFFSETS = 11 };

static void
spoil_dispatch_offset(puppet_t *puppet, int64_t number)
{
    puppet_post(puppet, STEP_DISPATCH)->offset[number / NUM_OFFSETS] =
        bad_offset(puppet, number % NUM_OFFSETS);
}

static void
arrays_outside_the_heap(void **state)
{
    (void)state;
    for (int64_t i = 0; i < EPX__NUM_ARRAYS * NUM_OFFSETS; i++) {
        puppet_check_layouts((puppet_case_t){ .name = "offset in a dispatch",
                                              .spoil = spoil_dispatch_offset,
                                              .number = i });
    }
}

static void
shift_dispatch_offset(puppet_t *puppet, int64_t array)
{
    puppet_post(puppet, STEP_DISPATCH)->offset[array]++;
}

/* Payload is bytes: it may lie anywhere. */
static void
arrays_that_are_not_aligned(void **state)
{
    (void)state;
    for (int array = EPX__ARRAY_SCALES; array < EPX__NUM_ARRAYS; array++) {
        puppet_check_layouts((puppet_case_t){ .name = "shifted array",
                                              .spoil = shift_dispatch_offset,
                                              .number = array });
    }
}

static void
forget_dispatch_array(puppet_t *puppet, int64_t array)
{
    puppet_post(puppet, STEP_DISPATCH)->offset[array] = 0;
}

/* Both are needed by what the ranks have agreed on; who leaves out another
 * does not get it. */
static void
missing_arrays(void **state)
{
    static const int arrays[] = { EPX__ARRAY_X, EPX__ARRAY_SCALES };

    (void)state;
    for (size_t i = 0; i < COUNT(arrays); i++) {
        puppet_check_layouts((puppet_case_t){ .name = "missing array",
                                              .spoil = forget_dispatch_array,
                                              .number = arrays[i] });
    }
}

static void
ask_for_weights(puppet_t *puppet, int64_t arrays)
{
    epx__post_t *post = puppet_post(puppet, STEP_DISPATCH);

    post->signature.arrays = (uint32_t)arrays;
    post->offset[EPX__ARRAY_TOPK_WEIGHTS] =
        puppet->victim->map.heap +
        (uint64_t)EPX__ARRAY_TOPK_WEIGHTS * PUPPET_STRIDE;
}

static void
weights_that_nobody_sends(void **state)
{
    puppet_case_t one = { .name = "weights unasked",
                          .no_weights = true,
                          .harmless = true,
                          .spoil = ask_for_weights };

    (void)state;
    puppet_check_layouts(one);
    one.number = EPX__ARRAYS_ANY;
    puppet_check_layouts(one);
}

/* ---- strides ---- */

static void
spoil_row_stride(puppet_t *puppet, int64_t index)
{
    puppet_post(puppet, STEP_DISPATCH)->scale_row_stride = huge[index];
}

static void
spoil_scale_stride(puppet_t *puppet, int64_t index)
{
    puppet_post(puppet, STEP_DISPATCH)->scale_stride = huge[index];
}

static void
spoil_expert_stride(puppet_t *puppet, int64_t index)
{
    puppet_post(puppet, STEP_DISPATCH)->scale_expert_stride = huge[index];
}

/* Each alone is too large; together they come round to something small. */
static void
spoil_all_strides(puppet_t *puppet, int64_t index)
{
    epx__post_t *post = puppet_post(puppet, STEP_DISPATCH);

    post->scale_row_stride = huge[index];
    post->scale_stride = 0 - huge[index];
    post->scale_expert_stride = 0 - huge[index] * 7;
}

static void
strides_that_leave_the_heap(void **state)
{
    (void)state;
    for (size_t i = 0; i < COUNT(huge); i++) {
        puppet_case_t one = { .name = "stride", .number = (int64_t)i };

        one.spoil = spoil_row_stride;
        puppet_check_layouts(one);
        one.spoil = spoil_scale_stride;
        puppet_check_layouts(one);
        one.spoil = spoil_all_strides;
        puppet_check_layouts(one);
        one.spoil = spoil_expert_stride; /* which only these have */
        one.layout = EPX_LAYOUT_EXPERT_SLOTS;
        puppet_check(&one);
    }
}

/* ---- a combine's arrays ---- */

static void
spoil_combine_offset(puppet_t *puppet, int64_t number)
{
    int array = number < NUM_OFFSETS ? EPX__ARRAY_X : EPX__ARRAY_TOPK_WEIGHTS;

    puppet_post(puppet, STEP_COMBINE)->offset[array] =
        bad_offset(puppet, number % NUM_OFFSETS);
}

static void
outputs_outside_the_heap(void **state)
{
    (void)state;
    for (int64_t i = 0; i < 2 * NUM_OFFSETS; i++) {
        puppet_check_layouts((puppet_case_t){ .name = "offset in a combine",
                                              .spoil = spoil_combine_offset,
                                              .number = i });
    }
}

static void
shift_combine_offset(puppet_t *puppet, int64_t array)
{
    puppet_post(puppet, STEP_COMBINE)->offset[array]++;
}

static void
forget_combine_array(puppet_t *puppet, int64_t array)
{
    puppet_post(puppet, STEP_COMBINE)->offset[array] = 0;
}

static void
outputs_missing_or_not_aligned(void **state)
{
    static const int arrays[] = { EPX__ARRAY_X, EPX__ARRAY_TOPK_WEIGHTS };

    (void)state;
    for (size_t i = 0; i < COUNT(arrays); i++) {
        puppet_case_t one = { .name = "missing output",
                              .spoil = forget_combine_array,
                              .number = arrays[i] };

        puppet_check_layouts(one);
        one.name = "shifted output";
        one.spoil = shift_combine_offset;
        puppet_check_layouts(one);
    }
}

/* ---- anything anywhere ---- */

enum { ROUNDS = 300 };

/* A word of what the puppet has said, and what to make of it. */
static void
scribble(const puppet_t *puppet, rng_t *rng)
{
    static const uint64_t small[] = { 0, 1, 2, 3, 8, 16, 64, 4096 };
    void *parts[] = { puppet_counts(puppet), puppet_tokens(puppet),
                      puppet_post(puppet, STEP_DISPATCH),
                      puppet_post(puppet, STEP_COMBINE) };
    const size_t bytes[] = { sizeof(epx__count_row_t),
                             (PUPPET_RANKS + API_EXPERTS) * sizeof(uint32_t),
                             sizeof(epx__post_t), sizeof(epx__post_t) };
    int64_t part = rng_int(rng, 0, 3);
    char *word =
        (char *)parts[part] + 4 * rng_int(rng, 0, (int64_t)bytes[part] / 4 - 1);
    uint64_t value;
    uint32_t old;

    memcpy(&old, word, sizeof(old));
    switch (rng_int(rng, 0, 3)) {
    case 0:
        value = huge[rng_int(rng, 0, COUNT(huge) - 1)] >>
                (rng_one_in(rng, 2) ? 32 : 0);
        break;
    case 1:
        value = small[rng_int(rng, 0, COUNT(small) - 1)];
        break;
    case 2:
        value = old + (uint64_t)rng_int(rng, -16, 16);
        break;
    default:
        value = rng_next(rng);
    }
    old = (uint32_t)value;
    memcpy(word, &old, sizeof(old));
}

/* An offset that is wrong but in the heap leads astray there, and nowhere else:
 * that is the peer's own business. */
static void
play_scribbled(world_rank_t *self, void *context)
{
    (void)context;
    for (uint64_t seed = 0; seed < ROUNDS && !self->failed; seed++) {
        rng_t rng = rng_of(seed, 3, 3);
        puppet_t puppet = {
            .layout = (epx_layout_t)(1 + seed % 3),
            .send_only = rng_one_in(&rng, 2),
            .no_weights = rng_one_in(&rng, 4),
        };
        const epx__segment_header_t *header;
        epx_status_t status;

        *(uint64_t *)self->shared = seed;
        puppet_open(&puppet);
        for (int64_t words = rng_int(&rng, 1, 3); words > 0; words--) {
            scribble(&puppet, &rng);
        }
        status = puppet_play(&puppet);
        header =
            (const epx__segment_header_t *)(const void *)epx__group_segment(
                puppet.strings);
        if (header->magic != EPX__SEGMENT_MAGIC || status == EPX_ERR_TIMEOUT) {
            world_fail(self, "%s returned %d: %s", puppet.call, (int)status,
                       epx_last_error());
        }
        puppet_close(&puppet);
    }
}

static void
scribbled_words_do_no_harm(void **state)
{
    char text[2048];
    void *seed;

    (void)state;
    if (!world_run(WORLD_SHM, 1, true, sizeof(uint64_t), play_scribbled, NULL,
                   &seed, text, sizeof(text))) {
        print_error("seed %" PRIu64 ":\n%s", *(const uint64_t *)seed, text);
        fail();
    }
    world_release(seed, sizeof(uint64_t));
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(posts_of_another_step),
        cmocka_unit_test(every_byte_of_a_signature_is_compared),
        cmocka_unit_test(too_few_rows),
        cmocka_unit_test(arrays_outside_the_heap),
        cmocka_unit_test(arrays_that_are_not_aligned),
        cmocka_unit_test(missing_arrays),
        cmocka_unit_test(weights_that_nobody_sends),
        cmocka_unit_test(strides_that_leave_the_heap),
        cmocka_unit_test(outputs_outside_the_heap),
        cmocka_unit_test(outputs_missing_or_not_aligned),
        cmocka_unit_test(scribbled_words_do_no_harm),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
