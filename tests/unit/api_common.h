/* SPDX-License-Identifier: MIT */
/* What the tests of the public interface share. */
#ifndef TESTS_UNIT_API_COMMON_H
#define TESTS_UNIT_API_COMMON_H

#include <epx/epx.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

/* Asserts that a call was refused with this status and a sentence that has the
 * word in it; the failure shows both. */
#define REFUSED(call, status, word) \
    api_refused((call), (status), (word), #call, __FILE__, __LINE__)

/* Asserts that a call went well; the failure shows its sentence. */
#define WORKS(call) api_works((call), #call, __FILE__, __LINE__)

static inline void
api_refused(epx_status_t got, epx_status_t want, const char *word,
            const char *call, const char *file, int line)
{
    if (got != want || strstr(epx_last_error(), word) == NULL) {
        print_error("%s:\n  expected status %d and a sentence with '%s'\n"
                    "  got      status %d and '%s'\n",
                    call, (int)want, word, (int)got, epx_last_error());
        _fail(file, line);
    }
}

static inline void
api_works(epx_status_t got, const char *call, const char *file, int line)
{
    if (got != EPX_OK) {
        print_error("%s: status %d: %s\n", call, (int)got, epx_last_error());
        _fail(file, line);
    }
}

/* A group of one rank. */
static inline epx_group_t *
api_group_of_one(uint64_t heap_bytes)
{
    epx_group_config_t config = EPX_GROUP_CONFIG_INIT;
    epx_bootstrap_t *bootstrap;
    epx_group_t *group;

    WORKS(epx_bootstrap_threads_create(1, &bootstrap));
    config.bootstrap = bootstrap;
    config.heap_bytes = heap_bytes;
    config.num_workers = 2;
    WORKS(epx_group_create(&config, &group));
    epx_bootstrap_destroy(bootstrap);
    return group;
}

/* A plan's arguments: 4 tokens, top-2 of 6 experts. */
enum { API_TOKENS = 4, API_TOPK = 2, API_EXPERTS = 6 };

static const int64_t api_topk_idx[API_TOKENS * API_TOPK] = { 0, 5, 1,  2,
                                                             3, 0, -1, 4 };

static inline epx_plan_args_t
api_plan_args(epx_layout_t layout)
{
    epx_plan_args_t args = EPX_PLAN_ARGS_INIT;

    args.layout = layout;
    args.num_experts = API_EXPERTS;
    args.topk = API_TOPK;
    args.idx_dtype = EPX_I64;
    args.num_tokens = API_TOKENS;
    args.topk_idx = api_topk_idx;
    args.max_tokens_per_rank = API_TOKENS;
    return args;
}

#endif
