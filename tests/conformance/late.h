/* SPDX-License-Identifier: MIT */
/*
 * A rank that comes late to an operation stands out in its peers' wait_ns.
 * When exactly the peers begin to wait is up to the system, so that a test says
 * more than that only by being late enough: it tries again, later each time.
 */
#ifndef TESTS_CONFORMANCE_LATE_H
#define TESTS_CONFORMANCE_LATE_H

#include "conformance/world.h"

enum {
    LATE_RANK = 1,
    LATE_BEFORE = 1000, /* in wait_ns to begin with */
};

typedef struct late_call {
    const char *name;
    /* One operation, to its end, right after late_nap(self, late_ms); then
     * wait_ns, [R], which held LATE_BEFORE.  False when it failed. */
    bool (*run)(world_rank_t *self, const struct late_call *call,
                int64_t late_ms, int64_t *wait_ns);
    void *context;
    uint32_t flags; /* of the operation */
    bool is_combine;
} late_call_t;

/* All ranks come here; the late one then sleeps. */
void late_nap(world_rank_t *self, int64_t late_ms);

/* Bytes that the ranks of a world must share, zeroed. */
#define LATE_SHARED_BYTES ((size_t)WORLD_MAX_RANKS)

/* Notes a failure when the late rank cannot be told from the others. */
void late_check(world_rank_t *self, const late_call_t *call);

#endif
