/* SPDX-License-Identifier: MIT */
#include "net/ucx/ucx_library.h"

#include "core/env.h"

#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <string.h>

#define OLDEST_MAJOR 1
#define OLDEST_MINOR 13

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static epx__ucx_library_t library; /* once is_loaded */
static bool is_loaded;

/* Before 1.20 UCX takes over the signals of crashes as soon as it is loaded,
 * unless UCX_HANDLE_ERRORS says otherwise; a library may not. */
static void *
load_quietly(const char *name)
{
    struct sigaction before[NSIG];
    bool is_known[NSIG] = { false };
    bool is_wanted = epx__env_string("UCX_HANDLE_ERRORS") != NULL ||
                     epx__env_string("UCX_DEBUG_SIGNO") != NULL;
    void *handle;

    for (int number = 1; number < NSIG; number++) {
        is_known[number] = sigaction(number, NULL, &before[number]) == 0;
    }
    handle = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    for (int number = 1; number < NSIG && !is_wanted; number++) {
        struct sigaction now;

        if (is_known[number] && sigaction(number, NULL, &now) == 0 &&
            now.sa_sigaction != before[number].sa_sigaction) {
            (void)sigaction(number, &before[number], NULL);
        }
    }
    return handle;
}

static epx_status_t
find_functions(void *handle)
{
    const char *missing = NULL;
    unsigned major = 0, minor = 0, release = 0;

#define FIND(name)                                    \
    do {                                              \
        void *found = dlsym(handle, #name);           \
        memcpy(&library.name, &found, sizeof(found)); \
        missing = found == NULL ? #name : missing;    \
    } while (0);
    EPX__UCX_FUNCTIONS(FIND)
#undef FIND
    if (library.ucp_get_version != NULL) {
        library.ucp_get_version(&major, &minor, &release);
    }
    if (major != OLDEST_MAJOR || minor < OLDEST_MINOR) {
        return epx__fail(EPX_ERR_UNSUPPORTED,
                         "this machine has UCX %u.%u; other hosts are reached "
                         "with UCX %d.%d or a later 1.x",
                         major, minor, OLDEST_MAJOR, OLDEST_MINOR);
    }
    if (missing != NULL) {
        return epx__fail(EPX_ERR_UNSUPPORTED, "UCX %u.%u has no %s", major,
                         minor, missing);
    }
    return EPX_OK;
}

static epx_status_t
load(void)
{
    void *handle = load_quietly("libucp.so.0");
    epx_status_t status;

    if (handle == NULL) {
        return epx__fail(EPX_ERR_UNSUPPORTED,
                         "other hosts are reached with UCX %d.%d or later, "
                         "which cannot be loaded: %s",
                         OLDEST_MAJOR, OLDEST_MINOR, dlerror());
    }
    status = find_functions(handle);
    if (status != EPX_OK) {
        (void)dlclose(handle);
        return status;
    }
    /* What it has to say comes through statuses; others may not print. */
    if (epx__env_string("UCX_LOG_LEVEL") == NULL) {
        (void)library.ucs_global_opts_set_value("LOG_LEVEL", "fatal");
    }
    is_loaded = true;
    return EPX_OK;
}

epx_status_t
epx__ucx_library(const epx__ucx_library_t **library_p)
{
    epx_status_t status = EPX_OK;

    (void)pthread_mutex_lock(&lock);
    if (!is_loaded) {
        status = load();
    }
    (void)pthread_mutex_unlock(&lock);
    *library_p = &library;
    return status;
}

void
epx__ucx_expect_card(void)
{
    (void)pthread_mutex_lock(&lock);
    /* UCX notes what is allocated by hooks, which miss calls of a runtime that
     * is linked statically; so it is to ask the driver instead. */
    if (epx__env_string("UCX_MEMTYPE_CACHE") == NULL) {
        (void)library.ucs_global_opts_set_value("MEMTYPE_CACHE", "n");
    }
    (void)pthread_mutex_unlock(&lock);
}
