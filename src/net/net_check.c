/* SPDX-License-Identifier: MIT */
#include "core/atomic.h"
#include "net/net_wire.h"

/* Acknowledges nothing that was not sent. */
static bool
ack_fits(const epx__net_view_t *view, const epx__net_header_t *header)
{
    uint64_t beyond; /* messages that were sent after `acked` */

    if (header->acked >= view->next_sent) {
        return false;
    }
    beyond = view->next_sent - 1 - header->acked;
    return beyond >= EPX__NET_WINDOW || header->acked_bits >> beyond == 0;
}

/* Steps that are further ahead cannot have begun anywhere, and those that are
 * further back are over everywhere: see control.h. */
static bool
step_fits(const epx__net_view_t *view, uint64_t step)
{
    return step > 0 &&
           (step <= view->last_step ? view->last_step - step < EPX__MAX_OPEN
                                    : step - view->last_step <= EPX__MAX_OPEN);
}

static const char *
check_signal(const epx__net_view_t *view, const epx__net_header_t *header)
{
    bool is_counts = header->kind == EPX__NET_KIND_COUNTS;
    uint64_t least = header->kind == EPX__NET_KIND_POST ? sizeof(epx__post_t)
                     : is_counts ? sizeof(epx__count_row_t)
                                 : 0;
    uint64_t most = is_counts ? view->map->count_row_bytes : least;

    if (header->gate >= EPX__NUM_GATES) {
        return "for a gate that there is not";
    }
    if (!step_fits(view, header->step)) {
        return "for a step that is not open";
    }
    if (header->bytes < least || header->bytes > most) {
        return "with a post or count row of another size";
    }
    return header->channel != 0 || header->turn != 0 || header->offset != 0 ||
                   header->total != 0
               ? "with fields that a signal has not"
               : NULL;
}

/* Of a piece that belongs to the turn that is coming. */
static const char *
check_rest(const epx__net_half_t *half, const epx__net_header_t *header)
{
    if (header->total != half->total || header->step != half->step ||
        header->gate != half->gate) {
        return "that disagrees with others of its turn";
    }
    return half->done_turn == half->turn ||
                   header->bytes > half->total - half->placed
               ? "with more bytes than its turn has"
               : NULL;
}

/* The turn that may come where the piece belongs, 0: none.  It may change, so
 * it is read once. */
static uint64_t
open_turn(const epx__net_view_t *view, const epx__net_header_t *header)
{
    return header->kind == EPX__NET_KIND_PIECE &&
                   header->channel < view->num_channels
               ? epx__load_acquire_u64(&view->slots[header->channel]
                                            .halves[header->turn % 2]
                                            .open_turn)
               : 0;
}

/* Whether nobody waits for the piece any more, its slot being closed or its
 * turn over. */
static bool
is_stray(const epx__net_header_t *header, uint64_t open)
{
    return header->kind == EPX__NET_KIND_PIECE &&
           (open == 0 || header->turn < open);
}

static const char *
check_piece(const epx__net_view_t *view, const epx__net_header_t *header,
            uint64_t open)
{
    bool strays = is_stray(header, open);
    const epx__net_slot_t *slot;
    const epx__net_half_t *half;

    if (header->channel >= view->num_channels) {
        return "for a channel that there is not";
    }
    slot = &view->slots[header->channel];
    half = &slot->halves[header->turn % 2];
    if (header->turn == 0 || (!strays && header->turn != open)) {
        return "for a turn that is not open";
    }
    if ((!strays && header->total > slot->bytes) ||
        header->offset > header->total ||
        header->bytes > header->total - header->offset) {
        return "that does not fit its slot";
    }
    if (header->bytes == 0 && header->total != 0) {
        return "without bytes";
    }
    if (header->gate >= EPX__NUM_GATES ||
        (header->step != 0 && !step_fits(view, header->step))) {
        return "for a step that is not open";
    }
    return !strays && header->turn == half->turn ? check_rest(half, header)
                                                 : NULL;
}

static const char *
check_note(const epx__net_view_t *view, const epx__net_header_t *header)
{
    if (header->channel >= view->num_channels) {
        return "for a channel that there is not";
    }
    return header->turn == 0 || header->bytes != sizeof(epx__net_note_t) ||
                   header->gate != 0 || header->step != 0 ||
                   header->offset != 0 || header->total != 0
               ? "with fields that a note has not"
               : NULL;
}

static const char *
check_kind(const epx__net_view_t *view, const epx__net_header_t *header,
           uint64_t open)
{
    switch (header->kind) {
    case EPX__NET_KIND_ACK:
        return header->sequence != 0 || header->bytes != 0
                   ? "with fields that an acknowledgement has not"
                   : NULL;
    case EPX__NET_KIND_BYE:
        return header->bytes != 0 ? "with fields that a farewell has not"
                                  : NULL;
    case EPX__NET_KIND_VERDICT:
        return header->bytes != sizeof(epx__net_verdict_t)
                   ? "with a verdict of another size"
                   : NULL;
    case EPX__NET_KIND_PLEDGE:
        return header->bytes != sizeof(epx__pledge_t)
                   ? "with a pledge of another size"
                   : NULL;
    case EPX__NET_KIND_SIGNAL:
    case EPX__NET_KIND_POST:
    case EPX__NET_KIND_COUNTS:
        return check_signal(view, header);
    case EPX__NET_KIND_PIECE:
        return check_piece(view, header, open);
    case EPX__NET_KIND_NOTE:
        return view->has_notes ? check_note(view, header)
                               : "of a kind that there is not";
    default:
        return "of a kind that there is not";
    }
}

bool
epx__net_is_duplicate(const epx__net_view_t *view, uint64_t sequence)
{
    uint64_t ahead = sequence - view->next_received;

    return sequence > 0 &&
           (sequence < view->next_received ||
            (ahead < EPX__NET_WINDOW && (view->started >> ahead & 1) != 0));
}

const char *
epx__net_check(const epx__net_view_t *view, const void *header,
               size_t header_bytes, uint64_t bytes, epx__net_header_t *header_p,
               bool *is_stray_p)
{
    uint64_t open;

    *is_stray_p = false;
    if (header_bytes != sizeof(*header_p)) {
        return "with a header of another size";
    }
    epx__copy_in(header_p, header, sizeof(*header_p));
    if (header_p->magic != EPX__NET_MAGIC ||
        header_p->version != EPX__NET_VERSION) {
        return "of another protocol";
    }
    if (header_p->group != view->group) {
        return "of another group";
    }
    if (header_p->source != view->source) {
        return "in the name of another rank";
    }
    if (header_p->bytes != bytes) {
        return "of another length than its header says";
    }
    if (!ack_fits(view, header_p)) {
        return "that acknowledges what was not sent";
    }
    /* What a duplicate belongs to may be long over. */
    if (epx__net_is_duplicate(view, header_p->sequence)) {
        return NULL;
    }
    if (header_p->kind != EPX__NET_KIND_ACK &&
        (header_p->sequence == 0 ||
         header_p->sequence - view->next_received >= EPX__NET_WINDOW)) {
        return "with a sequence number that is not its turn";
    }
    open = open_turn(view, header_p);
    *is_stray_p = is_stray(header_p, open);
    return check_kind(view, header_p, open);
}
