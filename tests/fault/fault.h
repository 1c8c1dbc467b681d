/* SPDX-License-Identifier: MIT */
/*
 * One round of the fault suite: some processes make a group and run layers in
 * it, one of them is killed or stopped, and the others must end as they ought
 * to, leave nothing behind, and make a new group: without it, with a fresh
 * process in its place, or with one more.  Or they mask it and go on in the
 * group that they have, while sometimes a second one is killed.
 */
#ifndef TESTS_FAULT_FAULT_H
#define TESTS_FAULT_FAULT_H

#include <epx/epx.h>
#include <stdbool.h>

enum { FAULT_MAX_RANKS = 5, FAULT_MAX_NEWCOMERS = 2 };

/* What ranks are.  A card is an emulated one, whose memory is the host's,
 * unless FAULT_ON_CARD says otherwise. */
#ifndef FAULT_ON_CARD
#define FAULT_ON_CARD 0
#endif
#ifdef EPX_TEST_CUDA
#define FAULT_DEVICE EPX_DEVICE_CUDA
#else
#define FAULT_DEVICE EPX_DEVICE_CPU
#endif

typedef enum fault_kind {
    FAULT_KILL,
    FAULT_STOP,          /* for good */
    FAULT_STOP_CONTINUE, /* until the others have given it up */
    FAULT_NUM_KINDS,
} fault_kind_t;

/* When it strikes. */
typedef enum fault_phase {
    FAULT_AT_START,  /* some time after the processes have started */
    FAULT_IN_GATHER, /* before or after an allgather of epx_group_create */
    FAULT_AT_POINT,  /* at a place in a layer */
    FAULT_AT_SIGNAL, /* right after a signal to a peer */
    FAULT_ANY_TIME,  /* while layers run */
    FAULT_IN_END,    /* while everything is destroyed */
    FAULT_NUM_PHASES,
} fault_phase_t;

/* Places in a layer. */
typedef enum fault_point {
    POINT_BEFORE_PLAN,
    POINT_BEFORE_COUNTS,
    POINT_BEFORE_DISPATCH,
    POINT_IN_DISPATCH_HOOK, /* sent, not complete */
    POINT_BETWEEN,
    POINT_IN_COMBINE_HOOK,
    POINT_AFTER_COMBINE,
    NUM_POINTS,
} fault_point_t;

/* What a rank reports. */
typedef struct fault_report {
    int64_t told_ns; /* when it learned of the fault; 0: it did not */
    int32_t num_layers;
    bool failed; /* the test, that is */
    char text[1024];
} fault_report_t;

/* In memory that all processes share. */
typedef struct fault_round {
    uint64_t seed;
    int32_t num_ranks;
    int32_t num_nodes; /* by which ranks are told apart, beyond 1 */
    int32_t victim;
    fault_kind_t kind;
    fault_phase_t phase;
    int32_t which; /* gather, point, or step, to count from 1 */
    int32_t layer; /* in which the point is */
    uint32_t delay_us;
    epx_layout_t layout;
    bool is_queued;
    bool is_split; /* EPX_SEND_ONLY */
    bool has_slots;
    bool routes_ride; /* EPX_NEW_ROUTING, from the second layer on */
    bool in_heap;     /* arrays */
    bool masks;       /* the survivors go on in their group */
    bool keeps_plan;
    int32_t second; /* who is killed a while after the victim; -1: nobody */
    uint32_t second_delay_us;
    int32_t num_newcomers; /* to the new group */
    int32_t hidden;
    uint16_t port;     /* where the group's ranks meet */
    uint16_t new_port; /* and those of the next group */
    uint64_t timeout_ns;
    int64_t bound_ns; /* from the fault to its report */

    int64_t struck_ns;     /* atomic; 0: not yet */
    int32_t num_told;      /* atomic: survivors that are done with the group */
    int32_t num_at_layers; /* atomic: ranks whose group is made */
    int32_t num_gone_on;   /* atomic: survivors that have begun an epoch */
    int32_t has_left[FAULT_MAX_RANKS]; /* atomic: is done with the group */
    /* Newcomers' come after those of all ranks. */
    fault_report_t reports[FAULT_MAX_RANKS + FAULT_MAX_NEWCOMERS];
} fault_round_t;

int64_t fault_now_ns(void);

/* ---- a bootstrap in shared memory that ranks may fail in ---- */

enum { FAULT_MEETING_BYTES = 1 << 14 };

/* Zeroed at first; not to be used again once a rank has failed in it. */
typedef struct fault_meeting {
    int32_t turns[FAULT_MAX_RANKS]; /* atomic: gathers that a rank came to */
    char data[2][FAULT_MAX_RANKS][FAULT_MEETING_BYTES];
} fault_meeting_t;

typedef struct fault_seat {
    fault_meeting_t *meeting;
    int32_t rank;
    int32_t num_ranks;
} fault_seat_t;

epx_bootstrap_t fault_bootstrap(fault_seat_t *seat);

/* ---- ranks ---- */

/* Whether more than half of the ranks are not struck. */
bool fault_most_remain(const fault_round_t *round);

/* The life of a rank, in a process of its own. */
void fault_rank_main(fault_round_t *round, int32_t rank);

/* The life of one who only joins the new group; `number` counts from num_ranks
 * on. */
void fault_newcomer_main(fault_round_t *round, int32_t number);

/* Notes what the test has against this rank; the first remark counts. */
void fault_complain(fault_round_t *round, int32_t rank, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* ---- layers (fault_layer.c) ---- */

typedef struct fault_layers fault_layers_t;

/* Makes what layers need; `at` is called at each point. */
fault_layers_t *fault_layers_open(fault_round_t *round, epx_group_t *group,
                                  void (*at)(void *context, int32_t layer,
                                             fault_point_t point),
                                  void *context);

/* Runs one layer; on success everything that it moved has been compared, and
 * *wrong_p is NULL or what was wrong. */
epx_status_t fault_layers_run(fault_layers_t *layers, int32_t layer,
                              const char **wrong_p);

/* Ranks have been masked: whose experts get nothing from now on. */
void fault_layers_mask(fault_layers_t *layers, const int32_t *masked);

/* Destroys the plan; whether the heap then is as it was before the first, or
 * the group has failed, whose blocks go with it. */
bool fault_layers_are_clean(fault_layers_t *layers);

void fault_layers_close(fault_layers_t *layers);

#endif
