/* SPDX-License-Identifier: MIT */
/* The ranks' output on its way to the launcher's own: lines from many sources
 * go, whole and prefixed, into two sinks. */
#ifndef EPX_RUN_OUTPUT_H
#define EPX_RUN_OUTPUT_H

#include <stdbool.h>
#include <stddef.h>

typedef struct epx__buffer {
    char *data;
    size_t length;
    size_t capacity;
} epx__buffer_t;

/* One of the launcher's own streams.  What is queued is whole lines. */
typedef struct epx__sink {
    int fd;
    int error; /* errno of the write that failed; later lines are dropped */
    epx__buffer_t queue;
    size_t written; /* bytes of the queue that are out */
} epx__sink_t;

/* The reading end of one stream of one rank. */
typedef struct epx__source {
    int fd; /* does not block; -1: closed */
    char prefix[16];
    epx__buffer_t line; /* what has come of a line so far */
    epx__sink_t *sink;
} epx__source_t;

void epx__sink_append(epx__sink_t *sink, const char *bytes, size_t count);

/* Bytes that wait to be written. */
size_t epx__sink_pending(const epx__sink_t *sink);

/* False while so much waits that its sources should rather wait too. */
bool epx__sink_has_room(const epx__sink_t *sink);

/* Writes what can be written without blocking. */
void epx__sink_flush(epx__sink_t *sink);

void epx__sink_free(epx__sink_t *sink);

/* Reads once and passes the complete lines on.  True if bytes came; at the end
 * of the stream it is closed. */
bool epx__source_pump(epx__source_t *source);

/* Passes on a last line without an end, and closes.  May be repeated. */
void epx__source_close(epx__source_t *source);

#endif
