/* SPDX-License-Identifier: MIT */
/* A peer whose counts, plan or receive slots cannot be. */
#include "cpu_puppet.h"

#include <stdio.h>

/* ---- the control: without spoiling, all is well ---- */

static void
play_rightly(world_rank_t *self, void *context)
{
    puppet_t puppet = *(const puppet_t *)context;
    const char *damage;

    puppet_open(&puppet);
    (void)world_failed(self, puppet_play(&puppet), "the right play");
    damage = puppet_damage(&puppet);
    if (damage != NULL) {
        world_fail(self, "written to: %s", damage);
    }
    /* The victim's tokens 0, 2 and 3 have experts on the puppet. */
    if (puppet.layout == EPX_LAYOUT_RANK_MAJOR && !puppet.send_only &&
        (puppet_src_token(&puppet, 0) != 0 ||
         puppet_src_token(&puppet, 1) != 2 ||
         puppet_src_token(&puppet, 2) != 3)) {
        world_fail(self, "the puppet got tokens %d, %d, %d",
                   puppet_src_token(&puppet, 0), puppet_src_token(&puppet, 1),
                   puppet_src_token(&puppet, 2));
    }
    puppet_close(&puppet);
}

static void
right_puppets_are_believed(void **state)
{
    (void)state;
    for (int i = 0; i < 12; i++) {
        puppet_t puppet = { .layout = (epx_layout_t)(1 + i % 3),
                            .send_only = i / 3 % 2 == 1,
                            .no_weights = i / 6 == 1 };
        char text[2048];

        if (!world_run(WORLD_SHM, 1, true, 0, play_rightly, &puppet, NULL, text,
                       sizeof(text))) {
            print_error("layout %d, send-only %d, no weights %d:\n%s",
                        puppet.layout, puppet.send_only, puppet.no_weights,
                        text);
            fail();
        }
    }
}

/* ---- counts ---- */

static void
spoil_step(puppet_t *puppet, int64_t step)
{
    puppet_counts(puppet)->step = (uint64_t)step;
}

static void
counts_of_another_step(void **state)
{
    static const int64_t steps[] = { 0, 2, 1 + EPX__NUM_SLOTS, -1, INT64_MIN };

    (void)state;
    for (size_t i = 0; i < sizeof(steps) / sizeof(*steps); i++) {
        puppet_check_layouts((puppet_case_t){
            .name = "step", .spoil = spoil_step, .number = steps[i] });
    }
}

static void
spoil_num_tokens(puppet_t *puppet, int64_t num_tokens)
{
    puppet_counts(puppet)->num_tokens = (uint64_t)num_tokens;
}

/* 4 is T_max; 2 is less than go to each rank. */
static void
impossible_numbers_of_tokens(void **state)
{
    static const int64_t numbers[] = { 0, 2, 5, UINT32_MAX, INT64_MAX, -1 };

    (void)state;
    for (size_t i = 0; i < sizeof(numbers) / sizeof(*numbers); i++) {
        puppet_check_layouts((puppet_case_t){ .name = "num_tokens",
                                              .spoil = spoil_num_tokens,
                                              .number = numbers[i] });
    }
}

/* rank * 2^32 + count */
static void
spoil_tokens(puppet_t *puppet, int64_t number)
{
    puppet_tokens(puppet)[number >> 32] = (uint32_t)number;
}

static void
more_tokens_to_a_rank_than_there_are(void **state)
{
    static const uint32_t counts[] = { API_TOKENS + 1, INT32_MAX, UINT32_MAX };

    (void)state;
    for (size_t i = 0; i < sizeof(counts) / sizeof(*counts); i++) {
        for (int64_t rank = 0; rank < PUPPET_RANKS; rank++) {
            puppet_check_layouts(
                (puppet_case_t){ .name = "tokens",
                                 .spoil = spoil_tokens,
                                 .number = rank << 32 | counts[i] });
        }
    }
}

/* Nothing in all, yet something to us. */
static void
spoil_tokens_of_none(puppet_t *puppet, int64_t count)
{
    memset(puppet_rows(puppet), 0, API_EXPERTS * sizeof(uint32_t));
    puppet_counts(puppet)->num_tokens = 0;
    puppet_tokens(puppet)[0] = (uint32_t)count;
    puppet_tokens(puppet)[1] = 0;
}

static void
tokens_to_a_rank_from_none(void **state)
{
    static const uint32_t counts[] = { 1, 1000, UINT32_MAX };

    (void)state;
    for (size_t i = 0; i < sizeof(counts) / sizeof(*counts); i++) {
        puppet_case_t one = { .name = "tokens of none",
                              .spoil = spoil_tokens_of_none,
                              .number = counts[i] };

        puppet_check_layouts(one);
        one.send_only = true;
        puppet_check_layouts(one);
    }
}

/* expert * 2^32 + count */
static void
spoil_rows(puppet_t *puppet, int64_t number)
{
    puppet_rows(puppet)[number >> 32] = (uint32_t)number;
}

static void
more_rows_than_tokens_have_experts(void **state)
{
    static const uint32_t counts[] = { API_TOKENS * API_TOPK, INT32_MAX,
                                       UINT32_MAX };

    (void)state;
    for (size_t i = 0; i < sizeof(counts) / sizeof(*counts); i++) {
        for (int64_t expert = 0; expert < API_EXPERTS; expert++) {
            puppet_check_layouts(
                (puppet_case_t){ .name = "rows",
                                 .spoil = spoil_rows,
                                 .number = expert << 32 | counts[i] });
        }
    }
}

/* expert * 2^32 + count: the only rows for that expert's rank */
static void
spoil_rows_of_a_rank(puppet_t *puppet, int64_t number)
{
    int64_t expert = number >> 32;
    uint32_t *rows = puppet_rows(puppet) + expert / PUPPET_LOCAL * PUPPET_LOCAL;

    memset(rows, 0, PUPPET_LOCAL * sizeof(*rows));
    rows[expert % PUPPET_LOCAL] = (uint32_t)number;
}

/* Three tokens go to each rank: 4 rows there are possible, and 6, but not for
 * one expert, to which a token goes once; nor less than 3. */
static void
rows_of_an_expert_that_tokens_cannot_make(void **state)
{
    static const uint32_t counts[] = { 0, 2, 4, 6, 8 };

    (void)state;
    for (size_t i = 0; i < sizeof(counts) / sizeof(*counts); i++) {
        for (int64_t expert = 0; expert < API_EXPERTS; expert++) {
            puppet_case_t one = { .name = "rows of one expert",
                                  .spoil = spoil_rows_of_a_rank,
                                  .number = expert << 32 | counts[i] };

            puppet_check_layouts(one);
            one.send_only = true;
            puppet_check_layouts(one);
        }
    }
}

/* ---- the plan ---- */

static void
spoil_key(puppet_t *puppet, int64_t byte)
{
    char *key = (char *)&puppet_counts(puppet)->key;

    key[byte] ^= 1;
}

static void
every_byte_of_the_plan_is_compared(void **state)
{
    puppet_case_t one = { .name = "byte of the key",
                          .layout = EPX_LAYOUT_EXPERT_MAJOR,
                          .spoil = spoil_key };

    (void)state;
    for (size_t byte = 0; byte < sizeof(epx__plan_key_t); byte++) {
        one.number = (int64_t)byte;
        puppet_check(&one);
    }
}

/* ---- the victim's own counts, which lie where peers can write ---- */

static uint32_t *
own_tokens(const puppet_t *puppet)
{
    return epx__count_row_tokens(
        epx__map_counts(&puppet->victim->map,
                        epx__group_segment(puppet->victim), STEP_COUNTS, 0));
}

/* expert * 2^32 + count */
static void
overwrite_own_rows(puppet_t *puppet, int64_t number)
{
    own_tokens(puppet)[PUPPET_RANKS + (number >> 32)] = (uint32_t)number;
}

/* Either it notices, or it goes by what it knows itself. */
static void
play_with_overwritten_counts(world_rank_t *self, void *context)
{
    puppet_t puppet = *(const puppet_t *)context;
    epx_status_t status;
    const char *damage;

    puppet_open(&puppet);
    status = puppet_play(&puppet);
    damage = puppet_damage(&puppet);
    if (status != EPX_OK && status != EPX_ERR_PEER_DATA) {
        world_fail(self, "%s returned %d: %s", puppet.call, (int)status,
                   epx_last_error());
    }
    if (damage != NULL) {
        world_fail(self, "written to: %s", damage);
    }
    if (status == EPX_OK && puppet.layout == EPX_LAYOUT_RANK_MAJOR &&
        puppet_src_token(&puppet, 2) != 3) {
        world_fail(self, "the victim's third token was lost: got %d",
                   puppet_src_token(&puppet, 2));
    }
    puppet_close(&puppet);
}

static void
own_counts_cannot_be_overwritten(void **state)
{
    static const int64_t numbers[] = { 0, INT64_C(3) << 32,
                                       INT64_C(5) << 32 | 3 };

    (void)state;
    for (int i = 0; i < 9; i++) {
        puppet_t puppet = { .layout = (epx_layout_t)(1 + i % 3),
                            .late = overwrite_own_rows,
                            .number = numbers[i / 3] };
        char text[2048];

        if (!world_run(WORLD_SHM, 1, true, 0, play_with_overwritten_counts,
                       &puppet, NULL, text, sizeof(text))) {
            print_error("layout %d, number %#llx:\n%s", puppet.layout,
                        (unsigned long long)puppet.number, text);
            fail();
        }
    }
}

/* If nobody sent a row, nobody would need a place for it. */
static void
hide_every_row(puppet_t *puppet, int64_t num_tokens)
{
    size_t bytes = (PUPPET_RANKS + API_EXPERTS) * sizeof(uint32_t);

    puppet_counts(puppet)->num_tokens = (uint64_t)num_tokens;
    memset(own_tokens(puppet), 0, bytes);
    memset(puppet_tokens(puppet), 0, bytes);
    puppet_post(puppet, STEP_DISPATCH)->offset[EPX__ARRAY_X] = 0;
}

static void
rows_cannot_be_hidden_from_their_source(void **state)
{
    (void)state;
    puppet_check_layouts((puppet_case_t){ .name = "hidden rows",
                                          .late = true,
                                          .spoil = hide_every_row,
                                          .number = API_TOKENS });
}

/* ---- receive slots ---- */

static void
spoil_slots_offset(puppet_t *puppet, int64_t offset)
{
    puppet_counts(puppet)->slots_offset = (uint64_t)offset;
}

static void
slots_outside_the_heap(void **state)
{
    epx__map_t map = epx__map_make(PUPPET_RANKS, API_EXPERTS);
    int64_t heap = (int64_t)map.heap;
    int64_t end = heap + PUPPET_HEAP;
    int64_t bytes = (int64_t)2 * PUPPET_RANKS * API_TOKENS * PUPPET_SLOT;
    const int64_t offsets[] = {
        0,   heap - 64, heap + 1, heap + 4, end - bytes + 64,
        end, INT64_MAX, -1,       -64,      -bytes
    };

    (void)state;
    for (size_t i = 0; i < sizeof(offsets) / sizeof(*offsets); i++) {
        puppet_check_layouts((puppet_case_t){ .name = "slots_offset",
                                              .send_only = true,
                                              .spoil = spoil_slots_offset,
                                              .number = offsets[i] });
    }
}

/* In both halves of the slots: the victim reads one of them. */
static void
spoil_slot_expert(puppet_t *puppet, int64_t expert)
{
    for (int i = 0; i < 2 * API_TOKENS; i++) {
        int32_t number = (int32_t)expert;

        memcpy(puppet_slot(puppet, i / API_TOKENS, i % API_TOKENS) + 16,
               &number, sizeof(number));
    }
}

static void
experts_in_slots_that_are_not_local(void **state)
{
    static const int64_t experts[] = { -2, PUPPET_LOCAL, INT32_MAX, INT32_MIN };

    (void)state;
    for (size_t i = 0; i < sizeof(experts) / sizeof(*experts); i++) {
        puppet_case_t one = { .name = "expert in a slot",
                              .send_only = true,
                              .late = true,
                              .spoil = spoil_slot_expert,
                              .number = experts[i] };

        for (int layout = EPX_LAYOUT_EXPERT_MAJOR;
             layout <= EPX_LAYOUT_EXPERT_SLOTS; layout++) {
            one.layout = (epx_layout_t)layout;
            puppet_check(&one);
        }
    }
}

/* The counts tell of one row for expert 2. */
static void
more_slots_for_an_expert_than_counted(void **state)
{
    puppet_case_t one = { .name = "crowded expert",
                          .send_only = true,
                          .late = true,
                          .spoil = spoil_slot_expert,
                          .number = 2 };

    (void)state;
    for (int layout = EPX_LAYOUT_EXPERT_MAJOR;
         layout <= EPX_LAYOUT_EXPERT_SLOTS; layout++) {
        one.layout = (epx_layout_t)layout;
        puppet_check(&one);
    }
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(right_puppets_are_believed),
        cmocka_unit_test(counts_of_another_step),
        cmocka_unit_test(impossible_numbers_of_tokens),
        cmocka_unit_test(more_tokens_to_a_rank_than_there_are),
        cmocka_unit_test(tokens_to_a_rank_from_none),
        cmocka_unit_test(more_rows_than_tokens_have_experts),
        cmocka_unit_test(rows_of_an_expert_that_tokens_cannot_make),
        cmocka_unit_test(every_byte_of_the_plan_is_compared),
        cmocka_unit_test(own_counts_cannot_be_overwritten),
        cmocka_unit_test(rows_cannot_be_hidden_from_their_source),
        cmocka_unit_test(slots_outside_the_heap),
        cmocka_unit_test(experts_in_slots_that_are_not_local),
        cmocka_unit_test(more_slots_for_an_expert_than_counted),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
