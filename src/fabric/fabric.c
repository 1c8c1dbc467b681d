/* SPDX-License-Identifier: MIT */
#include "fabric/fabric.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

static uint64_t process_id[2];
static int process_error;
static pthread_once_t process_once = PTHREAD_ONCE_INIT;

static void
draw_process_id(void)
{
    if (getrandom(process_id, sizeof(process_id), 0) !=
        (ssize_t)sizeof(process_id)) {
        process_error = errno;
    }
}

static void
process_id_init(void)
{
    draw_process_id();
    /* A child of fork must not pass for its parent. */
    (void)pthread_atfork(NULL, NULL, draw_process_id);
}

/* "xxxxxxxx-xxxx-..." as 128 bits. */
static epx_status_t
read_boot_id(uint64_t host[2])
{
    char text[40];
    int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
    ssize_t length = fd < 0 ? -1 : read(fd, text, sizeof(text));
    int digits = 0;

    if (fd >= 0) {
        (void)close(fd);
    }
    for (ssize_t i = 0; i < length && digits < 32; i++) {
        char c = text[i];
        uint64_t value;

        if (c == '-') {
            continue;
        }
        if (c >= '0' && c <= '9') {
            value = (uint64_t)(c - '0');
        } else if (c >= 'a' && c <= 'f') {
            value = (uint64_t)(c - 'a') + 10;
        } else {
            break;
        }
        host[digits / 16] = host[digits / 16] << 4 | value;
        digits++;
    }
    return digits == 32
               ? EPX_OK
               : epx__fail(EPX_ERR_SYSTEM,
                           "cannot read this host's boot_id from /proc "
                           "(%d of 32 digits)",
                           digits);
}

epx_status_t
epx__fabric_place(epx__fabric_place_t *place)
{
    struct stat net, pids;

    memset(place, 0, sizeof(*place));
    (void)pthread_once(&process_once, process_id_init);
    if (process_error != 0) {
        errno = process_error;
        return epx__fail(EPX_ERR_SYSTEM, "no random bytes: %m");
    }
    memcpy(place->process, process_id, sizeof(process_id));
    if (stat("/proc/self/ns/net", &net) != 0) {
        return epx__fail(EPX_ERR_SYSTEM, "cannot stat /proc/self/ns/net: %m");
    }
    if (stat("/proc/self/ns/pid", &pids) != 0) {
        return epx__fail(EPX_ERR_SYSTEM, "cannot stat /proc/self/ns/pid: %m");
    }
    place->net_ns = (uint64_t)net.st_ino;
    place->pid_ns = (uint64_t)pids.st_ino;
    place->pid = getpid();
    return read_boot_id(place->host);
}

bool
epx__fabric_same_host(const epx__fabric_place_t *a,
                      const epx__fabric_place_t *b)
{
    return memcmp(a->host, b->host, sizeof(a->host)) == 0;
}

bool
epx__fabric_same_process(const epx__fabric_place_t *a,
                         const epx__fabric_place_t *b)
{
    return epx__fabric_same_host(a, b) && a->net_ns == b->net_ns &&
           memcmp(a->process, b->process, sizeof(a->process)) == 0;
}

static bool
can_join(const epx__fabric_ops_t *const *fabrics, const epx__fabric_place_t *a,
         const epx__fabric_place_t *b)
{
    for (int i = 0; a->node == b->node && fabrics[i] != NULL; i++) {
        if (fabrics[i]->obstacle(a, b) == NULL) {
            return true;
        }
    }
    return false;
}

void
epx__fabric_nodes(const epx__fabric_ops_t *const *fabrics,
                  const epx__fabric_place_t *places, int32_t num_ranks,
                  int32_t *node_of)
{
    int32_t num_nodes = 0;

    for (int32_t rank = 0; rank < num_ranks; rank++) {
        int32_t first = 0;

        while (first < rank &&
               !can_join(fabrics, &places[first], &places[rank])) {
            first++;
        }
        node_of[rank] = first < rank ? node_of[first] : num_nodes++;
    }
}

/* Why a fabric does not join the ranks of a node, and the first two that it
 * does not; NULL when it joins all. */
static const char *
first_obstacle(const epx__fabric_ops_t *fabric,
               const epx__fabric_place_t *places, const int32_t *node_of,
               int32_t num_ranks, int32_t *a_p, int32_t *b_p)
{
    for (int32_t a = 0; a < num_ranks; a++) {
        for (int32_t b = a + 1; b < num_ranks; b++) {
            const char *why = node_of[a] == node_of[b]
                                  ? fabric->obstacle(&places[a], &places[b])
                                  : NULL;

            if (why != NULL) {
                *a_p = a;
                *b_p = b;
                return why;
            }
        }
    }
    return NULL;
}

const epx__fabric_ops_t *
epx__fabric_find(const epx__fabric_ops_t *const *fabrics,
                 const epx__fabric_place_t *places, const int32_t *node_of,
                 int32_t num_ranks)
{
    int32_t a, b;

    while (*fabrics != NULL && first_obstacle(*fabrics, places, node_of,
                                              num_ranks, &a, &b) != NULL) {
        fabrics++;
    }
    return *fabrics;
}

epx_status_t
epx__fabric_choose(const epx__fabric_ops_t *const *fabrics,
                   const epx__fabric_place_t *places, const int32_t *node_of,
                   int32_t num_ranks, const epx__fabric_ops_t **fabric_p)
{
    char reasons[400] = "";
    size_t length = 0;

    for (int i = 0; fabrics[i] != NULL; i++) {
        int32_t a = 0, b = 0;
        const char *why =
            first_obstacle(fabrics[i], places, node_of, num_ranks, &a, &b);

        if (why == NULL) {
            *fabric_p = fabrics[i];
            return EPX_OK;
        }
        if (length < sizeof(reasons)) {
            length +=
                (size_t)snprintf(reasons + length, sizeof(reasons) - length,
                                 "%s%s: ranks %d and %d %s", i == 0 ? "" : "; ",
                                 fabrics[i]->name, a, b, why);
        }
    }
    return epx__fail(EPX_ERR_UNSUPPORTED, "the ranks cannot be joined; %s",
                     reasons);
}

epx__segment_header_t
epx__fabric_header(const epx_group_t *group, int32_t rank, uint64_t bytes)
{
    return (epx__segment_header_t){
        .magic = EPX__SEGMENT_MAGIC,
        .layout_version = EPX__LAYOUT_VERSION,
        .job_id = { group->job_id[0], group->job_id[1] },
        .bytes = bytes,
        .rank = (uint32_t)rank,
        .num_ranks = (uint32_t)group->num_ranks,
        .max_experts = (uint32_t)group->max_experts,
    };
}

epx_status_t
epx__fabric_check_header(const epx_group_t *group, int32_t rank, uint64_t bytes,
                         const epx__segment_header_t *found)
{
    epx__segment_header_t wanted = epx__fabric_header(group, rank, bytes);

    if (found->magic != wanted.magic ||
        found->layout_version != wanted.layout_version ||
        found->job_id[0] != wanted.job_id[0] ||
        found->job_id[1] != wanted.job_id[1] || found->bytes != bytes ||
        found->rank != wanted.rank || found->num_ranks != wanted.num_ranks ||
        found->max_experts != wanted.max_experts) {
        return epx__fail(
            EPX_ERR_PEER_DATA,
            "the segment of rank %d is not of this job: magic %#" PRIx64
            ", layout %" PRIu64 ", %" PRIu64 " bytes, rank %u of %u; expected "
            "magic %#" PRIx64 ", layout %d, %" PRIu64 " bytes, rank %d of %d",
            rank, found->magic, found->layout_version, found->bytes,
            found->rank, found->num_ranks, EPX__SEGMENT_MAGIC,
            EPX__LAYOUT_VERSION, bytes, rank, group->num_ranks);
    }
    return EPX_OK;
}
