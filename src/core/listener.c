/* SPDX-License-Identifier: MIT */
#include "core/listener.h"

#include "core/atomic.h"
#include "core/clock.h"
#include "core/thread.h"

#include <stdlib.h>

struct epx__listener {
    epx_group_t *group;
    pthread_t thread;
    uint32_t ends; /* atomic */
};

typedef struct epx__listener listener_t;

static void *
listener_main(void *argument)
{
    listener_t *listener = argument;
    epx_group_t *group = listener->group;
    uint32_t *bell = epx__group_bell(group);

    for (;;) {
        /* Read before looking: what is missed below rings after. */
        uint32_t count = epx__load_u32(bell);

        if (epx__load_u32(&listener->ends) != 0) {
            return NULL;
        }
        (void)epx__group_is_broken(group);
        epx__futex_wait(bell, count, EPX__NS_PER_SEC);
    }
}

epx_status_t
epx__listener_open(epx_group_t *group)
{
    listener_t *listener = calloc(1, sizeof(*listener));
    epx_status_t status;

    if (listener == NULL) {
        return epx__fail(EPX_ERR_NO_MEMORY, "no memory to listen to the peers");
    }
    listener->group = group;
    status = epx__thread_start(&listener->thread, listener_main, listener,
                               "the thread that listens to the peers");
    if (status != EPX_OK) {
        free(listener);
        return status;
    }
    group->listener = listener;
    return EPX_OK;
}

void
epx__listener_close(epx_group_t *group)
{
    listener_t *listener = group->listener;

    if (listener == NULL) {
        return;
    }
    epx__store_u32(&listener->ends, 1);
    epx__ring(&group->map, epx__group_control(group, group->rank));
    (void)pthread_join(listener->thread, NULL);
    free(listener);
    group->listener = NULL;
}
