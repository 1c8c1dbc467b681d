/* SPDX-License-Identifier: MIT */
/* The CPU engine's stream: a thread that runs tasks in order. */
#ifndef EPX_CORE_QUEUE_H
#define EPX_CORE_QUEUE_H

#include <epx/epx.h>
#include <stdint.h>

/* Room for the arguments of any operation, copied in by value. */
#define EPX__TASK_BYTES 384

typedef epx_status_t (*epx__task_fn_t)(void *payload);

epx_status_t epx__queue_open(epx_group_t *group, epx_queue_t **queue_p);
epx_status_t epx__queue_close(epx_queue_t *queue);

/* A closed queue's memory stays until the last release; all its tasks have
 * finished by then. */
void epx__queue_retain(epx_queue_t *queue);
void epx__queue_release(epx_queue_t *queue);

epx_group_t *epx__queue_group(const epx_queue_t *queue);

/* Queue fn over a copy of payload; *ticket_p (optional) names it. */
epx_status_t epx__queue_push(epx_queue_t *queue, epx__task_fn_t fn,
                             const void *payload, size_t bytes,
                             uint64_t *ticket_p);

/* Until the task has run or been skipped. */
void epx__queue_wait(epx_queue_t *queue, uint64_t ticket);

/* Until all has run; returns and clears the queue's error. */
epx_status_t epx__queue_drain(epx_queue_t *queue);

#endif
