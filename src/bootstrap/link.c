/* SPDX-License-Identifier: MIT */
#include "bootstrap/link.h"

#include <sodium.h>
#include <string.h>

_Static_assert(crypto_auth_hmacsha256_BYTES == EPX__MAC_BYTES &&
                   crypto_auth_hmacsha256_KEYBYTES == EPX__KEY_BYTES &&
                   crypto_hash_sha256_BYTES == sizeof(epx__digest_t),
               "HMAC-SHA256 of a SHA-256");

static const unsigned char from_root_label[EPX__LABEL_BYTES] =
    "epx from root 2";
static const unsigned char to_root_label[EPX__LABEL_BYTES] = "epx to root   2";

epx__digest_t
epx__digest(const void *block, size_t bytes)
{
    crypto_hash_sha256_state hash;
    epx__digest_t digest;

    crypto_hash_sha256_init(&hash);
    if (bytes > 0) {
        crypto_hash_sha256_update(&hash, block, bytes);
    }
    crypto_hash_sha256_final(&hash, digest.bytes);
    return digest;
}

/* The MAC of the frame with this header, the `number`th of its direction. */
static void
make_mac(const epx__link_t *link, const unsigned char *head, uint64_t number,
         const epx__digest_t *digest, unsigned char mac[EPX__MAC_BYTES])
{
    const bool from_root = epx__get_le(head + 6, 2) == 0;
    crypto_auth_hmacsha256_state hmac;
    unsigned char count[8];

    epx__put_le(count, number, 8);
    crypto_auth_hmacsha256_init(&hmac, link->key, EPX__KEY_BYTES);
    crypto_auth_hmacsha256_update(
        &hmac, from_root ? from_root_label : to_root_label, EPX__LABEL_BYTES);
    crypto_auth_hmacsha256_update(&hmac, count, sizeof(count));
    crypto_auth_hmacsha256_update(&hmac, head, EPX__FRAME_MAC);
    crypto_auth_hmacsha256_update(&hmac, digest->bytes, sizeof(*digest));
    crypto_auth_hmacsha256_final(&hmac, mac);
    sodium_memzero(&hmac, sizeof(hmac));
}

/* Room for a frame of which `more` bytes behind the header are in the outbox
 * too. */
static unsigned char *
add_head(epx__link_t *link, const epx__frame_t *frame,
         const epx__digest_t *digest, size_t more)
{
    unsigned char *head = epx__outbox_add(&link->out, EPX__FRAME_BYTES + more);

    epx__frame_encode(head, frame);
    make_mac(link, head, link->num_sent++, digest, head + EPX__FRAME_MAC);
    return head + EPX__FRAME_BYTES;
}

void
epx__link_add(epx__link_t *link, const epx__frame_t *frame, const void *block,
              const epx__digest_t *digest)
{
    (void)add_head(link, frame, digest, 0);
    link->out.block = block;
    link->out.block_bytes = (size_t)frame->bytes;
}

void
epx__link_report(epx__link_t *link, int32_t rank, epx__frame_kind_t kind,
                 uint64_t sequence, const epx__rank_set_t *ranks)
{
    if (epx__outbox_empty(&link->out)) {
        const epx__digest_t digest =
            epx__digest(ranks->bits, EPX__RANK_SET_BYTES);
        const epx__frame_t frame = {
            .kind = kind,
            .rank = rank,
            .sequence = sequence,
            .bytes = EPX__RANK_SET_BYTES,
        };

        memcpy(add_head(link, &frame, &digest, EPX__RANK_SET_BYTES),
               ranks->bits, EPX__RANK_SET_BYTES);
    }
    (void)epx__outbox_flush(&link->out, link->fd);
}

bool
epx__link_verify(epx__link_t *link, const unsigned char head[EPX__FRAME_BYTES],
                 void *body, size_t bytes)
{
    const epx__digest_t digest = epx__digest(body, bytes);
    unsigned char right[EPX__MAC_BYTES];

    make_mac(link, head, link->num_received++, &digest, right);
    if (sodium_memcmp(right, head + EPX__FRAME_MAC, EPX__MAC_BYTES) == 0) {
        return true;
    }
    if (bytes > 0) {
        memset(body, 0, bytes);
    }
    return false;
}
