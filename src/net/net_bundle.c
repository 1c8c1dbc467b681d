/* SPDX-License-Identifier: MIT */
/* Short messages that go together, on the first wire: each by itself costs more
 * than its bytes. */
#include "net/net_internal.h"

#include <string.h>

void
epx__net_bundle_post(epx__net_t *net, int32_t rank)
{
    epx__net_peer_t *peer = &net->peers[rank];
    epx__net_message_t *first = peer->bundle;

    peer->bundle = NULL;
    if (first != NULL) {
        epx__net_move(net, rank, first);
    }
}

void
epx__net_bundle_add(epx__net_t *net, int32_t rank, epx__net_message_t *message)
{
    epx__net_peer_t *peer = &net->peers[rank];
    uint64_t bytes = sizeof(message->header) + message->header.bytes;
    uint32_t ranges = 1 + message->num_ranges;
    bool goes_alone = net->puts != NULL || bytes > EPX__NET_BUNDLE_BYTES ||
                      ranges > EPX__NET_BUNDLE_RANGES;

    message->next = NULL;
    if (peer->bundle != NULL &&
        (goes_alone || bytes > EPX__NET_BUNDLE_BYTES - peer->bundle_bytes ||
         ranges > EPX__NET_BUNDLE_RANGES - peer->bundle_ranges)) {
        epx__net_bundle_post(net, rank);
    }
    if (goes_alone) {
        epx__net_move(net, rank, message);
        return;
    }
    if (peer->bundle == NULL) {
        peer->bundle = message;
        peer->bundle_bytes = 0;
        peer->bundle_ranges = 0;
    } else {
        peer->bundle_end->next = message;
    }
    peer->bundle_end = message;
    peer->bundle_bytes += bytes;
    peer->bundle_ranges += ranges;
}

/* Bytes of the payload behind a header: what that says, if there are so many.
 */
static uint64_t
payload_bytes(const void *header, size_t header_bytes, uint64_t bytes)
{
    epx__net_header_t said;

    if (header_bytes != sizeof(said)) {
        return bytes;
    }
    epx__copy_in(&said, header, sizeof(said));
    return said.bytes < bytes ? said.bytes : bytes;
}

void
epx__net_came_whole(epx__net_t *net, int32_t rank, const void *header,
                    size_t header_bytes, const void *data, uint64_t bytes)
{
    const char *at = data;

    for (;;) {
        uint64_t own = payload_bytes(header, header_bytes, bytes);
        void *to = NULL;
        uint64_t landing =
            epx__net_came(net, rank, header, header_bytes, own, &to);

        if (landing != EPX__NET_DROP) {
            if (own > 0) {
                memcpy(to, at, own);
            }
            epx__net_landed(net, rank, landing, true);
        }
        if (own == bytes) {
            return;
        }
        header = at + own;
        bytes -= own;
        header_bytes = bytes < sizeof(epx__net_header_t)
                           ? bytes
                           : sizeof(epx__net_header_t);
        at = (const char *)header + header_bytes;
        bytes -= header_bytes;
    }
}
