/* SPDX-License-Identifier: MIT */
#include "core/cores.h"

#include <sched.h>
#include <string.h>
#include <unistd.h>

epx__cores_t
epx__cores_get(void)
{
    epx__cores_t cores = { { 0 }, 1 };
    cpu_set_t set;

    _Static_assert(sizeof(set) == sizeof(cores.words), "1024 bits");
    if (sched_getaffinity(0, sizeof(set), &set) == 0) {
        memcpy(cores.words, &set, sizeof(set));
        cores.count = CPU_COUNT(&set);
    } else {
        long online = sysconf(_SC_NPROCESSORS_ONLN);

        cores.count = online > 1 ? (int32_t)online : 1;
    }
    return cores;
}

static bool
is_empty(const epx__cores_t *cores)
{
    for (int i = 0; i < 16; i++) {
        if (cores->words[i] != 0) {
            return false;
        }
    }
    return true;
}

bool
epx__cores_overlap(const epx__cores_t *a, const epx__cores_t *b)
{
    for (int i = 0; i < 16; i++) {
        if ((a->words[i] & b->words[i]) != 0) {
            return true;
        }
    }
    return is_empty(a) || is_empty(b);
}
