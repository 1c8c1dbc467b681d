/* SPDX-License-Identifier: MIT */
#include "bootstrap/join.h"
#include "bootstrap/net.h"
#include "core/clock.h"
#include "core/status.h"

#include <sodium.h>
#include <string.h>
#include <unistd.h>

#define FIRST_PAUSE_NS   (10 * EPX__NS_PER_MS)
#define LONGEST_PAUSE_NS (250 * EPX__NS_PER_MS)
/* So often, which takes a second, rank 0's only address may answer with another
 * secret or version until it is believed to stay so. */
#define MAX_MISTAKES 8

/* What has come of calling rank 0 so far. */
typedef struct call {
    const epx__identity_t *identity;
    int64_t deadline_ns;
    epx__link_t *link;
    bool joined;
    epx__reason_t why; /* why the last address was of no use */
    /* The last answer that was not rank 0's.  It is not the end: rank 0 may be
     * at another address, or come once the port is free. */
    epx__reason_t mistaken;
    epx_status_t mistake; /* EPX_OK: none; what kind it is */
    int num_mistakes;     /* but those that are no EPX at all */
} call_t;

static int64_t
earlier(int64_t a_ns, int64_t b_ns)
{
    return a_ns < b_ns ? a_ns : b_ns;
}

/* Notes how the handshake has failed.  Whoever answered has not proved to be
 * rank 0, so this decides nothing. */
static void
note_mistake(call_t *call, const epx__handshake_t *shake, const char *where)
{
    int32_t rank = call->identity->rank;

    switch (shake->failure) {
    case EPX__FAILURE_VERSION:
        call->mistake = EPX_ERR_MISMATCH;
        call->num_mistakes++;
        epx__reason_set(&call->mistaken,
                        "rank 0 at %s speaks version %u of the rendezvous, "
                        "rank %d version %u; all must use the same EPX",
                        where, shake->peer_version, rank, EPX__WIRE_VERSION);
        break;
    case EPX__FAILURE_SECRET:
        call->mistake = EPX_ERR_AUTH;
        call->num_mistakes++;
        epx__reason_set(&call->mistaken,
                        "rank 0 at %s does not hold the secret of rank %d; "
                        "EPX_SECRET, or the file that holds it, must be the "
                        "same for all ranks",
                        where, rank);
        break;
    default:
        call->mistake = EPX_ERR_PEER_DATA;
        epx__reason_set(&call->mistaken,
                        "what listens at %s is not rank 0 of an EPX job; "
                        "EPX_PORT chooses another port",
                        where);
        break;
    }
    call->why = call->mistaken;
}

static epx_status_t
check_verdict(const epx__handshake_t *shake, const char *where)
{
    int32_t rank = shake->identity->rank;
    int32_t num_ranks = shake->identity->num_ranks;

    switch (shake->verdict) {
    case EPX__VERDICT_WELCOME:
        return EPX_OK;
    case EPX__VERDICT_OTHER_JOB:
        return epx__fail(EPX_ERR_MISMATCH,
                         "rank 0 at %s belongs to another job than rank %d; "
                         "EPX_PORT chooses another port",
                         where, rank);
    case EPX__VERDICT_OTHER_SIZE:
        return epx__fail(EPX_ERR_MISMATCH,
                         "rank %d was started as one of %d ranks, rank 0 at "
                         "%s as one of %u",
                         rank, num_ranks, where, shake->value);
    case EPX__VERDICT_BAD_RANK:
        return epx__fail(EPX_ERR_MISMATCH,
                         "rank %d is refused by rank 0 at %s; ranks there are "
                         "below %u",
                         rank, where, shake->value);
    case EPX__VERDICT_TAKEN:
        return epx__fail(EPX_ERR_MISMATCH,
                         "another process has already joined as rank %d at %s",
                         rank, where);
    default:
        return epx__fail(EPX_ERR_PEER_DATA,
                         "rank 0 at %s answered with the unknown verdict %u",
                         where, shake->verdict);
    }
}

/* Moves the handshake on by what the socket has. */
static epx__io_t
pump(int fd, epx__handshake_t *shake, epx__outbox_t *out)
{
    epx__io_t io = epx__outbox_flush(out, fd);
    size_t want = epx__handshake_want(shake);
    size_t have = 0;

    if (io == EPX__IO_CLOSED) {
        return io;
    }
    io = epx__io_read(fd, shake->in + shake->in_bytes, want, &have);
    epx__handshake_got(shake, have, out);
    return io;
}

/* Sets call->joined, or fails for good, or notes what went wrong this time. */
static epx_status_t
shake_hands(call_t *call, const char *where, int64_t deadline_ns)
{
    epx__link_t *link = call->link;
    unsigned char nonce[EPX__NONCE_BYTES];
    epx__handshake_t shake;

    randombytes_buf(nonce, sizeof(nonce));
    epx__handshake_connect(&shake, call->identity, nonce, &link->out);
    while (shake.state != EPX__HANDSHAKE_JUDGED) {
        struct pollfd poll_fd = { .fd = link->fd, .events = POLLIN };
        epx__io_t io = pump(link->fd, &shake, &link->out);

        if (shake.state == EPX__HANDSHAKE_FAILED) {
            note_mistake(call, &shake, where);
            return EPX_OK;
        }
        if (io == EPX__IO_CLOSED) {
            epx__reason_set(&call->why, "%s closed the connection", where);
            return EPX_OK;
        }
        if (io == EPX__IO_DONE) {
            continue;
        }
        if (epx__now_ns() >= deadline_ns) {
            epx__reason_set(&call->why, "%s did not answer", where);
            return EPX_OK;
        }
        if (!epx__outbox_empty(&link->out)) {
            poll_fd.events |= POLLOUT;
        }
        if (epx__poll_until(&poll_fd, 1, deadline_ns) < 0) {
            return epx__fail(EPX_ERR_SYSTEM, "poll failed: %m");
        }
    }
    epx__handshake_key(&shake, link->key);
    call->joined = shake.verdict == EPX__VERDICT_WELCOME;
    return check_verdict(&shake, where);
}

static int64_t
patience(const call_t *call)
{
    return earlier(call->deadline_ns, epx__now_ns() + EPX__HANDSHAKE_NS);
}

static epx_status_t
try_address(call_t *call, const epx__address_t *address)
{
    epx_status_t status;

    *call->link = (epx__link_t){ 0 };
    call->link->fd = epx__net_connect(address, patience(call), &call->why);
    if (call->link->fd < 0) {
        return EPX_OK;
    }
    status = shake_hands(call, epx__address_text(address).text, patience(call));
    if (!call->joined) {
        (void)close(call->link->fd);
    }
    return status;
}

static epx_status_t
try_host(call_t *call, const char *host, uint16_t port)
{
    epx__address_t addresses[EPX__MAX_ADDRESSES];
    size_t count =
        epx__resolve(host, port, call->deadline_ns, addresses, &call->why);

    for (size_t i = 0; i < count && !call->joined; i++) {
        epx_status_t status;

        if (epx__address_is_wildcard(&addresses[i])) {
            return epx__fail(EPX_ERR_ENVIRONMENT,
                             "%s means every interface; MASTER_ADDR must name "
                             "one address of rank 0's host",
                             host);
        }
        status = try_address(call, &addresses[i]);
        if (status != EPX_OK) {
            return status;
        }
    }
    /* What is no EPX at all may yet make room for rank 0. */
    if (count == 1 && call->num_mistakes >= MAX_MISTAKES &&
        call->mistake != EPX_ERR_PEER_DATA) {
        return epx__fail(call->mistake, "%s", call->mistaken.text);
    }
    return EPX_OK;
}

static epx_status_t
fail_late(const call_t *call)
{
    bool mistaken = call->mistake != EPX_OK &&
                    strcmp(call->mistaken.text, call->why.text) != 0;

    return epx__fail(
        EPX_ERR_TIMEOUT, "rank %d did not reach rank 0 in time: %s%s%s",
        call->identity->rank, call->why.text, mistaken ? "; before, " : "",
        mistaken ? call->mistaken.text : "");
}

epx_status_t
epx__join_connect(const epx__identity_t *identity, const char *host,
                  uint16_t port, int64_t deadline_ns, epx__link_t *link)
{
    int64_t pause_ns = FIRST_PAUSE_NS;
    call_t call = {
        .identity = identity,
        .deadline_ns = deadline_ns,
        .link = link,
    };

    for (;;) {
        epx_status_t status = try_host(&call, host, port);

        if (status != EPX_OK || call.joined) {
            return status;
        }
        if (epx__now_ns() >= deadline_ns) {
            return fail_late(&call);
        }
        /* Rank 0 may not have started yet. */
        (void)epx__poll_until(NULL, 0,
                              earlier(deadline_ns, epx__now_ns() + pause_ns));
        pause_ns = earlier(2 * pause_ns, LONGEST_PAUSE_NS);
    }
}
