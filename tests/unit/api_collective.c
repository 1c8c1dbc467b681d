/* SPDX-License-Identifier: MIT */
/* Errors that concern several ranks: a rank that corrects itself while the
 * others wait, ranks that disagree, a rank that never comes. */
#include "api_common.h"
#include "conformance/world.h"
#include <stdlib.h>

enum { RANKS = 3, HIDDEN = 16, ROWS = RANKS * API_TOKENS };

/* ---- what every rank has ---- */

typedef struct member {
    world_rank_t *self;
    epx_group_t *group;
    epx_plan_t *plan;
    epx_dispatch_args_t dispatch;
    uint16_t x[API_TOKENS * HIDDEN];
    uint16_t recv[ROWS * HIDDEN];
    int32_t src[ROWS];
    float weights[API_TOKENS * API_TOPK];
    float recv_weights[ROWS * API_TOPK];
} member_t;

/* Notes it when a call did not end with this status and a word in its sentence.
 */
static void
expect(world_rank_t *self, const char *call, epx_status_t got,
       epx_status_t want, const char *word)
{
    if (got != want || (want != EPX_OK && !strstr(epx_last_error(), word))) {
        world_fail(self,
                   "%s: expected status %d and '%s', got status %d and '%s'",
                   call, (int)want, word, (int)got,
                   got == EPX_OK ? "" : epx_last_error());
    }
}

#define EXPECT(call, status, word) \
    expect(m->self, #call, (call), (status), (word))

static bool
join(member_t *m, world_rank_t *self, uint64_t timeout_ns)
{
    epx_group_config_t config = EPX_GROUP_CONFIG_INIT;

    memset(m, 0, sizeof(*m));
    m->self = self;
    config.bootstrap = self->bootstrap;
    config.heap_bytes = 1 << 20;
    config.num_workers = 2;
    config.timeout_ns = timeout_ns;
    m->dispatch = (epx_dispatch_args_t)EPX_DISPATCH_ARGS_INIT;
    m->dispatch.x = m->x;
    m->dispatch.hidden = HIDDEN;
    m->dispatch.dtype = EPX_BF16;
    m->dispatch.recv_x = m->recv;
    m->dispatch.recv_rows = ROWS;
    m->dispatch.recv_src_token = m->src;
    memset(m->src, 0x66, sizeof(m->src));
    return !world_failed(self, epx_group_create(&config, &m->group),
                         "epx_group_create");
}

static void
leave(member_t *m)
{
    EXPECT(epx_plan_destroy(m->plan), EPX_OK, "");
    EXPECT(epx_group_destroy(m->group), EPX_OK, "");
}

/* Runs fn as RANKS threads, and again as processes. */
static void
run_everywhere(world_fn *fn, void *context)
{
    char text[4096];

    for (int kind = WORLD_THREAD; kind <= WORLD_SHM; kind++) {
        if (!world_run((world_kind_t)kind, RANKS, false, 0, fn, context, NULL,
                       text, sizeof(text))) {
            print_error("%s:\n%s", world_name((world_kind_t)kind), text);
            fail();
        }
    }
}

static const uint64_t plenty_ns = UINT64_C(30000000000);
static const uint64_t short_ns = UINT64_C(300000000);

/* ---- a rank corrects itself ---- */

static void
bad_call_first_rank(world_rank_t *self, void *context)
{
    static const int64_t bad_idx[] = { 0, 1, 2, 99, 3, 4, 5, 0 };
    epx_plan_args_t args = api_plan_args(EPX_LAYOUT_RANK_MAJOR);
    epx_combine_args_t combine = EPX_COMBINE_ARGS_INIT;
    static _Thread_local member_t member;
    member_t *m = &member;
    uint16_t out[API_TOKENS * HIDDEN];

    (void)context;
    if (!join(m, self, plenty_ns)) {
        return;
    }
    combine.x = m->recv;
    combine.num_rows = ROWS;
    combine.hidden = HIDDEN;
    combine.dtype = EPX_BF16;
    combine.out = out;
    if (self->rank == 1) {
        args.topk_idx = bad_idx;
        EXPECT(epx_plan_create(m->group, &args, NULL, &m->plan), EPX_ERR_EXPERT,
               "99");
        args.topk_idx = api_topk_idx;
    }
    EXPECT(epx_plan_create(m->group, &args, NULL, &m->plan), EPX_OK, "");
    if (self->rank == 2) {
        m->dispatch.recv_rows = 1;
        EXPECT(epx_dispatch(m->plan, &m->dispatch, NULL), EPX_ERR_TOO_SMALL,
               "1");
        m->dispatch.recv_rows = ROWS;
    }
    EXPECT(epx_dispatch(m->plan, &m->dispatch, NULL), EPX_OK, "");
    if (self->rank == 0) {
        combine.num_rows = 2;
        EXPECT(epx_combine(m->plan, &combine, NULL), EPX_ERR_TOO_SMALL, "2");
        combine.num_rows = ROWS;
    }
    EXPECT(epx_combine(m->plan, &combine, NULL), EPX_OK, "");
    if (self->rank == 1) {
        EXPECT(epx_plan_update(m->plan, 4, bad_idx, NULL), EPX_ERR_EXPERT,
               "99");
    }
    EXPECT(epx_plan_update(m->plan, 4, api_topk_idx, NULL), EPX_OK, "");
    EXPECT(epx_dispatch(m->plan, &m->dispatch, NULL), EPX_OK, "");
    /* Rank 1 holds experts 2 and 3: tokens 1 and 2 of every rank. */
    if (self->rank == 1) {
        for (int i = 0; i < 2 * RANKS; i++) {
            if (m->src[i] != 1 + i % 2) {
                world_fail(self, "recv_src_token[%d] is %d", i, m->src[i]);
            }
        }
    }
    leave(m);
}

static void
a_rank_corrects_itself_while_others_wait(void **state)
{
    (void)state;
    run_everywhere(bad_call_first_rank, NULL);
}

/* Staging does not fit on one rank, which then uses EPX memory. */
static void
staging_rank(world_rank_t *self, void *context)
{
    enum { WIDE = 1 << 17 };
    epx_plan_args_t args = api_plan_args(EPX_LAYOUT_EXPERT_MAJOR);
    static _Thread_local member_t member;
    member_t *m = &member;
    uint16_t *x = calloc(API_TOKENS, WIDE * sizeof(*x));
    uint16_t *recv = calloc(ROWS * API_TOPK, WIDE * sizeof(*recv));
    epx_group_info_t info = EPX_GROUP_INFO_INIT;
    void *block = NULL;

    (void)context;
    if (!x || !recv || !join(m, self, plenty_ns)) {
        world_fail(self, "no memory");
        return;
    }
    /* Only one token a rank goes anywhere: to expert 0, on rank 0. */
    args.num_tokens = 1;
    args.topk = 1;
    m->dispatch.x = x;
    m->dispatch.hidden = WIDE / 4;
    m->dispatch.recv_x = recv;
    m->dispatch.recv_rows = 3;
    m->dispatch.recv_src_token = NULL;
    EXPECT(epx_plan_create(m->group, &args, NULL, &m->plan), EPX_OK, "");
    if (self->rank == 0) {
        EXPECT(epx_group_query(m->group, &info), EPX_OK, "");
        EXPECT(epx_mem_alloc(m->group, info.heap_largest_free_bytes, &block),
               EPX_OK, "");
        EXPECT(epx_dispatch(m->plan, &m->dispatch, NULL),
               EPX_ERR_HEAP_EXHAUSTED, "heap");
        m->dispatch.recv_x = block;
    }
    EXPECT(epx_dispatch(m->plan, &m->dispatch, NULL), EPX_OK, "");
    leave(m);
    free(x);
    free(recv);
}

static void
a_rank_without_heap_for_staging_tries_again(void **state)
{
    (void)state;
    run_everywhere(staging_rank, NULL);
}

/* ---- ranks that disagree ---- */

typedef void plan_change(epx_plan_args_t *args);

static void
other_layout(epx_plan_args_t *args)
{
    args->layout = EPX_LAYOUT_EXPERT_MAJOR;
}

static void
other_experts(epx_plan_args_t *args)
{
    args->num_experts = 7;
}

static void
other_topk(epx_plan_args_t *args)
{
    args->topk = 1;
}

static void
other_idx_dtype(epx_plan_args_t *args)
{
    static const int32_t narrow[API_TOKENS * API_TOPK] = { 0, 1, 2, 3,
                                                           4, 5, 0, 1 };

    args->idx_dtype = EPX_I32;
    args->topk_idx = narrow;
}

static void
other_max_tokens(epx_plan_args_t *args)
{
    args->max_tokens_per_rank = 5;
}

static void
other_capacity(epx_plan_args_t *args)
{
    args->recv_capacity = 40;
}

static void
other_alignment(epx_plan_args_t *args)
{
    args->expert_alignment = 2;
}

static void
other_send_only_bytes(epx_plan_args_t *args)
{
    args->send_only_row_bytes = 64;
}

static const struct {
    plan_change *change;
    const char *word;
} plan_changes[] = {
    { other_layout, "layout" },
    { other_experts, "num_experts" },
    { other_topk, "topk" },
    { other_idx_dtype, "idx_dtype" },
    { other_max_tokens, "max_tokens_per_rank" },
    { other_capacity, "recv_capacity" },
    { other_alignment, "expert_alignment" },
    { other_send_only_bytes, "send_only_row_bytes" },
};

static void
plan_mismatch_rank(world_rank_t *self, void *context)
{
    int which = *(int *)context;
    epx_plan_args_t args = api_plan_args(EPX_LAYOUT_RANK_MAJOR);
    epx_plan_counts_t counts = EPX_PLAN_COUNTS_INIT;
    static _Thread_local member_t member;
    member_t *m = &member;
    epx_status_t status;

    if (!join(m, self, plenty_ns)) {
        return;
    }
    if (plan_changes[which].change == other_alignment) {
        args.layout = EPX_LAYOUT_EXPERT_MAJOR;
    }
    if (self->rank == 1) {
        plan_changes[which].change(&args);
    }
    /* With receive slots the plan's first counts are waited for in the call
     * that makes it. */
    status = epx_plan_create(m->group, &args, NULL, &m->plan);
    if (status == EPX_OK) {
        status = epx_plan_counts(m->plan, &counts);
    }
    expect(self, "epx_plan_create or epx_plan_counts", status, EPX_ERR_MISMATCH,
           plan_changes[which].word);
    leave(m);
}

static void
plans_that_differ(void **state)
{
    (void)state;
    for (int i = 0; i < (int)(sizeof(plan_changes) / sizeof(plan_changes[0]));
         i++) {
        run_everywhere(plan_mismatch_rank, &i);
    }
}

typedef void dispatch_change(member_t *m);

static void
other_hidden(member_t *m)
{
    m->dispatch.hidden = 8;
}

static void
other_dtype(member_t *m)
{
    m->dispatch.dtype = EPX_F16;
}

static void
other_quantize(member_t *m)
{
    m->dispatch.quantize = EPX_QUANTIZE_F8E4M3_F32;
    m->dispatch.recv_scales = m->recv_weights;
}

static void
with_weights(member_t *m)
{
    m->dispatch.topk_weights = m->weights;
    m->dispatch.recv_topk_weights = m->recv_weights;
}

static void
with_send_only(member_t *m)
{
    m->dispatch.flags = EPX_SEND_ONLY;
}

static const struct {
    dispatch_change *change;
    const char *word;
} dispatch_changes[] = {
    { other_hidden, "hidden" },     { other_dtype, "dtype" },
    { other_quantize, "quantize" }, { with_weights, "weights" },
    { with_send_only, "flags" },
};

static void
dispatch_mismatch_rank(world_rank_t *self, void *context)
{
    int which = *(int *)context;
    epx_plan_args_t args = api_plan_args(EPX_LAYOUT_RANK_MAJOR);
    static _Thread_local member_t member;
    member_t *m = &member;
    epx_status_t status;

    if (!join(m, self, plenty_ns)) {
        return;
    }
    EXPECT(epx_plan_create(m->group, &args, NULL, &m->plan), EPX_OK, "");
    if (self->rank == 1) {
        dispatch_changes[which].change(m);
    }
    /* A send-only dispatch may have noticed nothing yet; its completion has. */
    status = epx_dispatch(m->plan, &m->dispatch, NULL);
    if (status == EPX_OK && (m->dispatch.flags & EPX_SEND_ONLY)) {
        status = epx_complete(m->plan, NULL);
    }
    expect(self, "epx_dispatch", status, EPX_ERR_MISMATCH,
           dispatch_changes[which].word);
    for (int i = 0; i < ROWS; i++) {
        if (m->src[i] != 0x66666666) {
            world_fail(self, "recv_src_token[%d] was written", i);
        }
    }
    leave(m);
}

static void
dispatches_that_differ(void **state)
{
    size_t count = sizeof(dispatch_changes) / sizeof(dispatch_changes[0]);

    (void)state;
    for (int i = 0; i < (int)count; i++) {
        run_everywhere(dispatch_mismatch_rank, &i);
    }
}

/* One rank's rows would count as they are, the other's by their codes. */
static void
combine_mismatch_rank(world_rank_t *self, void *context)
{
    epx_plan_args_t args = api_plan_args(EPX_LAYOUT_EXPERT_MAJOR);
    epx_combine_args_t combine = EPX_COMBINE_ARGS_INIT;
    static _Thread_local member_t member;
    member_t *m = &member;
    uint16_t out[ROWS * HIDDEN];

    (void)context;
    if (!join(m, self, plenty_ns)) {
        return;
    }
    EXPECT(epx_plan_create(m->group, &args, NULL, &m->plan), EPX_OK, "");
    combine.x = m->recv;
    combine.num_rows = ROWS;
    combine.hidden = HIDDEN;
    combine.dtype = EPX_BF16;
    combine.out = out;
    if (self->rank == 1) {
        combine.quantize = EPX_QUANTIZE_LOGFMT10;
    }
    EXPECT(epx_combine(m->plan, &combine, NULL), EPX_ERR_MISMATCH, "quantize");
    leave(m);
}

static void
combines_that_differ(void **state)
{
    (void)state;
    run_everywhere(combine_mismatch_rank, NULL);
}

static void
config_mismatch_rank(world_rank_t *self, void *context)
{
    epx_group_config_t config = EPX_GROUP_CONFIG_INIT;
    member_t only = { .self = self };
    member_t *m = &only;

    (void)context;
    config.bootstrap = self->bootstrap;
    config.heap_bytes = 1 << 20;
    config.max_experts = self->rank == 1 ? 64 : 128;
    EXPECT(epx_group_create(&config, &m->group), EPX_ERR_MISMATCH,
           "max_experts");
}

static void
configs_that_differ(void **state)
{
    (void)state;
    run_everywhere(config_mismatch_rank, NULL);
}

/* A rank whose config is unusable tells the others. */
static void
bad_config_rank(world_rank_t *self, void *context)
{
    epx_group_config_t config = EPX_GROUP_CONFIG_INIT;
    member_t only = { .self = self };
    member_t *m = &only;
    epx_status_t status;

    (void)context;
    config.bootstrap = self->bootstrap;
    config.heap_bytes = 1 << 20;
    if (self->rank == 1) {
        config.num_workers = -17;
        EXPECT(epx_group_create(&config, &m->group), EPX_ERR_INVALID, "-17");
        return;
    }
    status = epx_group_create(&config, &m->group);
    if (status == EPX_OK || status == EPX_ERR_TIMEOUT ||
        !strstr(epx_last_error(), "rank 1")) {
        world_fail(self, "expected an error that names rank 1, got %d and '%s'",
                   (int)status, epx_last_error());
    }
}

static void
one_config_is_unusable(void **state)
{
    (void)state;
    run_everywhere(bad_config_rank, NULL);
}

/* Ranks that are in different calls, or on different plans. */
typedef enum disorder {
    DISORDER_CALLS,
    DISORDER_PLANS,
    DISORDER_UPDATE,
    NUM_DISORDERS,
} disorder_t;

static epx_status_t
disorderly_call(member_t *m, epx_plan_t *second, disorder_t disorder)
{
    epx_combine_args_t combine = EPX_COMBINE_ARGS_INIT;
    epx_plan_counts_t counts = EPX_PLAN_COUNTS_INIT;
    uint16_t out[API_TOKENS * HIDDEN];
    epx_status_t status;

    combine.x = m->recv;
    combine.num_rows = ROWS;
    combine.hidden = HIDDEN;
    combine.dtype = EPX_BF16;
    combine.out = out;
    if (m->self->rank != 1) {
        return epx_dispatch(m->plan, &m->dispatch, NULL);
    }
    switch (disorder) {
    case DISORDER_CALLS:
        return epx_combine(m->plan, &combine, NULL);
    case DISORDER_PLANS:
        return epx_dispatch(second, &m->dispatch, NULL);
    default:
        status = epx_plan_update(m->plan, API_TOKENS, api_topk_idx, NULL);
        return status == EPX_OK ? epx_plan_counts(m->plan, &counts) : status;
    }
}

/* Mixed-up calls must end, in an error that says so; a rank whose counts
 * nobody answers may only find out that the group has failed. */
static void
disorder_rank(world_rank_t *self, void *context)
{
    epx_plan_args_t args = api_plan_args(EPX_LAYOUT_RANK_MAJOR);
    static _Thread_local member_t member;
    member_t *m = &member;
    epx_plan_t *second = NULL;
    epx_status_t status;

    if (!join(m, self, 20 * short_ns)) {
        return;
    }
    EXPECT(epx_plan_create(m->group, &args, NULL, &m->plan), EPX_OK, "");
    EXPECT(epx_plan_create(m->group, &args, NULL, &second), EPX_OK, "");
    EXPECT(epx_dispatch(second, &m->dispatch, NULL), EPX_OK, "");
    status = disorderly_call(m, second, *(disorder_t *)context);
    if (status != EPX_ERR_MISMATCH) {
        world_fail(self, "disorder %d ended with status %d: %s",
                   *(int *)context, (int)status,
                   status == EPX_OK ? "" : epx_last_error());
    }
    EXPECT(epx_plan_destroy(second), EPX_OK, "");
    leave(m);
}

static void
calls_in_different_orders(void **state)
{
    (void)state;
    for (int disorder = 0; disorder < NUM_DISORDERS; disorder++) {
        run_everywhere(disorder_rank, &disorder);
    }
}

/* ---- receive slots ---- */

/* Through receive slots a buffer that is too small is only seen by the hook;
 * what follows works all the same. */
static void
small_buffer_rank(world_rank_t *self, void *context)
{
    epx_plan_args_t args = api_plan_args(EPX_LAYOUT_RANK_MAJOR);
    static _Thread_local member_t member;
    member_t *m = &member;
    epx_status_t status;

    (void)context;
    if (!join(m, self, plenty_ns)) {
        return;
    }
    args.send_only_row_bytes = HIDDEN * 2;
    EXPECT(epx_plan_create(m->group, &args, NULL, &m->plan), EPX_OK, "");
    for (int i = 0; i < 4; i++) {
        bool is_small = i % 2 == 0 && self->rank == 1;

        memset(m->src, 0x66, sizeof(m->src));
        m->dispatch.flags = EPX_SEND_ONLY;
        m->dispatch.recv_rows = is_small ? 5 : ROWS;
        EXPECT(epx_dispatch(m->plan, &m->dispatch, NULL), EPX_OK, "");
        status = epx_complete(m->plan, NULL);
        expect(self, "epx_complete", status,
               is_small ? EPX_ERR_TOO_SMALL : EPX_OK, "5");
        /* Every rank holds experts of 2 to 4 tokens of each rank. */
        if ((m->src[5] == 0x66666666) != is_small) {
            world_fail(self, "round %d: recv_src_token[5] is %#x", i,
                       (unsigned)m->src[5]);
        }
    }
    EXPECT(epx_group_status(m->group), EPX_OK, "");
    leave(m);
}

static void
a_small_buffer_behind_receive_slots(void **state)
{
    (void)state;
    run_everywhere(small_buffer_rank, NULL);
}

/* ---- capacity ---- */

/* All tokens of all ranks go to expert 0: rank 0 would receive 12 rows. */
static void
capacity_rank(world_rank_t *self, void *context)
{
    static const int64_t crowd[] = { 0, -1, 0, -1, 0, -1, 0, -1 };
    epx_plan_args_t args = api_plan_args(EPX_LAYOUT_RANK_MAJOR);
    static _Thread_local member_t member;
    member_t *m = &member;

    (void)context;
    if (!join(m, self, plenty_ns)) {
        return;
    }
    args.topk_idx = crowd;
    args.recv_capacity = ROWS - 1;
    EXPECT(epx_plan_create(m->group, &args, NULL, &m->plan), EPX_OK, "");
    EXPECT(epx_dispatch(m->plan, &m->dispatch, NULL), EPX_ERR_CAPACITY, "12");
    for (int i = 0; i < ROWS; i++) {
        if (m->src[i] != 0x66666666) {
            world_fail(self, "recv_src_token[%d] was written", i);
        }
    }
    EXPECT(epx_group_status(m->group), EPX_OK, "");
    EXPECT(epx_plan_update(m->plan, self->rank == 0 ? 3 : 4, crowd, NULL),
           EPX_OK, "");
    EXPECT(epx_dispatch(m->plan, &m->dispatch, NULL), EPX_OK, "");
    if (self->rank == 0 && (m->src[10] != 3 || m->src[11] != 0x66666666)) {
        world_fail(self, "recv_src_token ends with %d, %d", m->src[10],
                   m->src[11]);
    }
    leave(m);
}

static void
routing_exceeds_the_capacity(void **state)
{
    (void)state;
    run_everywhere(capacity_rank, NULL);
}

/* ---- a rank that never comes ---- */

typedef enum absence {
    ABSENT_IN_COUNTS,
    ABSENT_IN_DISPATCH,
    ABSENT_IN_COMBINE,
    ABSENT_IN_COMPLETE,
    NUM_ABSENCES,
} absence_t;

/* The call that rank 2 does not make. */
static epx_status_t
wait_in_vain(member_t *m, absence_t absence)
{
    epx_plan_args_t args = api_plan_args(EPX_LAYOUT_RANK_MAJOR);
    epx_plan_counts_t counts = EPX_PLAN_COUNTS_INIT;
    epx_combine_args_t combine = EPX_COMBINE_ARGS_INIT;
    static _Thread_local uint16_t out[API_TOKENS * HIDDEN];

    combine.x = m->recv;
    combine.num_rows = ROWS;
    combine.hidden = HIDDEN;
    combine.dtype = EPX_BF16;
    combine.out = out;
    switch (absence) {
    case ABSENT_IN_COUNTS:
        EXPECT(epx_plan_create(m->group, &args, NULL, &m->plan), EPX_OK, "");
        return epx_plan_counts(m->plan, &counts);
    case ABSENT_IN_DISPATCH:
        return epx_dispatch(m->plan, &m->dispatch, NULL);
    case ABSENT_IN_COMBINE:
        return epx_combine(m->plan, &combine, NULL);
    default:
        combine.flags = EPX_SEND_ONLY;
        EXPECT(epx_combine(m->plan, &combine, NULL), EPX_OK, "");
        return epx_complete(m->plan, NULL);
    }
}

static void
timeout_rank(world_rank_t *self, void *context)
{
    absence_t absence = *(absence_t *)context;
    epx_plan_args_t args = api_plan_args(EPX_LAYOUT_RANK_MAJOR);
    static _Thread_local member_t member;
    member_t *m = &member;

    if (!join(m, self, short_ns)) {
        return;
    }
    if (absence != ABSENT_IN_COUNTS) {
        EXPECT(epx_plan_create(m->group, &args, NULL, &m->plan), EPX_OK, "");
        EXPECT(epx_dispatch(m->plan, &m->dispatch, NULL), EPX_OK, "");
    }
    world_barrier(self);
    if (self->rank != 2) {
        expect(self, "the call that rank 2 misses", wait_in_vain(m, absence),
               EPX_ERR_TIMEOUT, "rank 2");
        EXPECT(epx_group_status(m->group), EPX_ERR_TIMEOUT, "rank 2");
        EXPECT(epx_dispatch(m->plan, &m->dispatch, NULL), EPX_ERR_BROKEN,
               "rank 2");
    }
    world_barrier(self);
    leave(m);
}

static void
a_rank_never_calls(void **state)
{
    (void)state;
    for (int absence = 0; absence < NUM_ABSENCES; absence++) {
        run_everywhere(timeout_rank, &absence);
    }
}

static void
absent_from_group_rank(world_rank_t *self, void *context)
{
    epx_group_config_t config = EPX_GROUP_CONFIG_INIT;
    member_t only = { .self = self };
    member_t *m = &only;

    (void)context;
    config.bootstrap = self->bootstrap;
    config.timeout_ns = short_ns;
    config.heap_bytes = 1 << 20;
    if (self->rank != 2) {
        EXPECT(epx_group_create(&config, &m->group), EPX_ERR_TIMEOUT, "2");
    }
    world_barrier(self);
}

static void
a_rank_never_joins(void **state)
{
    char text[4096];

    (void)state;
    if (!world_run(WORLD_THREAD, RANKS, false, 0, absent_from_group_rank, NULL,
                   NULL, text, sizeof(text))) {
        print_error("%s", text);
        fail();
    }
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_rank_corrects_itself_while_others_wait),
        cmocka_unit_test(a_rank_without_heap_for_staging_tries_again),
        cmocka_unit_test(plans_that_differ),
        cmocka_unit_test(dispatches_that_differ),
        cmocka_unit_test(combines_that_differ),
        cmocka_unit_test(configs_that_differ),
        cmocka_unit_test(one_config_is_unusable),
        cmocka_unit_test(calls_in_different_orders),
        cmocka_unit_test(a_small_buffer_behind_receive_slots),
        cmocka_unit_test(routing_exceeds_the_capacity),
        cmocka_unit_test(a_rank_never_calls),
        cmocka_unit_test(a_rank_never_joins),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
