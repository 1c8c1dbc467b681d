/* SPDX-License-Identifier: MIT */
#include "bootstrap/io.h"

#include "core/clock.h"

#include <errno.h>
#include <sys/socket.h>
#include <sys/uio.h>

static epx__io_t
io_failed(void)
{
    if (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR) {
        return EPX__IO_AGAIN;
    }
    return EPX__IO_CLOSED;
}

epx__io_t
epx__io_read(int fd, void *to, size_t want, size_t *have_p)
{
    while (*have_p < want) {
        ssize_t n = recv(fd, (char *)to + *have_p, want - *have_p, 0);

        if (n < 0) {
            return io_failed();
        }
        if (n == 0) {
            errno = 0;
            return EPX__IO_CLOSED;
        }
        *have_p += (size_t)n;
    }
    return EPX__IO_DONE;
}

unsigned char *
epx__outbox_add(epx__outbox_t *box, size_t bytes)
{
    unsigned char *room;

    if (epx__outbox_empty(box)) {
        *box = (epx__outbox_t){ 0 };
    }
    room = box->small + box->small_bytes;
    box->small_bytes += bytes;
    return room;
}

epx__io_t
epx__outbox_flush(epx__outbox_t *box, int fd)
{
    while (!epx__outbox_empty(box)) {
        struct iovec parts[2];
        struct msghdr message = { .msg_iov = parts };
        size_t in_block = 0; /* bytes of the block that have gone */
        ssize_t n;

        if (box->sent < box->small_bytes) {
            parts[message.msg_iovlen++] =
                (struct iovec){ box->small + box->sent,
                                box->small_bytes - box->sent };
        } else {
            in_block = box->sent - box->small_bytes;
        }
        if (box->block_bytes > in_block) {
            parts[message.msg_iovlen++] =
                (struct iovec){ (char *)box->block + in_block,
                                box->block_bytes - in_block };
        }
        n = sendmsg(fd, &message, MSG_NOSIGNAL);
        if (n < 0) {
            return io_failed();
        }
        box->sent += (size_t)n;
    }
    return EPX__IO_DONE;
}

int
epx__poll_until(struct pollfd *polls, size_t num_polls, int64_t deadline_ns)
{
    int64_t left_ns = deadline_ns - epx__now_ns();
    struct timespec wait = { 0 };
    int ready;

    if (left_ns > 0) {
        wait.tv_sec = left_ns / EPX__NS_PER_SEC;
        wait.tv_nsec = left_ns % EPX__NS_PER_SEC;
    }
    ready = ppoll(polls, (nfds_t)num_polls, &wait, NULL);
    if (ready < 0 && errno == EINTR) {
        for (size_t i = 0; i < num_polls; i++) {
            polls[i].revents = 0;
        }
        return 0;
    }
    return ready;
}
