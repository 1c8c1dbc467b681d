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

const epx__fabric_ops_t *const epx__fabrics[] = {
    &epx__fabric_thread,
    &epx__fabric_shm,
    NULL,
};

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
    struct stat net;

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
    place->net_ns = (uint64_t)net.st_ino;
    return read_boot_id(place->host);
}

static const char *
first_obstacle(const epx__fabric_ops_t *fabric,
               const epx__fabric_place_t *places, int32_t num_ranks,
               int32_t *rank_p)
{
    for (*rank_p = 1; *rank_p < num_ranks; (*rank_p)++) {
        const char *why = fabric->obstacle(&places[0], &places[*rank_p]);

        if (why != NULL) {
            return why;
        }
    }
    return NULL;
}

epx_status_t
epx__fabric_choose(const epx__fabric_place_t *places, int32_t num_ranks,
                   const epx__fabric_ops_t **fabric_p)
{
    const char *why = NULL;
    int32_t rank = 0;

    for (int i = 0; epx__fabrics[i] != NULL; i++) {
        why = first_obstacle(epx__fabrics[i], places, num_ranks, &rank);
        if (why == NULL) {
            *fabric_p = epx__fabrics[i];
            return EPX_OK;
        }
    }
    return epx__fail(EPX_ERR_UNSUPPORTED, "ranks 0 and %d cannot be joined: %s",
                     rank, why);
}

void
epx__fabric_stamp_segment(epx_group_t *group)
{
    const epx__peer_t *own = &group->peers[group->rank];

    *(epx__segment_header_t *)own->base = (epx__segment_header_t){
        .magic = EPX__SEGMENT_MAGIC,
        .layout_version = EPX__LAYOUT_VERSION,
        .job_id = { group->job_id[0], group->job_id[1] },
        .bytes = own->bytes,
        .rank = (uint32_t)group->rank,
        .num_ranks = (uint32_t)group->num_ranks,
        .max_experts = (uint32_t)group->max_experts,
    };
}

epx_status_t
epx__fabric_check_segment(const epx_group_t *group, int32_t rank,
                          uint64_t bytes)
{
    epx__segment_header_t header =
        *(const epx__segment_header_t *)group->peers[rank].base;

    if (header.magic != EPX__SEGMENT_MAGIC ||
        header.layout_version != EPX__LAYOUT_VERSION ||
        header.job_id[0] != group->job_id[0] ||
        header.job_id[1] != group->job_id[1] || header.bytes != bytes ||
        header.rank != (uint32_t)rank ||
        header.num_ranks != (uint32_t)group->num_ranks ||
        header.max_experts != (uint32_t)group->max_experts) {
        return epx__fail(
            EPX_ERR_PEER_DATA,
            "the segment of rank %d is not of this job: magic %#" PRIx64
            ", layout %" PRIu64 ", %" PRIu64 " bytes, rank %u of %u; expected "
            "magic %#" PRIx64 ", layout %d, %" PRIu64 " bytes, rank %d of %d",
            rank, header.magic, header.layout_version, header.bytes,
            header.rank, header.num_ranks, EPX__SEGMENT_MAGIC,
            EPX__LAYOUT_VERSION, bytes, rank, group->num_ranks);
    }
    return EPX_OK;
}
