/* SPDX-License-Identifier: MIT */
#include "core/queue.h"

#include "core/group.h"
#include "core/thread.h"

#include <stdlib.h>
#include <string.h>

typedef struct task {
    struct task *next;
    epx__task_fn_t fn;
    _Alignas(16) char payload[EPX__TASK_BYTES];
} task_t;

struct epx_queue {
    epx_group_t *group;
    pthread_t thread;
    pthread_mutex_t lock; /* guards what follows */
    pthread_cond_t pushed;
    pthread_cond_t finished;
    task_t *first;
    task_t *last;
    task_t *spare; /* tasks to use again, so that pushing seldom allocates */
    uint64_t num_pushed;
    uint64_t num_finished;
    bool stopping;
    epx__error_t error;
    int references;
};

/* The next task; NULL once the queue is stopping and empty. */
static task_t *
next_task(epx_queue_t *queue, bool *skip_p)
{
    task_t *task;

    (void)pthread_mutex_lock(&queue->lock);
    while (queue->first == NULL && !queue->stopping) {
        (void)pthread_cond_wait(&queue->pushed, &queue->lock);
    }
    task = queue->first;
    if (task != NULL) {
        queue->first = task->next;
        *skip_p = queue->error.status != EPX_OK;
    }
    (void)pthread_mutex_unlock(&queue->lock);
    return task;
}

static void *
queue_main(void *argument)
{
    epx_queue_t *queue = argument;
    task_t *task;
    bool skip;

    while ((task = next_task(queue, &skip)) != NULL) {
        epx_status_t status = skip ? EPX_OK : task->fn(task->payload);

        (void)pthread_mutex_lock(&queue->lock);
        if (status != EPX_OK) {
            epx__error_save(&queue->error, status);
        }
        task->next = queue->spare;
        queue->spare = task;
        queue->num_finished++;
        (void)pthread_cond_broadcast(&queue->finished);
        (void)pthread_mutex_unlock(&queue->lock);
    }
    return NULL;
}

static void
free_tasks(task_t *task)
{
    while (task != NULL) {
        task_t *next = task->next;

        free(task);
        task = next;
    }
}

epx_status_t
epx__queue_open(epx_group_t *group, epx_queue_t **queue_p)
{
    epx_queue_t *queue = calloc(1, sizeof(*queue));
    epx_status_t status;

    if (queue == NULL) {
        return epx__fail(EPX_ERR_NO_MEMORY, "no memory for a queue");
    }
    queue->group = group;
    queue->references = 1;
    (void)pthread_mutex_init(&queue->lock, NULL);
    (void)pthread_cond_init(&queue->pushed, NULL);
    (void)pthread_cond_init(&queue->finished, NULL);
    status = epx__thread_start(&queue->thread, queue_main, queue,
                               "a queue's thread");
    if (status != EPX_OK) {
        free(queue);
        return status;
    }
    *queue_p = queue;
    return EPX_OK;
}

epx_status_t
epx__queue_close(epx_queue_t *queue)
{
    epx_status_t status = epx__queue_drain(queue);

    (void)pthread_mutex_lock(&queue->lock);
    queue->stopping = true;
    (void)pthread_cond_signal(&queue->pushed);
    (void)pthread_mutex_unlock(&queue->lock);
    (void)pthread_join(queue->thread, NULL);
    epx__queue_release(queue);
    return status;
}

void
epx__queue_retain(epx_queue_t *queue)
{
    (void)__atomic_add_fetch(&queue->references, 1, __ATOMIC_RELAXED);
}

void
epx__queue_release(epx_queue_t *queue)
{
    if (__atomic_sub_fetch(&queue->references, 1, __ATOMIC_ACQ_REL) > 0) {
        return;
    }
    free_tasks(queue->spare);
    (void)pthread_cond_destroy(&queue->finished);
    (void)pthread_cond_destroy(&queue->pushed);
    (void)pthread_mutex_destroy(&queue->lock);
    free(queue);
}

epx_group_t *
epx__queue_group(const epx_queue_t *queue)
{
    return queue->group;
}

static task_t *
take_spare(epx_queue_t *queue)
{
    task_t *task;

    (void)pthread_mutex_lock(&queue->lock);
    task = queue->spare;
    if (task != NULL) {
        queue->spare = task->next;
    }
    (void)pthread_mutex_unlock(&queue->lock);
    return task != NULL ? task : malloc(sizeof(*task));
}

epx_status_t
epx__queue_push(epx_queue_t *queue, epx__task_fn_t fn, const void *payload,
                size_t bytes, uint64_t *ticket_p)
{
    task_t *task = take_spare(queue);

    if (task == NULL) {
        return epx__fail(EPX_ERR_NO_MEMORY, "no memory for a queued task");
    }
    task->next = NULL;
    task->fn = fn;
    memcpy(task->payload, payload, bytes);
    (void)pthread_mutex_lock(&queue->lock);
    if (queue->first == NULL) {
        queue->first = task;
    } else {
        queue->last->next = task;
    }
    queue->last = task;
    queue->num_pushed++;
    if (ticket_p != NULL) {
        *ticket_p = queue->num_pushed;
    }
    (void)pthread_cond_signal(&queue->pushed);
    (void)pthread_mutex_unlock(&queue->lock);
    return EPX_OK;
}

void
epx__queue_wait(epx_queue_t *queue, uint64_t ticket)
{
    (void)pthread_mutex_lock(&queue->lock);
    while (queue->num_finished < ticket) {
        (void)pthread_cond_wait(&queue->finished, &queue->lock);
    }
    (void)pthread_mutex_unlock(&queue->lock);
}

epx_status_t
epx__queue_drain(epx_queue_t *queue)
{
    epx__error_t error;

    (void)pthread_mutex_lock(&queue->lock);
    while (queue->num_finished < queue->num_pushed) {
        (void)pthread_cond_wait(&queue->finished, &queue->lock);
    }
    error = queue->error;
    queue->error.status = EPX_OK;
    (void)pthread_mutex_unlock(&queue->lock);
    return error.status == EPX_OK ? EPX_OK : epx__error_restore(&error);
}
