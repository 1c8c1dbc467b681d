/* SPDX-License-Identifier: MIT */
#ifndef EPX_CORE_THREAD_H
#define EPX_CORE_THREAD_H

#include <epx/epx.h>
#include <pthread.h>

/*
 * A thread of the library: every signal is blocked in it, so that signals go to
 * the threads of the program, which may wait for them.  `what` completes the
 * sentence "cannot start WHAT".
 */
epx_status_t epx__thread_start(pthread_t *id_p, void *(*main)(void *argument),
                               void *argument, const char *what);

#endif
