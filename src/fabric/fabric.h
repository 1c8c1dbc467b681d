/* SPDX-License-Identifier: MIT */
/*
 * A fabric is how bytes reach a peer of the same node.  Those that exist map
 * the peer's segment, in memory of the host or of a card, where this rank's
 * engine loads and stores directly.  Which of them serve an engine, it says
 * itself.  Ranks that none of them joins are on different nodes, which a net
 * joins (src/net).
 */
#ifndef EPX_FABRIC_FABRIC_H
#define EPX_FABRIC_FABRIC_H

#include "core/cores.h"
#include "core/group.h"

/* How peers can get at a device's memory, as bits. */
#define EPX__MEMORY_PROCESS  1u /* at its address, within the process */
#define EPX__MEMORY_POSIX_FD 2u /* by a file descriptor, on this host */
#define EPX__MEMORY_IPC      4u /* by a CUDA IPC handle, on this host */
#define EPX__MEMORY_FABRIC   8u /* by a fabric handle (multi-node NVLink) */

/* The device that a rank works on; the engine fills it in. */
typedef struct epx__fabric_device {
    uint8_t uuid[16];       /* of the card; zero with CPUs */
    epx__cores_t cores;     /* with CPUs: which */
    int32_t num_workers;    /* usable cores, or SMs of the card */
    int32_t wanted_workers; /* the config's num_workers */
    uint32_t memory_kinds;  /* EPX__MEMORY_* */
} epx__fabric_device_t;

/* What a rank tells about itself before anything is shared. */
typedef struct epx__fabric_place {
    uint64_t host[2];    /* this boot of this kernel */
    uint64_t net_ns;     /* inode of the network namespace */
    uint64_t process[2]; /* random, drawn once per process */
    uint32_t node;       /* the config's */
    uint64_t pid_ns;     /* inode of the pid namespace, in which it is */
    int64_t pid;
    epx__fabric_device_t device;
} epx__fabric_place_t;

/* What a rank tells so that its peers can reach its segment. */
typedef struct epx__fabric_card {
    uint64_t segment_bytes;
    uint64_t token[4];
    char address[40];
    /* Of segments in the memory of a card (the device). */
    uint64_t mapped_bytes; /* the segment, rounded up to what can be mapped */
    uint8_t handle[64];
    uint8_t uuid[16];
    char pci[16]; /* "0000:3b:00.0" */
} epx__fabric_card_t;

typedef struct epx__fabric_ops {
    const char *name;
    /* NULL if the two ranks can be joined; else why not, as the end of the
     * sentence "ranks 0 and 1 WHY". */
    const char *(*obstacle)(const epx__fabric_place_t *a,
                            const epx__fabric_place_t *b);
    /* Make this rank's segment, reach->peers[rank], and fill in the card that
     * peers get.  The control region is zero but for the header. */
    epx_status_t (*open)(const epx_group_t *group, epx__reach_t *reach,
                         uint64_t bytes, epx__fabric_card_t *card);
    /* Reach the segments of this node's ranks: cards is [R].  All ranks call
     * this. */
    epx_status_t (*connect)(epx_group_t *group, epx__reach_t *reach,
                            const epx__fabric_card_t *cards,
                            int64_t deadline_ns);
    /* Let go of everything that open and connect made; either may have
     * failed half-way, or not have been called. */
    void (*close)(const epx_group_t *group, epx__reach_t *reach);
} epx__fabric_ops_t;

/* Where this process is: all of the place but the device. */
epx_status_t epx__fabric_place(epx__fabric_place_t *place);

bool epx__fabric_same_host(const epx__fabric_place_t *a,
                           const epx__fabric_place_t *b);
bool epx__fabric_same_process(const epx__fabric_place_t *a,
                              const epx__fabric_place_t *b);

/*
 * Which node each rank is on, numbered by its lowest rank: that of the first
 * rank which some fabric of the NULL-terminated list joins it with, unless
 * their configs forbid it.  places and node_of are [R].
 */
void epx__fabric_nodes(const epx__fabric_ops_t *const *fabrics,
                       const epx__fabric_place_t *places, int32_t num_ranks,
                       int32_t *node_of);

/* The first fabric of the list that joins the ranks of every node, for a single
 * rank the first; NULL when there is none. */
const epx__fabric_ops_t *
epx__fabric_find(const epx__fabric_ops_t *const *fabrics,
                 const epx__fabric_place_t *places, const int32_t *node_of,
                 int32_t num_ranks);

/* The same; EPX_ERR_UNSUPPORTED tells why there is none. */
epx_status_t epx__fabric_choose(const epx__fabric_ops_t *const *fabrics,
                                const epx__fabric_place_t *places,
                                const int32_t *node_of, int32_t num_ranks,
                                const epx__fabric_ops_t **fabric_p);

/* The header that a rank's segment of so many bytes starts with. */
epx__segment_header_t epx__fabric_header(const epx_group_t *group, int32_t rank,
                                         uint64_t bytes);

/* Refuse a segment whose header, copied from it, is not that. */
epx_status_t epx__fabric_check_header(const epx_group_t *group, int32_t rank,
                                      uint64_t bytes,
                                      const epx__segment_header_t *found);

extern const epx__fabric_ops_t epx__fabric_thread;
extern const epx__fabric_ops_t epx__fabric_shm;

#endif
