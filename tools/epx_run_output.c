/* SPDX-License-Identifier: MIT */
#include "epx_run_output.h"

#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define READ_BYTES     65536
#define QUEUE_BYTES    262144  /* above this, sources wait */
#define LINE_BYTES_MAX 1048576 /* a longer line is broken here */

static bool
buffer_append(epx__buffer_t *buffer, const char *bytes, size_t count)
{
    size_t needed = buffer->length + count;

    if (count == 0) {
        return true; /* data may still be NULL */
    }
    if (needed > buffer->capacity) {
        size_t capacity = buffer->capacity == 0 ? 4096 : buffer->capacity;
        char *data;

        while (capacity < needed) {
            capacity *= 2;
        }
        data = realloc(buffer->data, capacity);
        if (data == NULL) {
            return false;
        }
        buffer->data = data;
        buffer->capacity = capacity;
    }
    memcpy(buffer->data + buffer->length, bytes, count);
    buffer->length = needed;
    return true;
}

size_t
epx__sink_pending(const epx__sink_t *sink)
{
    return sink->queue.length - sink->written;
}

bool
epx__sink_has_room(const epx__sink_t *sink)
{
    return epx__sink_pending(sink) < QUEUE_BYTES;
}

static void
sink_fail(epx__sink_t *sink, int error)
{
    sink->error = error;
    sink->queue.length = 0;
    sink->written = 0;
}

void
epx__sink_append(epx__sink_t *sink, const char *bytes, size_t count)
{
    if (sink->error == 0 && !buffer_append(&sink->queue, bytes, count)) {
        sink_fail(sink, ENOMEM);
    }
}

/* The next piece to write.  Where poll() says that a pipe is writable it takes
 * PIPE_BUF bytes without blocking and as one; so cut there, and at the end of
 * a line if there is one. */
static size_t
next_piece(const char *bytes, size_t count)
{
    const char *end;

    if (count <= PIPE_BUF) {
        return count;
    }
    end = memrchr(bytes, '\n', PIPE_BUF);
    return end == NULL ? PIPE_BUF : (size_t)(end - bytes) + 1;
}

/* The stream is shared with other processes, so it is not ours to make
 * non-blocking: ask before each piece instead. */
void
epx__sink_flush(epx__sink_t *sink)
{
    struct pollfd ready = { .fd = sink->fd, .events = POLLOUT };

    while (epx__sink_pending(sink) > 0 && poll(&ready, 1, 0) == 1) {
        const char *next = sink->queue.data + sink->written;
        ssize_t count =
            write(sink->fd, next, next_piece(next, epx__sink_pending(sink)));

        if (count < 0) {
            if (errno != EINTR && errno != EAGAIN) {
                sink_fail(sink, errno);
            }
            return;
        }
        sink->written += (size_t)count;
    }
    /* Give the written part back, so that a queue that is never quite empty
     * does not grow for ever. */
    if (epx__sink_pending(sink) == 0 || sink->written > QUEUE_BYTES) {
        sink->queue.length = epx__sink_pending(sink);
        if (sink->queue.length > 0) {
            memmove(sink->queue.data, sink->queue.data + sink->written,
                    sink->queue.length);
        }
        sink->written = 0;
    }
}

void
epx__sink_free(epx__sink_t *sink)
{
    free(sink->queue.data);
    memset(sink, 0, sizeof(*sink));
}

/* Only whole lines reach the sink, so those of several ranks cannot mix. */
static void
emit(epx__source_t *source)
{
    const epx__buffer_t *line = &source->line;

    epx__sink_append(source->sink, source->prefix, strlen(source->prefix));
    epx__sink_append(source->sink, line->data, line->length);
    if (line->data[line->length - 1] != '\n') {
        epx__sink_append(source->sink, "\n", 1);
    }
    source->line.length = 0;
}

static void
take(epx__source_t *source, const char *bytes, size_t count)
{
    while (count > 0) {
        size_t room = LINE_BYTES_MAX - source->line.length;
        size_t piece = count < room ? count : room;
        const char *end = memchr(bytes, '\n', piece);

        if (end != NULL) {
            piece = (size_t)(end - bytes) + 1;
        }
        if (!buffer_append(&source->line, bytes, piece)) {
            sink_fail(source->sink, ENOMEM);
            return;
        }
        if (end != NULL || piece == room) {
            emit(source);
        }
        bytes += piece;
        count -= piece;
    }
}

bool
epx__source_pump(epx__source_t *source)
{
    static char bytes[READ_BYTES];
    ssize_t count;

    if (source->fd < 0) {
        return false;
    }
    count = read(source->fd, bytes, sizeof(bytes));
    if (count > 0) {
        take(source, bytes, (size_t)count);
        return true;
    }
    if (count == 0 || (errno != EAGAIN && errno != EINTR)) {
        epx__source_close(source);
    }
    return false;
}

void
epx__source_close(epx__source_t *source)
{
    if (source->fd < 0) {
        return;
    }
    if (source->line.length > 0) {
        emit(source);
    }
    free(source->line.data);
    memset(&source->line, 0, sizeof(source->line));
    (void)close(source->fd);
    source->fd = -1;
}
