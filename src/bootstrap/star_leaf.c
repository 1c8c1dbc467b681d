/* SPDX-License-Identifier: MIT */
/* The other ranks' side of an allgather: send the block, take the result. */
#include "bootstrap/star_internal.h"
#include "core/clock.h"

#include <inttypes.h>

static epx_status_t
fail_root(const epx__star_t *star, epx__frame_kind_t kind)
{
    epx__rank_set_t root = { { 0 } };

    epx__rank_set_add(&root, 0);
    return epx__star_fail(star, kind, &root);
}

static epx_status_t
fail_data(const epx__star_t *star)
{
    return epx__fail(EPX_ERR_PEER_DATA,
                     "rank 0 sent what cannot be part of allgather %" PRIu64,
                     star->sequence);
}

static epx_status_t
check_head(const epx__star_t *star, const epx__gather_t *gather,
           epx__frame_t *frame)
{
    const epx__star_peer_t *root = &star->peers[0];

    if (!epx__frame_decode(root->head, frame) || frame->rank != 0 ||
        frame->sequence != star->sequence) {
        return fail_data(star);
    }
    if (frame->kind != EPX__FRAME_DATA) {
        return frame->bytes == EPX__RANK_SET_BYTES ? EPX_OK : fail_data(star);
    }
    /* The result cannot come before rank 0 has this rank's block. */
    if (!epx__outbox_empty(&root->link.out)) {
        return fail_data(star);
    }
    return frame->bytes == gather->total_bytes
               ? EPX_OK
               : fail_root(star, EPX__FRAME_DISAGREE);
}

/* Takes in one frame, as far as it has come: a report, or the result. */
static epx_status_t
read_frame(epx__star_t *star, epx__gather_t *gather, bool *done_p)
{
    epx__star_peer_t *root = &star->peers[0];
    epx__frame_t frame = { 0 };
    unsigned char *body = NULL;
    epx__io_t io = epx__io_read(root->link.fd, root->head, EPX__FRAME_BYTES,
                                &root->head_bytes);

    if (io == EPX__IO_DONE) {
        epx_status_t status = check_head(star, gather, &frame);

        if (status != EPX_OK) {
            return status;
        }
        body = frame.kind == EPX__FRAME_DATA ? gather->recv : root->report.bits;
        io = epx__io_read(root->link.fd, body, (size_t)frame.bytes,
                          &root->body_bytes);
    }
    if (io != EPX__IO_DONE) {
        return io == EPX__IO_AGAIN ? EPX_OK : fail_root(star, EPX__FRAME_LOST);
    }
    root->head_bytes = 0;
    root->body_bytes = 0;
    if (!epx__link_verify(&root->link, root->head, body, (size_t)frame.bytes)) {
        return epx__star_fail_auth(star, 0);
    }
    if (frame.kind == EPX__FRAME_WAITING) {
        gather->awaited = root->report;
        return EPX_OK;
    }
    *done_p = frame.kind == EPX__FRAME_DATA;
    return *done_p ? EPX_OK : epx__star_fail(star, frame.kind, &root->report);
}

/* This rank's patience may end before rank 0's: then it says for whom it had
 * waited, so that rank 0 does not have to guess. */
static epx_status_t
fail_late(epx__star_t *star, const epx__gather_t *gather)
{
    epx__link_report(&star->peers[0].link, star->rank, EPX__FRAME_LATE,
                     star->sequence, &gather->awaited);
    return epx__star_fail(star, EPX__FRAME_LATE, &gather->awaited);
}

epx_status_t
epx__star_gather_leaf(epx__star_t *star, epx__gather_t *gather)
{
    epx__star_peer_t *root = &star->peers[0];
    bool done = false;

    /* Until rank 0 says more, it is rank 0 that is waited for. */
    epx__rank_set_add(&gather->awaited, 0);
    if (star->sequence > 0) {
        const epx__digest_t digest = epx__digest(gather->send, gather->bytes);

        epx__star_add_data(star, &root->link, gather->send, gather->bytes,
                           &digest);
    }
    while (!done) {
        struct pollfd poll_fd = { .fd = root->link.fd, .events = POLLIN };
        epx_status_t status;

        if (epx__outbox_flush(&root->link.out, root->link.fd) ==
            EPX__IO_CLOSED) {
            /* Rank 0 may have said why before it went. */
            root->link.out = (epx__outbox_t){ 0 };
        }
        if (!epx__outbox_empty(&root->link.out)) {
            poll_fd.events |= POLLOUT;
        }
        if (epx__now_ns() >= gather->deadline_ns) {
            return fail_late(star, gather);
        }
        if (epx__poll_until(&poll_fd, 1, gather->deadline_ns) < 0) {
            return epx__fail(EPX_ERR_SYSTEM, "poll failed: %m");
        }
        status = read_frame(star, gather, &done);
        if (status != EPX_OK) {
            return status;
        }
    }
    return EPX_OK;
}
