/* SPDX-License-Identifier: MIT */
/* Queues: order, the stop at the first error, and what destroying does. */
#include "api_common.h"
#include <pthread.h>

enum { HIDDEN = 8, ROWS = 8, MANY = 200 };

/* ---- functions to submit ---- */

typedef struct journal {
    int entries[MANY];
    int count;
} journal_t;

typedef struct entry {
    journal_t *journal;
    int number;
} entry_t;

static void
write_entry(void *arg)
{
    entry_t *entry = arg;

    entry->journal->entries[entry->journal->count++] = entry->number;
}

/* A door that a submitted function waits at. */
typedef struct door {
    pthread_mutex_t lock;
    pthread_cond_t opened;
    int is_open;
} door_t;

static void
wait_at_door(void *arg)
{
    door_t *door = arg;

    pthread_mutex_lock(&door->lock);
    while (!door->is_open) {
        pthread_cond_wait(&door->opened, &door->lock);
    }
    pthread_mutex_unlock(&door->lock);
}

static void
open_door(door_t *door)
{
    pthread_mutex_lock(&door->lock);
    door->is_open = 1;
    pthread_cond_signal(&door->opened);
    pthread_mutex_unlock(&door->lock);
}

/* Copies one element when its turn comes. */
typedef struct peek {
    const uint16_t *from;
    uint16_t to;
} peek_t;

static void
look(void *arg)
{
    peek_t *peek = arg;

    peek->to = *peek->from;
}

static epx_dispatch_args_t
dispatch_args(const uint16_t *x, uint16_t *recv)
{
    epx_dispatch_args_t args = EPX_DISPATCH_ARGS_INIT;

    args.x = x;
    args.hidden = HIDDEN;
    args.dtype = EPX_BF16;
    args.recv_x = recv;
    args.recv_rows = ROWS;
    return args;
}

/* ---- tests ---- */

static void
runs_in_order(void **state)
{
    epx_group_t *group = api_group_of_one(1 << 20);
    entry_t entries[MANY];
    journal_t journal = { .count = 0 };
    epx_queue_t *queue;

    (void)state;
    WORKS(epx_queue_create(group, &queue));
    WORKS(epx_queue_synchronize(queue));
    for (int i = 0; i < MANY; i++) {
        entries[i] = (entry_t){ &journal, i };
        WORKS(epx_queue_submit(queue, write_entry, &entries[i]));
    }
    WORKS(epx_queue_synchronize(queue));
    assert_int_equal(journal.count, MANY);
    for (int i = 0; i < MANY; i++) {
        assert_int_equal(journal.entries[i], i);
    }
    WORKS(epx_queue_destroy(queue));
    WORKS(epx_group_destroy(group));
}

/* Calls on a queue return at once, and run in order with functions. */
static void
operations_wait_their_turn(void **state)
{
    static uint16_t x[API_TOKENS * HIDDEN];
    static uint16_t recv[ROWS * HIDDEN];
    static uint16_t out[API_TOKENS * HIDDEN];
    door_t door = { PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, 0 };
    epx_group_t *group = api_group_of_one(1 << 20);
    epx_plan_args_t args = api_plan_args(EPX_LAYOUT_RANK_MAJOR);
    epx_dispatch_args_t dispatch = dispatch_args(x, recv);
    epx_combine_args_t combine = EPX_COMBINE_ARGS_INIT;
    peek_t before = { recv, 0 };
    peek_t after = { recv, 0 };
    epx_queue_t *queue;
    epx_plan_t *plan;

    (void)state;
    x[0] = 0x4000; /* 2.0 */
    recv[0] = 0x1111;
    combine.x = recv;
    combine.num_rows = ROWS;
    combine.hidden = HIDDEN;
    combine.dtype = EPX_BF16;
    combine.out = out;
    WORKS(epx_queue_create(group, &queue));
    WORKS(epx_queue_submit(queue, wait_at_door, &door));
    WORKS(epx_plan_create(group, &args, queue, &plan));
    WORKS(epx_queue_submit(queue, look, &before));
    WORKS(epx_dispatch(plan, &dispatch, queue));
    WORKS(epx_queue_submit(queue, look, &after));
    WORKS(epx_combine(plan, &combine, queue));
    assert_int_equal(recv[0], 0x1111); /* the door is still shut */
    open_door(&door);
    WORKS(epx_queue_synchronize(queue));
    assert_int_equal(before.to, 0x1111);
    assert_int_equal(after.to, 0x4000);
    assert_int_equal(out[0], 0x4000);
    WORKS(epx_plan_destroy(plan));
    WORKS(epx_queue_destroy(queue));
    WORKS(epx_group_destroy(group));
}

/* The counts wait for what is queued before them. */
static void
counts_wait_for_the_queue(void **state)
{
    static int64_t idx[API_TOKENS * API_TOPK];
    door_t door = { PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, 0 };
    epx_group_t *group = api_group_of_one(1 << 20);
    epx_plan_args_t args = api_plan_args(EPX_LAYOUT_EXPERT_MAJOR);
    epx_plan_counts_t counts = EPX_PLAN_COUNTS_INIT;
    epx_queue_t *queue;
    epx_plan_t *plan;

    (void)state;
    memset(idx, 0x7f, sizeof(idx)); /* not yet fit to be read */
    args.topk_idx = idx;
    WORKS(epx_queue_create(group, &queue));
    WORKS(epx_queue_submit(queue, wait_at_door, &door));
    WORKS(epx_plan_create(group, &args, queue, &plan));
    memcpy(idx, api_topk_idx, sizeof(idx));
    open_door(&door);
    WORKS(epx_plan_counts(plan, &counts));
    assert_int_equal(counts.num_recv_rows, 7);
    WORKS(epx_plan_destroy(plan));
    WORKS(epx_queue_destroy(queue));
    WORKS(epx_group_destroy(group));
}

static void
stops_at_the_first_error(void **state)
{
    static const int64_t bad[API_TOKENS * API_TOPK] = {
        0, 1, 2, 3, 4, 5, 0, 66
    };
    epx_group_t *group = api_group_of_one(1 << 20);
    epx_plan_args_t args = api_plan_args(EPX_LAYOUT_RANK_MAJOR);
    epx_plan_counts_t counts = EPX_PLAN_COUNTS_INIT;
    journal_t journal = { .count = 0 };
    entry_t entries[] = { { &journal, 0 }, { &journal, 1 }, { &journal, 2 } };
    epx_queue_t *queue;
    epx_plan_t *plan;

    (void)state;
    WORKS(epx_queue_create(group, &queue));
    WORKS(epx_plan_create(group, &args, NULL, &plan));
    WORKS(epx_queue_submit(queue, write_entry, &entries[0]));
    WORKS(epx_plan_update(plan, API_TOKENS, bad, queue));
    WORKS(epx_queue_submit(queue, write_entry, &entries[1]));
    REFUSED(epx_queue_synchronize(queue), EPX_ERR_EXPERT, "66");
    assert_int_equal(journal.count, 1);
    WORKS(epx_queue_synchronize(queue));
    WORKS(epx_queue_submit(queue, write_entry, &entries[2]));
    WORKS(epx_plan_update(plan, API_TOKENS, api_topk_idx, queue));
    WORKS(epx_queue_synchronize(queue));
    assert_int_equal(journal.count, 2);
    assert_int_equal(journal.entries[1], 2);
    WORKS(epx_plan_counts(plan, &counts));
    assert_int_equal(counts.num_recv_tokens, 4);
    WORKS(epx_plan_destroy(plan));
    WORKS(epx_queue_destroy(queue));
    WORKS(epx_group_destroy(group));
}

/* A plan whose creation fails in the queue can still be destroyed. */
static void
a_plan_that_never_came_to_be(void **state)
{
    static const int64_t bad[API_TOKENS * API_TOPK] = {
        0, 1, 2, 2, 4, 5, 0, 1
    };
    static uint16_t x[API_TOKENS * HIDDEN];
    static uint16_t recv[ROWS * HIDDEN];
    epx_group_t *group = api_group_of_one(1 << 20);
    epx_plan_args_t args = api_plan_args(EPX_LAYOUT_RANK_MAJOR);
    epx_dispatch_args_t dispatch = dispatch_args(x, recv);
    epx_queue_t *queue;
    epx_plan_t *plan;

    (void)state;
    args.topk_idx = bad;
    WORKS(epx_queue_create(group, &queue));
    WORKS(epx_plan_create(group, &args, queue, &plan));
    WORKS(epx_dispatch(plan, &dispatch, queue)); /* will be skipped */
    REFUSED(epx_queue_synchronize(queue), EPX_ERR_EXPERT, "2");
    REFUSED(epx_dispatch(plan, &dispatch, NULL), EPX_ERR_STATE, "routing");
    WORKS(epx_plan_destroy(plan));
    WORKS(epx_queue_destroy(queue));
    WORKS(epx_group_destroy(group));
}

static void
destroying_runs_what_is_queued(void **state)
{
    static const int64_t bad[API_TOKENS * API_TOPK] = {
        0, 1, 2, 3, 4, 5, 0, -7
    };
    epx_group_t *group = api_group_of_one(1 << 20);
    epx_plan_args_t args = api_plan_args(EPX_LAYOUT_RANK_MAJOR);
    journal_t journal = { .count = 0 };
    entry_t entries[MANY];
    epx_queue_t *queue;
    epx_plan_t *plan;

    (void)state;
    WORKS(epx_queue_create(group, &queue));
    for (int i = 0; i < MANY; i++) {
        entries[i] = (entry_t){ &journal, i };
        WORKS(epx_queue_submit(queue, write_entry, &entries[i]));
    }
    WORKS(epx_queue_destroy(queue));
    assert_int_equal(journal.count, MANY);

    WORKS(epx_plan_create(group, &args, NULL, &plan));
    WORKS(epx_queue_create(group, &queue));
    WORKS(epx_plan_update(plan, API_TOKENS, bad, queue));
    REFUSED(epx_queue_destroy(queue), EPX_ERR_EXPERT, "-7");
    WORKS(epx_plan_destroy(plan));
    WORKS(epx_group_destroy(group)); /* the queue is gone, error or not */
}

static void
refuses_misuse(void **state)
{
    epx_group_t *group = api_group_of_one(1 << 20);
    epx_queue_t *queue;

    (void)state;
    REFUSED(epx_queue_create(NULL, &queue), EPX_ERR_NULL, "group");
    REFUSED(epx_queue_create(group, NULL), EPX_ERR_NULL, "queue_p");
    WORKS(epx_queue_create(group, &queue));
    REFUSED(epx_queue_submit(NULL, look, NULL), EPX_ERR_NULL, "queue");
    REFUSED(epx_queue_submit(queue, NULL, NULL), EPX_ERR_NULL, "fn");
    REFUSED(epx_queue_synchronize(NULL), EPX_ERR_NULL, "queue");
    WORKS(epx_queue_destroy(queue));
    WORKS(epx_group_destroy(group));
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(runs_in_order),
        cmocka_unit_test(operations_wait_their_turn),
        cmocka_unit_test(counts_wait_for_the_queue),
        cmocka_unit_test(stops_at_the_first_error),
        cmocka_unit_test(a_plan_that_never_came_to_be),
        cmocka_unit_test(destroying_runs_what_is_queued),
        cmocka_unit_test(refuses_misuse),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
