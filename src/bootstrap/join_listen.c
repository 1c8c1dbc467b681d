/* SPDX-License-Identifier: MIT */
/*
 * Rank 0 lets the others in.  Anybody may connect, so whoever has not yet
 * proved to hold the secret is a stranger: it gets a slot out of a fixed
 * number, 5 seconds, and no word but the handshake's.  Nothing is allocated
 * after the start.
 */
#include "bootstrap/join.h"
#include "bootstrap/net.h"
#include "core/clock.h"
#include "core/status.h"

#include <errno.h>
#include <inttypes.h>
#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define NO_SLOT            (-1)
#define MAX_LOGGED_SOURCES 32
#define MAX_ACCEPTS        64 /* at a time, so that those inside are served */

/* A connection; a free slot has fd -1. */
typedef struct visitor {
    epx__link_t link;
    int32_t rank; /* -1: a stranger */
    int64_t deadline_ns;
    uint64_t number; /* in order of arrival */
    epx__address_t source;
    epx__handshake_t shake;
} visitor_t;

typedef struct door {
    const epx__identity_t *identity;
    int64_t deadline_ns;
    int listen_fd;
    epx__address_t address;
    visitor_t *visitors; /* [num_slots] */
    int32_t num_slots;
    struct pollfd *polls; /* [num_slots + 1] */
    int32_t *polled;      /* [num_slots + 1] which slot polls[i] is */
    int32_t *slots;       /* [num_ranks] where the rank is, NO_SLOT */
    int32_t num_joined;   /* rank 0 among them */
    int32_t num_strangers;
    uint64_t num_arrivals;
    epx__rank_set_t gave_up; /* ranks that had joined and left again */
    bool news;               /* since the last report to those inside */
    int64_t report_ns;
    int accept_error; /* the errno of an accept that wanted resources */
    /* Who was sent away, for the log and for the error. */
    uint64_t num_rejected;
    epx__reason_t last_rejected;
    epx__address_text_t logged[MAX_LOGGED_SOURCES];
    size_t num_logged;
} door_t;

static bool
is_here(const void *context, int32_t rank)
{
    const door_t *door = context;

    return rank == 0 || door->slots[rank] != NO_SLOT;
}

static void
close_visitor(door_t *door, visitor_t *visitor)
{
    (void)close(visitor->link.fd);
    visitor->link.fd = -1;
    if (visitor->rank < 0) {
        door->num_strangers--;
    } else {
        door->slots[visitor->rank] = NO_SLOT;
        door->num_joined--;
        door->news = true;
    }
}

/* One line for each source, however often it comes. */
static void
log_rejected(door_t *door, const epx__address_text_t *source)
{
    for (size_t i = 0; i < door->num_logged; i++) {
        if (strcmp(door->logged[i].text, source->text) == 0) {
            return;
        }
    }
    if (door->num_logged == MAX_LOGGED_SOURCES) {
        return;
    }
    door->logged[door->num_logged++] = *source;
    epx__log(EPX__LOG_WARN, "a connection to %s was turned away: %s",
             epx__address_text(&door->address).text, door->last_rejected.text);
}

/* Sends away a stranger.  What the handshake has to say goes out if it can. */
static void
reject(door_t *door, visitor_t *visitor, const char *why)
{
    epx__address_text_t source = epx__address_host_text(&visitor->source);

    (void)epx__outbox_flush(&visitor->link.out, visitor->link.fd);
    door->num_rejected++;
    epx__reason_set(&door->last_rejected, "%s %s", source.text, why);
    log_rejected(door, &source);
    close_visitor(door, visitor);
}

static void
reject_failed(door_t *door, visitor_t *visitor)
{
    switch (visitor->shake.failure) {
    case EPX__FAILURE_VERSION:
        reject(door, visitor, "speaks another version of the rendezvous");
        break;
    case EPX__FAILURE_SECRET:
        reject(door, visitor, "does not hold the job's secret");
        break;
    default:
        reject(door, visitor, "does not speak EPX's rendezvous");
        break;
    }
}

/* The stranger holds the secret: it joins, or learns why not. */
static void
judge(door_t *door, visitor_t *visitor)
{
    epx__reason_t why;
    uint32_t rank = epx__handshake_rank(&visitor->shake);
    uint32_t num_ranks = epx__handshake_num_ranks(&visitor->shake);

    switch (epx__handshake_judge(&visitor->shake, is_here, door,
                                 &visitor->link.out)) {
    case EPX__VERDICT_WELCOME:
        epx__handshake_key(&visitor->shake, visitor->link.key);
        visitor->rank = (int32_t)rank;
        door->slots[rank] = (int32_t)(visitor - door->visitors);
        door->num_strangers--;
        door->num_joined++;
        door->news = true;
        return;
    case EPX__VERDICT_TAKEN:
        epx__reason_set(&why, "came as rank %u, which is here already", rank);
        break;
    case EPX__VERDICT_OTHER_JOB:
        epx__reason_set(&why, "belongs to another job");
        break;
    default:
        epx__reason_set(&why, "came as rank %u of %u ranks", rank, num_ranks);
        break;
    }
    reject(door, visitor, why.text);
}

static void
serve_stranger(door_t *door, visitor_t *visitor)
{
    epx__handshake_t *shake = &visitor->shake;
    epx__io_t io = EPX__IO_DONE;

    /* DONE means that a message was complete: there may be another. */
    while (io == EPX__IO_DONE && epx__handshake_want(shake) > 0) {
        size_t have = 0;

        io = epx__io_read(visitor->link.fd, shake->in + shake->in_bytes,
                          epx__handshake_want(shake), &have);
        epx__handshake_got(shake, have, &visitor->link.out);
    }
    if (shake->state == EPX__HANDSHAKE_FAILED) {
        reject_failed(door, visitor);
    } else if (shake->state == EPX__HANDSHAKE_PROVEN) {
        judge(door, visitor);
    } else if (io == EPX__IO_CLOSED) {
        reject(door, visitor,
               shake->state == EPX__HANDSHAKE_WANT_HELLO
                   ? "hung up without a word"
                   : "hung up when asked for the job's secret");
    }
}

/* A rank that has joined has nothing to say until all have: it has given up, or
 * gone. */
static void
serve_joined(door_t *door, visitor_t *visitor)
{
    unsigned char byte;
    size_t have = 0;

    if (epx__io_read(visitor->link.fd, &byte, 1, &have) != EPX__IO_AGAIN) {
        epx__log(EPX__LOG_WARN, "rank %d left before all ranks had joined",
                 visitor->rank);
        epx__rank_set_add(&door->gave_up, visitor->rank);
        close_visitor(door, visitor);
    }
}

static void
serve(door_t *door, visitor_t *visitor, short ready)
{
    if (ready & ~POLLOUT) {
        if (visitor->rank < 0) {
            serve_stranger(door, visitor);
        } else {
            serve_joined(door, visitor);
        }
    }
    /* A connection that is gone shows when it is read next. */
    if (visitor->link.fd >= 0) {
        (void)epx__outbox_flush(&visitor->link.out, visitor->link.fd);
    }
}

static visitor_t *
oldest_stranger(door_t *door)
{
    visitor_t *oldest = NULL;

    for (int32_t i = 0; i < door->num_slots; i++) {
        visitor_t *visitor = &door->visitors[i];

        if (visitor->link.fd >= 0 && visitor->rank < 0 &&
            (oldest == NULL || visitor->number < oldest->number)) {
            oldest = visitor;
        }
    }
    return oldest;
}

static void
admit_stranger(door_t *door, int fd, const epx__address_t *source)
{
    unsigned char nonce[EPX__NONCE_BYTES];
    visitor_t *visitor = door->visitors;

    if (door->num_strangers ==
        door->identity->num_ranks + EPX__SPARE_STRANGERS) {
        reject(door, oldest_stranger(door), "kept others from being served");
    }
    while (visitor->link.fd >= 0) {
        visitor++;
    }
    *visitor = (visitor_t){
        .link = { .fd = fd },
        .rank = -1,
        .deadline_ns = epx__now_ns() + EPX__HANDSHAKE_NS,
        .number = door->num_arrivals++,
        .source = *source,
    };
    door->num_strangers++;
    randombytes_buf(nonce, sizeof(nonce));
    epx__handshake_accept(&visitor->shake, door->identity, nonce);
    epx__net_no_delay(fd);
}

static epx_status_t
accept_strangers(door_t *door)
{
    for (int i = 0; i < MAX_ACCEPTS; i++) {
        epx__address_t source = { .bytes = sizeof(source.storage) };
        int fd = accept4(door->listen_fd, (struct sockaddr *)&source.storage,
                         &source.bytes, SOCK_CLOEXEC | SOCK_NONBLOCK);

        if (fd >= 0) {
            admit_stranger(door, fd, &source);
        } else if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS ||
                   errno == ENOMEM) {
            door->accept_error = errno;
            if (door->num_strangers == 0) {
                return epx__fail(EPX_ERR_SYSTEM,
                                 "rank 0 cannot accept more connections, %d of "
                                 "%d ranks are there: %m",
                                 door->num_joined, door->identity->num_ranks);
            }
            reject(door, oldest_stranger(door), "used up a descriptor");
        } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
            return EPX_OK;
        }
        /* Any other error is that of a connection which is gone already. */
    }
    return EPX_OK;
}

/* Who has never come; or, when all came at some time, who has left again. */
static epx__rank_set_t
absent_ranks(const door_t *door, bool *came_p)
{
    epx__rank_set_t never_came = { { 0 } };
    epx__rank_set_t left = { { 0 } };

    *came_p = true;
    for (int32_t rank = 1; rank < door->identity->num_ranks; rank++) {
        if (is_here(door, rank)) {
            continue;
        }
        if (epx__rank_set_has(&door->gave_up, rank)) {
            epx__rank_set_add(&left, rank);
        } else {
            epx__rank_set_add(&never_came, rank);
            *came_p = false;
        }
    }
    return *came_p ? left : never_came;
}

static void
report(door_t *door, epx__frame_kind_t kind, const epx__rank_set_t *ranks)
{
    for (int32_t i = 0; i < door->num_slots; i++) {
        visitor_t *visitor = &door->visitors[i];

        if (visitor->link.fd >= 0 && visitor->rank > 0) {
            epx__link_report(&visitor->link, 0, kind, 0, ranks);
        }
    }
}

static epx_status_t
fail_late(door_t *door)
{
    bool came;
    epx__rank_set_t absent = absent_ranks(door, &came);
    int32_t num_ranks = door->identity->num_ranks;
    char rejected[320] = "";
    char refused[96] = "";

    report(door, EPX__FRAME_LATE, &absent);
    if (door->num_rejected > 0) {
        (void)snprintf(rejected, sizeof(rejected),
                       "; connections turned away: %" PRIu64 ", the last: %s",
                       door->num_rejected, door->last_rejected.text);
    }
    if (door->accept_error != 0) {
        (void)snprintf(refused, sizeof(refused),
                       "; rank 0 could not accept all connections: %s",
                       strerror(door->accept_error));
    }
    return epx__fail(EPX_ERR_TIMEOUT, "%s of %d did not %s at %s in time%s%s",
                     epx__rank_set_list(&absent, num_ranks).text, num_ranks,
                     came ? "stay" : "join",
                     epx__address_text(&door->address).text, refused, rejected);
}

/* Sends away who is too slow; returns when to look again. */
static int64_t
sweep(door_t *door)
{
    int64_t now = epx__now_ns();
    int64_t next_ns = door->deadline_ns;

    for (int32_t i = 0; i < door->num_slots; i++) {
        visitor_t *visitor = &door->visitors[i];

        if (visitor->link.fd < 0 || visitor->rank >= 0) {
            continue;
        }
        if (visitor->deadline_ns <= now) {
            reject(door, visitor, "did not finish the handshake in 5 s");
        } else if (visitor->deadline_ns < next_ns) {
            next_ns = visitor->deadline_ns;
        }
    }
    if (door->news && now >= door->report_ns) {
        bool came;
        epx__rank_set_t absent = absent_ranks(door, &came);

        report(door, EPX__FRAME_WAITING, &absent);
        door->news = false;
        door->report_ns = now + EPX__REPORT_INTERVAL_NS;
    }
    return door->news && door->report_ns < next_ns ? door->report_ns : next_ns;
}

static epx_status_t
wait_and_serve(door_t *door, int64_t until_ns)
{
    size_t num_polls = 0;

    door->polls[num_polls++] =
        (struct pollfd){ .fd = door->listen_fd, .events = POLLIN };
    for (int32_t i = 0; i < door->num_slots; i++) {
        const epx__link_t *link = &door->visitors[i].link;

        if (link->fd >= 0) {
            short events =
                epx__outbox_empty(&link->out) ? POLLIN : POLLIN | POLLOUT;

            door->polled[num_polls] = i;
            door->polls[num_polls++] =
                (struct pollfd){ .fd = link->fd, .events = events };
        }
    }
    if (epx__poll_until(door->polls, num_polls, until_ns) < 0) {
        return epx__fail(EPX_ERR_SYSTEM, "poll failed: %m");
    }
    /* Those inside first: a rank that comes again has left before. */
    for (int pass = 0; pass < 2; pass++) {
        for (size_t i = 1; i < num_polls; i++) {
            visitor_t *visitor = &door->visitors[door->polled[i]];
            bool joined = visitor->rank >= 0;

            if (door->polls[i].revents != 0 && joined == (pass == 0)) {
                serve(door, visitor, door->polls[i].revents);
                door->polls[i].revents = 0;
            }
        }
    }
    return door->polls[0].revents != 0 ? accept_strangers(door) : EPX_OK;
}

static epx_status_t
door_open(door_t *door)
{
    int32_t num_ranks = door->identity->num_ranks;

    door->num_slots = num_ranks - 1 + num_ranks + EPX__SPARE_STRANGERS;
    door->num_joined = 1;
    door->visitors = calloc((size_t)door->num_slots, sizeof(*door->visitors));
    door->polls = calloc((size_t)door->num_slots + 1, sizeof(*door->polls));
    door->polled = calloc((size_t)door->num_slots + 1, sizeof(*door->polled));
    door->slots = calloc((size_t)num_ranks, sizeof(*door->slots));
    if (door->visitors == NULL || door->polls == NULL || door->polled == NULL ||
        door->slots == NULL) {
        return epx__fail(EPX_ERR_NO_MEMORY,
                         "no memory for the connections of %d ranks",
                         num_ranks);
    }
    for (int32_t i = 0; i < door->num_slots; i++) {
        door->visitors[i].link.fd = -1;
    }
    for (int32_t rank = 0; rank < num_ranks; rank++) {
        door->slots[rank] = NO_SLOT;
    }
    return EPX_OK;
}

/* Closes every connection that has not been handed on. */
static void
door_close(door_t *door)
{
    for (int32_t i = 0; door->visitors != NULL && i < door->num_slots; i++) {
        if (door->visitors[i].link.fd >= 0) {
            (void)close(door->visitors[i].link.fd);
        }
    }
    if (door->listen_fd >= 0) {
        (void)close(door->listen_fd);
    }
    if (door->visitors != NULL) {
        sodium_memzero(door->visitors,
                       (size_t)door->num_slots * sizeof(*door->visitors));
    }
    free(door->slots);
    free(door->polled);
    free(door->polls);
    free(door->visitors);
}

static epx_status_t
let_all_in(door_t *door, const char *host, uint16_t port)
{
    epx_status_t status = door_open(door);

    if (status == EPX_OK) {
        status = epx__net_listen(host, port, door->deadline_ns,
                                 &door->listen_fd, &door->address);
    }
    while (status == EPX_OK && door->num_joined < door->identity->num_ranks) {
        int64_t next_ns = sweep(door);

        status = epx__now_ns() >= door->deadline_ns
                     ? fail_late(door)
                     : wait_and_serve(door, next_ns);
    }
    return status;
}

epx_status_t
epx__join_listen(const epx__identity_t *identity, const char *host,
                 uint16_t port, int64_t deadline_ns, epx__link_t *links)
{
    door_t door = {
        .identity = identity,
        .deadline_ns = deadline_ns,
        .listen_fd = -1,
    };
    epx_status_t status = let_all_in(&door, host, port);

    for (int32_t rank = 1; status == EPX_OK && rank < identity->num_ranks;
         rank++) {
        visitor_t *visitor = &door.visitors[door.slots[rank]];

        links[rank] = visitor->link;
        visitor->link.fd = -1;
    }
    door_close(&door);
    return status;
}
