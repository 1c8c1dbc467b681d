/* SPDX-License-Identifier: MIT */
#include "core/watch.h"

#include "core/atomic.h"
#include "core/clock.h"
#include "core/lost.h"
#include "core/mask.h"
#include "core/rank_list.h"
#include "core/thread.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

typedef enum fate {
    FATE_ALIVE = 0,
    FATE_LEFT,   /* destroyed its group */
    FATE_ENDED,  /* its process has */
    FATE_SILENT, /* for too long */
} fate_t;

typedef struct watched {
    int32_t rank;
    uint32_t fate; /* atomic fate_t */
    bool is_news;
    uint64_t beat;   /* the last that was heard */
    uint32_t missed; /* own beats since then */
} watched_t;

struct epx__watch {
    epx_group_t *group;
    pthread_t thread;
    bool has_thread;
    int stop_fd;
    int64_t beat_ns;
    int32_t num_peers;
    watched_t *peers;     /* [num_peers] */
    struct pollfd *polls; /* [num_peers + 1]: their pidfds, then stop_fd */
};

typedef struct epx__watch watch_t;

/* -1 where there are no pidfds, or the pid means nothing here: beats tell. */
static epx_status_t
open_pidfd(int32_t pid, int *fd_p)
{
    *fd_p = pid == 0 ? -1 : (int)syscall(SYS_pidfd_open, pid, 0);
    return *fd_p < 0 && (errno == EMFILE || errno == ENFILE || errno == ENOMEM)
               ? epx__fail(EPX_ERR_SYSTEM, "cannot watch process %d: %m", pid)
               : EPX_OK;
}

static void
close_fd(int *fd)
{
    if (*fd >= 0) {
        (void)close(*fd);
        *fd = -1;
    }
}

/* All segments are mapped: peers can be heard. */
static bool
is_joined(const watch_t *watch)
{
    return epx__load_u32(&watch->group->is_joined) != 0;
}

/* A peer has ended or fallen silent, unless it said goodbye before. */
static void
decide(watch_t *watch, int32_t i, fate_t fate)
{
    watched_t *peer = &watch->peers[i];
    bool has_left =
        is_joined(watch) && epx__lost_has_left(watch->group, peer->rank);

    epx__store_u32(&peer->fate, has_left ? FATE_LEFT : fate);
    peer->is_news = !has_left;
    if (has_left || fate != FATE_SILENT) {
        close_fd(&watch->polls[i].fd);
    }
}

/* A process has ended; if it was lost before, its memory is free only now. */
static void
end_peer(watch_t *watch, int32_t i)
{
    if (watch->peers[i].fate == FATE_SILENT) {
        epx__store_u32(&watch->peers[i].fate, FATE_ENDED);
        close_fd(&watch->polls[i].fd);
    } else {
        decide(watch, i, FATE_ENDED);
    }
    if (is_joined(watch)) {
        epx__mask_reclaim(watch->group);
    }
}

static void
listen_to(watch_t *watch, int32_t i)
{
    watched_t *peer = &watch->peers[i];
    const epx__vitals_t *vitals = epx__lost_vitals(watch->group, peer->rank);
    uint64_t beat = epx__load_acquire_u64(&vitals->beat);

    if (beat != peer->beat) {
        peer->beat = beat;
        peer->missed = 0;
    } else if (++peer->missed >= EPX__BEATS) {
        decide(watch, i, FATE_SILENT);
    }
}

static void
beat(watch_t *watch)
{
    epx__vitals_t *own = epx__lost_vitals(watch->group, watch->group->rank);

    epx__store_release_u64(&own->beat, own->beat + 1);
    for (int32_t i = 0; i < watch->num_peers && is_joined(watch); i++) {
        if (watch->peers[i].fate == FATE_ALIVE) {
            listen_to(watch, i);
        }
    }
}

/* Until the next beat is due or something happens; false when it is time to
 * stop. */
static bool
look(watch_t *watch, int64_t next_ns)
{
    int64_t left_ns = next_ns - epx__now_ns();
    struct timespec timeout = { 0 };

    if (left_ns > 0) {
        timeout.tv_sec = left_ns / EPX__NS_PER_SEC;
        timeout.tv_nsec = left_ns % EPX__NS_PER_SEC;
    }
    if (ppoll(watch->polls, (nfds_t)watch->num_peers + 1, &timeout, NULL) <=
        0) {
        return true;
    }
    for (int32_t i = 0; i < watch->num_peers; i++) {
        if (watch->polls[i].revents != 0) {
            end_peer(watch, i);
        }
    }
    return watch->polls[watch->num_peers].revents == 0;
}

typedef struct news {
    const watch_t *watch;
    fate_t fate;
} news_t;

static bool
is_in_news(const void *context, int32_t rank)
{
    const news_t *news = context;

    for (int32_t i = 0; i < news->watch->num_peers; i++) {
        const watched_t *peer = &news->watch->peers[i];

        if (peer->rank == rank && peer->fate == (uint32_t)news->fate) {
            return peer->is_news && !epx__is_masked(news->watch->group, rank);
        }
    }
    return false;
}

/* End the group for the peers that have just met this fate.  Should a new epoch
 * begin meanwhile, its beginner sees their fates afterwards. */
static void
report(watch_t *watch, fate_t fate)
{
    epx_group_t *group = watch->group;
    uint32_t epoch = epx__load_u32(&group->epoch);
    news_t news = { watch, fate };
    int32_t count = 0;
    epx__rank_list_t list;
    epx_status_t status;

    for (int32_t rank = 0; rank < group->num_ranks; rank++) {
        count += is_in_news(&news, rank);
    }
    if (count == 0) {
        return;
    }
    list = epx__rank_list_make(group->num_ranks, is_in_news, &news);
    if (fate == FATE_ENDED) {
        status = epx__fail(EPX_ERR_PEER_LOST, "%s %s ended", list.text,
                           count == 1 ? "is lost: its process"
                                      : "are lost: their processes");
    } else {
        status = epx__fail(EPX_ERR_PEER_LOST,
                           "%s %s lost: no sign of life for %.3f s", list.text,
                           count == 1 ? "is" : "are",
                           (double)group->lost_after_ns * 1e-9);
    }
    epx__group_end_epoch(group, epoch, status);
}

static void *
watch_main(void *argument)
{
    watch_t *watch = argument;
    int64_t next_ns = 0;

    while (look(watch, next_ns)) {
        if (epx__now_ns() >= next_ns) {
            beat(watch);
            /* Not next_ns + beat_ns: a thread that was held up must not take
             * its own delay for the silence of others. */
            next_ns = epx__now_ns() + watch->beat_ns;
        }
        report(watch, FATE_ENDED);
        report(watch, FATE_SILENT);
        for (int32_t i = 0; i < watch->num_peers; i++) {
            watch->peers[i].is_news = false;
        }
    }
    return NULL;
}

static epx_status_t
open_polls(watch_t *watch, const epx__watch_peer_t *peers)
{
    watch->stop_fd = eventfd(0, EFD_CLOEXEC);
    if (watch->stop_fd < 0) {
        return epx__fail(EPX_ERR_SYSTEM, "cannot make an eventfd: %m");
    }
    watch->polls[watch->num_peers] =
        (struct pollfd){ .fd = watch->stop_fd, .events = POLLIN };
    for (int32_t i = 0; i < watch->num_peers; i++) {
        epx_status_t status = open_pidfd(peers[i].pid, &watch->polls[i].fd);

        if (status != EPX_OK) {
            return status;
        }
        watch->polls[i].events = POLLIN;
        watch->peers[i].rank = peers[i].rank;
    }
    return EPX_OK;
}

epx_status_t
epx__watch_open(epx_group_t *group, const epx__watch_peer_t *peers,
                int32_t num_peers)
{
    watch_t *watch = calloc(1, sizeof(*watch));
    epx_status_t status;

    if (watch == NULL) {
        return epx__fail(EPX_ERR_NO_MEMORY, "no memory to watch the peers");
    }
    group->watch = watch;
    watch->group = group;
    watch->stop_fd = -1;
    watch->beat_ns = (int64_t)(group->lost_after_ns / EPX__BEATS);
    watch->peers = calloc((size_t)num_peers, sizeof(*watch->peers));
    watch->polls = calloc((size_t)num_peers + 1, sizeof(*watch->polls));
    if (watch->peers == NULL || watch->polls == NULL) {
        return epx__fail(EPX_ERR_NO_MEMORY, "no memory to watch the peers");
    }
    for (int32_t i = 0; i < num_peers; i++) {
        watch->polls[i].fd = -1;
    }
    watch->num_peers = num_peers;
    status = open_polls(watch, peers);
    if (status == EPX_OK) {
        status = epx__thread_start(&watch->thread, watch_main, watch,
                                   "the thread that watches the peers");
        watch->has_thread = status == EPX_OK;
    }
    return status;
}

static fate_t
fate_of(const epx_group_t *group, int32_t rank)
{
    const watch_t *watch = group->watch;

    for (int32_t i = 0; watch != NULL && i < watch->num_peers; i++) {
        if (watch->peers[i].rank == rank) {
            return (fate_t)epx__load_u32(&watch->peers[i].fate);
        }
    }
    return FATE_ALIVE;
}

bool
epx__watch_has_lost(const epx_group_t *group, int32_t rank)
{
    return fate_of(group, rank) != FATE_ALIVE;
}

bool
epx__watch_has_ended(const epx_group_t *group, int32_t rank)
{
    fate_t fate = fate_of(group, rank);

    return fate == FATE_ENDED || fate == FATE_LEFT;
}

void
epx__watch_close(epx_group_t *group)
{
    watch_t *watch = group->watch;

    if (watch == NULL) {
        return;
    }
    if (watch->has_thread) {
        (void)eventfd_write(watch->stop_fd, 1);
        (void)pthread_join(watch->thread, NULL);
    }
    for (int32_t i = 0; i < watch->num_peers; i++) {
        close_fd(&watch->polls[i].fd);
    }
    close_fd(&watch->stop_fd);
    free(watch->polls);
    free(watch->peers);
    free(watch);
    group->watch = NULL;
}
