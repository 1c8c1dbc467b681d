/* SPDX-License-Identifier: MIT */
/*
 * A fabric is how bytes reach a peer.  The two that exist map every peer's
 * segment into this rank's address space, so that the engine loads and stores
 * there directly.
 */
#ifndef EPX_FABRIC_FABRIC_H
#define EPX_FABRIC_FABRIC_H

#include "core/group.h"

/* What a rank tells about itself before anything is shared. */
typedef struct epx__fabric_place {
    uint64_t host[2];    /* this boot of this kernel */
    uint64_t net_ns;     /* inode of the network namespace */
    uint64_t process[2]; /* random, drawn once per process */
} epx__fabric_place_t;

/* What a rank tells so that its peers can reach its segment. */
typedef struct epx__fabric_card {
    uint64_t segment_bytes;
    uint64_t token[4];
    char address[40];
} epx__fabric_card_t;

typedef struct epx__fabric_ops {
    const char *name;
    /* NULL if the two ranks can be joined; else why not, as the end of the
     * sentence "... cannot be joined: WHY". */
    const char *(*obstacle)(const epx__fabric_place_t *a,
                            const epx__fabric_place_t *b);
    /* Make this rank's segment (zero-filled, group->peers[rank]) and fill in
     * the card that peers get. */
    epx_status_t (*open)(epx_group_t *group, uint64_t bytes,
                         epx__fabric_card_t *card);
    /* Reach the peers' segments: cards is [R].  All ranks call this. */
    epx_status_t (*connect)(epx_group_t *group, const epx__fabric_card_t *cards,
                            int64_t deadline_ns);
    /* Let go of everything that open and connect made; either may have
     * failed half-way, or not have been called. */
    void (*close)(epx_group_t *group);
} epx__fabric_ops_t;

/* In order of preference; NULL-terminated. */
extern const epx__fabric_ops_t *const epx__fabrics[];

epx_status_t epx__fabric_place(epx__fabric_place_t *place);

/* The first fabric that joins all ranks: places is [R]. */
epx_status_t epx__fabric_choose(const epx__fabric_place_t *places,
                                int32_t num_ranks,
                                const epx__fabric_ops_t **fabric_p);

/* Write the header that epx__fabric_check_segment expects. */
void epx__fabric_stamp_segment(epx_group_t *group);

/* Refuse a segment that is not what `rank` should have shared. */
epx_status_t epx__fabric_check_segment(const epx_group_t *group, int32_t rank,
                                       uint64_t bytes);

extern const epx__fabric_ops_t epx__fabric_thread;
extern const epx__fabric_ops_t epx__fabric_shm;

#endif
