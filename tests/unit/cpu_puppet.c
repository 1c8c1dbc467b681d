/* SPDX-License-Identifier: MIT */
#include "cpu_puppet.h"

#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

enum { UNTOUCHED = 0x5a };

/* ---- the two ranks ---- */

typedef struct joiner {
    pthread_t thread;
    epx_bootstrap_t *bootstrap;
    epx_group_t *group;
} joiner_t;

static void *
join_group(void *arg)
{
    joiner_t *joiner = arg;
    epx_group_config_t config = EPX_GROUP_CONFIG_INIT;

    config.bootstrap = joiner->bootstrap;
    config.heap_bytes = PUPPET_HEAP;
    config.num_workers = 1;
    config.max_experts = API_EXPERTS;
    if (epx_group_create(&config, &joiner->group) != EPX_OK) {
        joiner->group = NULL;
    }
    return NULL;
}

static void
join_groups(puppet_t *puppet)
{
    epx_bootstrap_t *bootstraps[PUPPET_RANKS];
    joiner_t joiners[PUPPET_RANKS];

    if (epx_bootstrap_threads_create(PUPPET_RANKS, bootstraps) != EPX_OK) {
        abort();
    }
    for (int r = 0; r < PUPPET_RANKS; r++) {
        joiners[r] = (joiner_t){ .bootstrap = bootstraps[r] };
        if (pthread_create(&joiners[r].thread, NULL, join_group, &joiners[r])) {
            abort();
        }
    }
    for (int r = 0; r < PUPPET_RANKS; r++) {
        if (pthread_join(joiners[r].thread, NULL) || !joiners[r].group) {
            abort();
        }
        epx_bootstrap_destroy(bootstraps[r]);
    }
    puppet->victim = joiners[0].group;
    puppet->strings = joiners[1].group;
    puppet->victim->timeout_ns = 50000000;
}

/* ---- what the puppet says ---- */

epx__count_row_t *
puppet_counts(const puppet_t *puppet)
{
    return epx__map_counts(&puppet->victim->map,
                           epx__group_segment(puppet->victim), STEP_COUNTS, 1);
}

uint32_t *
puppet_tokens(const puppet_t *puppet)
{
    return epx__count_row_tokens(puppet_counts(puppet));
}

uint32_t *
puppet_rows(const puppet_t *puppet)
{
    return epx__count_row_experts(puppet_counts(puppet), PUPPET_RANKS);
}

epx__post_t *
puppet_post(const puppet_t *puppet, uint64_t step)
{
    return epx__map_post(&puppet->victim->map,
                         epx__group_segment(puppet->victim), step, 1);
}

/* Where the puppet keeps an array, from the start of its segment. */
static uint64_t
array_offset(const puppet_t *puppet, int array)
{
    return puppet->strings->map.heap + (uint64_t)array * PUPPET_STRIDE;
}

static void
say_counts(const puppet_t *puppet)
{
    static const uint32_t tokens[PUPPET_RANKS] = { 3, 3 };
    static const uint32_t rows[API_EXPERTS] = { 2, 1, 1, 1, 1, 1 };
    bool slots = puppet->send_only;

    *puppet_counts(puppet) = (epx__count_row_t){
        .step = STEP_COUNTS,
        .key = { .plan_id = 1,
                 .layout = puppet->layout,
                 .num_experts = API_EXPERTS,
                 .topk = API_TOPK,
                 .idx_dtype = EPX_I64,
                 .expert_alignment = 1,
                 .max_tokens_per_rank = API_TOKENS,
                 .send_only_row_bytes =
                     slots ? PUPPET_HIDDEN + 4 * PUPPET_SCALES : 0 },
        .num_tokens = API_TOKENS,
        .slots_offset = slots ? array_offset(puppet, EPX__NUM_ARRAYS) : 0,
    };
    memcpy(puppet_tokens(puppet), tokens, sizeof(tokens));
    memcpy(puppet_rows(puppet), rows, sizeof(rows));
}

static void
say_dispatch(const puppet_t *puppet)
{
    epx__post_t *post = puppet_post(puppet, STEP_DISPATCH);

    *post = (epx__post_t){
        .step = STEP_DISPATCH,
        .signature = { .plan_id = 1,
                       .kind = EPX__STEP_DISPATCH,
                       .dtype = EPX_F8E4M3,
                       .arrays = puppet->no_weights
                                     ? 0
                                     : 1u << EPX__ARRAY_TOPK_WEIGHTS,
                       .flags = puppet->send_only ? EPX_SEND_ONLY : 0,
                       .num_scales = PUPPET_SCALES,
                       .hidden = PUPPET_HIDDEN },
        .num_rows = PUPPET_ROWS,
        .scale_row_stride = PUPPET_SCALES,
        .scale_stride = 1,
        .scale_expert_stride =
            (uint64_t)PUPPET_SCALES * PUPPET_RANKS * API_TOKENS,
    };
    for (int i = 0; i < EPX__NUM_ARRAYS; i++) {
        bool given = !puppet->send_only &&
                     (i != EPX__ARRAY_TOPK_WEIGHTS || !puppet->no_weights) &&
                     (i != EPX__ARRAY_TOPK_IDX ||
                      puppet->layout == EPX_LAYOUT_RANK_MAJOR);

        post->offset[i] = given ? array_offset(puppet, i) : 0;
    }
}

static void
say_combine(const puppet_t *puppet)
{
    epx__post_t *post = puppet_post(puppet, STEP_COMBINE);

    *post = (epx__post_t){
        .step = STEP_COMBINE,
        .signature = { .plan_id = 1,
                       .kind = EPX__STEP_COMBINE,
                       .dtype = EPX_F16,
                       .arrays = 1u << EPX__ARRAY_TOPK_WEIGHTS,
                       .hidden = PUPPET_OUTPUT },
        .num_rows = PUPPET_ROWS,
    };
    post->offset[EPX__ARRAY_X] = array_offset(puppet, EPX__ARRAY_X);
    post->offset[EPX__ARRAY_TOPK_WEIGHTS] =
        array_offset(puppet, EPX__ARRAY_TOPK_WEIGHTS);
}

/* The test runner would take a crash for the end of its own test. */
static void
let_signals_kill(void)
{
    static const int numbers[] = { SIGSEGV, SIGBUS, SIGILL, SIGFPE };

    for (size_t i = 0; i < sizeof(numbers) / sizeof(*numbers); i++) {
        (void)signal(numbers[i], SIG_DFL);
    }
}

void
puppet_open(puppet_t *puppet)
{
    epx_group_t *strings;

    let_signals_kill();
    join_groups(puppet);
    strings = puppet->strings;
    memset(epx__group_segment(strings) + strings->map.heap, UNTOUCHED,
           PUPPET_HEAP);
    say_counts(puppet);
    say_dispatch(puppet);
    say_combine(puppet);
    for (uint64_t step = STEP_COUNTS; step <= STEP_COMBINE; step++) {
        epx__signal(strings, 0, step, EPX__GATE_READY);
        epx__signal(strings, 0, step, EPX__GATE_DONE);
    }
}

void
puppet_close(puppet_t *puppet)
{
    if (epx_group_destroy(puppet->victim) != EPX_OK ||
        epx_group_destroy(puppet->strings) != EPX_OK) {
        abort();
    }
}

/* ---- receive slots ---- */

char *
puppet_slot(const puppet_t *puppet, int parity, int ordinal)
{
    /* The victim told where its slots are. */
    uint64_t offset =
        epx__map_counts(&puppet->strings->map,
                        epx__group_segment(puppet->strings), STEP_COUNTS, 0)
            ->slots_offset;

    return epx__group_segment(puppet->victim) + offset +
           (size_t)((parity * PUPPET_RANKS + 1) * API_TOKENS + ordinal) *
               PUPPET_SLOT;
}

/* The local experts of the puppet's three tokens for the victim. */
static void
fill_slots(const puppet_t *puppet)
{
    static const int32_t experts[3][API_TOPK] = { { 0, -1 },
                                                  { 1, 2 },
                                                  { -1, 0 } };

    for (int i = 0; i < 6; i++) {
        char *slot = puppet_slot(puppet, i / 3, i % 3);

        memset(slot, 0, PUPPET_SLOT);
        memcpy(slot + 16, experts[i % 3], sizeof(experts[0]));
    }
}

/* ---- what the victim does ---- */

/* Exactly `bytes` bytes up to a page that cannot be touched. */
static void *
fenced(size_t bytes)
{
    size_t room = (bytes + 4095) / 4096 * 4096;
    char *base = mmap(NULL, room + 4096, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (base == MAP_FAILED || mprotect(base + room, 4096, PROT_NONE) != 0) {
        abort();
    }
    return base + room - bytes;
}

/* The victim's arrays, outside of EPX memory; made once. */
static struct {
    uint8_t *x, *recv_x;
    uint32_t *scales, *recv_scales;
    float *weights, *recv_weights, *out_weights;
    int64_t *recv_idx;
    int32_t *recv_src, *counts;
    uint16_t *y, *out;
} own;

static void
make_arrays(void)
{
    if (own.x != NULL) {
        return;
    }
    own.x = fenced(API_TOKENS * PUPPET_HIDDEN);
    own.scales = fenced(API_TOKENS * PUPPET_SCALES * 4);
    own.weights = fenced(API_TOKENS * API_TOPK * 4);
    own.recv_x = fenced(PUPPET_ROWS * PUPPET_HIDDEN);
    own.recv_scales = fenced(PUPPET_ROWS * PUPPET_SCALES * 4);
    own.recv_weights = fenced(PUPPET_ROWS * API_TOPK * 4);
    own.recv_idx = fenced(PUPPET_ROWS * API_TOPK * 8);
    own.recv_src = fenced(PUPPET_ROWS * 4);
    own.counts = fenced(PUPPET_LOCAL * 4);
    own.y = fenced(PUPPET_ROWS * PUPPET_OUTPUT * 2);
    own.out = fenced(API_TOKENS * PUPPET_OUTPUT * 2);
    own.out_weights = fenced(API_TOKENS * API_TOPK * 4);
}

static epx_dispatch_args_t
dispatch_args(const puppet_t *puppet)
{
    epx_dispatch_args_t args = EPX_DISPATCH_ARGS_INIT;

    args.x = own.x;
    args.hidden = PUPPET_HIDDEN;
    args.dtype = EPX_F8E4M3;
    args.scales = own.scales;
    args.num_scales = PUPPET_SCALES;
    args.topk_weights = puppet->no_weights ? NULL : own.weights;
    args.recv_x = own.recv_x;
    args.recv_rows = PUPPET_ROWS;
    args.recv_scales = own.recv_scales;
    args.recv_topk_weights = puppet->no_weights ? NULL : own.recv_weights;
    args.recv_topk_idx =
        puppet->layout == EPX_LAYOUT_RANK_MAJOR ? own.recv_idx : NULL;
    args.recv_src_token = own.recv_src;
    args.recv_expert_counts = own.counts;
    args.flags = puppet->send_only ? EPX_SEND_ONLY : 0;
    return args;
}

static epx_combine_args_t
combine_args(const puppet_t *puppet)
{
    epx_combine_args_t args = EPX_COMBINE_ARGS_INIT;

    args.x = own.y;
    args.num_rows = PUPPET_ROWS;
    args.hidden = PUPPET_OUTPUT;
    args.dtype = EPX_F16;
    args.topk_weights =
        puppet->layout == EPX_LAYOUT_RANK_MAJOR ? NULL : own.weights;
    args.out = own.out;
    args.recv_topk_weights = own.recv_weights;
    args.out_topk_weights = own.out_weights;
    return args;
}

static epx_status_t
play_plan(puppet_t *puppet, epx_plan_t *plan)
{
    epx_plan_counts_t counts = EPX_PLAN_COUNTS_INIT;
    epx_dispatch_args_t dispatch = dispatch_args(puppet);
    epx_combine_args_t combine = combine_args(puppet);
    epx_status_t status;

    puppet->call = "epx_plan_counts";
    status = epx_plan_counts(plan, &counts);
    if (status == EPX_OK) {
        puppet->call = "epx_dispatch";
        status = epx_dispatch(plan, &dispatch, NULL);
    }
    if (status == EPX_OK && puppet->send_only) {
        puppet->call = "epx_complete";
        status = epx_complete(plan, NULL);
    }
    if (status == EPX_OK) {
        puppet->call = "epx_combine";
        status = epx_combine(plan, &combine, NULL);
    }
    return status;
}

epx_status_t
puppet_play(puppet_t *puppet)
{
    epx_plan_args_t args = api_plan_args(puppet->layout);
    epx__error_t error;
    epx_plan_t *plan;
    epx_status_t status;

    make_arrays();
    args.send_only_row_bytes =
        puppet->send_only ? PUPPET_HIDDEN + 4 * PUPPET_SCALES : 0;
    puppet->call = "epx_plan_create";
    status = epx_plan_create(puppet->victim, &args, NULL, &plan);
    if (status != EPX_OK) {
        return status;
    }
    if (puppet->send_only) {
        fill_slots(puppet);
    }
    if (puppet->late != NULL) {
        puppet->late(puppet, puppet->number);
    }
    epx__error_save(&error, play_plan(puppet, plan));
    (void)epx_plan_destroy(plan);
    return epx__error_restore(&error);
}

/* ---- what came of it ---- */

/* Bytes of the puppet's arrays that the victim may write to. */
static size_t
array_bytes(const puppet_t *puppet, int array)
{
    static const size_t row[EPX__NUM_ARRAYS] = {
        PUPPET_HIDDEN, PUPPET_SCALES * 4, API_TOPK * 8, API_TOPK * 4, 4
    };

    if (array == EPX__NUM_ARRAYS) {
        return puppet->send_only ? 2 * PUPPET_RANKS * API_TOKENS * PUPPET_SLOT
                                 : 0;
    }
    if (array > EPX__NUM_ARRAYS || puppet->send_only ||
        (array == EPX__ARRAY_TOPK_WEIGHTS && puppet->no_weights)) {
        return 0;
    }
    return PUPPET_ROWS * row[array];
}

const char *
puppet_damage(const puppet_t *puppet)
{
    const epx_group_t *strings = puppet->strings;
    const epx__segment_header_t *header =
        (const epx__segment_header_t *)(void *)epx__group_segment(strings);

    if (header->magic != EPX__SEGMENT_MAGIC || header->rank != 1 ||
        header->num_ranks != PUPPET_RANKS) {
        return "the header of the puppet's segment";
    }
    if (epx__map_post(&strings->map, epx__group_segment(strings), STEP_DISPATCH,
                      1)
            ->step != 0) {
        return "a post that is not its own";
    }
    for (int i = 0; i < PUPPET_HEAP / PUPPET_STRIDE; i++) {
        const char *array =
            epx__group_segment(strings) + array_offset(puppet, i);

        for (size_t at = array_bytes(puppet, i); at < PUPPET_STRIDE; at++) {
            if (array[at] != UNTOUCHED) {
                return "the puppet's heap beside its arrays";
            }
        }
    }
    return NULL;
}

int32_t
puppet_src_token(const puppet_t *puppet, int row)
{
    int32_t token;

    memcpy(&token,
           epx__group_segment(puppet->strings) +
               array_offset(puppet, EPX__ARRAY_SRC_TOKEN) +
               (size_t)row * sizeof(token),
           sizeof(token));
    return token;
}

/* ---- cases ---- */

static void
check_refusal(world_rank_t *self, const puppet_t *puppet, epx_status_t status,
              bool harmless)
{
    const char *sentence = status == EPX_OK ? "" : epx_last_error();
    const char *damage = puppet_damage(puppet);

    if (status != EPX_ERR_PEER_DATA && status != EPX_ERR_MISMATCH &&
        !(status == EPX_OK && harmless)) {
        world_fail(self, "not refused; %s returned %d: %s", puppet->call,
                   (int)status, sentence);
    }
    if (damage != NULL) {
        world_fail(self, "%s returned %d, but has written to %s: %s",
                   puppet->call, (int)status, damage, sentence);
    }
    if (status == EPX_ERR_PEER_DATA &&
        epx_group_status(puppet->victim) != EPX_ERR_PEER_DATA) {
        world_fail(self, "%s returned PEER_DATA, but the group goes on",
                   puppet->call);
    }
}

static void
run_case(world_rank_t *self, void *context)
{
    const puppet_case_t *one = context;
    puppet_t puppet = { .layout = one->layout,
                        .send_only = one->send_only,
                        .no_weights = one->no_weights,
                        .late = one->late ? one->spoil : NULL,
                        .number = one->number };

    puppet_open(&puppet);
    if (!one->late) {
        one->spoil(&puppet, one->number);
    }
    check_refusal(self, &puppet, puppet_play(&puppet), one->harmless);
    if (!self->failed) {
        puppet_close(&puppet);
    }
}

void
puppet_check(const puppet_case_t *one)
{
    char text[2048];

    if (!world_run(WORLD_SHM, 1, true, 0, run_case, (void *)(uintptr_t)one,
                   NULL, text, sizeof(text))) {
        print_error("%s, %" PRId64 ", layout %d%s:\n%s", one->name, one->number,
                    one->layout, one->send_only ? ", send-only" : "", text);
        fail();
    }
}

void
puppet_check_layouts(puppet_case_t one)
{
    for (int layout = EPX_LAYOUT_RANK_MAJOR; layout <= EPX_LAYOUT_EXPERT_SLOTS;
         layout++) {
        one.layout = (epx_layout_t)layout;
        puppet_check(&one);
    }
}
