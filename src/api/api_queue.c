/* SPDX-License-Identifier: MIT */
#include "core/queue.h"

#include "core/group.h"

epx_status_t
epx_queue_create(epx_group_t *group, epx_queue_t **queue_p)
{
    epx_status_t status;

    if (group == NULL || queue_p == NULL) {
        return epx__fail(EPX_ERR_NULL, "%s is null",
                         group == NULL ? "group" : "queue_p");
    }
    if (group->device != EPX_DEVICE_CPU) {
        return epx__fail(EPX_ERR_UNSUPPORTED,
                         "queues are the streams of CPU groups; the streams of "
                         "this group's device, %d, are CUDA's",
                         group->device);
    }
    status = epx__queue_open(group, queue_p);
    if (status == EPX_OK) {
        epx__group_count(group, &group->num_queues, 1);
    }
    return status;
}

epx_status_t
epx_queue_destroy(epx_queue_t *queue)
{
    epx_group_t *group;
    epx_status_t status;

    if (queue == NULL) {
        return EPX_OK;
    }
    group = epx__queue_group(queue);
    status = epx__queue_close(queue);
    epx__group_count(group, &group->num_queues, -1);
    return status;
}

typedef struct user_task {
    void (*fn)(void *arg);
    void *arg;
} user_task_t;

static epx_status_t
run_user_task(void *payload)
{
    const user_task_t *task = payload;

    task->fn(task->arg);
    return EPX_OK;
}

epx_status_t
epx_queue_submit(epx_queue_t *queue, void (*fn)(void *arg), void *arg)
{
    user_task_t task = { fn, arg };

    if (queue == NULL || fn == NULL) {
        return epx__fail(EPX_ERR_NULL, "%s is null",
                         queue == NULL ? "queue" : "fn");
    }
    return epx__queue_push(queue, run_user_task, &task, sizeof(task), NULL);
}

epx_status_t
epx_queue_synchronize(epx_queue_t *queue)
{
    return queue == NULL ? epx__fail(EPX_ERR_NULL, "queue is null")
                         : epx__queue_drain(queue);
}
