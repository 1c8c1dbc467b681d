/* SPDX-License-Identifier: MIT */
/*
 * The engines that are modules.  A module uses the core of the libepx.so that
 * loads it; beside libepx.a it would bring a second one, so there this file is
 * compiled without EPX__LOADS_MODULES.
 */
#include "engine/engine.h"

#ifdef EPX__LOADS_MODULES

#include <dlfcn.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define MODULE "libepx_cuda.so.0"

static const epx__engine_ops_t *module; /* NULL: reason tells why */
static char reason[400];
static pthread_once_t module_once = PTHREAD_ONCE_INIT;

/* Where the module would be beside libepx.so; false when that is not known. */
static bool
find_own_folder(char *path, size_t size)
{
    Dl_info own;
    const char *slash;

    if (dladdr(&module, &own) == 0 || own.dli_fname == NULL) {
        return false;
    }
    slash = strrchr(own.dli_fname, '/');
    return slash != NULL &&
           snprintf(path, size, "%.*s/" MODULE, (int)(slash - own.dli_fname),
                    own.dli_fname) < (int)size;
}

/* Beside libepx.so if it is there, else where the system looks. */
static void *
open_module(void)
{
    char path[PATH_MAX];
    bool is_there =
        find_own_folder(path, sizeof(path)) && access(path, F_OK) == 0;

    return dlopen(is_there ? path : MODULE, RTLD_NOW | RTLD_LOCAL);
}

static void
load_module(void)
{
    void *library = open_module();
    const epx__engine_ops_t *engine =
        library == NULL ? NULL : dlsym(library, "epx__engine_cuda");

    if (engine == NULL) {
        /* dlerror tells this thread alone, and just once. */
        (void)snprintf(reason, sizeof(reason),
                       "EPX_DEVICE_CUDA needs EPX's module for CUDA, which "
                       "cannot be loaded: %s",
                       dlerror());
    } else if (engine->abi != EPX__ENGINE_ABI) {
        (void)snprintf(reason, sizeof(reason),
                       "EPX_DEVICE_CUDA needs the " MODULE
                       " of this build: the one that was found has version %u "
                       "of the interface, and it must have %u",
                       engine->abi, EPX__ENGINE_ABI);
    } else {
        module = engine;
    }
}

const epx__engine_ops_t *
epx__engine_module(const char **why_p)
{
    (void)pthread_once(&module_once, load_module);
    *why_p = reason;
    return module;
}

#else

const epx__engine_ops_t *
epx__engine_module(const char **why_p)
{
    *why_p = "EPX_DEVICE_CUDA is served by the shared library: link libepx.so "
             "instead of libepx.a";
    return NULL;
}

#endif
