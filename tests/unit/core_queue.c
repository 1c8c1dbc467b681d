/* SPDX-License-Identifier: MIT */
/* The queue's insides: payloads, tickets, errors and lifetime. */
#include "api_common.h"
#include "core/queue.h"
#include "core/status.h"

#include <pthread.h>

enum { TASKS = 500, PRODUCERS = 4 };

/* ---- tasks ---- */

/* Written by the queue's thread, read once it has been waited for. */
static int seen[PRODUCERS * TASKS];
static int num_seen;

static epx_status_t
note(void *payload)
{
    memcpy(&seen[num_seen++], payload, sizeof(int));
    return EPX_OK;
}

static epx_status_t
fail_with_number(void *payload)
{
    int number;

    memcpy(&number, payload, sizeof(number));
    return epx__fail(EPX_ERR_CAPACITY, "task %d failed", number);
}

static epx_status_t
check_pattern(void *payload)
{
    const unsigned char *bytes = payload;

    if ((uintptr_t)payload % 16 != 0) {
        return epx__fail(EPX_ERR_INVALID, "the payload is at %p", payload);
    }
    for (int i = 0; i < EPX__TASK_BYTES; i++) {
        if (bytes[i] != (unsigned char)(bytes[0] + i)) {
            return epx__fail(EPX_ERR_INVALID, "byte %d is %d", i, bytes[i]);
        }
    }
    return EPX_OK;
}

static uint64_t
push(epx_queue_t *queue, epx__task_fn_t fn, int number)
{
    uint64_t ticket = 0;

    WORKS(epx__queue_push(queue, fn, &number, sizeof(number), &ticket));
    return ticket;
}

static epx_queue_t *
open_queue(void)
{
    epx_queue_t *queue = NULL;

    num_seen = 0;
    WORKS(epx__queue_open(NULL, &queue));
    return queue;
}

/* ---- tests ---- */

static void
payloads_are_copied(void **state)
{
    epx_queue_t *queue = open_queue();
    unsigned char payload[EPX__TASK_BYTES];

    (void)state;
    for (int task = 0; task < TASKS; task++) {
        for (int i = 0; i < EPX__TASK_BYTES; i++) {
            payload[i] = (unsigned char)(task + i);
        }
        WORKS(epx__queue_push(queue, check_pattern, payload, sizeof(payload),
                              NULL));
        memset(payload, 0xee, sizeof(payload));
    }
    WORKS(epx__queue_close(queue));
}

static void
a_ticket_waits_for_its_task(void **state)
{
    epx_queue_t *queue = open_queue();

    (void)state;
    for (int i = 0; i < TASKS; i++) {
        uint64_t ticket = push(queue, note, i);

        assert_int_equal(ticket, i + 1);
        if (i % 7 == 0) {
            epx__queue_wait(queue, ticket);
            assert_int_equal(num_seen, i + 1);
            epx__queue_wait(queue, ticket / 2); /* long past */
        }
    }
    WORKS(epx__queue_drain(queue));
    assert_int_equal(num_seen, TASKS);
    for (int i = 0; i < TASKS; i++) {
        assert_int_equal(seen[i], i);
    }
    WORKS(epx__queue_close(queue));
}

static void
an_error_skips_what_follows(void **state)
{
    epx_queue_t *queue = open_queue();
    uint64_t ticket;

    (void)state;
    (void)push(queue, note, 1);
    (void)push(queue, fail_with_number, 2);
    (void)push(queue, fail_with_number, 3);
    ticket = push(queue, note, 4);
    epx__queue_wait(queue, ticket); /* skipped counts as finished */
    assert_int_equal(num_seen, 1);
    (void)push(queue, note, 5);
    epx__error_clear();
    REFUSED(epx__queue_drain(queue), EPX_ERR_CAPACITY, "task 2 failed");
    assert_int_equal(num_seen, 1);

    /* told once; then it works again */
    WORKS(epx__queue_drain(queue));
    (void)push(queue, note, 6);
    WORKS(epx__queue_drain(queue));
    assert_int_equal(num_seen, 2);
    assert_int_equal(seen[1], 6);

    (void)push(queue, fail_with_number, 7);
    REFUSED(epx__queue_close(queue), EPX_ERR_CAPACITY, "task 7 failed");
}

static void
closing_runs_what_is_queued(void **state)
{
    (void)state;
    for (int round = 0; round < 50; round++) {
        epx_queue_t *queue = open_queue();

        for (int i = 0; i < round; i++) {
            (void)push(queue, note, i);
        }
        WORKS(epx__queue_close(queue));
        assert_int_equal(num_seen, round);
    }
}

/* A plan may still hold its last ticket when the queue is gone. */
static void
a_closed_queue_can_be_waited_for(void **state)
{
    epx_queue_t *queue = open_queue();
    uint64_t ticket = push(queue, note, 1);

    (void)state;
    epx__queue_retain(queue);
    epx__queue_retain(queue);
    WORKS(epx__queue_close(queue));
    epx__queue_wait(queue, ticket);
    epx__queue_release(queue);
    epx__queue_wait(queue, ticket);
    epx__queue_release(queue);
}

static void
knows_its_group(void **state)
{
    epx_group_t *group = api_group_of_one(1 << 16);
    epx_queue_t *queue = NULL;

    (void)state;
    WORKS(epx__queue_open(group, &queue));
    assert_ptr_equal(epx__queue_group(queue), group);
    WORKS(epx__queue_close(queue));
    WORKS(epx_group_destroy(group));
}

/* ---- several threads ---- */

typedef struct producer {
    pthread_t thread;
    epx_queue_t *queue;
    int first;
    int failures;
} producer_t;

static void *
produce(void *arg)
{
    producer_t *producer = arg;

    for (int i = 0; i < TASKS; i++) {
        int number = producer->first + i;
        uint64_t ticket;

        if (epx__queue_push(producer->queue, note, &number, sizeof(number),
                            &ticket) != EPX_OK) {
            producer->failures++;
        } else if (i % 50 == 0) {
            epx__queue_wait(producer->queue, ticket);
        }
    }
    return NULL;
}

/* Each thread's tasks run in its order, and none is lost or run twice. */
static void
takes_tasks_from_many_threads(void **state)
{
    epx_queue_t *queue = open_queue();
    producer_t producers[PRODUCERS];
    int next[PRODUCERS] = { 0 };

    (void)state;
    for (int p = 0; p < PRODUCERS; p++) {
        producers[p] = (producer_t){ .queue = queue, .first = p * TASKS };
        assert_int_equal(
            pthread_create(&producers[p].thread, NULL, produce, &producers[p]),
            0);
    }
    for (int p = 0; p < PRODUCERS; p++) {
        assert_int_equal(pthread_join(producers[p].thread, NULL), 0);
        assert_int_equal(producers[p].failures, 0);
    }
    WORKS(epx__queue_close(queue));
    assert_int_equal(num_seen, PRODUCERS * TASKS);
    for (int i = 0; i < num_seen; i++) {
        assert_in_range(seen[i], 0, PRODUCERS * TASKS - 1);
        assert_int_equal(seen[i] % TASKS, next[seen[i] / TASKS]++);
    }
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(payloads_are_copied),
        cmocka_unit_test(a_ticket_waits_for_its_task),
        cmocka_unit_test(an_error_skips_what_follows),
        cmocka_unit_test(closing_runs_what_is_queued),
        cmocka_unit_test(a_closed_queue_can_be_waited_for),
        cmocka_unit_test(knows_its_group),
        cmocka_unit_test(takes_tasks_from_many_threads),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
