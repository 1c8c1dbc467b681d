/* SPDX-License-Identifier: MIT */
/* What a test cannot do without, and skips where it is not. */
#ifndef EPX_TESTS_NET_NEEDS_H
#define EPX_TESTS_NET_NEEDS_H

#include <dlfcn.h>
#include <stdbool.h>
#include <stdio.h>
#include <sys/wait.h>
#include <unistd.h>

/* UCX is not loaded into this process, which is still to fork. */
static inline bool
has_ucx(void)
{
    int status = 1;
    pid_t pid = fork();

    if (pid == 0) {
#ifdef EPX_TEST_UCX
        _exit(dlopen("libucp.so.0", RTLD_NOW | RTLD_LOCAL) == NULL);
#else
        _exit(1);
#endif
    }
    if (waitpid(pid, &status, 0) != pid || status != 0) {
        fprintf(stderr, "SKIPPED: no UCX\n");
        return false;
    }
    return true;
}

#endif
