/* SPDX-License-Identifier: MIT */
#include "bootstrap/join.h"
#include "bootstrap/net.h"
#include "core/clock.h"
#include "core/status.h"

#include <errno.h>
#include <sodium.h>
#include <string.h>
#include <unistd.h>

#define FIRST_PAUSE_NS   (10 * EPX__NS_PER_MS)
#define LONGEST_PAUSE_NS (250 * EPX__NS_PER_MS)

static int64_t
earlier(int64_t a_ns, int64_t b_ns)
{
    return a_ns < b_ns ? a_ns : b_ns;
}

/* Whatever the handshake has come to that trying again would not change. */
static epx_status_t
fail_handshake(const epx__handshake_t *shake, const char *where)
{
    switch (shake->failure) {
    case EPX__FAILURE_VERSION:
        return epx__fail(EPX_ERR_MISMATCH,
                         "rank 0 at %s speaks version %u of the rendezvous, "
                         "rank %d version %u; all must use the same EPX",
                         where, shake->peer_version, shake->identity->rank,
                         EPX__WIRE_VERSION);
    case EPX__FAILURE_SECRET:
        return epx__fail(EPX_ERR_AUTH,
                         "rank 0 at %s does not hold the secret of rank %d; "
                         "EPX_SECRET, or the file that holds it, must be the "
                         "same for all ranks",
                         where, shake->identity->rank);
    default:
        return epx__fail(EPX_ERR_PEER_DATA,
                         "what listens at %s is not rank 0 of an EPX job; "
                         "EPX_PORT chooses another port",
                         where);
    }
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

/* Sets *joined_p, or fails for good, or explains in *why what went wrong this
 * time. */
static epx_status_t
shake_hands(const epx__identity_t *identity, const char *where,
            int64_t deadline_ns, epx__link_t *link, bool *joined_p,
            epx__reason_t *why)
{
    unsigned char nonce[EPX__NONCE_BYTES];
    epx__handshake_t shake;

    randombytes_buf(nonce, sizeof(nonce));
    epx__handshake_connect(&shake, identity, nonce, &link->out);
    while (shake.state != EPX__HANDSHAKE_JUDGED) {
        struct pollfd poll_fd = { .fd = link->fd, .events = POLLIN };
        epx__io_t io = pump(link->fd, &shake, &link->out);

        if (shake.state == EPX__HANDSHAKE_FAILED) {
            return fail_handshake(&shake, where);
        }
        if (io == EPX__IO_CLOSED) {
            epx__reason_set(why, "%s closed the connection", where);
            return EPX_OK;
        }
        if (io == EPX__IO_DONE) {
            continue;
        }
        if (epx__now_ns() >= deadline_ns) {
            epx__reason_set(why, "%s did not answer", where);
            return EPX_OK;
        }
        if (!epx__outbox_empty(&link->out)) {
            poll_fd.events |= POLLOUT;
        }
        if (epx__poll_until(&poll_fd, 1, deadline_ns) < 0) {
            return epx__fail(EPX_ERR_SYSTEM, "poll failed: %m");
        }
    }
    *joined_p = shake.verdict == EPX__VERDICT_WELCOME;
    return check_verdict(&shake, where);
}

static epx_status_t
try_address(const epx__identity_t *identity, const epx__address_t *address,
            int64_t deadline_ns, epx__link_t *link, bool *joined_p,
            epx__reason_t *why)
{
    epx_status_t status;

    *link = (epx__link_t){ 0 };
    link->fd = epx__net_connect(
        address, earlier(deadline_ns, epx__now_ns() + EPX__HANDSHAKE_NS), why);
    if (link->fd < 0) {
        return EPX_OK;
    }
    status =
        shake_hands(identity, epx__address_text(address).text,
                    earlier(deadline_ns, epx__now_ns() + EPX__HANDSHAKE_NS),
                    link, joined_p, why);
    if (!*joined_p) {
        (void)close(link->fd);
    }
    return status;
}

static epx_status_t
try_host(const epx__identity_t *identity, const char *host, uint16_t port,
         int64_t deadline_ns, epx__link_t *link, bool *joined_p,
         epx__reason_t *why)
{
    epx__address_t addresses[EPX__MAX_ADDRESSES];
    size_t count = epx__resolve(host, port, deadline_ns, addresses, why);

    for (size_t i = 0; i < count && !*joined_p; i++) {
        epx_status_t status;

        if (epx__address_is_wildcard(&addresses[i])) {
            return epx__fail(EPX_ERR_ENVIRONMENT,
                             "%s means every interface; MASTER_ADDR must name "
                             "one address of rank 0's host",
                             host);
        }
        status = try_address(identity, &addresses[i], deadline_ns, link,
                             joined_p, why);
        if (status != EPX_OK) {
            return status;
        }
    }
    return EPX_OK;
}

epx_status_t
epx__join_connect(const epx__identity_t *identity, const char *host,
                  uint16_t port, int64_t deadline_ns, epx__link_t *link)
{
    int64_t pause_ns = FIRST_PAUSE_NS;
    epx__reason_t why = { "" };

    for (;;) {
        bool joined = false;
        epx_status_t status =
            try_host(identity, host, port, deadline_ns, link, &joined, &why);

        if (status != EPX_OK || joined) {
            return status;
        }
        if (epx__now_ns() >= deadline_ns) {
            return epx__fail(EPX_ERR_TIMEOUT,
                             "rank %d did not reach rank 0 in time: %s",
                             identity->rank, why.text);
        }
        /* Rank 0 may not have started yet. */
        (void)epx__poll_until(NULL, 0,
                              earlier(deadline_ns, epx__now_ns() + pause_ns));
        pause_ns = earlier(2 * pause_ns, LONGEST_PAUSE_NS);
    }
}
