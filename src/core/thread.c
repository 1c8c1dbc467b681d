/* SPDX-License-Identifier: MIT */
#include "core/thread.h"

#include "core/status.h"

#include <signal.h>
#include <string.h>

epx_status_t
epx__thread_start(pthread_t *id_p, void *(*main)(void *argument),
                  void *argument, const char *what)
{
    sigset_t all, before;
    int error;

    /* A new thread inherits its creator's mask. */
    (void)sigfillset(&all);
    (void)pthread_sigmask(SIG_SETMASK, &all, &before);
    error = pthread_create(id_p, NULL, main, argument);
    (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    return error == 0 ? EPX_OK
                      : epx__fail(EPX_ERR_SYSTEM, "cannot start %s: %s", what,
                                  strerror(error));
}
